"""MuToR on images: registers along the raster (1D) and on the grid (2D); paper, section 3 and Table 7.

MuToR2D, d_max 3, on a grid of 4 columns; a register behind t predicts one of the cells marked with their offset d:

    t  1  2  .        (d_h, d_w) drawn from {1, 2, 3}^2 without (1, 1), which is t itself; d = (d_h - 1) 4 + d_w - 1
    4  5  6  .        a plain offset along the raster, so that it runs on into the next row near the right border
    8  9 10  .

The two count d_max differently, as the paper does. Along the raster d is 1 .. d_max. On the grid d_w is 1 .. d_max and
d = d_w - 1 in the own row (d_h = 1), so that d_max 4 means offsets 1 .. 4 in MuToR1D and 1 .. 3 in MuToR2D's own row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mutor.checks import setting
from mutor.mtp.mutor import MuToR, MuToRConfig

if TYPE_CHECKING:
    from torch import Tensor

    from mutor.mtp.method import Context


@dataclass(frozen=True)
class MuToR1DConfig(MuToRConfig):
    """Settings of MuToR along the raster; defaults are the paper's for images."""

    d_max: int = setting(4, doc="offsets d are 1 .. d_max; in its own row mutor_2d's are 1 .. d_max - 1", low=1)
    a: float = setting(0.5, doc="weight of the register loss", low=0, high=1, open_ends=True)


class MuToR1D(MuToR):
    """Registers that look 1 .. d_max tokens ahead along the raster."""

    Config = MuToR1DConfig


@dataclass(frozen=True)
class MuToR2DConfig(MuToR1DConfig):
    """Settings of MuToR on a grid: d_max counts rows and columns, the own one included (paper: 4)."""

    d_max: int = setting(
        4, doc="pairs (d_h, d_w) are from {1 .. d_max}^2 without (1, 1); in the own row d is 1 .. d_max - 1", low=2
    )

    def __post_init__(self) -> None:
        self._leave_out("in two dimensions", d_min=1, leap=1)
        if self.offsets == "all":
            raise ValueError("offsets: 'all' would be d_max^2 - 1 registers behind a token; allowed: sequence, mixed")
        super().__post_init__()

    @property
    def nearest(self) -> int:
        """The smallest grid of pairs, of which (1, 1) is none."""
        return 2


class MuToR2D(MuToR):
    """Registers that look ahead to the right and down."""

    Config = MuToR2DConfig

    def add_parameters(self) -> None:
        """As MuToR's; the model has to say how wide its grid is."""
        if not getattr(self.trunk.config, "columns", None):
            raise ValueError(f"{self.trunk.name}: mutor_2d needs a model of images, whose config has rows and columns")
        super().add_parameters()

    @property
    def different_offsets(self) -> int:
        """d_max^2 - 1 pairs."""
        return self.config.d_max**2 - 1

    @property
    def reach(self) -> range:
        """In its own row."""
        return range(1, self.config.d_max)

    def offsets(self, samples: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Each token's offset d = (d_h - 1) columns + d_w - 1, and the number of its pair."""
        from mutor.mtp.registers import grid_offsets

        config, columns, mixed = self.config, int(self.trunk.config.columns), self.config.offsets == "mixed"
        seed, reach = context.seed, config.reach(context.progress)
        return grid_offsets(samples, seed=seed, d_max=reach, columns=columns, mixed=mixed, largest=config.d_max)
