"""Lossless self-speculative decoding: the model verifies drafts and makes the next ones in one pass.

model, method = load("runs/.../last")                    # a plain checkpoint, with what its method added beside it
done = generate(model, method, prompts, new_tokens=64, draft=3)
done.ids, done.acceptance_length                         # the tokens of draft=0, in fewer passes
model.generate(**inputs, custom_generate=speculative(method, draft=3))     # the same through transformers

A pass is fed the last token that is known, y, and k drafts of the tokens behind it; where registers draft, k behind
each of these, as it is not known yet which is the last that is right:

    y  d  d | r r  r r  r r        k = 2; each register sees the text up to its token, and itself

The longest run of drafts that the model itself would have said is kept, and the next token comes free (blockwise
parallel decoding, Stern et al. 2018). With sampling a draft x ~ q is kept with probability min(1, p(x) / q(x)), and
what stands for the first that is not is drawn from max(0, p - q), normalised (Leviathan et al. 2023; Chen et al. 2023),
so that the text has the model's own distribution. Equal to decoding without drafts up to rounding: where two tokens are
equally likely to the last bits, as in bfloat16 some are, a longer pass may choose the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mutor.mtp.attention import sliding_window
from mutor.mtp.drafts import Drafter, Step
from mutor.mtp.method import Method
from mutor.mtp.speculative import Choice, Loop, check_cache
from mutor.mtp.trials import evaluating


@dataclass(frozen=True)
class Generated:
    """ids: of each prompt the new tokens, int64 [n], its end token included; passes: forward passes of the batch.

    accepted: of each prompt, for each pass but the prompt's own, how many drafts were kept; `draft` were proposed.
    """

    ids: list[Tensor]
    accepted: list[list[int]]
    draft: int
    passes: int

    @property
    def acceptance_length(self) -> float:
        """Tokens a verifying pass gives on average: 1 and the drafts that are kept, as vLLM reports it."""
        counts = [count for row in self.accepted for count in row]
        return 1 + sum(counts) / len(counts) if counts else 1.0

    @property
    def acceptance_by_position(self) -> list[float]:
        """For each of the drafts of a pass how often it is kept, which needs those before it to be."""
        counts = [count for row in self.accepted for count in row]
        return [sum(count >= k for count in counts) / max(1, len(counts)) for k in range(1, self.draft + 1)]


class PromptLookup:
    """Drafts that cost nothing: what stood in the text behind an earlier occurrence of its last tokens.

    ngram: how many tokens have to be the same at most; found by transformers' PromptLookupCandidateGenerator.
    """

    def __init__(self, ngram: int = 2):
        """Raises ValueError for less than one token."""
        if ngram < 1:
            raise ValueError(f"ngram: {ngram} is out of range, allowed: 1 or more")
        self.ngram = ngram

    def drafter(self, draft: int) -> Drafter:
        """One that proposes so many tokens."""
        from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

        lookup: Any = PromptLookupCandidateGenerator(None, draft, self.ngram, max_length=2**31)

        def propose(step: Step) -> None:
            found = torch.full((len(step.text), draft), -1, device=step.text.device)
            for row, end in enumerate((step.last + 2).tolist()):
                ids, _ = lookup.get_candidates(step.text[row : row + 1, :end])
                found[row, : ids.shape[1] - end] = ids[0, end:]
            step.put(found)

        return Drafter(propose)


def load(folder: str | Path, **options: Any) -> tuple[Any, Method]:
    """The plain checkpoint of a folder, and the method whose weights stand beside it, attached.

    options: of `AutoModelForCausalLM.from_pretrained`. Raises ValueError for a folder without such weights, or whose
    method is none of the suite's and was not imported.
    """
    import json
    import sys

    from transformers import AutoModelForCausalLM

    from mutor.checks import from_mapping
    from mutor.mtp.method import SETTINGS, WEIGHTS
    from mutor.registry import METHODS, resolve

    own = Path(folder) / "method"
    for file in (own / SETTINGS, own / WEIGHTS):
        if not file.exists():
            raise ValueError(f"{file}: is missing, and with it what a method added to the model; `export` saves it")
    made = json.loads((own / SETTINGS).read_text())
    name = made["class"]
    if name not in METHODS.values() and name.partition(":")[0] not in sys.modules:
        raise ValueError(f"{own / SETTINGS}: class {name!r} is none of the suite's methods; import its module before")
    method_class: type[Method] = resolve(name)
    method = method_class(from_mapping(method_class.Config, made["settings"], str(own / SETTINGS)))
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    return method.load_own(model, own).eval(), method


def generate(
    model: Any,
    method: Method | PromptLookup | None,
    prompts: Sequence[Any],
    *,
    new_tokens: int,
    draft: int = 0,
    end_id: int | Sequence[int] | None = None,
    prefix_lm: bool = False,
    temperature: float = 0.0,
    seed: int = 0,
) -> Generated:
    """Continue each prompt by up to `new_tokens` tokens, `draft` of them proposed in each pass.

    method: drafts, with what it added attached to `model`; None: nothing does. prompts: of each its token ids, [t], of
    any length. end_id: tokens that end a text. prefix_lm: prompts are read in both directions. temperature: 0 is
    greedy, else what logits are divided by before tokens are drawn, from `seed`. Raises ValueError for a method that
    can't draft so many tokens, or whose plain model does not answer alone, a text beyond the model's positions or its
    sliding window, and a model that does not compute the same with such a cache.
    """
    if not temperature >= 0:
        raise ValueError(f"temperature: {temperature} is out of range, allowed: 0 or more")
    choice = Choice(temperature, seed, ends=_ends(end_id))
    return _generate(model, method, prompts, new_tokens, draft, prefix_lm=prefix_lm, choice=choice)


def speculative(method: Method | PromptLookup | None, draft: int) -> Callable[..., Tensor]:
    """`generate(..., custom_generate=speculative(method, draft=3))` of transformers: its text, in fewer passes.

    Greedy or sampled, with its logits processors and stopping criteria, but no streamer; with `is_causal=False` prompts
    are read in both directions. Raises ValueError, then, for beams, a dict as result, a cache that holds something
    already and caches that are static or have a sliding window.
    """

    def custom_generate(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **options: Any,
    ) -> Tensor:
        from transformers.generation import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList

        for name, only in {"num_beams": 1, "return_dict_in_generate": False, "cache_implementation": None}.items():
            if (given := getattr(generation_config, name, None) or only) not in (only, "dynamic", "dynamic_full"):
                raise ValueError(f"{name}: {given!r} does not go with drafts; allowed: {only!r}")
        for each in logits_processor:
            if isinstance(getattr(each, "prompt_ignore_length", None), Tensor) and len(input_ids) > 1:
                name = type(each).__name__
                raise ValueError(
                    f"logits_processor: {name} with padded prompts; allowed: without padding, or one by one"
                )
        _check_given_cache(options.get("past_key_values"))
        mask = options.get("attention_mask")
        there = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
        ends = _ends(generation_config.eos_token_id)
        others = StoppingCriteriaList(
            [each for each in stopping_criteria if not isinstance(each, (EosTokenCriteria, MaxLengthCriteria))]
        )
        choice = Choice(
            temperature=1.0 if generation_config.do_sample else 0.0,  # what it is, a processor has made of the logits
            seed=int(torch.randint(2**31, ())) if generation_config.do_sample else 0,
            process=logits_processor or None,
            ends=ends,
            stop=(lambda text: bool(others(text, None).all())) if others else None,
        )
        prompts = [row[kept] for row, kept in zip(input_ids, there, strict=True)]
        done = _generate(
            model,
            method,
            prompts,
            generation_config.max_length - input_ids.shape[1],
            draft,
            prefix_lm=options.get("is_causal") is False,
            choice=choice,
        )
        pad = generation_config.pad_token_id
        pad = pad if pad is not None else ends[0] if ends else 0
        new = torch.nn.utils.rnn.pad_sequence(done.ids, batch_first=True, padding_value=pad)
        return torch.cat([input_ids, new], dim=1)

    return custom_generate


def _ends(end_id: int | Sequence[int] | None) -> tuple[int, ...]:
    return () if end_id is None else (end_id,) if isinstance(end_id, int) else tuple(end_id)


def rooms(config: Any) -> dict[str, int]:
    """By its name in the model's configuration, how many tokens a text may have."""
    most = {
        "max_position_embeddings": getattr(config, "max_position_embeddings", None),
        "sliding_window": sliding_window(config),
    }
    return {key: int(room) for key, room in most.items() if room}


