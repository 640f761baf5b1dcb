"""Losses over the rows that have a target, and a way to train many heads in the memory of one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mutor.mtp.layout import IGNORE

Criterion = Callable[[Tensor, Tensor], Tensor]  # (logits float32 [n, V], targets [n]) -> losses [n]


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """[n]: minus log probability, in nats, of each target id [n] under logits [n, V]."""
    return F.cross_entropy(logits, target, reduction="none")


@dataclass(frozen=True)
class LossTargets:
    """What one loss predicts: sum over its N targets of share x their loss, divided by count.

    index: int64 [N] where, in the flattened [B x L]; target: int64 [N] token ids, or [N, ...] whatever the criterion
    takes; share: float32 [N] what each counts for, 1, or 1 over its sequence's number of targets; count: int64 [] how
    many targets, or sequences, there are.
    Made on the CPU, so that no step waits for the device to say how many targets a batch has.
    """

    index: Tensor
    target: Tensor
    share: Tensor
    count: Tensor

    @classmethod
    def of(cls, target: Tensor, segment: Tensor, per_sequence: bool = False) -> "LossTargets":
        """The loss targets of int64 [B, L] (-100 for none); segment: [B, L] number of the sequence inside its row.

        per_sequence: a mean over tokens inside each sequence first, as in the published recipe.
        """
        index = (target != IGNORE).flatten().nonzero().squeeze(1)
        share, count = torch.ones(len(index), device=target.device), index.new_tensor(len(index))
        if per_sequence:
            row = torch.arange(target.shape[0], device=target.device)[:, None]
            sequence = (row * target.shape[1] + segment).flatten()[index]
            _, member, size = sequence.unique(return_inverse=True, return_counts=True)
            share, count = 1 / size[member].float(), index.new_tensor(len(size))
        return cls(index, target.flatten()[index], share, count)


def head_loss(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: LossTargets,
    vocabulary: int,
    criterion: Criterion = cross_entropy,
    *,
    max_logits: int | None = None,
) -> Tensor:
    """The loss of some targets, in float32, without ever holding all logits of a large vocabulary.

    head: [n, d] -> [n, V]; hidden: [B, L, d]; vocabulary: V. Beyond `max_logits` logits they are computed in parts, and
    again in the backward pass: the same values in the memory of one part. Without targets the loss is zero, and still
    part of the graph.
    """
    if max_logits is None:
        # a GPU reads the whole output layer for each part, so that they are larger there: 1 GB in float32
        max_logits = 2**28 if hidden.is_cuda else 2**25
    hidden = hidden.flatten(0, 1).index_select(0, targets.index)
    rows = max(1, max_logits // vocabulary)

    def part(some: Tensor, wanted: Tensor, share: Tensor) -> Tensor:
        return (criterion(head(some).float(), wanted) * share).sum()

    pieces = list(zip(*(values.split(rows) for values in (hidden, targets.target, targets.share)), strict=True))
    losses = [part(*p) if len(pieces) == 1 else checkpoint(part, *p, use_reentrant=False) for p in pieces]
    return torch.stack(losses).sum() / targets.count.clamp(min=1)


class _OneAtATime(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, losses: Sequence[Callable[[Tensor], Tensor]], hidden: Tensor, *parameters: Tensor) -> Tensor:
        values: list[Tensor] = []
        grads: list[Tensor | None] = [None] * (1 + len(parameters))
        for loss in losses:
            with torch.enable_grad():
                leaf = hidden.detach().requires_grad_()
                value = loss(leaf)
                got = torch.autograd.grad(value, (leaf, *parameters), allow_unused=True)
            values.append(value.detach())
            for i, g in enumerate(got):
                if g is not None:
                    so_far = grads[i]
                    grads[i] = g if so_far is None else so_far.add_(g)
            del value, got  # this head's graph is gone before the next is built
        ctx.grads = grads
        stacked = torch.stack(values)
        return torch.cat([stacked.mean(0, keepdim=True), stacked])

    @staticmethod
    def backward(ctx: Any, *grad: Any) -> tuple[Tensor | None, ...]:
        scale, grads, ctx.grads = grad[0], ctx.grads, None
        count = scale.numel() - 1
        return None, *(None if g is None else g * (scale[0] / count) for g in grads)


def one_at_a_time(
    losses: Sequence[Callable[[Tensor], Tensor]], hidden: Tensor, parameters: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """The mean of several losses of one hidden state, each run forward and backward alone.

    losses: K functions of `hidden` [B, L, d] to a scalar, reading nothing trainable but `parameters`. Returns (mean,
    to be differentiated; [K] the losses, detached). Gradients equal those of the plain mean, but only one loss's
    graph is alive at a time, so memory does not grow with K (Gloeckle et al. 2024, section 2). Where parameters are
    sharded over processes, it is the plain mean.
    """
    trainable = [p for p in parameters if p.requires_grad]
    if any(hasattr(p, "device_mesh") for p in trainable):  # FSDP: whole only while their layer runs, so not to be named
        together = torch.stack([loss(hidden) for loss in losses])
        return together.mean(), together.detach()
    if not (torch.is_grad_enabled() and (hidden.requires_grad or trainable)):
        values = torch.stack([loss(hidden).detach() for loss in losses])
        return values.mean(), values
    if not hidden.requires_grad:  # a frozen trunk under trainable heads
        hidden = hidden.detach().requires_grad_()
    out = _OneAtATime.apply(losses, hidden, *trainable)
    return out[0], out[1:].detach()
