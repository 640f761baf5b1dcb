"""What a run record has to look like: every field's kind, and what fields say of each other.

check(json.loads(text))      # raises ValueError naming the field, what it is and what is allowed
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

VERSION = 1
Check = Callable[[str, Any], None]  # the field's name, its value; raises ValueError


def _kind(words: str, is_one: Callable[[Any], bool]) -> Check:
    def check(name: str, value: Any) -> None:
        if not is_one(value):
            shown = repr(value)
            raise ValueError(f"field {name!r} is {shown[:60] + '...' * (len(shown) > 60)}, allowed: {words}")

    return check


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 2**63


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _mapping(of: Check, plainly: Callable[[Any], bool] = lambda inner: False) -> Check:
    """Of texts to what `of` allows. plainly: what it allows, told faster than by its name; there are millions."""
    is_mapping = _kind("a mapping", lambda v: isinstance(v, dict))

    def check(name: str, value: Any) -> None:
        is_mapping(name, value)
        for key, inner in value.items():
            if not plainly(inner):
                of(f"{name}.{key}", inner)

    return check


def _list(of: Check) -> Check:
    is_list = _kind("a list", lambda v: isinstance(v, list))

    def check(name: str, value: Any) -> None:
        is_list(name, value)
        for number, inner in enumerate(value):
            of(f"{name}[{number}]", inner)

    return check


def _fields(required: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> Check:
    """A mapping with these fields, and others of any kind."""
    is_mapping = _kind("a mapping", lambda v: isinstance(v, dict))

    def check(name: str, value: Any) -> None:
        is_mapping(name or "(the whole)", value)
        for key, of in {**required, **(optional or {})}.items():
            where = f"{name}.{key}" if name else key
            if key in value:
                of(where, value[key])
            elif key in required:
                raise ValueError(f"field {where!r} is missing")

    return check


def _or_none(of: Check) -> Check:
    return lambda name, value: None if value is None else of(name, value)


TEXT = _kind("a text", lambda v: isinstance(v, str))
NAME = _kind("a text without '/'", lambda v: isinstance(v, str) and v != "" and "/" not in v)
FLAG = _kind("true or false", lambda v: isinstance(v, bool))
NUMBER = _kind("a number", _number)
SECONDS = _kind("a number from 0", lambda v: _number(v) and v >= 0)
COUNT = _kind("a whole number from 0", _whole)
SOME = _kind("a whole number from 1", lambda v: _whole(v) and v > 0)
PERCENT = _kind("0 to 100", lambda v: _number(v) and 0 <= v <= 100)
SIMPLE = _kind(
    "a text, a number, true, false, null or a list or mapping of such",
    lambda v: v is None or isinstance(v, (str, bool, list, dict)) or _number(v),
)


def _metric(name: str, value: Any) -> None:
    metric = name.rpartition(".")[2]
    rate = metric.endswith("rate") or "accuracy" in metric or metric.startswith("rouge")
    (PERCENT if rate else NUMBER)(name, value)


def _entry(name: str, value: Any) -> None:
    """Of the learning curve: numbers, of which one is the step."""
    WITH_STEP(name, value)
    NUMBERS(name, value)


def _base(name: str, value: Any) -> None:
    _or_none(_fields(MADE_OF))(name, value)


WITH_STEP = _fields({"step": COUNT})
NUMBERS = _mapping(NUMBER, lambda v: type(v) is float and -(2.0**63) < v < 2.0**63)
MADE_OF: dict[str, Check] = {
    "method": TEXT,
    "task": TEXT,
    "model": _fields({"attention": TEXT}),
    "base": _base,
}
CHECKPOINT = _fields(
    {"names": _list(TEXT), "step": COUNT, "metrics": _mapping(_metric)},
    {"scores": _mapping(_fields({"count": SOME}, {"bits": TEXT, "float32": TEXT}))},
)
MAKER: dict[str, Check] = {
    "code": _mapping(TEXT),
    "git_commit": _or_none(TEXT),
    "git_changed": FLAG,
    "platform": TEXT,
}
RECORD = _fields(
    {
        "version": _kind(f"{VERSION}, as this program reads", lambda v: _whole(v) and v == VERSION),
        "scale": NAME,
        "train_data": NAME,
        "model": NAME,
        "method": NAME,
        "settings": _mapping(SIMPLE),
        "seed": COUNT,
        "config": _fields(MADE_OF | {"settings": _mapping(SIMPLE), "recipe": _mapping(SIMPLE)}),
        "config_hash": TEXT,
        "checkpoints": _list(CHECKPOINT),
        "curve": _list(_entry),
        "steps": COUNT,
        "seconds_training": SECONDS,
        "trainable_parameters": COUNT,
        "added_parameters": COUNT,
        "versions": _mapping(TEXT),
    },
    MAKER
    | {
        "tokens": COUNT,
        "examples": _or_none(COUNT),
        "examples_dropped": COUNT,
        "parameters": COUNT,
        "started": TEXT,
        "finished": TEXT,
        "resumed": FLAG,
        "weights_hash": TEXT,
        "base_weights_hash": _or_none(TEXT),
        "also_made_by": _list(_fields(MAKER | {"from": TEXT})),
        "peak_memory_bytes": COUNT,
        "device": TEXT,
        "threads": SOME,
        "processes": SOME,
        "train_data_name": TEXT,
        "train_data_role": TEXT,
        "model_role": TEXT,
        "stands_in_for": TEXT,
        "data_hash": TEXT,
        "test_data_hash": _or_none(TEXT),
        "chosen_on": _kind("'valid', 'test' or ''", lambda v: v in ("valid", "test", "")),
    },
)


def check(record: Any) -> None:
    """Raise ValueError for what no run writes: a field that is missing or of another kind, metrics that contradict."""
    RECORD("", record)
    names = [name for checkpoint in record["checkpoints"] for name in checkpoint["names"]]
    for name in ("best", "last"):
        if names.count(name) != 1:
            raise ValueError(f"field 'checkpoints' has {names.count(name)} of {name!r}, allowed: one")
    for number, checkpoint in enumerate(record["checkpoints"]):
        for metric, packed in checkpoint.get("scores", {}).items():
            _agree(f"checkpoints[{number}].metrics.{metric}", checkpoint["metrics"].get(metric), packed)


def _agree(name: str, metric: float | None, packed: Mapping[str, Any]) -> None:
    """A metric is 100 times the mean of its problems' scores; float32 ones are rounded."""
    try:
        scores = unpack(packed).astype(float)
    except (KeyError, ValueError, binascii.Error):
        raise ValueError(f"field {name!r}: its scores can't be unpacked") from None
    if len(scores) != packed["count"] or not np.isfinite(scores).all():
        raise ValueError(f"field {name!r}: its scores are not {packed['count']} numbers")
    mean = 100 * float(scores.mean())
    if metric is not None and not math.isclose(metric, mean, rel_tol=1e-5, abs_tol=1e-4):
        raise ValueError(f"field {name!r} is {metric}, but the scores of its problems give {mean:.6g}")


def pack(scores: np.ndarray) -> dict[str, Any]:
    """Scores of all problems, packed: bool [N] as bits, others as float32."""
    if scores.dtype == bool:
        return {"count": len(scores), "bits": base64.b64encode(np.packbits(scores).tobytes()).decode()}
    return {"count": len(scores), "float32": base64.b64encode(scores.astype("<f4").tobytes()).decode()}


def unpack(packed: Mapping[str, Any]) -> np.ndarray:
    """The inverse of `pack`."""
    if "bits" in packed:
        bits = np.unpackbits(np.frombuffer(base64.b64decode(packed["bits"], validate=True), np.uint8))
        return bits[: packed["count"]].astype(bool)
    return np.frombuffer(base64.b64decode(packed["float32"], validate=True), "<f4")
