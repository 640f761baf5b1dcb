"""Two runs side by side."""

import json

import numpy as np
import pytest

from mutor.cli import main
from mutor.files import write_json
from mutor.results import record_schema
from mutor.results.compare import lines

CONFIG = {
    "task": "t",
    "method": "m",
    "model": {"attention": "a"},
    "base": None,
    "settings": {},
    "recipe": {"steps": 20},
}


def write(folder, method, seed, right, **more):
    """A record of a run that solves the problems in `right`, of ten."""
    scores = np.isin(np.arange(10), right)
    record = {
        "version": 1,
        "scale": "smoke",
        "train_data": "x",
        "model": "m",
        "method": method,
        "settings": {},
        "seed": seed,
        "config_hash": "h",
        "config": CONFIG | {"method": method},
        "data_hash": "d",
        "test_data_hash": "t",
        "versions": {},
        "curve": [],
        "steps": 20,
        "seconds_training": 1.0,
        "trainable_parameters": 100,
        "added_parameters": 0,
        "checkpoints": [
            {
                "names": ["best", "last"],
                "step": 20,
                "metrics": {"solve_rate": 100 * float(scores.mean())},
                "scores": {"solve_rate": record_schema.pack(scores)},
            }
        ],
        **more,
    }
    write_json(folder / f"seed{seed}/metrics.json", record)


def test_settings_seed_by_seed(tmp_path, capsys):
    for seed in (1, 2, 3):
        write(tmp_path / "a", "mutor", seed, range(9))
        write(tmp_path / "b", "next_token", seed, range(4))
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    printed = capsys.readouterr().out
    assert "method: mutor | next_token" in printed and "recipe" not in printed and "seeds 1, 2, 3" in printed
    assert "the same code, data and machine" in printed
    assert "solve_rate                       90         40  difference +50" in printed
    assert "solve_rate, problem by problem: A - B = +50.00 points" in printed
    assert "over seeds and problems" in printed


def test_two_runs_of_different_seeds_data_and_code(tmp_path):
    write(tmp_path / "a", "mutor", 1, range(9))
    other = {"data_hash": "e", "test_data_hash": "u", "code": {"mutor.train": "2"}}
    other |= {"config": CONFIG | {"recipe": {"steps": 30}}}
    write(tmp_path / "b", "mutor", 2, range(9), **other)
    printed = "\n".join(lines(tmp_path / "a/seed1/metrics.json", tmp_path / "b/seed2"))
    assert "recipe.steps: 20 | 30" in printed and "code.mutor.train: None | 2" in printed
    assert "not known to be scored on the same problems" in printed and "\n   data_hash: d | e" in printed


def test_other_training_data_are_compared_problem_by_problem(tmp_path):
    """The test problems decide; where a record does not name them, nothing is paired."""
    write(tmp_path / "a", "mutor", 1, range(6), data_hash="d")
    write(tmp_path / "b", "mutor", 1, (), data_hash="e")
    printed = "\n".join(lines(tmp_path / "a", tmp_path / "b"))
    assert "over problems" in printed and "\n   data_hash: d | e" in printed
    for folder in ("a", "b"):
        write(tmp_path / folder, "mutor", 1, range(6), test_data_hash=None)
    assert "not known to be scored on the same problems" in "\n".join(lines(tmp_path / "a", tmp_path / "b"))
    write(tmp_path / "a", "mutor", 2, range(6), test_data_hash="u")  # each seed on problems of its own
    write(tmp_path / "b", "mutor", 2, range(6), test_data_hash="u")
    write(tmp_path / "a", "mutor", 1, range(6)), write(tmp_path / "b", "mutor", 1, range(6))
    assert "not known to be scored on the same problems" in "\n".join(lines(tmp_path / "a", tmp_path / "b"))


def test_one_seed_is_tested_exactly(tmp_path):
    write(tmp_path / "a", "mutor", 1, range(6))
    write(tmp_path / "b", "next_token", 1, ())
    assert "over problems" in "\n".join(lines(tmp_path / "a", tmp_path / "b"))


def test_what_is_not_there_is_named(tmp_path, capsys):
    write(tmp_path / "a", "mutor", 1, ())
    write(tmp_path / "a", "mutor", 2, ())
    write(tmp_path / "b", "mutor", 3, ())
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "none")]) == 2
    assert "none: no run there" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"no seed in common: \[1, 2\] and \[3\]"):
        lines(tmp_path / "a", tmp_path / "b")
    file = tmp_path / "b/seed3/metrics.json"
    file.write_text(json.dumps({"version": 1}))
    with pytest.raises(ValueError, match="field 'scale' is missing"):
        lines(tmp_path / "a", tmp_path / "b")
