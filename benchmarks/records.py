"""What many records cost: processor time and memory of plan, stale, collect and report.

    python benchmarks/records.py [--count 5000] [--folder FOLDER]

The committed records of the laptop scale are copied, each under further seeds, until there are `count` of them. Each
command is a process of its own; what is printed is its processor time, its peak memory and the size of the report.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from itertools import count
from pathlib import Path

ROOT = Path(__file__).parent.parent
COMMANDS = {
    "plan": ["plan"],
    "stale": ["stale"],
    "collect": ["collect"],
    "collect claims": ["collect", "claims"],
    "collect report": ["collect", "report"],
}


def copies(folder: Path, wanted: int) -> None:
    """Write so many records below folder/laptop: the committed ones, then each again as another seed."""
    known = sorted((ROOT / "results/reference/laptop/runs/laptop").glob("*/*/*/*/seed*/metrics.json"))
    written = 0
    for turn in count():
        for file in known:
            if written == wanted:
                return
            record = json.loads(file.read_text())
            record["seed"] += 1000 * turn
            place = folder / "laptop" / "/".join(file.parts[-6:-2]) / f"seed{record['seed']}/metrics.json"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(json.dumps(record, indent=1))
            written += 1


def measured(arguments: list[str]) -> tuple[float, float]:
    """Seconds of processor time and MB at most of `python -m mutor` with these arguments."""
    with open(os.devnull, "w") as away:
        child = subprocess.Popen([sys.executable, "-m", "mutor", *arguments], cwd=ROOT, stdout=away, stderr=away)
        _, status, used = os.wait4(child.pid, 0)
    if status:
        sys.exit(f"python -m mutor {' '.join(arguments)}: ended with {status}")
    return used.ru_utime + used.ru_stime, used.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--folder", type=Path, help="where the records are, or will be (default: a temporary one)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if not (folder / "runs/laptop").exists():
            copies(folder / "runs", args.count)
        for name, command in COMMANDS.items():
            options = ["--scale", "laptop", "--runs", str(folder / "runs")]
            options += ["--results", str(folder / "results")] if command[0] == "collect" else []
            seconds, megabytes = measured([*command, *options])
            print(f"{name:<16} {seconds:6.1f} s {megabytes:6.0f} MB", flush=True)
        print(f"report.html      {(folder / 'results/report.html').stat().st_size / 1e6:6.1f} MB")


if __name__ == "__main__":
    main()
