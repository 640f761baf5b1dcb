"""Commands of `python -m mutor`, or `mutor`: try, run, collect, plan, compare, methods, readme, stale, cleanup."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import yaml

from mutor.checks import described
from mutor.config.inputs import missing
from mutor.config.load import CODE, find_root, load_project, load_scale, load_table
from mutor.config.runs import make_spec, run_cells
from mutor.config.schema import Project
from mutor.files import check_writable, locked, remove_folder, sweep, write_text
from mutor.mtp.method import Method
from mutor.registry import METHODS, load
from mutor.results import provenance, records

TRY = "does multi-token prediction help your model on your data? Train, score and say so"


def main(arguments: list[str] | None = None) -> int:
    """Run a command; what the user got wrong is one line on stderr and exit status 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    args = _parser().parse_args(arguments)
    args.arguments = arguments
    keep_memory()
    try:
        root = find_root()
        project = load_project(root, {"scale": args.scale} if args.scale else None)
        given: dict[str, Any] = {name: getattr(args, name, None) for name in ("runs", "results", "artifacts", "seeds")}
        given = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items() if v}
        project = replace(project, **given)
        status = args.command(args, root, project) or 0
        sys.stdout.flush()
        return status
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader has seen enough, as `head` has; nothing may be flushed at the end either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        told = _of_a_file(error)
        if not told:
            raise
        print(f"error: {told}", file=sys.stderr)
        return 1


def keep_memory() -> None:
    """On glibc, freed memory of up to 1 GB stays with the process: each step of training asks for as much again.

    Given back to the system, it comes as new pages, which take 2 to 8% of a step on a CPU.
    """
    with contextlib.suppress(OSError, TypeError, AttributeError):  # another libc
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, the most that glibc takes: larger blocks are pages of their own
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


