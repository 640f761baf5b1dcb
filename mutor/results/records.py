"""Run records: one metrics.json a seeded run, small, versioned and self-describing.

runs/<scale>/<training data>/<model>/<method>/<settings>/seed<n>/metrics.json holds the settings, every checkpoint's
metrics, the learning curve, the scores of every problem, and what made it: code, data, versions, device.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mutor.config.runs import Spec
from mutor.files import read_json
from mutor.results.record_schema import VERSION, check, unpack

FROM_TRAINING = (  # fields of last/training.json that a record repeats
    "curve",
    "steps",
    "tokens",
    "examples",
    "examples_dropped",
    "parameters",
    "trainable_parameters",
    "added_parameters",
    "started",
    "resumed",
    "weights_hash",
    "base_weights_hash",
)


def seed_folder(runs: Path, spec: Spec, seed: int) -> Path:
    """Where a seeded run lives."""
    return Path(runs) / spec.path / f"seed{seed}"


def models(folder: Path) -> list[Path]:
    """What training has left in a seeded run's folder: plain models and checkpoints, in the order to delete them.

    last/ says that training has ended, so it goes first: what is left when a process is killed is never taken for all.
    """
    parts = (folder / "last", folder / "best", *sorted(folder.glob("step*")), folder / "checkpoints")
    return [part for part in parts if part.exists()]


def weights_hash(folder: Path) -> str:
    """A hash of a saved model's weights."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as handle:
            while part := handle.read(1 << 24):
                digest.update(part)
    return digest.hexdigest()[:16]


