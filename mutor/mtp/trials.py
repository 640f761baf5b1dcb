"""Whether a model does what is asked of it, tried on a few tokens before anything is trained.

`trunk` is always a `Backbone`.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from mutor.mtp import blockwise
from mutor.mtp.attention import sliding_window
from mutor.mtp.layout import Layout
from mutor.registry import answers_under


class evaluating:
    """Context: the model in evaluation mode, put back as it was afterwards.

    It answers under the attention backend that the one it is trained under names in mutor/registry.py.
    """

    def __init__(self, model: nn.Module):
        self.model = model

    def __enter__(self) -> None:
        self.was, self.attention = self.model.training, getattr(self.model.config, "_attn_implementation", "")
        self.model.eval()
        self._attend(answers_under(self.attention))

    def __exit__(self, *error: object) -> None:
        self.model.train(self.was)
        self._attend(self.attention)

    def _attend(self, attention: str) -> None:
        if answers_under(self.attention) != self.attention:
            self.model.set_attn_implementation(attention)  # type: ignore[operator]


def carrying(config: Any) -> list[str]:
    """The types of layers that carry a state from left to right, by recurrence or convolution."""
    kinds = set(getattr(config, "layer_types", None) or ())
    return sorted(kind for kind in kinds if any(word in kind for word in ("conv", "linear", "mamba", "recurrent")))


def why_not(model: Any) -> str:
    """What it is about a model that does not fit, where it says so itself; "" where it says nothing."""
    config = model.config.get_text_config()
    if getattr(model, "_is_stateful", False) or carrying(config):
        return "it is recurrent: some layers carry a state along the row, whatever mask and positions say"
    # a Falcon has what ALiBi needs whether it is used or not; a Bloom has no word for it in its configuration
    if getattr(config, "alibi", any("alibi" in name for name in dir(model.base_model))):
        return "its positions are biases by the order in the row (ALiBi), and registers stand behind all tokens"
    return ""


@torch.no_grad()
def stock(trunk: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Normed hidden states [1, T, d] and logits float32 [1, T, V] of ids [1, T], without a mask."""
    seen: list[Tensor] = []
    hook = trunk.norm.register_forward_hook(lambda module, args, output: seen.append(output))
    with evaluating(trunk.model):
        logits = trunk.model(input_ids=ids.to(trunk.embedding.weight.device), use_cache=False).logits.float()
    hook.remove()
    return seen[-1].view(*ids.shape, -1), logits  # NanoChat's norm is before its layers, too


def check_logits(trunk: Any) -> None:
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
                "output layer; the adapter in mutor/mtp/backbone.py does not know what it does to them"
            )


def windows_hold(trunk: Any) -> bool:
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


def attend_blockwise(trunk: Any) -> str:
    """From sdpa, whose mask is dense, to the backend that needs none, where it gives the same hidden states.

    Returns the name of the backend before.
    """
    if (before := str(trunk.config._attn_implementation)) != "sdpa":
        return before
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
    return before


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
