"""Tables and figures from finished runs."""


localrules:
    table,
    figure,
    sweep,
    runs_csv,


rule table:
    input:
        lambda wildcards: index_files(wildcards.artifact),
        reported="config/reported.csv",
    output:
        report(
            f"{RESULTS}/{{artifact}}.csv",
            caption="../report/artifact.rst",
            category="Tables",
        ),
        f"{RESULTS}/{{artifact}}.md",
        f"{RESULTS}/{{artifact}}.tex",
    log:
        f"{RUNS}/logs/{{artifact}}.log",
    wildcard_constraints:
        artifact="|".join(PLAIN) or "none",
    conda:
        "../../environment.yml"
    params:
        python=PYTHON,
        scale=PROJECT.scale,
        state=lambda wildcards: table_state(wildcards.artifact),
    message:
        "Collecting {wildcards.artifact}"
    shell:
        "{params.python} -m mutor collect {wildcards.artifact} --scale {params.scale} "
        f"--runs {RUNS} --results {RESULTS} > {{log:q}} 2>&1"


use rule table as figure with:
    output:
        report(
            f"{RESULTS}/{{artifact}}.csv",
            caption="../report/artifact.rst",
            category="Figures",
        ),
        f"{RESULTS}/{{artifact}}.md",
        f"{RESULTS}/{{artifact}}.tex",
        report(
            f"{RESULTS}/{{artifact}}.png",
            caption="../report/artifact.rst",
            category="Figures",
        ),
        f"{RESULTS}/{{artifact}}.svg",
        report(
            f"{RESULTS}/{{artifact}}_curves.png",
            caption="../report/artifact.rst",
            category="Figures",
        ),
        f"{RESULTS}/{{artifact}}_curves.svg",
    wildcard_constraints:
        artifact="|".join(FIGURES) or "none",


use rule table as sweep with:
    output:
        report(
            f"{RESULTS}/{{artifact}}.csv",
            caption="../report/artifact.rst",
            category="Figures",
        ),
        f"{RESULTS}/{{artifact}}.md",
        f"{RESULTS}/{{artifact}}.tex",
        report(
            f"{RESULTS}/{{artifact}}.png",
            caption="../report/artifact.rst",
            category="Figures",
        ),
        f"{RESULTS}/{{artifact}}.svg",
    wildcard_constraints:
        artifact="|".join(SWEEPS) or "none",


rule runs_csv:
    input:
        [f"{RUNS}/{path}/index.json" for path in WANTED],
    output:
        report(
            f"{RESULTS}/runs.csv",
            caption="../report/artifact.rst",
            category="Runs",
        ),
    log:
        f"{RUNS}/logs/runs_csv.log",
    conda:
        "../../environment.yml"
    params:
        python=PYTHON,
        scale=PROJECT.scale,
    message:
        "Collecting all runs"
    shell:
        "{params.python} -m mutor collect runs --scale {params.scale} "
        f"--runs {RUNS} --results {RESULTS} > {{log:q}} 2>&1"
