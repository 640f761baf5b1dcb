"""What settings of methods may depend on while a model is trained. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """How far training is: `step` of `steps` steps are done."""

    step: int = 0
    steps: int = 1
