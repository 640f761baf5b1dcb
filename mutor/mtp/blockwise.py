"""Attention at the cost of what is seen: two calls of a fused kernel and each register's own key, without a mask.

No token sees a register but the register itself. So attention falls apart:

    tokens     x tokens, causal                        -> out
    registers  x tokens, causal by their anchors       -> out_2, and the logsumexp of its scores, lse_2
    registers  x their own key:  s = scale q . k_own   -> lse = log(exp lse_2 + exp s),  w = exp(s - lse)
    a register's output  =  (1 - w) out_2 + w v_own

where a dense mask takes all pairs of all tokens. Gradients are exact: given the merged output and lse, the kernel's
own backward pass returns its block's share, as in ring attention (Liu et al., arXiv 2310.01889).

A model takes it by name, attn_implementation="blockwise", once this module is imported; `attach` sees to both. Its
mask is int32 [B, 1, L, 4], by `bounds_mask`. Without such a mask it is transformers' sdpa. It is sdpa with the same
rule as a dense mask where attention weights are dropped out, where keys and values differ in width, where there is
no kernel, and on a GPU where sequences of many lengths would take many small calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mutor.mtp.attention import bounds, dense
from mutor.mtp.kernels import Kernel, kernel_for
from mutor.mtp.layout import Layout

NAME = "blockwise"
FEW = 2  # groups of sequences that a GPU takes one after the other
ALIKE = 0.7  # sequences that share a call: the shortest has at least this share of the longest's tokens


def bounds_mask(layout: Layout, dtype: torch.dtype | None = None, window: int | None = None) -> Tensor:
    """int32 [B, 1, L, 4]: key, low and high of `bounds`, and the segment; four axes, so that models hand it through."""
    return torch.stack([*bounds(layout, window), layout.segment.int()], -1)[:, None]


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' attention function: query [B, H, L, D], key and value [B, H_kv, L, D] to [B, L, H, D].

    Raises ValueError for capped scores and for sinks.
    """
    if attention_mask is None or attention_mask.dtype != torch.int32:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return out, None
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise ValueError(f"attention: {NAME!r} can't do {name!r} of {type(module).__name__}; allowed: eager")
    if torch.is_autocast_enabled(query.device.type):  # which casts what sdpa is given, but knows no kernel's name
        query, key, value = (x.to(torch.get_autocast_dtype(x.device.type)) for x in (query, key, value))
    kernel = kernel_for(query.device, query.dtype, query.shape[-1])
    whole = not kwargs.get("dropout") and query.shape[-1] == value.shape[-1]
    plan = planned(attention_mask) if kernel and whole else None
    if kernel is None or plan is None or not plan.fits(kernel):
        out, _ = sdpa_attention_forward(module, query, key, value, _dense(attention_mask), **kwargs)
        return out, None
    if plan.plain:
        out, _ = sdpa_attention_forward(module, query, key, value, None, **{**kwargs, "is_causal": True})
        return out, None
    scale = kwargs.get("scaling")
    return _Blockwise.apply(query, key, value, plan, kernel, query.shape[-1] ** -0.5 if scale is None else scale), None


def _dense(mask: Tensor) -> Tensor:
    """bool [B, 1, L, L], made once for all layers: the same tensor reaches them all."""
    if not hasattr(mask, "dense"):
        mask.dense = dense(*mask[:, 0, :, :3].unbind(-1))  # type: ignore[attr-defined]
    found: Tensor = mask.dense  # type: ignore[attr-defined]
    return found


def planned(mask: Tensor) -> Plan | None:
    """The plan of a mask from `bounds_mask`, made once for all layers; None where a register sees no token."""
    if not hasattr(mask, "plan"):
        mask.plan = Plan.of(mask)  # type: ignore[attr-defined]
    found: Plan | None = mask.plan  # type: ignore[attr-defined]
    return found


