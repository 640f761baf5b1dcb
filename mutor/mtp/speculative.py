"""The loop of speculative decoding: passes that verify drafts, and what is kept of them. mutor/decode.py says how."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mutor.mtp.backbone import Backbone
from mutor.mtp.drafts import Beside, Drafter, Step
from mutor.mtp.passes import BackboneOutput
from mutor.mtp.slots import Slots


@dataclass(frozen=True)
class Choice:
    """How tokens are chosen of logits, and when a text ends.

    temperature: 0 is greedy; process: text int64 [1, t] and logits float32 [1, V] to other logits; ends: tokens that
    end a text; stop: whether a text, int64 [1, t], ends.
    """

    temperature: float = 0.0
    seed: int = 0
    process: Callable[[Tensor, Tensor], Tensor] | None = None
    ends: tuple[int, ...] = ()
    stop: Callable[[Tensor], bool] | None = None


class Loop:
    """One batch of texts, each row at its own place.

    text: int64 [B, slots] prompts, new tokens and drafts; last: int64 [B] the slot of the newest token that stands in
    the caches, behind which `text` has one more; rows: which prompt each row is; ids: of each prompt its new tokens,
    when it has ended; accepted: of each prompt how many drafts each pass kept; passes: forward passes so far.
    """

    def __init__(
        self,
        model: Any,
        trunk: Backbone | None,
        drafter: Drafter | None,
        prompts: list[Tensor],
        new_tokens: int,
        *,
        draft: int,
        prefix_lm: bool,
        choice: Choice,
    ):
        """trunk: of the method whose drafter needs hidden states; draft: tokens that are proposed in each pass."""
        self.model, self.trunk, self.drafter, self.choice = model, trunk, drafter, choice
        self.config, self.device = model.config.get_text_config(), model.device
        self.new_tokens, self.k = new_tokens, draft
        registers = drafter.registers if drafter else ()
        self.registers = self._numbers(number for number, _ in registers)
        self.distance = self._numbers(distance for _, distance in registers)
        self.sizes, longest = [len(prompt) for prompt in prompts], max(map(len, prompts))
        # a row that ends may have got a whole pass too many, with drafts behind it
        capacity = longest + new_tokens + (draft + 1) * (2 + len(registers))
        prefix = self._numbers(size if prefix_lm else 0 for size in self.sizes)
        self.slots = Slots(prefix, capacity, self.config, model.dtype)
        self.cache, self.beside = self.slots.cache(), Beside(self.slots, drafter) if drafter else None
        self.text = torch.zeros(len(prompts), capacity, dtype=torch.long, device=self.device)
        for row, prompt in enumerate(prompts):
            self.text[row, : len(prompt)] = prompt
        self.last, self.furthest = self._numbers(size - 1 for size in self.sizes), longest - 1
        self.rows, self.columns = list(range(len(prompts))), torch.arange(draft + 1, device=self.device)
        self.drafts, self.drawn_from = self.text[:, :0], list[Tensor]()
        self.ids, self.accepted = [prompt[:0] for prompt in prompts], [list[int]() for _ in prompts]
        self.passes = 0
        self.generator = torch.Generator(self.device).manual_seed(choice.seed)

    def _numbers(self, values: Iterable[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.long, device=self.device)

    def run(self) -> None:
        """Until all texts have ended."""
        self._pass(torch.arange(self.furthest + 1, device=self.device).expand(len(self.rows), -1), self.last)
        while self.rows:
            self._pass(self.last[:, None] + 1 + self.columns)

    def _pass(self, at: Tensor, ends: Tensor | None = None) -> None:
        """Feed the text at the slots `at`, int64 [B, n]; keep the drafts that are right, and make new ones.

        ends: int64 [B] the last token of each prompt, where prompts are fed; else the token that is known, and drafts.
        """
        out, logits = self.step(at, at.shape[1] if ends is not None else self.furthest + 2 + self.k, ends)
        kept, following = self._verify(logits, at if ends is None else ends[:, None])
        column = kept if ends is None else ends
        self.last = at[:, 0] + column
        self.text.scatter_(1, self.last[:, None] + 1, following[:, None])
        left = self._count(kept)
        if not left:
            self.rows = []
            return
        if self.drafter and self.beside:
            self._draft(self.drafter, self.beside, out, at, column, kept)
        if len(left) < len(self.rows):
            self._select(left)

    def step(self, at: Tensor, end: int, ends: Tensor | None = None) -> tuple[BackboneOutput | None, Tensor]:
        """One pass of the model; its hidden states, where they are needed, and logits float32 [B, 1 + drafts, V].

        at: int64 [B, n] slots of what is fed; end: the first slot behind all of them; ends: as in `_pass`.
        """
        ids, position, mask = self.text.gather(1, at), at, None
        if len(self.registers):
            anchors = (at if ends is None else ends[:, None])[..., None]
            shape = (*anchors.shape[:2], len(self.registers))
            behind = at[:, -1:] + 1 + torch.arange(shape[1] * shape[2], device=self.device)
            ids = torch.cat([ids, self.registers.expand(shape).flatten(1)], 1)
            position = torch.cat([at, (anchors + self.distance - 1).flatten(1)], 1)
            keys = torch.arange(end + behind.shape[1], device=self.device)
            limit = anchors.expand(shape).flatten(1)[..., None]
            seen = self.slots.sees(at, len(keys))
            mask = self.slots.as_taken(torch.cat([seen, (keys <= limit) | (keys == behind[..., None])], 1))
            self.slots.place(torch.cat([at, behind], 1), len(keys))
        else:
            if at.shape != (1, 1):  # one token sees all there is, as without a mask, which is faster
                mask = self.slots.mask(at, end)
            self.slots.place(at, end)
        room = self.config.max_position_embeddings
        if end + self.k >= room:
            position = position.clamp(max=room - 1)  # beyond are drafts of no use
        asked, column = (self.columns, None) if ends is None else ends.unique(return_inverse=True)
        inputs = {
            "input_ids": ids,
            "position_ids": position,
            "attention_mask": mask,
            "past_key_values": self.cache,
            "use_cache": True,
            "logits_to_keep": asked,
        }
        if self.trunk is None:
            out, logits = None, self.model(**inputs).logits
        else:
            out = self.trunk.run(self.model, all_states=bool(self.drafter and self.drafter.all_states), **inputs)
            logits = out.logits
        if column is not None:
            logits = logits[torch.arange(len(at), device=self.device), column][:, None]
        return out, logits.float()

    def _likely(self, logits: Tensor, slot: Tensor) -> Tensor:
        """Logits [B, V] behind the text up to the slots [B], processed; as probabilities where tokens are drawn."""
        if self.choice.process is not None:
            texts = (self.text[row : row + 1, : end + 1] for row, end in enumerate(slot.tolist()))
            process = self.choice.process
            logits = torch.cat([process(text, one) for text, one in zip(texts, logits.split(1), strict=True)])
        return (logits / self.choice.temperature).softmax(-1) if self.choice.temperature else logits

    def _verify(self, logits: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """How many drafts are kept, int64 [B], and the token behind them, int64 [B]; slots: int64 [B, 1 + drafts]."""
        drafts, rows = self.drafts, torch.arange(len(logits), device=self.device)
        likely = logits
        if self.choice.process or self.choice.temperature:
            likely = torch.stack([self._likely(logits[:, n], slots[:, n]) for n in range(logits.shape[1])], 1)
        if not self.choice.temperature:
            chosen = likely.argmax(-1)
            kept = (chosen[:, :-1] == drafts).long().cumprod(1).sum(1)
            return kept, chosen[rows, kept]
        if not drafts.shape[1]:
            return torch.zeros_like(rows), self._draw(likely[:, 0])
        proposed = drafts.clamp(min=0)[..., None]
        if self.drawn_from:
            source = torch.stack(self.drawn_from, 1)
        else:  # drafts that were not drawn are certain of themselves
            source = torch.zeros_like(likely[:, 1:]).scatter_(2, proposed, (drafts >= 0).float()[..., None])
        chance = likely[:, :-1].gather(2, proposed)[..., 0] / source.gather(2, proposed)[..., 0].clamp(min=1e-30)
        lot = torch.rand(drafts.shape, generator=self.generator, device=self.device)
        kept = ((lot < chance) & (drafts >= 0)).long().cumprod(1).sum(1)
        source = torch.cat([source, torch.zeros_like(source[:, :1])], 1)  # behind all drafts nothing was proposed
        rest = (likely[rows, kept] - source[rows, kept]).clamp(min=0)
        left = rest.sum(-1, keepdim=True) > 0  # else nothing but rounding is between the two
        return kept, self._draw(torch.where(left, rest, likely[rows, kept]))

    def _draw(self, likely: Tensor) -> Tensor:
        return torch.multinomial(likely, 1, generator=self.generator)[:, 0]

    def _count(self, kept: Tensor) -> list[int]:
        """Note what is new of each row, up to its end; the rows that go on."""
        start = self.last - kept + 1
        new = self.text.gather(1, start[:, None] + self.columns)
        left, furthest = [], 0
        for row, (first, many, *tokens) in enumerate(torch.cat([start[:, None], kept[:, None] + 1, new], 1).tolist()):
            prompt = self.rows[row]
            size, last = self.sizes[prompt], first + many - 2
            many = min(many, size + self.new_tokens - first)
            end = next((n for n in range(1, many + 1) if self._ends(row, first + n, tokens[n - 1])), None)
            if self.passes:
                self.accepted[prompt].append((end or many) - 1)
            if end or first + many == size + self.new_tokens:
                self.ids[prompt] = self.text[row, size : first + (end or many)].clone()
            else:
                left.append(row)
                furthest = max(furthest, last)
        self.passes, self.furthest = self.passes + 1, furthest
        return left

    def _ends(self, row: int, length: int, token: int) -> bool:
        stop = self.choice.stop
        return token in self.choice.ends or (stop is not None and stop(self.text[row : row + 1, :length]))

    def _draft(
        self, drafter: Drafter, beside: Beside, out: BackboneOutput | None, at: Tensor, column: Tensor, kept: Tensor
    ) -> None:
        """Drafts of the tokens behind the next; column: int64 [B] where t stands among those fed."""
        self.drafts, self.drawn_from = self.text.new_full((len(at), self.k), -1), []
        rows, made = torch.arange(len(at), device=self.device), 0

        def put(ids: Tensor) -> None:
            nonlocal made
            count = ids.shape[1]
            self.drafts[:, made : made + count] = ids
            slot = self.last[:, None] + 2 + made + torch.arange(count, device=self.device)
            self.text.scatter_(1, slot, ids.clamp(min=0))
            made += count

        def choose(logits: Tensor) -> Tensor:
            likely = self._likely(logits.float(), self.last + 1 + made)
            if self.choice.temperature:
                self.drawn_from.append(likely)
            ids = self._draw(likely) if self.choice.temperature else likely.argmax(-1)
            put(ids[:, None])
            return ids

        normed = at_registers = self.text[:, :0].float()
        if out is not None:
            normed = out.normed[rows, column]
            count = len(self.registers)
            first = at.shape[1] + kept[:, None] * count
            at_registers = out.normed[rows[:, None], first + torch.arange(count, device=self.device)]
            if drafter.reads_layers:
                beside.write(out, at)
        new = int(kept.max()) + 1 if self.passes > 1 else at.shape[1]
        window = partial(beside.window, self.last, new)
        drafter.propose(Step(self.text, self.last, normed, at_registers, choose, put, window))

    def _select(self, left: list[int]) -> None:
        rows = self._numbers(left)
        self.slots.select(rows)
        self.text, self.last, self.drafts = self.text[rows], self.last[rows], self.drafts[rows]
        self.drawn_from = [likely[rows] for likely in self.drawn_from]
        self.rows = [self.rows[row] for row in left]


_CHECKED: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()  # models, and attention tried there


@torch.no_grad()
def check_cache(model: Any) -> None:
    """Refuse a model whose logits, with a cache of slots and masks of its own, are not those of a plain pass.

    Two rows of different length are fed in two passes, with a token in between that is rejected.
    """
    config = model.config.get_text_config()
    if config._attn_implementation in _CHECKED.setdefault(model, set()):
        return
    device, sizes = model.device, torch.tensor([[2], [4]])
    texts = [(torch.arange(size + 3, device=device) * 7 + 3) % config.vocab_size for size in sizes[:, 0].tolist()]
    prompts = [text[:-3] for text in texts]
    loop = Loop(model, None, None, prompts, 3, draft=1, prefix_lm=False, choice=Choice())
    two = torch.arange(2, device=device).expand(2, -1)
    try:
        told = [loop.step(torch.arange(4, device=device).expand(2, -1), 4, loop.last)[1]]
        for first in (0, 1):  # at first the second token is a wrong one
            at = loop.last[:, None] + 1 + first + two
            right = torch.stack([text[row] for text, row in zip(texts, at, strict=True)])
            loop.text.scatter_(1, at, right if first else right * (1 - two))
            told.append(loop.step(at, 6 + first)[1][:, : 1 + first])
        plain = [model(input_ids=text[None], use_cache=False).logits[0, -4:].float() for text in texts]
        found, wanted = torch.cat(told, 1), torch.stack(plain)
        tolerance = (1e-2 if model.dtype == torch.float32 else 5e-2) * float(wanted.abs().max())
        why = "" if torch.allclose(found, wanted, atol=tolerance) else "its logits differ from those of one plain pass"
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}"
    if why:
        raise ValueError(
            f"{type(model).__name__} ({config.model_type}): can't be decoded with a cache in which each row has a "
            f"place of its own ({why})"
        )
    _CHECKED[model].add(config._attn_implementation)
