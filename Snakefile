# The whole benchmark: `snakemake --cores all`, one artifact: `snakemake results/figure4.csv`.
from snakemake.utils import min_version

min_version("9.0")


configfile: "config/config.yaml"


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/artifacts.smk"


rule all:
    default_target: True
    input:
        artifact_files(ARTIFACTS),
        f"{RESULTS}/runs.csv",
        f"{RESULTS}/claims.csv",
        f"{RESULTS}/verdict.md",
        f"{RESULTS}/report.html",


check_targets()
if workflow.output_settings.dryrun:
    atexit.register(say_not_ready)


onstart:
    for problem in not_ready():
        sys.exit(f"error: {problem}")


onsuccess:
    say_where()
    say_answers()
