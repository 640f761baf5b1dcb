"""Damaged files: named in one line, made again or left out, and nothing else stops or changes."""

import csv
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import forks
from kills import stopped_before
from trial import (
    BASE_PATH,
    IMAGES,
    OWN,
    STAR,
    STAR_PATH,
    Case,
    Trial,
    copied,
    difference,
    fingerprint,
    one_line,
    outcomes,
)

Harm = Callable[[Path], object]


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)


HARMS: dict[str, Harm] = {
    "cut": lambda file: os.truncate(file, file.stat().st_size // 2 - 3),  # not between two lines
    "bit flipped": _flip,
    "empty": lambda file: os.truncate(file, 0),
    "not UTF-8": lambda file: file.write_bytes(b"\xff" + file.read_bytes()),
    "another shape": lambda file: file.write_text("[1]\n"),
    "missing": lambda file: file.unlink(),
}
CUT, FLIP, EMPTY, CODED, SHAPE, GONE = HARMS
CHECKPOINT = {
    "model.safetensors": (CUT, FLIP, GONE),
    "optimizer.pt": (CUT, FLIP, EMPTY, GONE),
    "scheduler.pt": (FLIP, GONE),
    "rng_state.pth": (CUT, GONE),
    "trainer_state.json": (CUT, CODED, SHAPE, GONE),
    "training_args.bin": (FLIP,),
    "made_by.json": (FLIP, SHAPE),
    "config.json": (CODED,),
    "manifest.json": (EMPTY, SHAPE, GONE),
}
MODEL = {
    "last/model.safetensors": (CUT, FLIP, GONE),
    "last/config.json": (CODED, SHAPE),
    "last/training.json": (CUT, GONE),
    "last/manifest.json": (SHAPE, GONE),
    "last/method/weights.safetensors": (FLIP, GONE),
    "best/model.safetensors": (FLIP, EMPTY),
    "best/training.json": (FLIP, GONE),
}
ASSETS = {
    "train.npy": (CUT, FLIP, GONE),
    "test_labels.npy": (FLIP,),
    "real.npy": (EMPTY,),
    "classifier.pt": (CUT,),
    "tokenizer/diffusion_pytorch_model.safetensors": (FLIP,),
    "tokenizer/config.json": (CODED,),
    "assets.json": (SHAPE,),
    "manifest.json": (GONE,),
}
RECORD = (CUT, FLIP, EMPTY, CODED, SHAPE)
CONFIG = {
    "config/config.yaml": (CODED, SHAPE),
    "config/scales/smoke.yaml": (CODED, SHAPE, EMPTY, GONE),
    "config/tables/figure4.yaml": (CODED, SHAPE, EMPTY),
    "config/claims.yaml": (CODED, SHAPE, EMPTY, GONE),
    "config/reported.csv": (CUT, CODED, EMPTY, GONE),
}
DATA = {"data/train.jsonl": (CUT, CODED, SHAPE, EMPTY, GONE), "data/test.jsonl": (CUT, CODED, SHAPE, EMPTY, GONE)}
COST = (CUT, CODED, SHAPE, EMPTY)
SEED = ("--seeds", "7")


def files(trial: Trial, folder: Path, processes: int) -> list[tuple[Case, str]]:
    """Every damage above."""
    states = {name: folder / name for name in ("training", "unscored", "base", "images", "whole", "whole images")}
    stopped_before(trial, STAR, ("7",), states["training"], r"/\.last\.part")
    stopped_before(trial, STAR, ("7",), states["unscored"], r"/\.metrics\.json\.\d+\.tmp\.json")
    stopped_before(trial, STAR, ("7",), states["base"], r"/seed7")
    stopped_before(trial, IMAGES, ("7",), states["images"], r"/\.metrics\.json\.\d+\.tmp\.json")
    for name, words in (("whole", STAR), ("whole images", IMAGES)):
        assert trial.command("run", *words, *SEED, "--runs", states[name]).status == 0
    wanted, wanted_images = fingerprint(states["whole"]), fingerprint(states["whole images"])

    def again(state: str, where: str, words: tuple[str, ...] = STAR) -> Callable[..., Callable[[Path], str]]:
        aim = wanted_images if words is IMAGES else wanted
        return lambda name, harm: partial(
            _made_again, trial=trial, state=states[state], file=f"{where}/{name}", harm=harm, words=words, wanted=aim
        )

    (assets,) = (p.name for p in (states["images"] / "smoke/assets").iterdir() if p.is_dir())
    seed = f"{STAR_PATH}/seed7"
    cases = _cases("checkpoint", CHECKPOINT, again("training", f"{seed}/checkpoints/checkpoint-6"))
    cases += _cases("mark of an unfinished run", {"config_hash": (FLIP, EMPTY)}, again("training", seed))
    cases += _cases("trained model", MODEL, again("unscored", seed))
    cases += _cases("base model", {"last/model.safetensors": (FLIP, GONE)}, again("base", f"{BASE_PATH}/seed7"))
    cases += _cases(
        "record of a base model", {"metrics.json": (CUT, EMPTY, CODED, SHAPE)}, again("base", f"{BASE_PATH}/seed7")
    )
    cases += _cases("record", {"metrics.json": RECORD}, again("whole", seed))
    cases += _cases("what runs on images share", ASSETS, again("images", f"smoke/assets/{assets}", IMAGES))
    for told, names, words in (
        ("configuration", CONFIG, ("collect", "figure4", "claims")),
        ("a user's data", DATA, ("run", *OWN, *SEED)),
    ):
        cases += _cases(
            told,
            names,
            lambda name, harm, words=words: partial(_refused, trial=trial, file=name, harm=harm, words=words),
        )
    return outcomes(cases, folder, processes) + shown(trial, folder, processes)


def shown(trial: Trial, folder: Path, processes: int) -> list[tuple[Case, str]]:
    """Damage to what tables and the workflow read: records, measurements, indexes."""
    runs, tables = folder / "shown", folder / "tables"
    assert trial.command("run", *STAR, "--seeds", "7", "8", "--runs", runs).status == 0
    script = [sys.executable, "benchmarks/cost.py", "--tables", "rebuttal_latency", "--scale", "smoke"]
    environment = {**os.environ, "PYTHONPATH": str(trial.folder)}
    command = [*script, "--runs", str(runs), "--threads", "1"]
    subprocess.run(command, cwd=trial.folder, env=environment, check=True, capture_output=True)
    assert trial.command("collect", "figure4", "rebuttal_latency", "--runs", runs, "--results", tables).status == 0

    def left_out(name: str, harm: str) -> Callable[[Path], str]:
        return partial(_left_out, trial=trial, runs=runs, tables=tables, file=name, harm=harm)

    cases = _cases("record, in tables", {f"{STAR_PATH}/seed7/metrics.json": RECORD}, left_out)
    cases += _cases("measurements, in tables", {"smoke/cost/rebuttal_latency.json": COST}, left_out)
    found = outcomes(cases, folder, processes)
    with forks.python(folder / "python") as executable:

        def planned(name: str, harm: str) -> Callable[[Path], str]:
            return partial(_planned, trial=trial, runs=runs, file=name, harm=harm, executable=executable)

        names = {f"{STAR_PATH}/index.json": (CUT, SHAPE, EMPTY, CODED), f"{STAR_PATH}/seed7/metrics.json": (CUT, GONE)}
        return found + outcomes(_cases("file that the workflow waits for", names, planned), folder, processes)


def _cases(
    row: str, names: dict[str, tuple[str, ...]], attempt: Callable[[str, str], Callable[[Path], str]]
) -> list[Case]:
    return [
        Case(f"{row}: {Path(name).name} ({', '.join(harms)})", harm, attempt(name, harm))
        for name, harms in names.items()
        for harm in harms
    ]


def _made_again(
    home: Path, *, trial: Trial, state: Path, file: str, harm: str, words: tuple[str, ...], wanted: dict
) -> str:
    """The run goes on, names the file, and ends as an unbroken one."""
    runs = copied(state, home / "runs")
    HARMS[harm](runs / file)
    done = trial.command("run", *words, *SEED, "--runs", runs)
    if done.status or done.err:
        return f"ended with {done.status}: {done.err.strip()[-200:]}"
    if Path(file).name not in done.out:
        return "not named"
    ours = {name: what for name, what in fingerprint(runs).items() if "metrics.superseded-" not in name}
    return one_line(done) or difference(ours, wanted)


def _refused(home: Path, *, trial: Trial, file: str, harm: str, words: tuple[str, ...]) -> str:
    """The command ends at once, with one line that names the file."""
    project = trial.config(home / "project")
    HARMS[harm](project / file)
    done = trial.command(*words, "--runs", home / "runs", home=project)
    if done.status != 2 or not done.err.startswith("error: "):
        return f"ended with {done.status}: {done.err.strip()[-200:]}"
    if Path(file).stem not in done.err:
        return f"not named: {done.err.strip()[:200]}"
    return one_line(done) or ("something was run" if list(home.glob("runs/**/metrics.json")) else "")


def _left_out(home: Path, *, trial: Trial, runs: Path, tables: Path, file: str, harm: str) -> str:
    """One line names the file; the cells that it had are without it, all others as before."""
    runs = copied(runs, home / "runs")
    HARMS[harm](runs / file)
    done = trial.command(
        "collect", "rebuttal_latency", "figure4", "--runs", runs, "--results", home / "tables", home=trial.folder
    )
    if done.status:
        return f"ended with {done.status}: {done.err.strip()[-200:]}"
    if not re.fullmatch(rf"left out: .*{re.escape(file)}: .*\n", done.err):
        return f"said {done.err.strip()[:200]!r}"
    for table in ("figure4", "rebuttal_latency"):
        rows, before = (list(csv.DictReader(open(part / f"{table}.csv"))) for part in (home / "tables", tables))
        for row, was in zip(rows, before, strict=True):
            mine = was["method"] == "mutor" and was["n_seeds"] == "2" if "metrics" in file else table != "figure4"
            if row["n_seeds"] == was["n_seeds"] if mine else row != was:
                return f"{table}: {row['method']} {row['metric']}: {row['n_seeds']} of {was['n_seeds']}"
    return ""


def _planned(home: Path, *, trial: Trial, runs: Path, file: str, harm: str, executable: str) -> str:
    """Snakemake names it and would run the setting again."""
    runs = copied(runs, home / "runs")
    HARMS[harm](runs / file)
    target, changes = f"{runs}/{STAR_PATH}/index.json", ["scale=smoke", "seeds=[7,8]", f"runs={runs}"]
    done = subprocess.run(
        [executable, "-m", "snakemake", "-n", "--nolock", target, "--config", *changes],
        cwd=trial.folder, env={**os.environ, "PYTHONPATH": str(trial.folder)}, capture_output=True, text=True,
    )  # fmt: skip
    said = done.stdout + done.stderr
    if done.returncode or "Traceback" in said:
        return f"ended with {done.returncode}: {said.strip()[-200:]}"
    named = [line for line in done.stderr.splitlines() if Path(file).name in line and "run again" in line]
    return "" if len(named) == 1 and f"Training {STAR_PATH}" in said else "not named, or not run again"
