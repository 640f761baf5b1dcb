"""What a method's drafts are worth at inference: passes, FLOPs and seconds of decoding with them, by their number.

found = measure(model, method, prompts, new_tokens=64, end_id=2, prefix_lm=False, log=print)
found["acceptance_length_draft_3"], found["speedup_draft_3"]

Greedy, one text at a time (batch 1), with 1, 2 .. drafts a pass and with none, by mutor.decode. A method that can't
draft has drafts that cost nothing: what stood behind an earlier occurrence of the last tokens (prompt lookup).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mutor.decode import Generated, PromptLookup, generate, rooms
from mutor.mtp.method import Method
from mutor.tasks.task import Log

MOST = 4  # drafts a pass


@dataclass
class Decoded:
    """The prompts decoded with one number of drafts.

    texts: of each prompt; seconds, flops: of a pass, on average.
    """

    texts: list[Generated]
    seconds: float
    flops: float

    @property
    def accepted(self) -> list[int]:
        """How many drafts each pass kept, but for the prompts' own."""
        return [count for done in self.texts for count in done.accepted[0]]

    @property
    def passes_per_token(self) -> float:
        """Of all passes but the prompts' own, and of the tokens that they gave."""
        return len(self.accepted) / sum(len(done.ids[0]) - 1 for done in self.texts)


def drafting(method: Method) -> tuple[Method | PromptLookup, int]:
    """What drafts, and how many tokens at most: the method, or a look-up in the text where it has no draft."""
    most = 0
    while most < MOST:
        try:
            method.drafter(most + 1)
        except ValueError:
            break
        most += 1
    return (method, most) if most else (PromptLookup(), MOST)


def measure(
    model: Any,
    method: Method,
    prompts: Sequence[np.ndarray],
    *,
    new_tokens: int,
    end_id: int | None,
    prefix_lm: bool,
    log: Log,
) -> dict[str, float]:
    """Metrics by name, k from 1 to as many drafts as the method can propose, 4 at most.

    acceptance_length_draft_k: tokens that a verifying pass gives, 1 and its drafts that are kept (vLLM's convention).
    accepted_draft_k_at_i: how often the i-th draft of a pass is kept, in percent of all passes, for the largest k.
    passes_per_token_draft_k: forward passes, the prompts' own included, a new token. flops_per_token_draft_k: 1e6 FLOPs
    a token, those of drafts included; also for k = 0. speedup_draft_k: seconds a token without drafts over those with
    them. identical_draft_k: how many texts are those without drafts, token for token, in percent.

    FLOPs and seconds are those of a pass behind the first that verifies, times passes a token: reading the prompt, by
    drafting layers as well, is left out. Seconds are summed over texts, which take turns with each number of drafts
    after a warm-up. They are the processor's where one thread computes, so that other work on the machine counts
    little, else the clock's. FLOPs are counted in the longest text. There is no metric where a method answers by its
    own rule, where the model can't be decoded with drafts, and where texts end too early.
    """
    if type(method).answer is not Method.answer or not prompts:
        return {}
    source, most = drafting(method)
    text = partial(_text, model, source, new_tokens=new_tokens, end_id=end_id, prefix_lm=prefix_lm)
    try:
        for draft in range(most + 1):
            text(prompts[0], draft)
    except ValueError as error:
        log(f"not decoded with drafts: {error}")
        return {}
    done: list[list[tuple[Generated, float]]] = [[] for _ in range(most + 1)]
    for prompt in prompts:
        for draft, texts in enumerate(done):
            texts.append(_beyond_first(partial(text, prompt, draft), partial(_timed, model)))
    passes = [sum(max(0, len(each.accepted[0]) - 1) for each, _ in texts) for texts in done]
    longest = max(range(len(prompts)), key=lambda n: len(done[-1][n][0].accepted[0]))
    if not all(passes) or len(done[-1][longest][0].accepted[0]) < 2:
        log(f"not decoded with drafts: no text of {len(prompts)} needs more than two passes")
        return {}
    found = []
    for draft, texts in enumerate(done):
        counted, flops = _beyond_first(partial(text, prompts[longest], draft), _counted)
        seconds = sum(seconds for _, seconds in texts) / passes[draft]
        found.append(Decoded([each for each, _ in texts], seconds, flops / (len(counted.accepted[0]) - 1)))
    return _metrics(found)


def fitting(model: Any, prompts: Sequence[np.ndarray], new_tokens: int) -> list[np.ndarray]:
    """The prompts [t] that leave room for so many new tokens in the model's positions and its sliding window."""
    most = rooms(model.config.get_text_config()).values()
    return [prompt for prompt in prompts if all(len(prompt) + new_tokens <= room for room in most)]


def _text(model: Any, source: Method | PromptLookup, prompt: np.ndarray, draft: int, **options: Any) -> Generated:
    return generate(model, source, [prompt], draft=draft, **options)


def _beyond_first(
    text: Callable[..., Generated], measured: Callable[[Callable[[], Generated]], tuple[Generated, float]]
) -> tuple[Generated, float]:
    """A text, and what is measured of its passes behind the first that verifies: of two tokens, that is the last."""
    done, whole = measured(text)
    return done, whole - measured(partial(text, new_tokens=2))[1] if len(done.accepted[0]) > 1 else 0.0


def _timed(model: Any, decode: Callable[[], Generated]) -> tuple[Generated, float]:
    """What it gives, and its seconds."""
    on_gpu = model.device.type == "cuda"
    clock = time.process_time if not on_gpu and torch.get_num_threads() == 1 else time.perf_counter
    if on_gpu:
        torch.cuda.synchronize()
    began = clock()
    done = decode()
    if on_gpu:
        torch.cuda.synchronize()
    return done, clock() - began


def _counted(decode: Callable[[], Generated]) -> tuple[Generated, float]:
    """What it gives, and its FLOPs, with attention of the plain kind, as a CPU's fused kernel is not counted."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        done = decode()
    return done, counter.get_total_flops()


def _metrics(found: Sequence[Decoded]) -> dict[str, float]:
    plain, most = found[0], len(found) - 1
    metrics = {"flops_per_token_draft_0": plain.flops / 1e6}
    for draft, one in enumerate(found[1:], start=1):
        same = [a.ids[0].tolist() == b.ids[0].tolist() for a, b in zip(one.texts, plain.texts, strict=True)]
        metrics |= {
            f"acceptance_length_draft_{draft}": 1 / one.passes_per_token,
            f"passes_per_token_draft_{draft}": sum(t.passes for t in one.texts) / sum(len(t.ids[0]) for t in one.texts),
            f"flops_per_token_draft_{draft}": one.flops * one.passes_per_token / 1e6,
            f"speedup_draft_{draft}": plain.seconds / (one.seconds * one.passes_per_token),
            f"identical_draft_{draft}": 100 * sum(same) / len(same),
        }
    accepted = found[-1].accepted
    for i in range(1, most + 1):
        metrics[f"accepted_draft_{most}_at_{i}"] = 100 * sum(count >= i for count in accepted) / len(accepted)
    return metrics
