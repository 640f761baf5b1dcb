"""One job trains and evaluates one setting, its seeds one after the other in one process; one measures costs.

The metrics.json of each seed are not declared outputs: Snakemake deletes those before a job starts and when it
fails, and nothing finished may be lost.
"""


rule train:
    input:
        base_index,
    output:
        f"{RUNS}/{{run}}/index.json",
    log:
        f"{RUNS}/{{run}}/run.log",
    benchmark:
        f"{RUNS}/{{run}}/benchmark.tsv"
    wildcard_constraints:
        run="|".join(map(re.escape, SPECS)) or "none",
    conda:
        "../../environment.yml"
    threads: lambda wildcards: SCALE.threads * SPECS[wildcards.run].processes
    resources:
        mem_mb=memory,
        runtime=SCALE.minutes,
        gpu=lambda wildcards: SCALE.gpus * SPECS[wildcards.run].processes,
        nodes=nodes,
        tasks=lambda wildcards: (
            SPECS[wildcards.run].processes if nodes(wildcards) > 1 else 1
        ),
        tasks_per_gpu=0,  # else SLURM starts the command once a GPU
        cpus_per_task=lambda wildcards: SCALE.threads if nodes(wildcards) > 1 else None,
        mpi=lambda wildcards: "srun" if nodes(wildcards) > 1 else None,
        label=label,  # no parameter: a run that is added changes all of them, and would start each finished one again
    params:
        launcher=launcher,
        python=PYTHON,
        arguments=run_arguments,
        config_hash=lambda wildcards: SPECS[wildcards.run].config_hash,
        code=code_state(),
    message:
        "Training {wildcards.run}"
    shell:
        "{params.launcher}{params.python:q} -m mutor run {params.arguments} --label {resources.label:q} --threads {threads} 2>&1 | tee -a {log:q}"


rule measure:
    output:
        touch(f"{RUNS}/{SCALE.name}/cost/{{artifact}}.done"),
    log:
        f"{RUNS}/{SCALE.name}/cost/{{artifact}}.log",
    wildcard_constraints:
        artifact="|".join(n for n, t in TABLES.items() if t.drawing.made_of == "costs")
        or "none",
    conda:
        "../../environment.yml"
    threads: workflow.resource_settings.cores or SCALE.threads  # nothing runs beside what is timed
    resources:
        mem_mb=SCALE.memory_mb,
        runtime=SCALE.minutes,
        gpu=SCALE.gpus,
    params:
        python=PYTHON,
        arguments=shlex.join(
            ["--scale", SCALE.name, "--runs", RUNS, "--threads", str(SCALE.threads)]
        ),
        state=lambda wildcards: table_state(wildcards.artifact),
    message:
        "Measuring {wildcards.artifact}"
    shell:
        "{params.python:q} benchmarks/cost.py --tables {wildcards.artifact:q} {params.arguments} 2>&1 | tee -a {log:q}"
