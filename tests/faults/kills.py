"""Processes that are killed, and disks that are full: the same command goes on, to the same files."""

import os
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import forks
from trial import BASE_PATH, IMAGES, STAR, WALKS, Case, Trial, difference, fingerprint, outcomes

SEEDS = ("--seeds", "7")
WORKFLOW = ("--cores", "2", "--config", "scale=smoke", "seeds=[42]", "artifacts=[table1,table7]")
KILLS = 30
DISKS = 11


def at_every_operation(trial: Trial, folder: Path, processes: int) -> list[tuple[Case, str]]:
    """A run of star graphs, and one of images with their tokenizer and codes, killed everywhere."""
    cases = []
    for row, words in (("a run of star graphs", WALKS), ("a run of images", IMAGES)):
        points: list[str] = []
        whole = folder / f"whole {row}"
        done = trial.command("run", *words, *SEEDS, "--runs", whole, points=points)
        assert done.status == 0, done.said
        wanted = fingerprint(whole)

        def attempt(home: Path, number: int, words: tuple[str, ...] = words, wanted: dict = wanted) -> str:
            command = ("run", *words, *SEEDS, "--runs", home / "runs")
            killed = trial.command(*command, kill_at=number)
            if killed.status != -signal.SIGKILL:
                return f"was not killed, but ended with {killed.status}"
            done = trial.command(*command)
            if done.status or done.err:
                return f"ended with {done.status}: {done.err.strip()[-200:]}"
            return difference(fingerprint(home / "runs"), wanted)

        for number, point in enumerate(points, start=1):
            cases.append(
                Case(f"kill at a file operation of {row}", point, lambda home, n=number, go=attempt: go(home, n))
            )
    return outcomes(cases, folder, processes)


def on_full_disks(trial: Trial, folder: Path, processes: int) -> list[tuple[Case, str]]:
    """The run of star graphs on small disks, which grow afterwards; none where disks can't be mounted."""
    probe = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tempfile.mkdtemp(dir=folder)])
    if os.getuid() or probe.returncode:
        print("  left out: only root can mount disks")
        return []
    subprocess.run(["umount", *map(str, folder.glob("tmp*"))], check=True)
    whole = folder / "whole disk"
    trial.command("run", *STAR, *SEEDS, "--runs", whole)
    wanted, used = fingerprint(whole), sum(f.stat().st_size for f in whole.rglob("*") if f.is_file())

    def attempt(home: Path, size: int) -> str:
        disk = home / "disk"
        disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], check=True)
        try:
            command = ("run", *STAR, *SEEDS, "--runs", disk / "runs")
            full = trial.command(*command)
            lines = full.err.strip().splitlines()
            if full.status != 1 or len(lines) != 1 or "o space" not in lines[0]:
                return f"ended with {full.status} and said {full.err.strip()[-300:]!r}"
            subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
            done = trial.command(*command)
            if done.status or done.err:
                return f"once there is space: {done.status}, {done.err.strip()[-200:]}"
            return difference(fingerprint(disk / "runs"), wanted)
        finally:
            subprocess.run(["umount", str(disk)], check=True)

    sizes = [used * number // (DISKS + 1) // 4096 * 4096 for number in range(1, DISKS + 1)]
    cases = [Case("full disk", f"{size} bytes", lambda home, size=size: attempt(home, size)) for size in sizes]
    return outcomes(cases, folder, processes)


def of_the_workflow(trial: Trial, folder: Path, processes: int) -> list[tuple[Case, str]]:
    """Snakemake and all that it started, killed at random moments until it is done, by the same command each time."""
    random_times, found = random.Random(22), []
    row = "kill of the whole workflow (7 settings of texts and images, to tables, claims and report)"
    with forks.python(folder / "python") as executable:

        def start() -> subprocess.Popen:
            environment = {**os.environ, "PYTHONPATH": str(trial.folder), "OMP_NUM_THREADS": "1"}
            command = [executable, "-m", "snakemake", *WORKFLOW]
            with open(folder / "workflow.log", "w") as log:
                return subprocess.Popen(
                    command, cwd=trial.folder, env=environment, start_new_session=True, stdout=log, stderr=log
                )

        def emptied() -> tuple[Path, Path]:
            parts = (trial.folder / "runs", trial.folder / "results")
            for part in (*parts, trial.folder / ".snakemake"):
                shutil.rmtree(part, ignore_errors=True)
            return parts

        parts, began = emptied(), time.monotonic()
        assert start().wait() == 0, (folder / "workflow.log").read_text()
        seconds, wanted = time.monotonic() - began, fingerprint(*parts)
        print(f"  unbroken: {seconds:.0f} s", flush=True)
        while len(found) < KILLS:
            emptied()
            moments: list[str] = []
            while True:
                process = start()
                try:
                    code = process.wait(random_times.uniform(0.05, 0.4) * seconds)
                    break
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    moments.append(f"pass {len(found)}, kill {len(moments) + 1}")
                    time.sleep(0.2)  # who was started by it ends with it
            said = (folder / "workflow.log").read_text(errors="replace")
            wrong = f"ended with {code}: {said[-300:]}" if code else difference(fingerprint(*parts), wanted)
            found += [(Case(row, moment, lambda home: ""), wrong) for moment in moments]
            print(f"  {len(found)} kills; this pass: {wrong or 'the same'}", flush=True)
    return found


def stopped_before(trial: Trial, words: tuple[str, ...], seeds: tuple[str, ...], runs: Path, name: str) -> None:
    """Leave a run as a process killed before its last such operation leaves it; name: pattern of the file's end."""
    points: list[str] = []
    trial.command("run", *words, "--seeds", *seeds, "--runs", runs, points=points)
    shutil.rmtree(runs)
    ends = re.compile(f"{name}$")
    number = max(n for n, point in enumerate(points, start=1) if ends.search(point) and BASE_PATH not in point)
    done = trial.command("run", *words, "--seeds", *seeds, "--runs", runs, kill_at=number)
    assert done.status == -signal.SIGKILL, done.said