@dataclass(frozen=True)
class Places:
    """Places of a batch [B, L] as n rows of m: `index` int64 [n, m] into the flattened [B x L].

    real: bool [n, m], None for all of them; a place that is not real stands in for one that is missing. start: they are
    columns start .. start + m - 1 of all rows, and padding where they are not real, so that a view does.
    """

    index: Tensor
    real: Tensor | None
    start: int | None

    @classmethod
    def of(cls, index: Tensor, real: Tensor, there: Tensor) -> Places:
        """there: bool [B, L], False for padding."""
        (batch, length), (rows, many) = there.shape, index.shape
        whole, start = bool(real.all()), None
        first = int(index[real][0]) % length - int(real[real.any(1)][0].int().argmax())
        if rows == batch and 0 <= first <= length - many:
            columns = torch.arange(first, first + many) + length * torch.arange(batch)[:, None]
            if bool(torch.where(real, index == columns, ~there[:, first : first + many]).all()):
                index, start = columns, first
        return cls(index, None if whole else real, start)

    def to(self, device: torch.device) -> Places:
        """The same on another device."""
        return Places(self.index.to(device), None if self.real is None else self.real.to(device), self.start)

    def take(self, values: Tensor) -> Tensor:
        """[B, H, L, D] -> [n, H, m, D]."""
        if self.start is not None:
            return values[:, :, self.start : self.start + self.index.shape[1]]
        picked = values.transpose(1, 2).flatten(0, 1).index_select(0, self.index.flatten())
        return picked.unflatten(0, self.index.shape).transpose(1, 2)

    def take_gradient(self, values: Tensor) -> Tensor:
        """As `take`, with zeros at places that are not real."""
        taken = self.take(values)
        return taken if self.real is None else taken.masked_fill(~self.real[:, None, :, None], 0)

    def copy(self, values: Tensor, out: Tensor) -> None:
        """[n, H, m, D] to the real places of out, [B, L, H, D], and maybe to padding."""
        values = values.transpose(1, 2)
        if self.start is not None:
            out[:, self.start : self.start + self.index.shape[1]] = values
        elif self.real is None:
            out.view(-1, *out.shape[2:]).index_copy_(0, self.index.flatten(), values.flatten(0, 1))
        else:
            out.view(-1, *out.shape[2:]).index_copy_(0, self.index[self.real], values[self.real])

    def put(self, function: Callable[..., Tensor], out: Tensor, *arguments: Tensor) -> None:
        """What a function gives of [n, H_kv, queries a key, m, D] to where `copy` copies; out may have H_kv heads."""
        heads = (max(x.shape[1] for x in arguments), -1)
        if self.start is not None and out.shape[2] == heads[0] * arguments[-1].shape[2]:
            place = out[:, self.start : self.start + self.index.shape[1]].transpose(1, 2).unflatten(1, heads)
            function(*arguments, out=place)
            return
        values = function(*arguments)
        shared = out.shape[2] == heads[0]
        self.copy((values.sum(2) if shared else values.flatten(1, 2)).to(out.dtype), out)


