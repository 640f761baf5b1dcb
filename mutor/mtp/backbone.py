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
from typing import Any

import torch
from torch import Tensor, nn

from mutor.checks import choose
from mutor.mtp import adapters, trials
from mutor.mtp.facts import ModelFacts
from mutor.mtp.layout import Layout
from mutor.mtp.passes import BackboneOutput, Ear, Heard, Listener
from mutor.registry import ATTENTION

LAYER_NAMES = ("layers", "h", "blocks")
NORM_NAMES = (
    "norm", "norm_f", "ln_f", "final_norm", "final_layernorm", "final_layer_norm", "layer_norm", "layernorm",
    "embedding_norm",
)  # fmt: skip
TEXT_NAMES = ("model", "language_model", "decoder", "text_model")  # of the part for texts, inside of a model for more
EXTRA = "mtp"  # the one submodule that holds whatever a method adds to a model


class Backbone(ModelFacts):
    """Adapter to a causal LM: its layers, final norm, embedding and output layer.

    initialise: how new layers get their weights (a function of a module); None: as the model initialises its own.
    Raises ValueError, naming the architecture, where a part can't be found or the logits can't be rebuilt from them.
    """

    def __init__(self, model: Any, initialise: Callable[[nn.Module], None] | None = None):
        self.model, self.config = model, model.config.get_text_config()
        self.name = type(model).__name__
        owner, layers, norm = self._parts(model.base_model)
        self.layers, self.norm = getattr(owner, layers), getattr(owner, norm)
        self.embedding = model.get_input_embeddings()
        if self.head is None:
            raise ValueError(f"{self.name} has no output layer; a causal language model is needed")
        self.width = int(self.config.hidden_size)
        self.initialise = initialise
        self.added: nn.Module | None = None  # what the method added
        self.trained_before: list[nn.Parameter] = []  # of the model's own, before a method froze some
        self._trained: set[str] = set()  # of it, the names of parameters that are not frozen
        self._rows: nn.Embedding | None = None
        self._outputs: list[nn.Module] = []
        self._hooks: list[Any] = []
        self.meta = self.embedding.weight.device.type == "meta"
        self.exact_windows, self.attention = True, self.config._attn_implementation
        if not self.meta:
            trials.check_logits(self)
            self.exact_windows = trials.windows_hold(self)
            self.attention = trials.attend_blockwise(self)
        self.listener = Listener(owner, self.facts(), layers, norm)

    @property
    def head(self) -> Any:
        """The model's output layer."""
        return self.model.get_output_embeddings()

    @property
    def vocabulary(self) -> int:  # type: ignore[override]  # follows the model
        """Rows of the embedding, also after `resize_token_embeddings`; ids from here on are extra rows."""
        return int(self.embedding.weight.shape[0])

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """Of the weights."""
        return self.embedding.weight.dtype

    def _parts(self, base: Any) -> tuple[Any, str, str]:
        """The module that owns the layers, and their name and the final norm's there."""
        parts = [base, *(getattr(base, name, None) for name in TEXT_NAMES)]
        parts += [getattr(part, name, None) for part in parts[1:] for name in TEXT_NAMES]
        for owner in filter(None, parts):
            layers, norm = (next((n for n in names if hasattr(owner, n)), "") for names in (LAYER_NAMES, NORM_NAMES))
            if layers and norm and getattr(owner, norm) is not None:
                return owner, layers, norm
        if why := trials.why_not(self.model):
            raise ValueError(f"{self.name} ({self.config.model_type}) can't be trained here: {why}")
        found = any(hasattr(base, name) for name in LAYER_NAMES)
        what, known = ("final norm", NORM_NAMES) if found else ("layers", LAYER_NAMES)
        raise ValueError(
            f"{self.name}: {type(base).__name__} has no {what} named {', '.join(known)}; it needs an adapter"
        )

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
        layer = adapters.without(layer, merge=False).requires_grad_(True)
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
        # Gemma scales inside its embedding layer, Granite behind it, whatever came out
        scales = (m.embed_scale for m in self.embedding.modules() if hasattr(m, "embed_scale"))
        later = getattr(self.config, "embedding_multiplier", None)
        hooks = _ExtraRows(table, next(scales, None) if scaled else None, None if scaled else later)
        self._hooks += [
            self.embedding.register_forward_pre_hook(hooks.clamp),
            self.embedding.register_forward_hook(hooks.put),
        ]
        return table

    def add(self, module: nn.Module) -> nn.Module:
        """Make `module` part of the model, under the name that export leaves out."""
        if hasattr(self.model, EXTRA):
            raise ValueError(f"a method is already attached to this {self.name}; load the model again")
        weight = self.embedding.weight
        self.added = adapters.kept(module.to(device=weight.device, dtype=weight.dtype))
        self._trained = {name for name, p in self.added.named_parameters() if p.requires_grad}
        self.model.add_module(EXTRA, self.added)
        return module

    def remove(self) -> None:
        """Take everything off the model, whose attention is that of before."""
        for hook in self._hooks:
            hook.remove()
        self.listener.remove()
        if self.added is not None:
            delattr(self.model, EXTRA)
        if self.attention != self.config._attn_implementation:
            self.model.set_attn_implementation(self.attention)

    def check_attached(self) -> None:
        """Raise ValueError where the model was changed since, so that what was added is not read, or not trained."""
        if self._rows is not None and self.model.get_input_embeddings() is not self.embedding:
            raise ValueError(
                f"{self.name}: its input embeddings were wrapped or replaced after attach, so that registers would be "
                "read as tokens; load the model again and attach afterwards"
            )
        if self.added is None:
            return
        if adapters.reached(self.added):
            raise ValueError(
                f"{self.name}: peft reached into what the method added ({EXTRA}), which is trained and saved anyway; "
                "load the model again and attach after get_peft_model"
            )
        frozen = {name for name, p in self.added.named_parameters() if not p.requires_grad}
        if torch.is_grad_enabled() and frozen & self._trained:
            raise ValueError(
                f"{self.name}: what the method added ({EXTRA}) was frozen after attach and would not be trained; set "
                "its requires_grad"
            )

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
            if isinstance(module, nn.Embedding) or module in (self.head, *self._outputs) or as_wide:
                yield from module.parameters()

    def __call__(self, model: Any, layout: Layout, *, all_states: bool = False) -> BackboneOutput:
        """One forward of `model`: itself, what a distributed wrapper made of it, or a pass of it that was heard."""
        self.check_attached()
        if isinstance(model, Heard):
            return model.output
        attention = self.config._attn_implementation
        if layout.ids.device.type == "cpu":  # on a GPU a look at the positions would make the step wait
            self.check_lengths(layout)
            if torch.is_grad_enabled() and attention in ATTENTION and not ATTENTION[attention].cpu_gradients:
                allowed = ", ".join(name for name, backend in ATTENTION.items() if backend.cpu_gradients)
                raise ValueError(f"attention: {attention!r} has no gradients on a CPU; allowed there: {allowed}")
        inputs = {"input_ids": layout.ids, "position_ids": layout.position, "attention_mask": self.mask(layout)}
        return self.run(model, all_states=all_states, use_cache=False, logits_to_keep=1, **inputs)

    def run(self, model: Any, *, all_states: bool = False, **inputs: Any) -> BackboneOutput:
        """One forward of `model` on its own arguments. Raises ValueError for a model without this one's layers."""
        ear = Ear(self.layers, self.norm, all_states=all_states)
        try:
            logits = model(**inputs).logits
        finally:
            ear.stop()
        output = ear.output(None if torch.is_grad_enabled() else logits)  # in training they are only memory
        if output is None:
            raise ValueError(f"{self.name}: another model than the one that the method is attached to; attach to it")
        return output

    @torch.no_grad()
    def probe(self, layout: Layout) -> Tensor:
        """[B, L, d] normed hidden states in evaluation mode, without gradients; how a model is tested for fitness.

        Raises ValueError, naming the model, where that fails with an explicit mask and positions.
        """
        try:
            with trials.evaluating(self.model):
                return self(self.model, layout.to(self.embedding.weight.device)).normed
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
            why = f"with an explicit mask and positions it fails ({type(error).__name__}: {error})"
            why = trials.why_not(self.model) or why
            raise ValueError(f"{self.name} ({self.config.model_type}) can't be trained here: {why}") from error


class _ExtraRows:
    """Hooks of an embedding that give ids beyond its rows vectors of their own.

    An object, not closures: a copy of the model copies it, with the copy's own table.
    """

    def __init__(self, table: nn.Embedding, scale: Tensor | float | None, divide: float | None):
        """scale, divide: what a vector is multiplied with and divided by, None: left as it is."""
        self.table, self.scale, self.divide = table, scale, divide
        self.asked: list[Tensor] = []  # ids of the call under way: forward hooks only see them clamped

    def clamp(self, module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Before the embedding: ids that it knows."""
        self.asked.append(args[0])
        return (args[0].clamp(max=module.weight.shape[0] - 1), *args[1:])

    def put(self, module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Behind the embedding: the table's vectors where ids are beyond."""
        ids, vocabulary = self.asked.pop(), int(module.weight.shape[0])
        vectors = self.table((ids - vocabulary).clamp(0, self.table.num_embeddings - 1)).to(output.dtype)
        if self.scale is not None:
            vectors = vectors * torch.as_tensor(self.scale).to(output.dtype)
        if self.divide is not None:
            vectors = vectors / self.divide
        return torch.where((ids >= vocabulary)[..., None], vectors, output)
