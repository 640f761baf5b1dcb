"""Settings that methods with an auxiliary loss share, and how they change while a model is trained. No torch.

    trunk, trunk_rate, warm_up    how the model under the heads or registers is trained (Mehra et al., arXiv 2502.09419;
                                  Medusa, arXiv 2401.10774; CAFT, arXiv 2506.07833)
    a, a_schedule                 what the auxiliary loss counts for (CAFT)
    d_max, d_max_schedule, leap   which tokens are predicted (Aynetdinov and Akbik, arXiv 2505.22757; L-MTP, arXiv
                                  2505.17505)

Not found in these sources: values of Mehra's rates and warm-up, and whether anything but the trunk waits in theirs.
Here all of the model waits, its embedding and output layer included, and the learning rate's schedule does not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from mutor.checks import setting


@dataclass(frozen=True)
class Progress:
    """How far training is: `step` of `steps` steps are done."""

    step: int = 0
    steps: int = 1


@dataclass(frozen=True)
class AdapterSettings:
    """Settings of LoRA; the paper's rank, its scale is not stated."""

    rank: int = setting(32, doc="rank of the adapters of trunk 'lora'", low=1)
    lora_alpha: int = setting(32, doc="their scale is lora_alpha / rank", low=1)


@dataclass(frozen=True)
class TrunkSettings(AdapterSettings):
    """How the model is trained to which a method adds heads or registers."""

    trunk: str = setting(
        "trained",
        doc="the model's own weights: trained, frozen, or frozen under LoRA adapters on all its linear layers",
        choices=("trained", "frozen", "lora"),
    )
    trunk_rate: float = setting(
        1.0, doc="the trunk's learning rate, as a multiple of that of what is added", low=0, open_ends=True
    )
    warm_up: float = setting(
        0.0, doc="steps in which only what is added is trained; below 1: this share of all steps", low=0
    )

    def __post_init__(self) -> None:
        if self.trunk == "frozen":
            self._leave_out("with trunk 'frozen'", trunk_rate=1.0, warm_up=0.0)
        if self.trunk != "lora":
            self._leave_out(f"with trunk {self.trunk!r}", rank=32, lora_alpha=32)

    def warm_up_steps(self, steps: int) -> int:
        """In how many of so many steps the trunk waits."""
        return round(self.warm_up * steps) if self.warm_up < 1 else int(self.warm_up)

    def _leave_out(self, where: str, **usual: Any) -> None:
        """Raise ValueError for a setting that is not as usual, but means nothing there."""
        for key, value in usual.items():
            if getattr(self, key) != value:
                raise ValueError(f"{key}: {getattr(self, key)} means nothing {where}; leave it out")


@dataclass(frozen=True)
class AuxiliarySettings(TrunkSettings):
    """What every method with an auxiliary loss shares."""

    d_max: int = setting(2, doc="furthest token predicted: x_(t + d_max)", low=1)
    a: float = setting(0.1, doc="weight of the auxiliary loss, 1 - a that of next-token", low=0, high=1, open_ends=True)
    a_schedule: str = setting(
        "constant", doc="how a falls to zero over training, if it does", choices=("constant", "linear", "quarter_sine")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trunk == "frozen":
            self._leave_out("with trunk 'frozen', which no next-token loss trains", a_schedule="constant")

    def weight(self, progress: Progress) -> float:
        """The weight of the auxiliary loss in the step that comes next: a s(t), with CAFT's s for quarter_sine."""
        left = 1 - progress.step / progress.steps
        factors = {"constant": 1.0, "linear": left, "quarter_sine": math.sin(left * math.pi / 2)}
        return self.a * factors[self.a_schedule]
