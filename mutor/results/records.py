"""Run records: one metrics.json a seeded run, small, versioned and self-describing.

runs/<scale>/<training data>/<model>/<method>/<settings>/seed<n>/metrics.json holds the settings, every checkpoint's
metrics, the learning curve, the scores of every problem, and what made it: code, data, versions, device.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mutor.config.runs import Spec

VERSION = 1
REQUIRED = (
    "version",
    "scale",
    "train_data",
    "model",
    "method",
    "settings",
    "seed",
    "config",
    "config_hash",
    "checkpoints",
    "versions",
)


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
)


def seed_folder(runs: Path, spec: Spec, seed: int) -> Path:
    """Where a seeded run lives."""
    return Path(runs) / spec.path / f"seed{seed}"


def compose(
    spec: Spec,
    seed: int,
    training: Mapping[str, Any],
    checkpoints: list[dict[str, Any]],
    circumstances: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of metrics.json.

    training: content of last/training.json; checkpoints: their names, step, metrics and packed scores; circumstances:
    what the run was made on, and of which data and code.
    """
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
        **circumstances,
    }


def pack(scores: np.ndarray) -> dict[str, Any]:
    """Scores of all problems, packed: bool [N] as bits, others as float32."""
    if scores.dtype == bool:
        return {"count": len(scores), "bits": base64.b64encode(np.packbits(scores).tobytes()).decode()}
    return {"count": len(scores), "float32": base64.b64encode(scores.astype("<f4").tobytes()).decode()}


def unpack(packed: dict[str, Any]) -> np.ndarray:
    """The inverse of `pack`."""
    if "bits" in packed:
        return np.unpackbits(np.frombuffer(base64.b64decode(packed["bits"]), np.uint8))[: packed["count"]].astype(bool)
    return np.frombuffer(base64.b64decode(packed["float32"]), "<f4")


def read(file: Path) -> dict[str, Any]:
    """A run record, checked. Raises ValueError naming file and field for what is missing or nonsensical."""
    try:
        record = json.loads(file.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: not a run record: {error}") from None
    for key in REQUIRED:
        if not isinstance(record, dict) or key not in record:
            raise ValueError(f"{file}: field {key!r} is missing")
    if record["version"] != VERSION:
        raise ValueError(f"{file}: field 'version' is {record['version']!r}, this program reads {VERSION}")
    for checkpoint in record["checkpoints"]:
        if not isinstance(checkpoint, dict) or not {"names", "step", "metrics"} <= checkpoint.keys():
            raise ValueError(f"{file}: field 'checkpoints' needs names, step and metrics, has {checkpoint!r}")
        for metric, value in checkpoint["metrics"].items():
            rate = metric.endswith("rate") or "accuracy" in metric or metric.startswith("rouge")
            if not isinstance(value, (int, float)) or not math.isfinite(value) or (rate and not 0 <= value <= 100):
                raise ValueError(
                    f"{file}: field {metric!r} is {value!r}, allowed: {'0 to 100' if rate else 'a number'}"
                )
    if not {"best", "last"} <= {name for checkpoint in record["checkpoints"] for name in checkpoint["names"]}:
        raise ValueError(f"{file}: field 'checkpoints' lacks 'best' or 'last'")
    return record


class Records:
    """The run records below a folder, each read once.

    Records(Path("runs")).of(spec) lists a setting's; .of_scale("laptop") all of a scale, broken ones left out. What was
    left out, and why, stands in `problems`: broken records, copies in another run's folder, and records of the same run
    with other numbers, of which the one in the folder seed<n> counts.
    """

    def __init__(self, runs: Path) -> None:
        self.runs = Path(runs)
        self.problems: list[str] = []
        self._settings: dict[str, list[dict[str, Any]]] = {}

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
            for file in sorted(files, key=lambda f: (len(f.parent.name), f.parent.name)):
                try:
                    record = read(file)
                    _belongs(record, file, path)
                    same = found.setdefault((record["seed"], record["config_hash"]), record)
                    if same is record:
                        record |= {"path": path, "file": file}
                    else:
                        _agree(same, record, file)
                except ValueError as error:
                    self.problems.append(str(error))
            self._settings[path] = [found[key] for key in sorted(found)]
        return self._settings[path]


def _belongs(record: dict[str, Any], file: Path, path: str) -> None:
    says = "/".join(str(record[key]) for key in ("scale", "train_data", "model", "method"))
    if not path.startswith(f"{says}/"):
        raise ValueError(f"{file}: a record of {says}, in the folder of {path}")


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
