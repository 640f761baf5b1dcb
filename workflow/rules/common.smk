"""What the rules share: the checked configuration and the runs it asks for. No torch is imported here."""

import atexit
import fcntl
import hashlib
import math
import re
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(workflow.basedir)))

from mutor.config.inputs import missing
from mutor.config.load import load_project, load_scale, load_table, results_folder
from mutor.config.load import scale_names, table_names
from mutor.config.runs import run_cells, specs_of
from mutor.config.targets import check_target
from mutor.files import check_writable
from mutor.results.provenance import run_code
from mutor.results.records import drop_broken_index

ROOT = Path(workflow.basedir)
if re.search("[{}]", str(ROOT)):
    raise WorkflowError(
        f"{ROOT}: Snakemake can't work in a folder with braces in its name; rename it"
    )


def unlocked():
    """Remove the locks of a Snakemake that was killed here: one that lives holds the file that this returns."""
    folder = Path(".snakemake")
    folder.mkdir(exist_ok=True)
    handle = open(folder / "alive", "w")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    for lock in folder.glob("locks/*.lock"):
        print(f"{lock} was left by a Snakemake that is gone: removed", file=sys.stderr)
        lock.unlink()
    return handle


# held until this process ends; a job on another machine, which may not see that it is held, leaves all as it is
ALIVE = unlocked() if workflow.is_main_process else None
try:
    PROJECT = load_project(ROOT, config)
    SCALE = load_scale(ROOT, PROJECT.scale)
    TABLES = {name: load_table(ROOT, name) for name in table_names(ROOT)}
    CELLS = {
        name: run_cells(table, SCALE, PROJECT.seeds) for name, table in TABLES.items()
    }
except ValueError as error:
    sys.exit(f"error: {error}")

RUNS, RESULTS, PYTHON = PROJECT.runs, PROJECT.results, sys.executable
SPECS = {
    spec.path: spec for spec in specs_of([c for cells in CELLS.values() for c in cells])
}
for path in SPECS if workflow.is_main_process else ():
    broken = drop_broken_index(ROOT / RUNS / path)
    if broken:
        print(f"{RUNS}/{path}: {broken}; it is run again", file=sys.stderr)
ARTIFACTS = PROJECT.artifacts or SCALE.artifacts
WANTED = [spec.path for spec in specs_of([c for a in ARTIFACTS for c in CELLS[a]])]


def asked():
    """The targets on the command line: not known to a workflow while it is read."""
    if Path(sys.argv[0]).name not in ("snakemake", "__main__.py"):
        return []
    from snakemake.cli import get_argument_parser

    return get_argument_parser().parse_known_args(sys.argv[1:])[0].targets


def check_targets():
    """Stop for a target that is not made here, in one line; called when all rules are known."""
    homes = {name: results_folder(ROOT, name) for name in scale_names(ROOT)}
    rules = {rule.name: rule for rule in workflow.rules}
    files = [Path(file) for rule in rules.values() for file in rule.output]
    made = [file.name for file in files if file.parent == Path(RESULTS)]
    try:
        for target in asked():
            check_target(target, rules, made, PROJECT.scale, RESULTS, homes)
    except ValueError as error:
        sys.exit(f"error: {error}")


def not_ready():
    """What the jobs to do would stop at, a line each: folders to write to, files, models."""
    problems = []
    for key, folder in (("runs", RUNS), ("results", RESULTS)):
        try:
            check_writable(Path(folder), key)
        except ValueError as error:
            problems.append(str(error))
    jobs = workflow.dag.needrun_jobs(exclude_finished=False) if workflow.dag else []
    runs = [job.wildcards.run for job in jobs if job.rule.name == "train"]
    return problems + missing(SPECS[run] for run in runs)


def say_not_ready():
    """Behind all that a dry run prints."""
    for problem in not_ready():
        print(f"not ready: {problem}", file=sys.stderr)


def say_where():
    """What has been made, in one line."""
    made = [str(file) for job in workflow.dag.jobs for file in job.output]
    pages = [file for file in made if Path(file).parent == Path(RESULTS)]
    whole = [file for file in pages if file.endswith("report.html")]
    shown = whole or [file for file in pages if file.endswith((".md", "runs.csv"))]
    print(f"finished: {', '.join(shown or made)}", file=sys.stderr)


