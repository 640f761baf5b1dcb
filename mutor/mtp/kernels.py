"""Fused attention kernels of torch that also return the logsumexp of the scores, and take another one backwards."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ATEN = torch.ops.aten


@dataclass(frozen=True)
class Kernel:
    """forward: query [n, H, m, D], key and value [n, H_kv, T, D], mask [n, 1, m, T] to add, or None: causal from the
    upper left, scale -> out [n, H, m, D], logsumexp [n, H, m], and what `backward` wants to have back.

    backward: gradient of out, query, key, value, out, logsumexp, that, mask, scale -> gradients of the three. It takes
    any out and logsumexp, and returns the share of the keys that it is given.
    """

    forward: Callable[..., tuple[Tensor, Tensor, Any]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    takes_masks: bool


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor, Any]:
    flash = ATEN._scaled_dot_product_flash_attention_for_cpu
    out, lse = flash(q, k, v, 0.0, mask is None, attn_mask=mask, scale=scale)
    return out, lse, None


def _cpu_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, state: Any, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    flash = ATEN._scaled_dot_product_flash_attention_for_cpu_backward
    found: tuple[Tensor, Tensor, Tensor] = flash(g, q, k, v, out, lse, 0.0, mask is None, attn_mask=mask, scale=scale)
    return found


def _cuda_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor, Any]:
    out, lse, *state, _ = ATEN._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False, scale=scale)
    return out, lse, state


def _cuda_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, state: Any, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    (q_starts, k_starts, q_longest, k_longest, seed, offset) = state
    flash = ATEN._scaled_dot_product_flash_attention_backward
    found: tuple[Tensor, Tensor, Tensor] = flash(
        g, q, k, v, out, lse, q_starts, k_starts, q_longest, k_longest, 0.0, True, seed, offset, scale=scale
    )
    return found


KERNELS = {
    "cpu": Kernel(_cpu_forward, _cpu_backward, takes_masks=True),
    "cuda": Kernel(_cuda_forward, _cuda_backward, takes_masks=False),
}


@functools.cache
def kernel_for(device: torch.device, dtype: torch.dtype, width: int) -> Kernel | None:
    """The kernel for heads of this width, where there is one that is right: each is tried on a small case first."""
    kernel = KERNELS.get(device.type)
    if kernel is None:
        return None
    try:
        wrong = "its gradients are wrong" if not _right(kernel, device, dtype, width) else ""
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        wrong = str(error).splitlines()[0]
    if wrong:
        logging.getLogger(__name__).warning(
            "attention: no fused kernel on %s for %s, heads of %d (%s); a dense mask is used",
            device,
            dtype,
            width,
            wrong,
        )
        return None
    return kernel


def _right(kernel: Kernel, device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether a block of 16 keys of 17, merged with the last one, has the gradients of plain arithmetic."""
    cpu = torch.Generator().manual_seed(0)
    q, k, v, g = (torch.randn(1, heads, 16, width, generator=cpu).to(device, dtype) for heads in (2, 1, 1, 2))
    more_k, more_v = (torch.randn(1, 1, 16, width, generator=cpu).to(device, dtype) for _ in range(2))
    wide = [x.double() for x in (q, k, v)]
    scale, seen = width**-0.5, torch.ones(16, 16, device=device).tril().bool()
    scores = (wide[0] @ wide[1].transpose(-1, -2) * scale).masked_fill(~seen, -torch.inf)
    own = (wide[0] * more_k.double()).sum(-1, keepdim=True) * scale
    share = torch.cat([scores, own], -1).softmax(-1)
    merged = share[..., :-1] @ wide[2] + share[..., -1:] * more_v.double()
    total = torch.cat([scores, own], -1).logsumexp(-1)
    # the block's own share: the gradient that does not pass the last key
    delta = (g.double() * merged).sum(-1, keepdim=True)
    d_scores = share[..., :-1] * (g.double() @ wide[2].transpose(-1, -2) - delta) * scale
    wanted = (
        d_scores @ wide[1],
        (d_scores.transpose(-1, -2) @ wide[0]).sum(1, keepdim=True),
        (share[..., :-1].transpose(-1, -2) @ g.double()).sum(1, keepdim=True),
    )
    out, lse, state = kernel.forward(q, k, v, None, scale)
    plain = scores.softmax(-1) @ wide[2]
    found = kernel.backward(g, q, k, v, merged.to(dtype), total.to(lse.dtype), state, None, scale)
    near = 5e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-3
    pairs = zip((out, lse, *found), (plain, scores.logsumexp(-1), *wanted), strict=True)
    return all(torch.allclose(a.double(), b, rtol=near, atol=near) for a, b in pairs)
