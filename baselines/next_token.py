"""Next-token prediction: teacher forcing on the answer."""

from dataclasses import dataclass
from typing import ClassVar

from mutor.mtp.method import Method


@dataclass(frozen=True)
class NextTokenConfig:
    """No settings."""


class NextToken(Method):
    """Next tokens alone: the base class as it is."""

    Config: ClassVar[type] = NextTokenConfig
    source = "teacher forcing (Williams, Zipser, Neural Computation 1, 1989)"