def _of_a_file(error: Exception) -> str:
    """What the system said of a file, in one line; empty for errors of another kind."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    # torch and safetensors have words of their own for a file that could not be written to its end
    full = any(
        words in str(error) for words in ("No space left", "PytorchStreamWriter", "inline_container", "iostream error")
    )
    return f"a file can't be written, no space is left: {str(error).splitlines()[0]}" if full else ""


def _parser() -> argparse.ArgumentParser:
    name = "mutor" if Path(sys.argv[0]).name == "mutor" else "python -m mutor"
    parser = argparse.ArgumentParser(prog=name, description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=function)
        sub.add_argument("--scale", help="a file of config/scales (default: config.yaml's)")
        sub.add_argument("--runs", help="folder of the runs (default: config.yaml's)")
        return sub

    one = command("run", run, "train and evaluate one setting, its seeds one after the other")
    one.add_argument("--data", required=True, help="a dataset of the scale")
    one.add_argument("--model", required=True, help="a model of the scale")
    one.add_argument(
        "--method", required=True, help="next_token, mutor, parallel_mtp, ...: `python -m mutor methods` lists them"
    )
    one.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of the method")
    one.add_argument("--budget-factor", type=float, default=1.0, help="times the recipe's steps or epochs")
    one.add_argument("--seeds", nargs="+", type=int, help="seeds (default: config.yaml's, or the scale's)")
    one.add_argument("--label", default="", help="printed in front of each line of progress")
    one.add_argument("--threads", type=int, help="CPU threads, shared by its processes (default: the scale's for each)")
    one.add_argument("--rerun-stale", action="store_true", help="run again what was made by older code")

    own = commands.add_parser("try", help=TRY, description=TRY)
    own.set_defaults(command=attempt, scale=None)
    own.add_argument("model", help="a causal LM: a folder, or a name on the Hugging Face hub")
    own.add_argument("train", help='JSONL to train on: {"prompt": ..., "answer": ...} or {"messages": [...]} a line')
    own.add_argument("test", help='the same, to score on; "gold": what is right, if not what extract finds')
    own.add_argument("--valid", help="the same, scored during training; the best checkpoint is kept, too")
    own.add_argument("--methods", nargs="+", help="methods to compare with next_token (default: those of tables/own)")
    own.add_argument("--seeds", nargs="+", type=int, help="seeds (default: those of scales/own)")
    own.add_argument("--extract", help="how an answer is found: whole, hashes, boxed, letter")
    own.add_argument("--compare", help="how it is compared: text, number, mathematics, rouge")
    own.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="other settings of scales/own")
    own.add_argument("--quick", action="store_true", help="only a short pass: whether it works, how long it will take")
    own.add_argument("--out", type=Path, default=Path("tries"), help="folder of all tries (default: tries)")

    draw = command("collect", collect, "build a table or figure from whatever runs exist")
    draw.add_argument("artifact", nargs="*", type=_artifact, help="table1 or results/table1.csv, ... (default: all)")
    draw.add_argument("--artifacts", nargs="+", help="what the report shows (default: all wanted)")
    draw.add_argument("--seeds", nargs="+", type=int, help="seeds that no run should lack (default: config.yaml's)")
    draw.add_argument("--results", help="folder of tables and figures (default: config.yaml's, or the scale's)")

    look = command("plan", plan, "runs to do, their time, disk and memory")
    look.add_argument("target", nargs="*", type=_artifact, help="table1 or results/table1.csv (default: config.yaml's)")

    two = command("compare", compare, "what differs between two runs: settings, makers, results")
    two.add_argument("one", type=Path, help="a metrics.json, its folder, or the folder of a setting with its seeds")
    two.add_argument("other", type=Path, help="the same")

    what = command("methods", methods, "every method with its settings, what it adds, what answers, its source")
    what.add_argument("name", nargs="*", help="some of them (default: all)")

    command("readme", readme, "write README.md's results from results/reference, and results/README.md")
    command("stale", stale, "list results older than the code they depend on")
    command("cleanup", cleanup, "delete a scale's checkpoints and models; metrics stay")
    return parser


def _artifact(given: str) -> str:
    """A table's or figure's name, of itself or of its file, as Snakemake takes it."""
    return Path(given).stem


def run(args: argparse.Namespace, root: Path, project: Project) -> None:
    """Train and evaluate one setting; start again under a launcher where its model takes several processes."""
    from mutor.training.devices import is_main, join_step, launch, leave, processes
    from mutor.training.run import RunEnvironment
    from mutor.training.run import run as run_setting

    scale, settings = load_scale(root, project.scale), _settings(args.set)
    spec = make_spec(scale, args.data, args.model, args.method, settings, project.seeds, args.budget_factor)
    runs = root / project.runs
    check_writable(runs, "runs")
    if not all(records.finished(runs, spec, seed) for seed in spec.seeds):
        for problem in missing([spec]):
            raise ValueError(problem)
    threads = max(1, args.threads // spec.processes) if args.threads else scale.threads
    join_step()
    if processes() not in (1, spec.processes):
        raise ValueError(f"{processes()} processes were started, but {spec.model} has {spec.processes} at this scale")
    if spec.processes > 1 and processes() == 1:
        launch(args.arguments, spec.processes, scale.device, threads)
    env = RunEnvironment(
        root=CODE,
        runs=runs,
        device=scale.device,
        threads=threads,
        label=args.label,
        rerun_stale=args.rerun_stale or project.rerun_stale,
    )
    with _had(f"config/scales/{scale.name}.yaml: models: {spec.model}: pretrained", spec.model_config.pretrained):
        run_setting(spec, spec.seeds, env)
    if is_main():
        seeds = f"seed{'s' * (len(spec.seeds) > 1)} {', '.join(map(str, spec.seeds))}"
        print(f"{args.label}finished: {_shown(runs / spec.path, root)}, {seeds}", flush=True)
    leave()


@contextlib.contextmanager
def _had(where: str, pretrained: str | None) -> Iterator[None]:
    """Inside, what a library says of a pretrained model that it can't find becomes one line."""
    try:
        yield
    except OSError as error:  # with a number it is of a file
        if error.errno is not None or pretrained is None:
            raise
        raise ValueError(
            f"{where}: {pretrained} can't be had ({str(error).splitlines()[0]}); allowed: a model of the hub, with a "
            "network, or a local folder"
        ) from error


def _settings(pairs: list[str]) -> dict[str, Any]:
    settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--set {pair!r}: expected KEY=VALUE")
        settings[key] = yaml.safe_load(value)
    return settings


def attempt(args: argparse.Namespace, root: Path, project: Project) -> int:
    """Find out whether methods help a user's own model on their own data; status 1 where one was refused."""
    from mutor.config.own import own_scale, own_table
    from mutor.trying import attempt as run_all

    files = {"train_file": args.train, "test_file": args.test} | ({"valid_file": args.valid} if args.valid else {})
    given = {name: getattr(args, name) for name in ("extract", "compare") if getattr(args, name)}
    scale = own_scale(root, args.model, files, {**given, **_settings(args.set)})
    if project.seeds:
        scale = replace(scale, seeds=project.seeds)
    with _had("MODEL", args.model):
        return int(bool(run_all(root, scale, own_table(root, args.methods), args.out, quick=args.quick)))