def _generate(
    model: Any,
    method: Method | PromptLookup | None,
    prompts: Sequence[Any],
    new_tokens: int,
    draft: int,
    *,
    prefix_lm: bool,
    choice: Choice,
) -> Generated:
    texts = [torch.as_tensor(prompt, dtype=torch.long).flatten() for prompt in prompts]
    _check(model, method, texts, new_tokens, draft)
    drafter = method.drafter(draft) if draft and method is not None else None
    trunk = method.trunk if drafter and isinstance(method, Method) else None
    with torch.no_grad(), evaluating(model):
        check_cache(model)
        loop = Loop(model, trunk, drafter, texts, new_tokens, draft=draft, prefix_lm=prefix_lm, choice=choice)
        loop.run()
    return Generated(loop.ids, loop.accepted, draft, loop.passes)


def _check(model: Any, method: Any, texts: list[Tensor], new_tokens: int, draft: int) -> None:
    """Refuse what can't be decoded, by name."""
    if new_tokens < 1 or draft < 0:
        key, value, low = ("new_tokens", new_tokens, 1) if new_tokens < 1 else ("draft", draft, 0)
        raise ValueError(f"{key}: {value} is out of range, allowed: {low} or more")
    if not texts or min(map(len, texts)) < 1:
        raise ValueError("prompts: there is none, or an empty one; allowed: at least one, each of at least one token")
    ids, vocabulary = torch.cat(texts), int(model.get_input_embeddings().weight.shape[0])
    if len(wrong := ids[(ids < 0) | (ids >= vocabulary)]):  # they would be read as registers
        raise ValueError(f"prompts: {int(wrong[0])} is no token of this model; allowed: 0 to {vocabulary - 1}")
    if draft and method is None:
        raise ValueError(f"draft: {draft}, and there is no method to draft; allowed: 0, or a method")
    if isinstance(method, Method):
        if type(method).answer is not Method.answer:
            raise ValueError(f"{type(method).__name__}: the plain model does not answer alone; decode by its `answer`")
        if not hasattr(method, "trunk") or not any(part is method.trunk.model for part in model.modules()):
            raise ValueError(
                f"{type(method).__name__}: is not attached to this model; attach it, or `load` a checkpoint"
            )
    tokens = max(map(len, texts)) + new_tokens
    for key, most in rooms(model.config.get_text_config()).items():
        if tokens > most:
            raise ValueError(f"{key}: {most}, and prompt and new tokens are {tokens}; allowed: up to {most} together")


def _check_given_cache(cache: Any) -> None:
    """Refuse caches that can't give way to one with slots."""
    if cache is None:
        return
    name = type(cache).__name__
    if "Static" in name or any("Static" in type(layer).__name__ for layer in getattr(cache, "layers", ())):
        raise ValueError(f"past_key_values: {name} is static; allowed: none, or an empty DynamicCache")
    if any(getattr(layer, "is_sliding", False) for layer in getattr(cache, "layers", ())):
        raise ValueError(f"past_key_values: {name} has a sliding window; allowed: none, or an empty DynamicCache")
    if cache.get_seq_length():
        raise ValueError(f"past_key_values: {name} holds {cache.get_seq_length()} tokens; allowed: an empty one")
