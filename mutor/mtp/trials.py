"""Whether a model does what is asked of it, tried on a few tokens before anything is trained or decoded."""

from __future__ import annotations

import logging
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mutor.mtp import blockwise
from mutor.mtp.attention import sliding_window
from mutor.mtp.layout import Layout

if TYPE_CHECKING:
    from mutor.mtp.backbone import Backbone


@torch.no_grad()
def stock(trunk: Backbone, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Normed hidden states [1, T, d] and logits float32 [1, T, V] of ids [1, T], without a mask."""
    from mutor.mtp.backbone import evaluating

    seen: list[Tensor] = []
    hook = trunk.norm.register_forward_hook(lambda module, args, output: seen.append(output))
    with evaluating(trunk.model):
        logits = trunk.model(input_ids=ids.to(trunk.embedding.weight.device), use_cache=False).logits.float()
    hook.remove()
    return seen[0].view(*ids.shape, -1), logits


def check_logits(trunk: Backbone) -> None:
    """Refuse a model whose logits are not those of its final norm and output layer, mask and positions given."""
    few = few_tokens(trunk.vocabulary)
    masked = trunk.probe(few)
    normed, theirs = stock(trunk, few.ids)
    largest = float(theirs.abs().max())
    # in one pass they are equal; two passes, one with a mask, differ by rounding, in bfloat16 by some percent
    between = 1e-2 if masked.dtype == torch.float32 else 5e-2
    for ours, tolerance in ((normed, 1e-2), (masked, between)):
        if not torch.allclose(trunk.logits(ours), theirs, atol=tolerance * largest + 1e-6):
            raise ValueError(
                f"{trunk.name} ({trunk.config.model_type}): its logits can't be rebuilt from its final norm and "
                "output layer; it scales them in a way the adapter in mutor/mtp/backbone.py does not know"
            )


def windows_hold(trunk: Backbone) -> bool:
    """Whether explicit masks of sliding windows do what the model does by itself, tried with one of 2 tokens."""
    window, few = trunk.config.sliding_window if sliding_window(trunk.config) else None, few_tokens(trunk.vocabulary)
    if window is None:
        return True
    trunk.config.sliding_window = 2
    try:
        masked, (normed, _) = trunk.probe(few), stock(trunk, few.ids)
    except ValueError:  # it takes one mask for all layers
        return False
    finally:
        trunk.config.sliding_window = window
    tolerance = 1e-2 if masked.dtype == torch.float32 else 5e-2
    return torch.allclose(masked.float(), normed.float(), atol=tolerance * float(normed.abs().max()))


def attend_blockwise(trunk: Backbone) -> None:
    """From sdpa, whose mask is dense, to the backend that needs none, where it gives the same hidden states."""
    if trunk.config._attn_implementation != "sdpa":
        return
    layout = few_rows(trunk.vocabulary)
    wanted = trunk.probe(layout)
    try:
        trunk.model.set_attn_implementation(blockwise.NAME)
        found, why = trunk.probe(layout), "its hidden states differ"
    except ValueError as error:
        found, why = torch.full_like(wanted, torch.nan), str(error)
    tolerance = (1e-3 if wanted.dtype == torch.float32 else 5e-2) * float(wanted.abs().max())
    if not (found - wanted).float()[layout.segment >= 0].abs().max() <= tolerance:
        trunk.model.set_attn_implementation("sdpa")
        logging.getLogger(__name__).warning("%s: attention with a dense mask: %s", trunk.name, why)


def few_rows(vocabulary: int) -> Layout:
    """Two rows with two sequences and with padding, a prefix in both directions and registers, to try it with."""
    segment = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0, -1, -1, -1]])
    position = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 2, 3, 1], [0, 1, 2, 3, 4, 2, 3, 0, 0, 0]])
    index = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 1, 2, 4], [0, 1, 2, 3, 4, 1, 2, 0, 0, 0]])
    register = torch.tensor([[False] * 7 + [True] * 3, [False] * 5 + [True] * 2 + [False] * 3])
    prefix = (index < 2) & (segment == 0) & ~register
    ids = (torch.arange(20).view(2, 10) * 7 + 3) % vocabulary
    return Layout(ids, position, segment, index, prefix, register, torch.zeros_like(ids))


def few_tokens(vocabulary: int) -> Layout:
    """Four tokens of the vocabulary, to try the model with."""
    ids, index = torch.arange(4)[None] % vocabulary, torch.arange(4)[None]
    zero = torch.zeros_like(ids)
    return Layout(ids, index, zero, index, zero.bool(), zero.bool(), zero)


_CHECKED: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()  # models, and attention tried there


@torch.no_grad()
def check_cache(model: Any) -> None:
    """Refuse a model whose logits, with a cache of slots and masks of its own, are not those of a plain pass.

    Two rows of different length are fed in two passes, with a token in between that is rejected.
    """
    from mutor.mtp.speculative import Choice, Loop

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
