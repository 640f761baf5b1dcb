"""Numbers as people read them, and what stands where there is none."""

from __future__ import annotations

from typing import Any


def is_missing(value: Any) -> bool:
    """Whether there is no value: None, NaN or an empty text."""
    return value is None or value == "" or value != value


def text(value: Any, form: str = "") -> str:
    """A value in words: nothing where it is missing; numbers in `form` (".1f", "+.2f"), else with four digits."""
    if is_missing(value):
        return ""
    if form:
        return format(value, form)
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4g}" if abs(value) < 1000 or abs(value) >= 1e9 else f"{value:,.0f}"