def compose(
    spec: Spec,
    seed: int,
    training: Mapping[str, Any],
    checkpoints: list[dict[str, Any]],
    made_by: Sequence[Mapping[str, Any]],
    circumstances: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of metrics.json.

    training: content of last/training.json; checkpoints: their names, step, metrics and packed scores; made_by: code,
    versions and platform at the start, and of each process that went on under others; circumstances: what the run was
    made on, and of which data.
    """
    first, *later = made_by
    return {
        "version": VERSION,
        "scale": spec.scale,
        "train_data": spec.data,
        "model": spec.model,
        "train_data_role": spec.dataset.role,
        "model_role": spec.model_config.role,
        "stands_in_for": spec.stands_in_for,
        "method": spec.method,
        "settings": spec.settings,
        "seed": seed,
        "config": spec.as_dict(),
        "config_hash": spec.config_hash,
        "checkpoints": checkpoints,
        "seconds_training": training["seconds"],
        **{name: training[name] for name in FROM_TRAINING},
        **{name: value for name, value in first.items() if name != "from"},
        "also_made_by": later,
        **circumstances,
    }


def read(file: Path) -> dict[str, Any]:
    """A run record, checked. Raises ValueError naming file and field for what is missing or nonsensical."""
    record: dict[str, Any] = read_json(file)
    try:
        check(record)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return record


class Records:
    """The run records below a folder, each read once and kept without its learning curve, which `curve` reads.

    Records(Path("runs")).of(spec) lists a setting's; .of_scale("laptop") all of a scale, broken ones left out. What was
    left out, and why, stands in `problems`: broken records, copies in another run's folder, and records of the same run
    with other numbers, of which the one in the folder seed<n> counts, seeds with other data than the first.
    """

    def __init__(self, runs: Path) -> None:
        self.runs = Path(runs)
        self.problems: list[str] = []
        self._settings: dict[str, list[dict[str, Any]]] = {}
        self._alike: dict[str, Any] = {}  # what many records have, once

    def of(self, spec: Spec) -> list[dict[str, Any]]:
        """The records of a setting whose configuration is the one asked for, by seed."""
        asked = spec.config_hash
        return [r for r in self.at(spec.path) if r["config_hash"] == asked]

    def of_scale(self, scale: str) -> list[dict[str, Any]]:
        """All records of a scale, by folder and seed."""
        folders = sorted({f.parent.parent for f in (self.runs / scale).glob("*/*/*/*/seed*/metrics.json")})
        return [record for folder in folders for record in self.at(folder.relative_to(self.runs).as_posix())]

    def at(self, path: str) -> list[dict[str, Any]]:
        """The records in a setting's folder, by seed, each with its `path` and `file`."""
        if path not in self._settings:
            found: dict[tuple[int, str], dict[str, Any]] = {}
            files = (self.runs / path).glob("seed*/metrics.json")
            for file in sorted(files, key=_number):
                try:
                    record = self._slim(read(file)) | {"path": path, "file": file}
                    _belongs(record, file, path)
                    same = found.get((record["seed"], record["config_hash"]))
                    if same:
                        _agree(same, record, file)
                    else:
                        _same_data(record, found.values())
                        found[record["seed"], record["config_hash"]] = record
                except ValueError as error:
                    self.leave_out(error)
            self._settings[path] = [found[key] for key in sorted(found)]
        return self._settings[path]

    def leave_out(self, error: ValueError) -> None:
        """Name what is wrong with something that is left out, once."""
        if str(error) not in self.problems:
            self.problems.append(str(error))

    def _slim(self, record: dict[str, Any]) -> dict[str, Any]:
        """A record as it is kept: a curve is most of it, and thousands share their settings and their code."""
        shared = {
            key: value for key, value in record.items() if isinstance(value, (dict, list)) and key != "checkpoints"
        }
        shared.pop("curve")
        alike = {key: self._alike.setdefault(json.dumps(value), value) for key, value in shared.items()}
        return {key: alike.get(key, value) for key, value in record.items() if key != "curve"}


def curve(record: Mapping[str, Any]) -> list[dict[str, float]]:
    """The learning curve of one of `Records`: numbers by name of each step that is logged or scored."""
    return list(read_json(record["file"])["curve"])


def _number(file: Path) -> tuple[int, str]:
    """The seed that a record's folder names, seed<n> or seed<n>-<what you like>, and the rest."""
    seed, _, rest = file.parent.name.removeprefix("seed").partition("-")
    return int(seed) if seed.isdecimal() else -1, rest


def _belongs(record: dict[str, Any], file: Path, path: str) -> None:
    """Raise ValueError for a record that another run has written."""
    says = "/".join(str(record[key]) for key in ("scale", "train_data", "model", "method"))
    if not path.startswith(f"{says}/"):
        raise ValueError(f"{file}: a record of {says}, in the folder of {path}")
    if _number(file)[0] != record["seed"]:
        raise ValueError(f"{file}: a record of seed {record['seed']}, in a folder for another")


def _same_data(record: dict[str, Any], found: Iterable[dict[str, Any]]) -> None:
    """Raise ValueError for a seed that was trained or scored on other data than the first one of its setting."""
    for first in found:
        if first["config_hash"] == record["config_hash"] and first.get("data_hash") != record.get("data_hash"):
            raise ValueError(
                f"{record['file']}: its data are others (hash {record.get('data_hash')}) than those of seed "
                f"{first['seed']} ({first.get('data_hash')})"
            )


def _agree(first: dict[str, Any], second: dict[str, Any], file: Path) -> None:
    """Raise ValueError where two records of the same run have different numbers."""
    for name in ("best", "last"):
        ours, theirs = checkpoint_metrics(first, name), checkpoint_metrics(second, name)
        for metric in ours:
            if ours[metric] != theirs.get(metric):
                raise ValueError(
                    f"{file}: contradicts {first['file']}, the same run: {name} {metric} is {theirs.get(metric)} here "
                    f"and {ours[metric]} there"
                )


def finished(runs: Path, spec: Spec, seed: int) -> bool:
    """Whether this seeded run is done, in the configuration asked for."""
    file = seed_folder(runs, spec, seed) / "metrics.json"
    try:
        return read(file)["config_hash"] == spec.config_hash
    except ValueError:
        return False


def drop_broken_index(folder: Path) -> str:
    """Delete a setting's index.json if a record is not of the size it names, so that the setting is run again.

    Returns what is wrong; empty where nothing is, or where there is no index.
    """
    file = folder / "index.json"
    if not file.exists():
        return ""
    try:
        sizes = {seed: int(size) for seed, size in read_json(file)["seeds"].items()}
        now = {seed: _size(folder / f"seed{seed}/metrics.json") for seed in sizes}
        wrong = [f"seed{s}/metrics.json has {now[s]} bytes of {sizes[s]}" for s in sizes if now[s] != sizes[s]]
    except (ValueError, TypeError, KeyError, AttributeError):
        wrong = ["index.json can't be read"]
    if wrong:
        file.unlink(missing_ok=True)
    return "; ".join(wrong)


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def checkpoint_metrics(record: dict[str, Any], name: str) -> dict[str, float]:
    """Test metrics of a record's checkpoint `last` or `best`."""
    return next(c["metrics"] for c in record["checkpoints"] if name in c["names"])


def same_problems(*test_data_hashes: str | None) -> bool:
    """Whether these are all of the same test problems, in the same order; a record without the field does not tell."""
    return None not in test_data_hashes and len(set(test_data_hashes)) == 1


def problem_scores(record: dict[str, Any], name: str, metric: str) -> np.ndarray | None:
    """Scores [N] of a record's checkpoint `last` or `best`, 0 to 1 a problem; None where `metric` has none."""
    packed = next(c.get("scores", {}) for c in record["checkpoints"] if name in c["names"])
    return unpack(packed[metric]).astype(float) if metric in packed else None
