"""Bad records and bad configurations, drawn with a fixed seed: each named in one line, none stops or changes others."""

import copy
import csv
import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from trial import STAR, STAR_PATH, Case, Trial, copied, one_line, outcomes

RECORDS = CONFIGURATIONS = 50
WRONG: list[Any] = [None, True, -3, "x" * 70, [[]], {"a": {}}, 10**400, "\ud800"]
FREE = ("description", "stands_in_for", "title", "caption", "label", "plan")  # any text says what it says
FILES = ("config/scales/smoke.yaml", "config/tables/figure4.yaml", "config/config.yaml", "config/claims.yaml")


def records(trial: Trial, folder: Path, processes: int) -> list[tuple[Case, str]]:
    """One of two records of a setting is bad: the tables are those of the other one alone."""
    runs, tables, draw, cases = folder / "runs", folder / "tables", random.Random(22), []
    assert trial.command("run", *STAR, "--seeds", "7", "8", "--runs", runs).status == 0
    text = (runs / STAR_PATH / "seed7/metrics.json").read_text()
    alone = copied(runs, folder / "alone")
    (alone / STAR_PATH / "seed7/metrics.json").unlink()
    assert trial.command("collect", "figure4", "--runs", alone, "--results", tables).status == 0
    while len(cases) < RECORDS:
        row, name, bad = _bad_record(draw, json.loads(text))
        cases.append(Case(f"record: {row}", name, partial(_left_out, trial=trial, runs=runs, tables=tables, text=bad)))
    return outcomes(cases, folder, processes)


def _bad_record(draw: random.Random, record: dict[str, Any]) -> tuple[str, str, str]:
    """(kind, what is done, the record's text)."""
    from mutor.results import record_schema

    kind = draw.choice(["field missing", "value of another kind", "contradicts itself", "another run's", "text cut"])
    if kind == "text cut":
        text = json.dumps(record)
        at = draw.randrange(len(text) - 1)
        return kind, f"at {at}", text[:at]
    if kind in ("field missing", "value of another kind"):
        while True:  # until it is a field that a record needs, or a value that it can't have
            name, value, changed = draw.choice(sorted(record)), draw.choice(WRONG), copy.deepcopy(record)
            if kind == "field missing":
                del changed[name]
            else:
                changed[name] = value
            try:
                record_schema.check(changed)
            except ValueError:
                break
        record, name = changed, name if kind == "field missing" else f"{name} = {str(value)[:20]!a}"
    elif kind == "contradicts itself":
        checkpoint = draw.choice(record["checkpoints"])
        metric = draw.choice(sorted(checkpoint["scores"]))
        checkpoint["metrics"][metric], name = draw.choice([-1.0, 33.333, 100.5, float("nan"), float("inf")]), metric
    else:
        name = draw.choice(["seed", "scale", "train_data", "model", "method"])
        record[name] = 99 if name == "seed" else "another"
    return kind, name, json.dumps(record)


def _left_out(home: Path, *, trial: Trial, runs: Path, tables: Path, text: str) -> str:
    """Named in one line, its numbers nowhere, all others there; every command that reads records goes on."""
    runs = copied(runs, home / "runs")
    file = runs / STAR_PATH / "seed7/metrics.json"
    file.write_text(text)
    done = trial.command("collect", "figure4", "--runs", runs, "--results", home / "tables")
    if done.status or not done.err.startswith(f"left out: {file}: "):
        return f"ended with {done.status}: {done.err.strip()[-200:]}"
    rows, wanted = (list(csv.DictReader(open(part / "figure4.csv"))) for part in (home / "tables", tables))
    if rows != wanted:
        return "other tables"
    for command in ("stale", "plan"):
        other = trial.command(command, "--runs", runs)
        if other.status or "Traceback" in other.said or str(file) not in other.said:
            return f"{command} ended with {other.status}: {other.said.strip()[-200:]}"
    return one_line(done)


def configurations(trial: Trial, folder: Path, processes: int) -> list[tuple[Case, str]]:
    """One thing is wrong in one file."""
    draw, cases = random.Random(23), []
    texts = {name: (trial.folder / name).read_text() for name in FILES}
    while len(cases) < CONFIGURATIONS:
        name = draw.choice(FILES)
        kind, what, text = _bad_configuration(draw, yaml.safe_load(texts[name]))
        if (kind, what) == ("value of another kind", "scale"):
            continue  # the command names one
        row = f"{Path(name).name}: {kind}"
        cases.append(Case(row, what, partial(_refused, trial=trial, file=name, text=text, key=what.split(".")[-1])))
    return outcomes(cases, folder, processes)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all keys, but of those whose values are free and what lies below a model's own `config`."""
    if path and path[-1] in (*FREE, "config"):
        return []
    found = [path] if path and isinstance(path[-1], str) else []
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return found + [place for key, inner in inside for place in _places(inner, (*path, key))]


def _bad_configuration(draw: random.Random, content: dict[str, Any]) -> tuple[str, str, str]:
    """(kind, the key's path, the file's text)."""
    *path, last = draw.choice(_places(content))
    inside = content
    for key in path:
        inside = inside[key]
    kind = draw.choice(["key misspelt", "value of another kind", "key twice"])
    where = ".".join(map(str, [*path, last]))
    if kind == "key misspelt":
        inside[f"{last}x"] = inside.pop(last)
    elif kind == "value of another kind":
        inside[last] = {"surely": ["not", "this"]}
    else:
        inside[last] = "TWICE"
        text = yaml.safe_dump(content, sort_keys=False, default_flow_style=True, width=10**6)
        return kind, where, text.replace(f"{last}: TWICE", f"{last}: 1, {last}: 1")
    return kind, where, yaml.safe_dump(content, sort_keys=False)


def _refused(home: Path, *, trial: Trial, file: str, text: str, key: str) -> str:
    """Refused in one line that names the file, or what is in it, before anything is run or written."""
    project = trial.config(home / "project")
    (project / file).write_text(text)
    done = trial.command("collect", "figure4", "claims", "--runs", home / "runs", home=project)
    if done.status != 2 or not done.err.startswith("error: "):
        return f"ended with {done.status}: {done.err.strip()[-200:]}"
    if key not in done.err and Path(file).stem not in done.err:
        return f"not named: {done.err.strip()[:200]}"
    return one_line(done)
