"""The parts of a stock Hugging Face causal LM that multi-token objectives need, found without patching the model.

trunk = Trunk(model)
out = trunk(model, layout)          # one forward of the model as it is
out.hidden                          # [B, L, d] last layer's output, before the final norm
trunk.logits(out.normed[rows])      # [N, V] the model's own output layer, where something is predicted
out.through(layer, x)               # another decoder layer under the trunk's own mask and positions
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mutor.mtp.attention import attention_mask
from mutor.mtp.layout import Layout
from mutor.registry import ATTENTION, answers_under

LAYER_NAMES = ("layers", "h", "blocks")
NORM_NAMES = ("norm", "ln_f", "final_layernorm", "final_layer_norm")
EXTRA = "mtp"  # the one submodule that holds whatever a method adds to a model


@dataclass
class BackboneOutput:
    """hidden: [B, L, d] before the final norm; normed: [B, L, d] after it; through: apply one more layer."""

    hidden: Tensor
    normed: Tensor
    apply_layer: Callable[[nn.Module, Tensor], Tensor]


class Backbone:
    """Adapter to a causal LM: its layers, final norm, embedding and output layer.

    initialise: how new layers get their weights (a function of a module); None: as the model initialises its own.
    Raises ValueError, naming the architecture, where a part can't be found or the logits can't be rebuilt from them.
    """

    def __init__(self, model: Any, initialise: Callable[[nn.Module], None] | None = None):
        self.model, self.config = model, model.config.get_text_config()
        self.name = type(model).__name__
        base = model.base_model
        self.layers = self._part(base, LAYER_NAMES)
        self.norm = self._part(base, NORM_NAMES)
        self.embedding = model.get_input_embeddings()
        self.head: Any = model.get_output_embeddings()
        if self.head is None:
            raise ValueError(f"{self.name} has no output layer; a causal language model is needed")
        self.vocabulary = int(self.embedding.num_embeddings)
        self.width = int(self.config.hidden_size)
        self.initialise = initialise
        self.meta = self.embedding.weight.device.type == "meta"
        if not self.meta:
            self._check_logits()

    def _part(self, base: nn.Module, names: tuple[str, ...]) -> Any:
        for name in names:
            if hasattr(base, name):
                return getattr(base, name)
        raise ValueError(f"{self.name}: found none of {', '.join(names)} in {type(base).__name__}; it needs an adapter")

    def logits(self, normed: Tensor) -> Tensor:
        """float32 [..., V]: the model's output layer on hidden states [..., d] that passed the final norm."""
        logits = self.head(normed).float()
        scaling, scale = getattr(self.config, "logits_scaling", None), getattr(self.config, "logit_scale", None)
        logits = logits / scaling if scaling else logits * scale if scale else logits
        cap = getattr(self.config, "final_logit_softcapping", None)
        return torch.tanh(logits / cap) * cap if cap else logits

    def new_layer(self) -> nn.Module:
        """One more decoder layer of the model's kind, with fresh weights, where the model's last layer is."""
        last = self.layers[-1]
        # right class, layer index, dtype and device, for every family; the configuration is the model's own
        layer = copy.deepcopy(last, {id(c): c for c in (self.config, self.model.config)})
        if self.initialise is not None:
            self.initialise(layer)
        elif not self.meta:
            layer.apply(self._fresh)
        return layer

    def _fresh(self, module: nn.Module) -> None:
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()  # type: ignore[operator]  # for what transformers leaves as built
        for parameter in module.parameters(recurse=False):
            if hasattr(parameter, "_is_hf_initialized"):
                del parameter._is_hf_initialized
        self.model._init_weights(module)

    def add(self, module: nn.Module) -> nn.Module:
        """Make `module` part of the model, under the name that export leaves out."""
        if hasattr(self.model, EXTRA):
            raise ValueError(f"a method is already attached to this {self.name}; load the model again")
        weight = self.embedding.weight
        self.model.add_module(EXTRA, module.to(device=weight.device, dtype=weight.dtype))
        return module

    def __call__(self, model: Any, layout: Layout) -> BackboneOutput:
        """One forward of `model` (the model itself, or what a distributed wrapper made of it)."""
        attention = self.config._attn_implementation
        if layout.ids.device.type == "cpu":  # on a GPU a look at the positions would make the step wait
            self.check_lengths(layout)
            if torch.is_grad_enabled() and attention in ATTENTION and not ATTENTION[attention].cpu_gradients:
                allowed = ", ".join(name for name, backend in ATTENTION.items() if backend.cpu_gradients)
                raise ValueError(f"attention: {attention!r} has no gradients on a CPU; allowed there: {allowed}")
        mask = attention_mask(layout, attention, self.embedding.weight.dtype)
        seen: dict[str, Any] = {}

        def last_layer(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            seen.update(args=args[1:], kwargs={k: v for k, v in kwargs.items() if k != "hidden_states"})
            seen["hidden"] = _first(output)

        hooks = [
            self.layers[-1].register_forward_hook(last_layer, with_kwargs=True),
            self.norm.register_forward_hook(lambda module, args, output: seen.update(normed=output)),
        ]
        try:
            model(
                input_ids=layout.ids,
                position_ids=layout.position,
                attention_mask=mask,
                use_cache=False,
                logits_to_keep=1,
            )
        finally:
            for hook in hooks:
                hook.remove()
        return BackboneOutput(
            hidden=seen["hidden"],
            normed=seen["normed"].view(seen["hidden"].shape),
            apply_layer=lambda layer, x: _first(layer(x, *seen["args"], **seen["kwargs"])),
        )

    def check_lengths(self, layout: Layout) -> None:
        """Raise ValueError for a sequence that is longer than the model's positions or its sliding window."""
        length = layout.ids.shape[1]
        room = getattr(self.config, "max_position_embeddings", None)
        if room and int(length) > room and int(layout.position.max()) >= room:
            raise ValueError(
                f"{self.name}: position {int(layout.position.max())}, the model has positions 0..{room - 1}"
            )
        window = getattr(self.config, "sliding_window", None) or 0
        slides = getattr(self.config, "use_sliding_window", True) and window > 0
        if slides and int(length) > window and int(layout.position.max()) >= window:
            raise ValueError(
                f"{self.name}: a sequence of {int(layout.position.max()) + 1} tokens is longer than the model's "
                f"sliding window of {window}, which an explicit mask would lift; shorten the sequences"
            )

    @torch.no_grad()
    def probe(self, layout: Layout) -> Tensor:
        """[B, L, d] normed hidden states in evaluation mode, without gradients; how a model is tested for fitness.

        Raises ValueError, naming the model, where it does not take an explicit mask and positions.
        """
        try:
            with evaluating(self.model):
                return self(self.model, layout.to(self.embedding.weight.device)).normed
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
            raise ValueError(
                f"{self.name} ({self.config.model_type}) can't be trained here: it does not take an explicit mask and "
                f"positions ({type(error).__name__}: {error})"
            ) from error

    @torch.no_grad()
    def _check_logits(self) -> None:
        ids = torch.arange(4)[None] % self.vocabulary
        zero, index = torch.zeros_like(ids), torch.arange(4)[None]
        ours = self.logits(self.probe(Layout(ids, index, zero, index, zero.bool(), zero.bool(), zero)))
        with evaluating(self.model):
            theirs = self.model(input_ids=ids.to(ours.device), use_cache=False).logits.float()
        if not torch.allclose(ours, theirs, atol=1e-2 * float(theirs.abs().max()) + 1e-6):
            raise ValueError(
                f"{self.name} ({self.config.model_type}): its logits can't be rebuilt from its final norm and output "
                "layer; it scales them in a way the adapter in mutor/mtp/backbone.py does not know"
            )


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


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
