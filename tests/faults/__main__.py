"""Fault campaign (`make faults`): kills, full disks, damaged files, bad records and configurations, a SLURM cluster.

PYTHONPATH=tests python tests/faults [PART ...]

Parts: kills, disks, workflow, files, records, configurations, cluster

Each fault has to end as if nothing had happened, or in one line that names the file and what is wrong with it; never
in a traceback, never in another result without a word. Each part writes its section of results/reference/faults.md;
the others stay. Fails where one fault did not end so. About half an hour on two cores.
"""

import contextlib
import gc
import importlib
import io
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import cluster
import damages
import forks
import kills
import mistakes
from trial import IMAGES, OWN, ROOT, STAR, Case, Trial

TABLE = ROOT / "results/reference/faults.md"
HEAD = """# Faults, and what they do

`make faults` makes them, each in a project of its own, and writes this. A run that was killed goes on by the same
command; numbers of records, predictions and weights are compared with those of an unbroken one, all but times. What is
damaged or wrong has to be named in one line, and stop nothing else. Not noticed, and not tried here, is a bit flipped
in a part of a record that no other part repeats, such as its device.
"""
PARTS: dict[str, tuple[str, Callable[[Trial, Path, int], list[tuple[Case, str]]]]] = {
    "kills": ("Kills at file operations", kills.at_every_operation),
    "disks": ("Full disks", kills.on_full_disks),
    "workflow": ("Kills of the workflow", kills.of_the_workflow),
    "files": ("Damaged files", damages.files),
    "records": ("Bad records", mistakes.records),
    "configurations": ("Bad configurations", mistakes.configurations),
    "cluster": ("SLURM", cluster.faults),
}


def main(names: list[str]) -> int:
    unknown = set(names) - set(PARTS)
    if unknown:
        print(f"error: {', '.join(unknown)}: no such part; allowed: {', '.join(PARTS)}", file=sys.stderr)
        return 2
    processes, bad = max(1, len(os.sched_getaffinity(0))), 0
    with tempfile.TemporaryDirectory(prefix="mutor-faults-") as home:
        trial = Trial(Path(home) / "project")
        warm(trial, Path(home) / "warm")
        for name in names or PARTS:
            title, part = PARTS[name]
            print(f"{title} ...", flush=True)
            began, folder = time.monotonic(), Path(home) / name
            folder.mkdir()
            found = part(trial, folder, processes)
            seconds = time.monotonic() - began
            wrong = sum(1 for _, what in found if what)
            print(f"{title}: {len(found) - wrong} of {len(found)} as wanted, {seconds:.0f} s", flush=True)
            bad += wrong
            if found:
                write(title, section(found, seconds))
    return int(bad > 0)


def warm(trial: Trial, runs: Path) -> None:
    """Import in this process, from which all others are forked, what they need, and do once what they do."""
    import torch

    torch.set_num_threads(1)
    for name in forks.PACKAGES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    from mutor.cli import main as command

    os.chdir(trial.folder)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        for words in (STAR, IMAGES, OWN):
            command(["run", "--scale", "smoke", *words, "--seeds", "7", "--runs", str(runs)])
        command(["collect", "--scale", "smoke", "--runs", str(runs), "--results", str(runs / "results")])
    gc.collect()
    gc.freeze()


def section(found: list[tuple[Case, str]], seconds: float) -> str:
    """What a part says: when, by what, a row for each kind of fault, and what was not as wanted."""
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True)
    lines = [
        f"{datetime.now(UTC):%Y-%m-%d}, commit {commit.stdout.strip() or 'unknown'}, Python "
        f"{platform.python_version()}, {seconds / 60:.0f} minutes on {len(os.sched_getaffinity(0))} cores.",
        "",
        "| fault | tried | as wanted |",
        "|---|---|---|",
    ]
    for row in dict.fromkeys(case.row for case, _ in found):
        mine = [wrong for case, wrong in found if case.row == row]
        lines.append(f"| {row} | {len(mine)} | {sum(1 for wrong in mine if not wrong)} |")
    wrong = [f"- {case.row}, {case.name}: {what}" for case, what in found if what]
    return "\n".join(lines + (["", "Not as wanted:", "", *wrong] if wrong else [])) + "\n"


def write(title: str, text: str) -> None:
    """Replace a section of the table; the order is that of PARTS."""
    old = TABLE.read_text() if TABLE.exists() else ""
    parts = re.split(r"^## (.+)\n", old, flags=re.M)[1:]
    sections = dict(zip(parts[::2], parts[1::2], strict=True)) | {title: text}
    order = [name for name, _ in PARTS.values() if name in sections]
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    TABLE.write_text("\n".join([HEAD, *(f"## {name}\n\n{sections[name].strip()}\n" for name in order)]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