def index_files(artifact):
    """The runs, or the measurements, that an artifact is made of."""
    if TABLES[artifact].drawing.made_of == "costs":
        return [f"{RUNS}/{SCALE.name}/cost/{artifact}.done"]
    return [f"{RUNS}/{spec.path}/index.json" for spec in specs_of(CELLS[artifact])]


def artifact_files(artifacts):
    """One file of each artifact wanted; the others are made with it."""
    return [f"{RESULTS}/{name}.csv" for name in artifacts]


def base_index(wildcards):
    """The run that makes the base model, if there is one."""
    base = SPECS[wildcards.run].base
    return [f"{RUNS}/{base.path}/index.json"] if base else []


def nodes(wildcards):
    """How many nodes of a cluster a run is spread over."""
    processes = SPECS[wildcards.run].processes
    return math.ceil(processes / (PROJECT.processes_per_node or processes))


def memory(wildcards, attempt):
    """Memory of a run on each of its nodes; twice as much where it failed before."""
    here = math.ceil(SPECS[wildcards.run].processes / nodes(wildcards))
    return SCALE.memory_mb * here * min(attempt, 2)


def launcher(wildcards):
    """What starts a run that is spread over nodes, once for each process; its own launcher takes one node."""
    if nodes(wildcards) == 1:
        return ""
    words = ["srun", "--nodes", nodes(wildcards)]
    words += ["--ntasks", SPECS[wildcards.run].processes]
    words += ["--cpus-per-task", SCALE.threads, "--cpu-bind=none"]
    return shlex.join(map(str, [*words, "--kill-on-bad-exit=1"])) + " "


def label(wildcards):
    """What a run's lines begin with: which of all runs it is."""
    number = WANTED.index(wildcards.run) + 1 if wildcards.run in WANTED else 0
    return f"[{number}/{len(WANTED)}] "


def run_arguments(wildcards):
    """The command line that makes a run."""
    spec = SPECS[wildcards.run]
    words = ["--scale", spec.scale, "--data", spec.data, "--model", spec.model]
    words += ["--method", spec.method, "--seeds", *spec.seeds, "--runs", RUNS]
    if spec.settings:
        words += ["--set", *(f"{k}={v}" for k, v in spec.settings.items())]
    if spec.budget_factor != 1:
        words += ["--budget-factor", spec.budget_factor]
    if PROJECT.rerun_stale:
        words.append("--rerun-stale")
    return shlex.join(map(str, words))


def collect(name):
    """The command line that builds an artifact."""
    words = [PYTHON, "-m", "mutor", "collect", name, "--scale", PROJECT.scale]
    if PROJECT.artifacts:
        words += ["--artifacts", *ARTIFACTS]
    if PROJECT.seeds:
        words += ["--seeds", *PROJECT.seeds]
    return shlex.join(map(str, [*words, "--runs", RUNS, "--results", RESULTS]))


def say_answers():
    """Print what the artifacts answer, whose question is whether something helps."""
    asked = [name for name in ARTIFACTS if TABLES[name].drawing.answer]
    if not asked:
        return
    from mutor.results.cells import Evidence
    from mutor.results.records import Records
    from mutor.results.render import answer

    evidence = Evidence(ROOT, SCALE, Records(ROOT / RUNS), PROJECT.seeds)
    for name in asked:
        print("\n".join(answer(evidence, TABLES[name])), file=sys.stderr)


def code_state():
    """A token that changes with the code, only where runs made by older code are to be made again."""
    if not PROJECT.rerun_stale:
        return ""
    code = [sorted(run_code(ROOT, spec.as_dict()).items()) for spec in SPECS.values()]
    return hashlib.sha256(repr(code).encode()).hexdigest()[:12]


def table_state(artifact):
    """A token that changes when an artifact's cells do."""
    cells = [f"{c.spec.path} {c.spec.config_hash} {c.metric}" for c in CELLS[artifact]]
    text = "\n".join([repr(TABLES[artifact]), repr(SCALE.cost), *cells])
    return f"{PROJECT.scale} {hashlib.sha256(text.encode()).hexdigest()[:12]}"
