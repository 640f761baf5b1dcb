"""Checks of what users write: every error names the key, the value and what is allowed.

>>> from_mapping(Config, {"d_mx": 4}, "method mutor")
ValueError: method mutor: unknown key 'd_mx', did you mean 'd_max'? Known keys: a, d_max, d_min
"""

import contextlib
import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

NAMES = {float: "a number", tuple: "a list", dict: "a mapping"}  # kinds as a person who writes YAML calls them


def setting(
    default: Any = dataclasses.MISSING,
    *,
    doc: str,
    low: float | None = None,
    high: float | None = None,
    open_ends: bool = False,
    choices: Iterable[Any] | None = None,
    was: str = "",
    on_disk: str = "",
) -> Any:
    """A field of a frozen config dataclass that carries its documentation and its range.

    `low` and `high` are inclusive, exclusive with `open_ends`; `choices` lists the allowed values; `was` is
    the key's name in an earlier version, which is refused with the new one named; `on_disk` says that the value is a
    path that must be there before a run: "file", "folder", or "module:function", a file that this reads and refuses.
    """
    allowed = choices and tuple(choices)
    metadata = {"doc": doc, "low": low, "high": high, "open": open_ends, "choices": allowed, "was": was}
    metadata["on_disk"] = on_disk
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def choose(value: str, allowed: Iterable[str], what: str) -> str:
    """Return `value` if it is one of `allowed`; else raise ValueError with the nearest allowed one."""
    allowed = sorted(map(str, allowed))
    if value in allowed:
        return value
    near = difflib.get_close_matches(str(value), allowed, n=1)
    hint = f", did you mean {near[0]!r}?" if near else "."
    raise ValueError(f"{what}: {value!r} is unknown{hint} Known: {', '.join(allowed)}")


def from_mapping(cls: type, values: Mapping[str, Any] | None, where: str) -> Any:
    """Build the config dataclass `cls` from what a user wrote, checking names, types and ranges.

    Raises ValueError naming `where`, the key, the value and what is allowed.
    """
    values = {} if values is None else values
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: expected a mapping of settings, got {values!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    renamed = {f.metadata["was"]: name for name, f in fields.items() if f.metadata.get("was")}
    for key in values:
        if key in renamed:
            new = renamed[key]
            raise ValueError(f"{where}: the key {key!r} is now {new!r}: {fields[new].metadata['doc']}")
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f", did you mean {near[0]!r}?" if near else "."
            raise ValueError(f"{where}: unknown key {key!r}{hint} Known keys: {', '.join(sorted(fields))}")
    missing = [
        name
        for name, f in fields.items()
        if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{where}: missing key {missing[0]!r}: {fields[missing[0]].metadata.get('doc', '')}")
    hints = _hints(cls)
    clean = {key: _check(f"{where}: {key}", value, hints[key], fields[key].metadata) for key, value in values.items()}
    try:
        return cls(**clean)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


_hints = functools.cache(typing.get_type_hints)  # a scale has hundreds of mappings of a dozen kinds


def described(field: dataclasses.Field[Any]) -> str:
    """What a setting means and what is allowed: "rank of the adapters; [1, inf)"."""
    meta = field.metadata
    low, high, choices = meta["low"], meta["high"], meta["choices"]
    if choices is not None:
        return f"{meta['doc']}; one of {', '.join(map(str, choices))}"
    return meta["doc"] + (f"; {_span(low, high, meta['open'])}" if (low, high) != (None, None) else "")


def _span(low: float | None, high: float | None, open_ends: bool) -> str:
    left, right = "()" if open_ends else "[]"
    return f"{left}{'-inf' if low is None else low}, {'inf' if high is None else high}{right}"


def _check(where: str, value: Any, hint: Any, meta: Mapping[str, Any]) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    kinds = tuple(typing.get_origin(o) or o for o in options if o is not type(None))
    if float in kinds and isinstance(value, str):  # YAML reads 1e-3 as text
        with contextlib.suppress(ValueError):
            value = float(value)
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if tuple in kinds and isinstance(value, list):
        value = tuple(value)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        names = " or ".join(NAMES.get(kind, kind.__name__) for kind in kinds)
        raise ValueError(f"{where}: {value!r} is not {names}")
    inner = next((typing.get_args(o)[0] for o in options if typing.get_origin(o) is tuple), None)
    if inner is not None and isinstance(value, tuple):
        return tuple(_check(where, item, inner, meta) for item in value)
    low, high, choices = meta.get("low"), meta.get("high"), meta.get("choices")
    if choices is not None and value not in choices:
        raise ValueError(f"{where}: {value!r} is not allowed; allowed: {', '.join(map(str, choices))}")
    if low is not None or high is not None:
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                raise ValueError(f"{where}: {number!r} is not a number")
            under = low is not None and (number <= low if meta["open"] else number < low)
            over = high is not None and (number >= high if meta["open"] else number > high)
            if under or over or number != number:
                span = _span(low, high, meta["open"])
                raise ValueError(f"{where}: {number!r} is out of range, allowed: {span}")
    return value


def not_default(config: Any) -> dict[str, Any]:
    """The settings of a config dataclass that differ from their defaults, sorted by name."""
    changed = {}
    for f in sorted(dataclasses.fields(config), key=lambda f: f.name):
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        value = getattr(config, f.name)
        if value != default:
            changed[f.name] = value
    return changed
