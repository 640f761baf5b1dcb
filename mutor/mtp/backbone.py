"""The parts of a stock Hugging Face causal LM that multi-token objectives need, found without patching the model.

trunk = Backbone(model)
out = trunk(model, layout)          # one forward of the model as it is
out.hidden                          # [B, L, d] last layer's output, before the final norm
trunk.logits(out.normed[rows])      # [N, V] the model's own output layer, where something is predicted
out.apply_layer(layer, x)           # another decoder layer under the trunk's own mask and positions

trunk.new_layer()                   # what a method may add: a decoder layer,
trunk.new_linear(d, V, output=True) # a linear layer, here an output layer,
trunk.extra_rows(3)                 # input vectors beyond the vocabulary,
trunk.add(module)                   # all of it in one module of the model
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mutor.checks import choose
from mutor.mtp.attention import attention_mask
from mutor.mtp.layout import Layout
from mutor.registry import ATTENTION, answers_under

LAYER_NAMES = ("layers", "h", "blocks")
NORM_NAMES = ("norm", "ln_f", "final_layernorm", "final_layer_norm")
EXTRA = "mtp"  # the one submodule that holds whatever a method adds to a model


@dataclass
class BackboneOutput:
    """hidden: [B, L, d] before the final norm; normed: [B, L, d] after it; apply_layer: one more layer on [B, L, d]."""

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
        self.added: nn.Module | None = None  # what the method added
        self._rows: nn.Embedding | None = None
        self._outputs: list[nn.Module] = [self.head]
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

    def new_linear(self, in_features: int, out_features: int, *, bias: bool = False, output: bool = False) -> nn.Linear:
        """A linear layer with fresh weights, initialised like the model's own, on its device and in its dtype.

        output: it makes logits of hidden states, so it is trained like the model's output layer. One with as many
        outputs as the vocabulary is taken for one in any case.
        """
        weight = self.embedding.weight
        with torch.device(weight.device):
            linear = nn.Linear(in_features, out_features, bias=bias)
        if self.initialise is not None:
            self.initialise(linear)
        elif not self.meta:
            self.model._init_weights(linear)
        if output:
            self._outputs.append(linear)
        return linear.to(weight.dtype)

    def extra_rows(self, count: int, init: str = "mean", *, scaled: bool = True) -> nn.Embedding:
        """`count` learned input vectors: input id vocabulary size + n feeds row n. Part of the model once `add`ed.

        init: "mean" of the input embeddings, or "model": normal, with their standard deviation. scaled: multiplied as
        the model multiplies its own (Gemma: by sqrt(d)). Raises ValueError where the model has extra rows already.
        """
        if self._rows is not None:
            raise ValueError(f"{self.name} has {self._rows.num_embeddings} extra rows already; ask for all at once")
        choose(init, ("mean", "model"), "init of extra rows")
        table = self._rows = nn.Embedding(count, self.width, device=self.embedding.weight.device)
        if not self.meta:
            with torch.no_grad():
                if init == "mean":
                    table.weight.copy_(self.embedding.weight.float().mean(0).expand(count, -1))
                else:
                    table.weight.normal_(0, float(self.embedding.weight.float().std()))
        scale = getattr(self.embedding, "embed_scale", None)  # Gemma scales inside its embedding layer
        later = getattr(self.config, "embedding_multiplier", None)  # Granite behind it, whatever came out
        asked: list[Tensor] = []  # ids of the call under way: forward hooks only see them clamped

        def clamp(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            asked.append(args[0])
            return (args[0].clamp(max=self.vocabulary - 1), *args[1:])

        def put(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            ids = asked.pop()
            vectors = table((ids - self.vocabulary).clamp(0, count - 1)).to(output.dtype)
            if scale is not None and scaled:
                vectors = vectors * scale.to(output.dtype)
            if later is not None and not scaled:
                vectors = vectors / later
            return torch.where((ids >= self.vocabulary)[..., None], vectors, output)

        self.embedding.register_forward_pre_hook(clamp)
        self.embedding.register_forward_hook(put)
        return table

    def add(self, module: nn.Module) -> nn.Module:
        """Make `module` part of the model, under the name that export leaves out."""
        if hasattr(self.model, EXTRA):
            raise ValueError(f"a method is already attached to this {self.name}; load the model again")
        weight = self.embedding.weight
        self.added = module.to(device=weight.device, dtype=weight.dtype)
        self.model.add_module(EXTRA, self.added)
        return module

    def is_layer(self, module: nn.Module) -> bool:
        """Whether it is a decoder layer, the model's or a new one."""
        return type(module) in map(type, self.layers)

    def tables(self) -> Iterator[nn.Parameter]:
        """The parameters of embeddings and output layers, the model's and added ones: a row for each token id.

        Output layers are the model's own, those made as such by `new_linear`, and each module outside of decoder
        layers with as many outputs as the vocabulary.
        """
        inside = {id(part) for layer in self.model.modules() if self.is_layer(layer) for part in layer.modules()}
        for module in self.model.modules():
            as_wide = id(module) not in inside and getattr(module, "out_features", None) == self.vocabulary
            if isinstance(module, nn.Embedding) or module in self._outputs or as_wide:
                yield from module.parameters()

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
        """Refuse a model whose logits are not those of its final norm and output layer, mask and positions given."""
        ids = torch.arange(4)[None] % self.vocabulary
        zero, index = torch.zeros_like(ids), torch.arange(4)[None]
        masked = self.probe(Layout(ids, index, zero, index, zero.bool(), zero.bool(), zero))
        seen: list[Tensor] = []
        hook = self.norm.register_forward_hook(lambda module, args, output: seen.append(output))
        with evaluating(self.model):
            theirs = self.model(input_ids=ids.to(masked.device), use_cache=False).logits.float()
        hook.remove()
        largest = float(theirs.abs().max())
        # in one pass they are equal; two passes, one with a mask, differ by rounding, in bfloat16 by some percent
        between = 1e-2 if masked.dtype == torch.float32 else 5e-2
        for normed, tolerance in ((seen[0].view(masked.shape), 1e-2), (masked, between)):
            if not torch.allclose(self.logits(normed), theirs, atol=tolerance * largest + 1e-6):
                raise ValueError(
                    f"{self.name} ({self.config.model_type}): its logits can't be rebuilt from its final norm and "
                    "output layer; it scales them in a way the adapter in mutor/mtp/backbone.py does not know"
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
