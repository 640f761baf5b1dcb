"""A small project to harm: its folder, its commands in forked processes, and what is compared afterwards.

trial = Trial(folder)                                    # a copy of the project, its smoke scale made smaller
trial.command("run", *STAR, "--runs", runs, kill_at=17)  # `python -m mutor run ...`, killed at its 17th file operation
same(fingerprint(runs), wanted)
"""

import contextlib
import csv
import hashlib
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
PARTS = ("Snakefile", "workflow", "config", "profiles", "mutor", "baselines", "benchmarks", "environment.yml")
TIMES = (
    "seconds",
    "started",
    "finished",
    "memory",
    "speedup",
    "resumed",
    "git",
)  # what differs between two runs of one thing
RECIPES = {
    "star_graph": {"steps": 6, "log_every": 2, "eval_every": 2, "save_every": 2},
    "images": {"steps": 4, "log_every": 2, "eval_every": 2, "save_every": 2, "keep_steps": [2]},
    "text": {"decode_prompts": 1},
}
OPTIONS = {"tokenizer_steps": 4, "classifier_steps": 4, "valid_size": 10, "test_size": 20, "train_size": 32}
STAR = ("--data", "g2x3", "--model", "gpt2-2x32", "--method", "mutor", "--set", "d_min=2", "d_max=3", "a=0.5")
IMAGES = ("--data", "digits", "--model", "llamagen-1x32", "--method", "mutor_2d", "--set", "d_max=4", "a=0.5")
OWN = ("--data", "mine", "--model", "llama-2x32", "--method", "next_token")
WALKS = ("--data", "g2x3-walks", "--model", "gpt2-2x32", "--method", "mutor", "--set", "d_min=2", "d_max=3", "a=0.5")
STAR_PATH = "smoke/g2x3/gpt2-2x32/mutor/a=0.5,d_max=3,d_min=2"
BASE_PATH = "smoke/g2x3-walks/gpt2-2x32/next_token/default"
IMAGES_PATH = "smoke/digits/llamagen-1x32/mutor_2d/a=0.5,d_max=4"


@dataclass(frozen=True)
class Done:
    """How a command ended, and what it said on stdout and on stderr."""

    status: int
    out: str
    err: str

    @property
    def said(self) -> str:
        return self.out + self.err


class Trial:
    """A copy of the project, without its runs, whose smoke scale takes fewer steps."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True)
        for name in PARTS:
            source = ROOT / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
        file = folder / "config/scales/smoke.yaml"
        scale = yaml.safe_load(file.read_text())
        for name, changes in RECIPES.items():
            scale["recipes"][name] |= changes
        for data in scale["datasets"].values():
            data["options"] |= {key: value for key, value in OPTIONS.items() if key in data["options"]}
        scale["datasets"]["digits"]["options"] |= {"copies": 1, "real_samples": 50}
        scale["datasets"]["mine"] = {
            "role": "own", "task": "text", "recipe": "text",
            "options": {"corpus": "own", "tokens": "standin", "train_file": "data/train.jsonl",
                        "test_file": "data/test.jsonl", "extract": "hashes", "compare": "number", "new_tokens": 8},
        }  # fmt: skip
        file.write_text(yaml.safe_dump(scale, sort_keys=False))
        for file in (folder / "config/tables").glob("*.yaml"):  # rows of checkpoints that these recipes do not keep
            table = yaml.safe_load(file.read_text())
            table["rows"] = [row for row in table["rows"] if row.get("iterations") not in (100000, 200000)]
            file.write_text(yaml.safe_dump(table, sort_keys=False))
        (folder / "data").mkdir()
        for name, numbers in (("train", range(32)), ("test", range(50, 58))):
            rows = [{"prompt": f"Question: {n} + 4 = ?", "answer": f"{n} + 4 = {n + 4} #### {n + 4}"} for n in numbers]
            (folder / f"data/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def config(self, folder: Path) -> Path:
        """A new folder with this project's configuration and data alone, enough for all commands but Snakemake."""
        for name in ("config", "data"):
            shutil.copytree(self.folder / name, folder / name)
        return folder

    def command(
        self, *arguments: Any, home: Path | None = None, kill_at: int = 0, points: list[str] | None = None
    ) -> Done:
        """`python -m mutor` at smoke scale, in a forked process.

        home: the project's folder; kill_at: the number of the file operation below --runs that it is killed at;
        points: gets what these operations are.
        """
        words = [str(a) for a in arguments]
        words[1:1] = ["--scale", "smoke"]
        runs = Path(words[words.index("--runs") + 1]) if "--runs" in words else None
        kept = Path(f"/tmp/mutor-faults-{os.getpid()}-{time.monotonic_ns()}")
        process = os.fork()
        if process == 0:
            _become(words, home or self.folder, runs, kept, kill_at, points is not None)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        texts = []
        for ending in ("out", "err", "points"):
            file = kept.with_suffix(f".{ending}")
            texts.append(file.read_text(errors="replace") if file.exists() else "")
            file.unlink(missing_ok=True)
        if points is not None:
            points += texts[2].splitlines()
        return Done(status, texts[0], texts[1])


