"""Commands of `python -m mutor`: run, collect, plan, compare, methods, readme, stale, cleanup."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import yaml

from mutor.checks import described
from mutor.config.load import find_root, load_project, load_scale, load_table
from mutor.config.runs import make_spec
from mutor.config.schema import Project
from mutor.files import locked, remove_folder, sweep, write_text
from mutor.mtp.method import Method
from mutor.registry import METHODS, load
from mutor.results import provenance, records


def main(arguments: list[str] | None = None) -> int:
    """Run a command; what the user got wrong is one line on stderr and exit status 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    args = _parser().parse_args(arguments)
    args.arguments = arguments
    try:
        root = find_root()
        project = load_project(root, {"scale": args.scale} if args.scale else None)
        given: dict[str, Any] = {name: getattr(args, name, None) for name in ("runs", "results", "artifacts", "seeds")}
        given = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items() if v}
        project = replace(project, **given)
        return args.command(args, root, project) or 0
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        told = _of_a_file(error)
        if not told:
            raise
        print(f"error: {told}", file=sys.stderr)
        return 1


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
    parser = argparse.ArgumentParser(prog="python -m mutor", description=__doc__)
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

    draw = command("collect", collect, "build a table or figure from whatever runs exist")
    draw.add_argument("artifact", nargs="*", help="files of config/tables, claims, runs, report (default: all)")
    draw.add_argument("--artifacts", nargs="+", help="what the report shows (default: all wanted)")
    draw.add_argument("--seeds", nargs="+", type=int, help="seeds that no run should lack (default: config.yaml's)")
    draw.add_argument("--results", help="folder of tables and figures (default: config.yaml's)")

    look = command("plan", plan, "runs to do, their time, disk and memory")
    look.add_argument("target", nargs="*", help="tables and figures (default: config.yaml's)")

    two = command("compare", compare, "what differs between two runs: settings, makers, results")
    two.add_argument("one", type=Path, help="a metrics.json, its folder, or the folder of a setting with its seeds")
    two.add_argument("other", type=Path, help="the same")

    what = command("methods", methods, "every method with its settings, what it adds, what answers, its source")
    what.add_argument("name", nargs="*", help="some of them (default: all)")

    command("readme", readme, "write README.md's results from results/reference")
    command("stale", stale, "list results older than the code they depend on")
    command("cleanup", cleanup, "delete a scale's checkpoints and models; metrics stay")
    return parser


def run(args: argparse.Namespace, root: Path, project: Project) -> None:
    """Train and evaluate one setting; start again under a launcher where its model takes several processes."""
    from mutor.training.devices import join_step, launch, leave, processes
    from mutor.training.run import RunEnvironment
    from mutor.training.run import run as run_setting

    scale = load_scale(root, project.scale)
    settings = {}
    for pair in args.set:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--set {pair!r}: expected KEY=VALUE")
        settings[key] = yaml.safe_load(value)
    spec = make_spec(scale, args.data, args.model, args.method, settings, project.seeds, args.budget_factor)
    threads = max(1, args.threads // spec.processes) if args.threads else scale.threads
    join_step()
    if processes() not in (1, spec.processes):
        raise ValueError(f"{processes()} processes were started, but {spec.model} has {spec.processes} at this scale")
    if spec.processes > 1 and processes() == 1:
        launch(args.arguments, spec.processes, scale.device, threads)
    env = RunEnvironment(
        root=root,
        runs=root / project.runs,
        device=scale.device,
        threads=threads,
        label=args.label,
        rerun_stale=args.rerun_stale or project.rerun_stale,
    )
    run_setting(spec, spec.seeds, env)
    leave()


def collect(args: argparse.Namespace, root: Path, project: Project) -> None:
    """Build artifacts."""
    from mutor.results.cells import Evidence
    from mutor.results.claims import collect_claims
    from mutor.results.drawings import collect_artifact, collect_runs
    from mutor.results.report import collect_report

    scale, folder = load_scale(root, project.scale), root / project.results
    evidence = Evidence(root, scale, records.Records(root / project.runs), project.seeds)
    wanted = list(project.artifacts or scale.artifacts)
    for name in args.artifact or [*wanted, "claims", "runs", "report"]:
        if name == "runs":
            files = collect_runs(evidence, folder)
        elif name == "claims":
            files = collect_claims(evidence, folder)
        elif name == "report":
            files = collect_report(evidence, wanted, folder)
        else:
            files = collect_artifact(evidence, evidence.table(name), folder)
        for file in files:
            print(_shown(file, root))
    _say_problems(evidence.runs)


def _say_problems(found: records.Records) -> None:
    for problem in found.problems:
        print(f"left out: {problem}", file=sys.stderr)


def _shown(file: Path, root: Path) -> Path:
    return file.relative_to(root) if file.is_relative_to(root) else file


def plan(args: argparse.Namespace, root: Path, project: Project) -> None:
    """Print what a target takes."""
    from mutor.results.plan import lines

    scale = load_scale(root, project.scale)
    chosen = [load_table(root, str(name)) for name in (args.target or project.artifacts or scale.artifacts)]
    print("\n".join(lines(chosen, scale, root / project.runs, root / "results/reference", project.seeds)))


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
    """Write the README's results."""
    from mutor.results.readme import readme as written

    file = root / "README.md"
    write_text(file, written(root, file.read_text()))


def stale(args: argparse.Namespace, root: Path, project: Project) -> None:
    """Print runs made by older code, with the definitions that changed."""
    count, found = 0, records.Records(root / project.runs)
    for record in found.of_scale(project.scale):
        changed = provenance.changed_code(record, root)
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
