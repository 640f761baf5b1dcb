"""Tables and figures from finished runs."""


localrules:
    runs_csv,
    claims,
    verdict,
    report_html,


for artifact, table in TABLES.items():

    rule:
        name:
            artifact
        input:
            index_files(artifact),
            reported="config/reported.csv",
        output:
            report(
                f"{RESULTS}/{artifact}.csv",
                caption="../report/artifact.rst",
                category="Figures" if table.drawing.figures else "Tables",
            ),
            f"{RESULTS}/{artifact}.md",
            f"{RESULTS}/{artifact}.tex",
            [
                report(
                    f"{RESULTS}/{artifact}{suffix}",
                    caption="../report/artifact.rst",
                    category="Figures",
                )
                for suffix in table.drawing.suffixes
            ],
        log:
            f"{RUNS}/logs/{artifact}.log",
        localrule: True
        conda:
            "../../environment.yml"
        params:
            command=collect(artifact),
            state=table_state(artifact),
        message:
            f"Collecting {artifact}"
        shell:
            "{params.command} > {log:q} 2>&1"


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
        f"{RUNS}/logs/runs.log",
    conda:
        "../../environment.yml"
    params:
        command=lambda wildcards: collect("runs"),
    message:
        "Collecting all runs"
    shell:
        "{params.command} > {log:q} 2>&1"


rule claims:
    input:
        [f"{RUNS}/{path}/index.json" for path in WANTED],
        claims="config/claims.yaml",
        reported="config/reported.csv",
    output:
        report(
            f"{RESULTS}/claims.csv",
            caption="../report/artifact.rst",
            category="Claims",
        ),
    log:
        f"{RUNS}/logs/claims.log",
    conda:
        "../../environment.yml"
    params:
        command=lambda wildcards: collect("claims"),
        state=[table_state(artifact) for artifact in ARTIFACTS],
    message:
        "Holding the claims against the runs"
    shell:
        "{params.command} > {log:q} 2>&1"


rule verdict:
    input:
        artifact_files(ARTIFACTS),
        claims="config/claims.yaml",
        reported="config/reported.csv",
    output:
        f"{RESULTS}/verdict.md",
        report(
            f"{RESULTS}/verdict.png",
            caption="../report/artifact.rst",
            category="Claims",
        ),
        f"{RESULTS}/verdict.svg",
    log:
        f"{RUNS}/logs/verdict.log",
    conda:
        "../../environment.yml"
    params:
        command=lambda wildcards: collect("verdict"),
        state=[table_state(artifact) for artifact in ARTIFACTS],
    message:
        "Answering three questions"
    shell:
        "{params.command} > {log:q} 2>&1"


rule report_html:
    input:
        artifact_files(ARTIFACTS),
        f"{RESULTS}/verdict.md",
        claims="config/claims.yaml",
        reported="config/reported.csv",
    output:
        f"{RESULTS}/report.html",
    log:
        f"{RUNS}/logs/report.log",
    conda:
        "../../environment.yml"
    params:
        command=lambda wildcards: collect("report"),
        state=[table_state(artifact) for artifact in ARTIFACTS],
    message:
        "Writing the report"
    shell:
        "{params.command} > {log:q} 2>&1"
