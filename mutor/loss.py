"""Losses over the rows that have a target, and a way to train many heads in the memory of one."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def mean_loss(logits: Tensor, target: Tensor, group: Tensor | None = None) -> Tensor:
    """Cross entropy in float32, a mean over tokens; or, with `group`, over tokens inside each sequence first.

    logits: [N, V]; target: int64 [N]; group: int64 [N] number of the sequence a token belongs to (the published
    recipe averages inside each sequence, then over sequences). Zero where N is 0, still part of the graph.
    """
    if target.numel() == 0:
        return logits.sum() * 0.0
    if group is None:
        return F.cross_entropy(logits.float(), target)
    return _grouped(F.cross_entropy(logits.float(), target, reduction="none"), group)


def _grouped(loss: Tensor, group: Tensor) -> Tensor:
    _, member, size = group.unique(return_inverse=True, return_counts=True)
    return (loss / size[member]).sum() / size.numel()


def head_loss(
    head: Callable[[Tensor], Tensor], hidden: Tensor, target: Tensor, vocabulary: int, group: Tensor | None = None,
    *, most: int = 2**25,
) -> Tensor:  # fmt: skip
    """`mean_loss` of an output layer on hidden states, without ever holding all logits of a large vocabulary.

    head: [n, d] -> [n, V]; hidden: [N, d]; target, group: int64 [N]. Beyond `most` logits (64 million bytes in bf16)
    they are computed in parts, and again in the backward pass: the same values in the memory of one part.
    """
    rows = max(1, most // vocabulary)
    if len(hidden) <= rows:
        return mean_loss(head(hidden), target, group)

    def part(some: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(head(some).float(), wanted, reduction="none")

    pairs = zip(hidden.split(rows), target.split(rows), strict=True)
    loss = torch.cat([checkpoint(part, some, wanted, use_reentrant=False) for some, wanted in pairs])
    return loss.mean() if group is None else _grouped(loss, group)


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
    graph is alive at a time, so memory does not grow with K (Gloeckle et al. 2024, section 2).
    """
    trainable = [p for p in parameters if p.requires_grad]
    if not (torch.is_grad_enabled() and (hidden.requires_grad or trainable)):
        values = torch.stack([loss(hidden).detach() for loss in losses])
        return values.mean(), values
    if not hidden.requires_grad:  # a frozen trunk under trainable heads
        hidden = hidden.detach().requires_grad_()
    out = _OneAtATime.apply(losses, hidden, *trainable)
    return out[0], out[1:].detach()