def _become(words: list[str], home: Path, runs: Path | None, kept: Path, kill_at: int, listed: bool) -> None:
    """In the forked process: be the command, and end."""
    code = 70
    try:
        for number, ending in ((1, "out"), (2, "err")):
            os.dup2(os.open(kept.with_suffix(f".{ending}"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        os.chdir(home)
        from mutor.cli import main

        if runs and (kill_at or listed):
            _Watch(runs, kill_at, kept.with_suffix(".points") if listed else None).start()
        code = main(words)
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class _Watch:
    """Counts what changes files below a folder, and kills this process at one such operation.

    A file that is written counts twice: before it is opened, and when a part of it is written. Files that torch and
    safetensors write are no events of Python, so these two functions are wrapped.
    """

    def __init__(self, folder: Path, kill_at: int, listed: Path | None):
        self.folder, self.kill_at, self.listed = str(folder.resolve()), kill_at, listed
        self.count, self.quiet = 0, False

    def start(self) -> None:
        import safetensors.torch
        import torch

        torch.save = self._around(torch.save, lambda *args, **_: args[1])
        serialize = safetensors.torch.serialize_file
        safetensors.torch.serialize_file = self._around(serialize, lambda *args, **_: args[1])
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.quiet or event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            return
        if event == "open" and not (isinstance(arguments[0], (str, bytes, os.PathLike)) and (arguments[2] or 0) & 3):
            return
        self.quiet = True
        where = arguments[-1] if event in ("os.remove", "os.rmdir") else -1
        path = os.fsdecode(arguments[0])
        path = os.path.join(os.readlink(f"/proc/self/fd/{where}") if where >= 0 else os.getcwd(), path)
        if path.startswith(self.folder) and (event == "open" or (event == "os.mkdir") is not os.path.exists(path)):
            self._point(event.removeprefix("os."), path)
            if event == "open":
                self._point("write", path, self._part)
        self.quiet = False

    def _around(self, real: Callable[..., Any], file_of: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            path = str(file_of(*args, **kwargs))
            self._point("open", path)
            self.quiet = True
            done = real(*args, **kwargs)
            self._point("write", path, lambda path: os.truncate(path, os.path.getsize(path) // 2))
            self.quiet = False
            return done

        return wrapped

    def _part(self, path: str) -> None:
        if not os.path.exists(path) or not path.endswith((".npy", ".lock")):
            Path(path).write_text('{"')

    def _point(self, kind: str, path: str, before: Callable[[str], Any] = lambda path: None) -> None:
        self.count += 1
        if self.listed:
            with open(self.listed, "a") as handle:
                handle.write(f"{kind} {path.removeprefix(self.folder)}\n")
        if self.count == self.kill_at:
            before(path)
            os.kill(os.getpid(), signal.SIGKILL)


def timeless(value: Any) -> Any:
    """A record without times, memory and commit."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if not any(t in k for t in TIMES)}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def fingerprint(runs: Path, *others: Path) -> dict[str, Any]:
    """Every file of the runs (and of other folders) by what it says: all but times, and sizes that differ by them."""
    found: dict[str, Any] = {}
    for folder in (runs, *others):
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            try:
                content = _content(file)
            except ValueError:  # half-written
                content = "damaged"
            found[file.relative_to(folder).as_posix()] = content
    return found


def _content(file: Path) -> Any:
    if file.name in ("manifest.json", "index.json"):
        content = json.loads(file.read_text())
        return sorted(content.get("seeds", content))
    if file.suffix == ".json":
        return timeless(json.loads(file.read_text()))
    if file.suffix == ".csv":
        with open(file, newline="") as handle:
            return [timeless(row) for row in csv.DictReader(handle)]
    timed = file.suffix in (".log", ".tsv", ".html", ".lock")
    return "" if timed else hashlib.sha256(file.read_bytes()).hexdigest()


def difference(ours: dict[str, Any], wanted: dict[str, Any]) -> str:
    """Which files differ, in one line; empty where none does."""
    lost, more = sorted(wanted.keys() - ours.keys()), sorted(ours.keys() - wanted.keys())
    other = sorted(name for name in ours.keys() & wanted.keys() if ours[name] != wanted[name])
    told = (("missing", lost), ("new", more), ("other", other))
    return "; ".join(f"{word}: {', '.join(names[:3])}" for word, names in told if names)


@dataclass(frozen=True)
class Case:
    """One fault: its row of the table, its name, and what tries it in a new folder and returns what is wrong."""

    row: str
    name: str
    attempt: Callable[[Path], str]


def outcomes(cases: Iterable[Case], folder: Path, processes: int) -> list[tuple[Case, str]]:
    """Try each case in a process of its own; (case, what is wrong: empty where nothing is)."""
    waiting, alive, found = list(cases), {}, []
    total, began = len(waiting), time.monotonic()
    while waiting or alive:
        while waiting and len(alive) < processes:
            case, home = waiting.pop(0), folder / f"case{len(found) + len(alive)}"
            shutil.rmtree(home, ignore_errors=True)
            home.mkdir(parents=True)
            process = os.fork()
            if process == 0:
                _attempt(case, home)
            alive[process] = (case, home)
        process, _ = os.wait()
        case, home = alive.pop(process)
        wrong = (home / "wrong").read_text() if (home / "wrong").exists() else "the trial itself died"
        found.append((case, wrong))
        shutil.rmtree(home, ignore_errors=True)
        if wrong:
            print(f"  {case.row}: {case.name}: {wrong}", flush=True)
        if len(found) % 20 == 0:
            print(f"  {len(found)} of {total}, {time.monotonic() - began:.0f} s", flush=True)
    return found


def _attempt(case: Case, home: Path) -> None:
    wrong = "the trial itself failed"
    with contextlib.suppress(BaseException):
        try:
            wrong = case.attempt(home)
        except Exception as error:
            wrong = f"the trial itself failed: {error!r}"
    (home / "wrong").write_text(wrong)
    os._exit(0)


def copied(folder: Path, target: Path) -> Path:
    """A copy of a folder of runs."""
    return Path(shutil.copytree(folder, target))


def one_line(done: Done) -> str:
    """What is wrong with how a fault was told: a traceback, or more than a line on stderr."""
    if "Traceback" in done.said:
        return f"a traceback, {done.said.strip().splitlines()[-1][:150]}"
    lines = done.err.strip().splitlines()
    return f"{len(lines)} lines on stderr: {lines[0][:100]} ..." if len(lines) > 1 else ""