def collect(args: argparse.Namespace, root: Path, project: Project) -> None:
    """Build artifacts."""
    from mutor.results.cells import Evidence
    from mutor.results.report import collect_all

    scale, folder = load_scale(root, project.scale), root / project.results
    check_writable(folder, "results")
    evidence = Evidence(root, scale, records.Records(root / project.runs), project.seeds)
    wanted = list(project.artifacts or scale.artifacts)
    files, answers = collect_all(
        evidence, args.artifact or [*wanted, "claims", "verdict", "runs", "report"], wanted, folder
    )
    for file in files:
        print(_shown(file, root))
    _say_problems(evidence.runs)
    print("".join(f"\n{sentence}\n" for sentence in answers), end="")


def _say_problems(found: records.Records) -> None:
    for problem in found.problems:
        print(f"left out: {problem}", file=sys.stderr)


def _shown(file: Path, root: Path) -> Path:
    return file.relative_to(root) if file.is_relative_to(root) else file


def plan(args: argparse.Namespace, root: Path, project: Project) -> None:
    """Print what a target takes."""
    from mutor.results.plan import lines
    from mutor.results.sizes import sized

    scale = sized(load_scale(root, project.scale))
    chosen = [load_table(root, str(name)) for name in (args.target or project.artifacts or scale.artifacts)]
    here = records.Records(root / project.runs)
    elsewhere = records.Records(root / "results/reference" / scale.name / "runs")
    measured = here.of_scale(scale.name) or elsewhere.of_scale(scale.name)
    print("\n".join(lines(chosen, scale, here, measured, project.seeds)))
    for problem in missing(cell.spec for table in chosen for cell in run_cells(table, scale, project.seeds)):
        print(f"not ready: {problem}", file=sys.stderr)


def methods(args: argparse.Namespace, root: Path, project: Project) -> None:
    """Print what each method is, and its settings with their defaults and what is allowed."""
    for name in args.name or METHODS:
        method: type[Method] = load(METHODS, name, "method")
        lines = [("source", method.source), ("adds", method.adds), ("answers by", method.at_inference)]
        lines += [(f"{f.name}={f.default}", described(f)) for f in fields(method.Config)]
        print(f"{name}: {(method.__doc__ or '').splitlines()[0]}")
        print("".join(f"    {key:<27} {text}\n" for key, text in lines))


def compare(args: argparse.Namespace, root: Path, project: Project) -> None:
    """Print what differs between two runs."""
    from mutor.results.compare import lines

    print("\n".join(lines(args.one, args.other)))


def readme(args: argparse.Namespace, root: Path, project: Project) -> None:
    """Write the README's results, and what the columns of results are."""
    from mutor.results.readme import dictionary
    from mutor.results.readme import readme as written

    file = root / "README.md"
    write_text(file, written(root, file.read_text()))
    write_text(root / "results/README.md", dictionary())


def stale(args: argparse.Namespace, root: Path, project: Project) -> None:
    """Print runs made by older code, with the definitions that changed."""
    count, found = 0, records.Records(root / project.runs)
    for record in found.of_scale(project.scale):
        changed = provenance.changed_code(record, CODE)
        if changed:
            count += 1
            print(f"{_shown(record['file'], root)}: {', '.join(changed)}")
    _say_problems(found)
    print(
        f"{count} stale runs at scale {project.scale}"
        + ("; --config rerun_stale=true runs them again" if count else "")
    )


def cleanup(args: argparse.Namespace, root: Path, project: Project) -> None:
    """Delete checkpoints and models of a scale, but not of runs that are under way."""
    freed = 0
    for folder in sorted((root / project.runs / project.scale).glob("*/*/*/*/seed*")):
        try:
            with locked(folder / ".lock", wait=False):
                sweep(folder)
                for part in records.models(folder):
                    if part.name == "checkpoints" or (folder / "metrics.json").exists():
                        freed += sum(f.stat().st_size for f in part.rglob("*") if f.is_file())
                        remove_folder(part)
        except BlockingIOError:
            print(f"{_shown(folder, root)} is being run: left as it is")
    print(f"freed {freed / 1e6:.1f} MB at scale {project.scale}; metrics.json files are kept")