@dataclass(frozen=True)
class Group:
    """Sequences of about equal length: their tokens in order, their registers, and who sees whom.

    sees, registers_see: bool [n, 1, m, T] for the kernel's mask; None: causal, and the registers that see up to the
    i-th token stand in row i. registers: None where there are none.
    """

    tokens: Places
    sees: Tensor | None
    registers: Places | None = None
    registers_see: Tensor | None = None
    added: dict[torch.dtype, tuple[Tensor | None, Tensor | None]] = field(default_factory=dict)

    def to(self, device: torch.device) -> Group:
        """The same on another device."""
        return Group(*(None if part is None else part.to(device) for part in self._parts()))  # type: ignore[arg-type]

    def _parts(self) -> tuple[Places | Tensor | None, ...]:
        return self.tokens, self.sees, self.registers, self.registers_see

    @property
    def seen(self) -> int | None:
        """How many tokens of each sequence registers see at most, where they are causal."""
        assert self.registers is not None
        return self.registers.index.shape[1] if self.registers_see is None else None

    def masks(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """Both as numbers to add to scores, made once for all layers."""
        if dtype not in self.added:
            self.added[dtype] = (_to_add(self.sees, dtype), _to_add(self.registers_see, dtype))
        return self.added[dtype]


def _to_add(sees: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if sees is None:
        return None
    return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill_(~sees, -torch.inf)


@dataclass(frozen=True)
class Plan:
    """How a batch goes through the kernel. padded: some places are in no sequence; masked: some group has a mask."""

    groups: list[Group]
    padded: bool
    masked: bool

    def fits(self, kernel: Kernel) -> bool:
        """Whether the kernel does it: without masks, in few calls. Many take longer than a dense mask."""
        return kernel.takes_masks or (not self.masked and len(self.groups) <= FEW)

    @property
    def plain(self) -> bool:
        """Whether all of it is causal attention over whole rows, with padding behind them or none."""
        first = self.groups[0]
        return len(self.groups) == 1 and first.registers is None and first.sees is None and first.tokens.start == 0

    def new(self, like: Tensor) -> Tensor:
        """[B, L, H, D] to be filled, with zeros where there is padding; like: [B, H, L, D]."""
        batch, heads, length, width = like.shape
        make = torch.zeros if self.padded else torch.empty
        return make(batch, length, heads, width, dtype=like.dtype, device=like.device)

    @classmethod
    def of(cls, mask: Tensor) -> Plan | None:
        """From `bounds_mask`. It is made on the CPU, so that a GPU waits for it once a step."""
        shape = (mask.shape[0], mask.shape[2])
        key, low, high, segment = (part.flatten() for part in mask[:, 0].cpu().long().unbind(-1))
        row = torch.arange(shape[0]).repeat_interleave(shape[1])
        there = segment >= 0
        names, number = torch.where(there, row * shape[1] + segment, -1).unique(return_inverse=True)
        padded = not bool(there.all())
        number, count = number - int(padded), len(names) - int(padded)
        if not count:
            return None
        tokens = _Listed.of(there & (key >= 0), key, number, count)
        registers = _Listed.of(there & (key < 0), high, number, count)
        if int(tokens.many.min()) == 0 or bool((high < low)[registers.at].any()):
            return None
        bound, real = (key, low, high), there.view(shape)
        # without registers, rows of one sequence each need no copies, whatever their lengths
        whole = count == shape[0] and not len(registers.at)
        together = [torch.arange(count)] if whole else _alike(tokens.many)
        groups = [_group(tokens, registers, some, bound, real) for some in together]
        masked = any(group.sees is not None or group.registers_see is not None for group in groups)
        return cls([group.to(mask.device) for group in groups], padded, masked)


@dataclass(frozen=True)
class _Listed:
    """Some places, sequence by sequence, in order inside of it; many, start: [N] of each sequence in that list."""

    at: Tensor
    many: Tensor
    start: Tensor

    @classmethod
    def of(cls, which: Tensor, order: Tensor, sequence: Tensor, count: int) -> _Listed:
        at = which.nonzero()[:, 0]
        at = at[order[at].argsort(stable=True)]
        at = at[sequence[at].argsort(stable=True)]
        many = sequence[at].bincount(minlength=count)
        return cls(at, many, many.cumsum(0) - many)

    def rows(self, some: Tensor, instead: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Places of some sequences as rows [n, m], and which are real; instead: [n, 1] what is repeated, else the
        first."""
        column = torch.arange(int(self.many[some].max()))
        real = column < self.many[some, None]
        index = self.at[(self.start[some, None] + column).clamp(max=len(self.at) - 1)]
        return torch.where(real, index, index[:, :1] if instead is None else instead), real


def _alike(many: Tensor) -> Iterator[Tensor]:
    """Numbers of sequences that go together, in order; many: tokens of each."""
    order = many.argsort(descending=True, stable=True)
    while len(order):
        together = many[order] >= ALIKE * many[order[0]]
        yield order[together].sort().values
        order = order[~together]


def _group(
    tokens: _Listed, registers: _Listed, some: Tensor, bound: tuple[Tensor, Tensor, Tensor], inside: Tensor
) -> Group:
    key, low, high = bound
    at, real = tokens.rows(some)
    keys = key[at].masked_fill(~real, -1)

    def sees(queries: Tensor) -> Tensor:
        return ((low[queries][..., None] <= keys[:, None]) & (keys[:, None] <= high[queries][..., None]))[:, None]

    def from_first(queries: Tensor) -> Tensor:
        return low[queries] <= keys[:, :1]

    causal = bool((~real | (from_first(at) & (high[at] == key[at]))).all())
    group = (Places.of(at, real, inside), None if causal else sees(at))
    if not int(registers.many[some].max()):
        return Group(*group)
    own, there = registers.rows(some, at[:, :1])
    anchor = torch.searchsorted(keys.masked_fill(~real, 2**40), high[own], right=True) - 1
    one_each = bool((~there[:, 1:] | (anchor[:, 1:] > anchor[:, :-1])).all())
    rows = int(anchor[there].max()) + 1
    if not (one_each and bool((~there | from_first(own)).all()) and rows <= 2 * own.shape[1]):
        return Group(*group, Places.of(own, there, inside), sees(own))
    index, filled = at[:, :rows].clone(), torch.zeros(len(at), rows, dtype=torch.bool)
    line = torch.arange(len(at))[:, None].expand_as(own)[there]
    index[line, anchor[there]], filled[line, anchor[there]] = own[there], True
    return Group(*group, Places.of(index, filled, inside))


class _Blockwise(torch.autograd.Function):
    """[B, H, L, D], [B, H_kv, L, D] twice -> [B, L, H, D]."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: Plan, kernel: Kernel, scale: float
    ) -> Tensor:
        out = plan.new(query)
        kept: list[Tensor] = []
        ctx.states = []
        for group in plan.groups:
            (mask, registers_mask), tokens, own = group.masks(query.dtype), group.tokens, group.registers
            k, v = tokens.take(key), tokens.take(value)
            part, lse, state = kernel.forward(tokens.take(query), k, v, mask, scale)
            tokens.copy(part, out)
            kept.append(lse)
            ctx.states.append(state)
            if own is None:
                continue
            q, seen = own.take(query), group.seen
            part, lse, state = kernel.forward(q, k[:, :, :seen], v[:, :, :seen], registers_mask, scale)
            k, v = own.take(key)[:, :, None], own.take(value)[:, :, None]
            heads = (key.shape[1], -1)  # those that share a key
            score = (q.unflatten(1, heads).to(lse.dtype) * k).sum(-1) * scale
            lse = lse.unflatten(1, heads)
            merged = torch.logaddexp(lse, score)
            weight = (score - merged).exp()
            own.put(torch.lerp, out, part.unflatten(1, heads), v, weight[..., None].to(part.dtype))
            kept += [merged.flatten(1, 2), weight]
            ctx.states.append(state)
        ctx.save_for_backward(query, key, value, out, *kept)
        ctx.plan, ctx.kernel, ctx.scale = plan, kernel, scale
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, *saved = ctx.saved_tensors
        plan, backward, scale = ctx.plan, ctx.kernel.backward, ctx.scale
        gradient, out = gradients[0].transpose(1, 2), out.transpose(1, 2)
        d_query, d_key, d_value = (plan.new(x) for x in (query, key, value))
        kept, states = iter(saved), iter(ctx.states)
        for group in plan.groups:
            (mask, registers_mask), tokens, own = group.masks(query.dtype), group.tokens, group.registers
            q, k, v = (tokens.take(x) for x in (query, key, value))
            g, o = tokens.take_gradient(gradient), tokens.take(out)
            dq, dk, dv = backward(g, q, k, v, o, next(kept), next(states), mask, scale)
            tokens.copy(dq, d_query)
            if own is not None:
                merged, weight, seen = next(kept), next(kept)[..., None], group.seen
                q, g, o = own.take(query), own.take_gradient(gradient), own.take(out)
                k, v = k[:, :, :seen], v[:, :, :seen]
                dq, more_dk, more_dv = backward(g, q, k, v, o, merged, next(states), registers_mask, scale)
                dk[:, :, :seen] += more_dk
                dv[:, :, :seen] += more_dv
                # the rest passes the registers' own keys and values
                heads, k, v = (key.shape[1], -1), own.take(key)[:, :, None], own.take(value)[:, :, None]
                q, g, o, dq = (x.unflatten(1, heads) for x in (q, g, o, dq))
                share = (g * (v - o).to(weight.dtype)).sum(-1, keepdim=True) * (weight * scale)
                own.put(torch.addcmul, d_query, dq, share.to(dq.dtype), k)
                own.put(torch.mul, d_key, share, q)
                own.put(torch.mul, d_value, weight, g)
            tokens.copy(dk, d_key)
            tokens.copy(dv, d_value)
        return d_query.transpose(1, 2), d_key.transpose(1, 2), d_value.transpose(1, 2), None, None, None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
