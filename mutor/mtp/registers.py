"""Where registers stand and what they predict: pure tensor functions.

Paper, section 3. Tokens x_1 .. x_T; a register behind x_t with offset d predicts x_(t+d) from position id
t + d - 1. Indices below count from 0, so the register behind `ids[p]` has target `ids[p + d]` and position
`position[p] + d - 1`:

    index         0  1  2  3  4  5
    ids           Q  Q  A  B  C  D        prefix Q Q, answer A B C D
    register         r  r  r  r           behind the last prefix token .. the last but one answer token
    target d=2       B  C  D  -           "-": runs past the end, the register is left out
    position d=2     2  3  4  -
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from mutor.streams import Stream, stream

_BLOCK = 4096


@lru_cache(maxsize=8)
def _block(name: Stream, seed: int, block: int) -> np.ndarray:
    return stream(name, seed, block).random(_BLOCK)


def uniform(name: Stream, seed: int, samples: Tensor) -> Tensor:
    """Numbers in [0, 1), one for each sample: a function of (name, seed, sample) alone.

    samples: int64 tensor of any shape, numbers of samples, counted over the whole run. Returns float64 of the same
    shape, on the CPU.
    Never touches a global generator, so a resumed or re-batched run draws the same numbers.
    """
    flat = samples.reshape(-1).cpu().numpy()
    out = np.empty(flat.shape)
    for block in np.unique(flat // _BLOCK):
        rows = flat // _BLOCK == block
        out[rows] = _block(name, seed, int(block))[flat[rows] % _BLOCK]
    return torch.from_numpy(out).view(samples.shape)


def offsets(samples: Tensor, *, seed: int, d_min: int, d_max: int, mixed: bool = False, leap: int = 1) -> Tensor:
    """Offsets drawn uniformly from {d_min, d_min + leap .. d_max}.

    samples: [B, T] the number of the sample that each token belongs to. Returns int64 [B, T]: one draw per
    sample, or one per token of a sample with `mixed` (paper, section 3: allowed, not used there).
    """
    if mixed:
        u = _per_token("offset_of_token", seed, samples)
    else:
        u = uniform("offset", seed, samples)
    return d_min + leap * (u * ((d_max - d_min) // leap + 1)).long()


def grid_offsets(
    samples: Tensor, *, seed: int, d_max: int, columns: int, mixed: bool = False, largest: int = 0
) -> tuple[Tensor, Tensor]:
    """Two-dimensional offsets: a pair (d_h, d_w) drawn uniformly from {1 .. d_max}^2 without (1, 1).

    On a grid of `columns` columns, read row by row, a pair is the plain offset d = (d_h - 1) columns + d_w - 1: near
    the right border it runs on into the next row, as published. Returns (d, number of the pair from 0), int64 [B, T].
    largest: the d_max whose pairs are numbered, where a schedule draws from fewer.
    """
    number = offsets(samples, seed=seed, d_min=1, d_max=d_max**2 - 1, mixed=mixed)
    down, right = number // d_max, number % d_max
    return down * columns + right, down * max(d_max, largest) + right - 1


def _per_token(name: Stream, seed: int, samples: Tensor) -> Tensor:
    """float64 [B, T]: the k-th token of sample c gets the k-th number of a generator of its own."""
    out = torch.empty(samples.shape, dtype=torch.float64)
    for row, line in enumerate(samples.tolist()):
        for c in sorted(set(line)):
            at = [i for i, value in enumerate(line) if value == c]
            numbers = stream(name, seed, c).random(len(at))
            out[row, at] = torch.from_numpy(numbers)
    return out


def anchors(segment: Tensor, is_target: Tensor) -> Tensor:
    """bool [B, T]: behind which tokens a register may stand, which is where an answer token is predicted next.

    segment: [B, T] number of the sequence that a token belongs to, -1 for padding. is_target: bool [B, T].
    """
    out = torch.zeros_like(is_target)
    out[:, :-1] = is_target[:, 1:] & (segment[:, 1:] == segment[:, :-1]) & (segment[:, 1:] >= 0)
    return out


def placed(anchor: Tensor, segment: Tensor, samples: Tensor, *, placement: str, registers: int, seed: int) -> Tensor:
    """bool [B, T]: the anchors that keep their register.

    placement "all": every one. "every": every `registers`-th of a sequence, its first included (the rebuttal's
    sparse registers with 2). "random": `registers` random ones of each sequence, drawn anew for each sample.
    """
    if placement == "all":
        return anchor
    out = torch.zeros_like(anchor)
    score = _per_token("placement", seed, samples) if placement == "random" else None
    for row in range(anchor.shape[0]):
        for number in segment[row][anchor[row]].unique():
            at = torch.nonzero(anchor[row] & (segment[row] == number)).squeeze(1)
            if score is None:
                out[row, at[::registers]] = True
            else:
                out[row, at[score[row, at].argsort()[:registers]]] = True
    return out


def targets(ids: Tensor, segment: Tensor, is_target: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """What a register behind each token would predict.

    offset: int64 [B, T]. Returns (target ids [B, T], bool [B, T] whether that target exists): it does where the
    token `offset` further on is an answer token of the same sequence.
    """
    length = ids.shape[1]
    index = torch.arange(length) + offset
    inside = index < length
    index = index.clamp(max=length - 1)
    exists = inside & (segment.gather(1, index) == segment) & is_target.gather(1, index) & (segment >= 0)
    return ids.gather(1, index), exists
