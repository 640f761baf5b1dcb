"""Settings that methods share, and how they change while a model is trained. No torch.

    trunk, trunk_rate, warm_up    how the model under the heads or registers is trained (Mehra et al., arXiv 2502.09419;
                                  Medusa, arXiv 2401.10774; CAFT, arXiv 2506.07833)
    a, a_schedule                 what the auxiliary loss counts for (CAFT)
    entropy_limit                 which targets count (AdaMTP, see mutor/mtp/segments.py)
    d_max, d_max_schedule, leap   which tokens are predicted (Aynetdinov and Akbik, arXiv 2505.22757; L-MTP, arXiv
                                  2505.17505)

For heads and modules the next token is the nearest one, so that a forward schedule begins with it alone. A leap for
sequential modules is not in the source: each joins the token that the one before it predicts.

Not found in these sources: values of Mehra's rates and warm-up, and whether anything but the trunk waits in theirs.
Here all of the model waits, its embedding and output layer included, and the learning rate's schedule does not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

from mutor.checks import setting


@dataclass(frozen=True)
class Progress:
    """How far training is: `step` of `steps` steps are done."""

    step: int = 0
    steps: int = 1


@dataclass(frozen=True)
class Context:
    """What a layout may depend on besides the rows.

    The run's seed, the dummy token, the kind of prefix, and how far training is when the rows are trained on.
    """

    seed: int = 0
    pad_id: int = 0
    prefix_lm: bool = False
    progress: Progress = Progress()


class TrainingRecipe(Protocol):
    """What a method may read of how it is trained; the suite's own is mutor/config/recipe.py."""

    @property
    def steps(self) -> int | None:
        """Optimiser steps."""

    @property
    def optimizer(self) -> str:
        """adamw, or muon with AdamW for what Muon does not take."""

    @property
    def learning_rate(self) -> float:
        """Peak rate of AdamW."""

    @property
    def muon_rate(self) -> float:
        """Peak rate of Muon."""

    @property
    def weight_decay(self) -> float:
        """Weight decay, where a group has it."""


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
class AuxiliarySettings:
    """The two settings that every method with an auxiliary loss shares."""

    d_max: int = setting(2, doc="furthest token predicted: x_(t + d_max)", low=1)
    a: float = setting(0.1, doc="weight of the auxiliary loss, 1 - a that of next-token", low=0, high=1, open_ends=True)


@dataclass(frozen=True)
class AheadSettings(AuxiliarySettings, TrunkSettings):
    """What methods share that predict single tokens further on, by heads, modules or registers."""

    a_schedule: str = setting(
        "constant", doc="how a falls to zero over training, if it does", choices=("constant", "linear", "quarter_sine")
    )
    d_max_schedule: str = setting(
        "constant",
        doc="'forward': only the nearest token is predicted at first, one more after each equal part of training; "
        "'reverse': all at first, only the nearest at last",
        choices=("constant", "forward", "reverse"),
    )
    leap: int = setting(1, doc="distance between the tokens predicted: 2 with d_max 5 means 1, 3, 5", low=1)
    entropy_limit: float | None = setting(
        None,
        doc="targets beyond a token whose next-token entropy was above this, in nats, are left out; none: none are",
        low=0,
        open_ends=True,
    )

    @property
    def nearest(self) -> int:
        """The first of the tokens predicted: the next, or a register's smallest offset."""
        return int(getattr(self, "d_min", 1))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.d_max == self.nearest:
            self._leave_out(f"with d_max {self.d_max}", leap=1, d_max_schedule="constant")
        if self.d_max == 1:
            self._leave_out("with d_max 1", entropy_limit=None)
        if (self.d_max - self.nearest) % self.leap:
            raise ValueError(f"d_max: {self.d_max} is no number of leaps of {self.leap} beyond {self.nearest}")
        if self.trunk == "frozen":
            self._leave_out("with trunk 'frozen', which no next-token loss trains", a_schedule="constant")

    def reach(self, progress: Progress) -> int:
        """The furthest token predicted in the step that comes next: d_max, or one nearer by the schedule.

        The source's formula with the share of steps for that of epochs, over the tokens `nearest`, `nearest` + leap ..
        d_max: of n, forward min(n, floor(n step / steps) + 1) are predicted, reverse max(1, n - floor(n step / steps)).
        """
        count = (self.d_max - self.nearest) // self.leap + 1
        done = count * progress.step // progress.steps
        active = {"constant": count, "forward": min(count, done + 1), "reverse": max(1, count - done)}
        return self.nearest + self.leap * (active[self.d_max_schedule] - 1)

    def weight(self, progress: Progress) -> float:
        """The weight of the auxiliary loss in the step that comes next: a s(t), with CAFT's s for quarter_sine."""
        left = 1 - progress.step / progress.steps
        factors = {"constant": 1.0, "linear": left, "quarter_sine": math.sin(left * math.pi / 2)}
        return self.a * factors[self.a_schedule]


@dataclass(frozen=True)
class HeadSettings(AheadSettings):
    """What methods share that have a head or a module for each further token."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trunk == "frozen":
            self._leave_out("with trunk 'frozen': for a part of training nothing is trained", d_max_schedule="constant")
        if self.d_max_schedule == "forward":
            self._leave_out("with d_max_schedule 'forward': at first no head is trained", warm_up=0.0)

    @property
    def further(self) -> range:
        """What is predicted beyond the next token: 1 + leap, 1 + 2 leap .. d_max."""
        return range(1 + self.leap, self.d_max + 1, self.leap)

    def active(self, progress: Progress) -> int:
        """How many heads or modules, from the first on, the step that comes next trains."""
        return sum(ahead <= self.reach(progress) for ahead in self.further)
