"""What a model computed in a pass that someone else ran, so that a method's loss can be read off it.

A Trainer calls `model(**batch)`, and a loss function is given the logits alone. Methods read more: hidden states before
and after the final norm, and what the last layer was given. So a batch brings its layout along, where position ids are:

    input_ids       int64 [B, L]      position_ids    int64 [B, 7, L], the fields of a Layout
    attention_mask  int64 [B, L]      labels          int64 [B, L] as transformers has them, -100 at registers

The module that owns the layers takes it apart: layers see position ids and who sees whom, and what they compute is
heard. It is the same whatever calls the model: peft, accelerate, a Trainer or a loop.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from mutor.mtp.facts import ModelFacts
from mutor.mtp.layout import IGNORE, Layout


@dataclass
class BackboneOutput:
    """hidden: [B, L, d] before the final norm; normed: [B, L, d] after it; apply_layer: one more layer on [B, L, d].

    states: where they are asked for, [B, L, d] what the first layer reads and what each layer gives, `hidden` last;
    logits: the model's own, without gradients only; given: what the last layer was given beside hidden states.
    """

    hidden: Tensor
    normed: Tensor
    apply_layer: Callable[[nn.Module, Tensor], Tensor]
    states: tuple[Tensor, ...] = ()
    logits: Tensor | None = None
    given: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})


@dataclass(frozen=True)
class Heard:
    """A pass that was heard; it stands for the model where its output is asked for."""

    layout: Layout
    output: BackboneOutput
    products: torch.dtype | None = None  # of matrices, where it was autocast

    def autocast(self) -> Any:
        """The context that the pass had."""
        device = self.layout.ids.device.type
        return torch.autocast(device, self.products, enabled=self.products is not None)


def batch_of(layout: Layout) -> dict[str, Tensor]:
    """The batch of a layout, as drawn above."""
    labels = torch.full_like(layout.ids, IGNORE)
    labels[:, 1:] = layout.target.masked_fill(layout.register, IGNORE)[:, :-1]
    return {
        "input_ids": layout.ids,
        "attention_mask": (layout.segment >= 0).long(),
        "position_ids": torch.stack([getattr(layout, f.name).long() for f in fields(Layout)], dim=1),
        "labels": labels,
    }


def layout_of(position_ids: Tensor) -> Layout:
    """The layout that a batch brings along; position_ids: int64 [B, 7, L]."""
    parts = dict(zip((f.name for f in fields(Layout)), position_ids.unbind(1), strict=True))
    return Layout(**{**parts, "prefix": parts["prefix"].bool(), "register": parts["register"].bool()})


class Ear:
    """Hears one pass: what each layer reads, if asked, what the last one gives, and the final norm."""

    def __init__(self, layers: Any, norm: nn.Module, *, all_states: bool):
        self.states: list[Tensor] = []
        self.seen: dict[str, Any] = {}
        self._hooks = [layer.register_forward_pre_hook(self._reads, with_kwargs=True) for layer in layers if all_states]
        self._hooks += [
            layers[-1].register_forward_hook(self._last, with_kwargs=True),
            norm.register_forward_hook(self._normed),
        ]

    def _reads(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.states.append(args[0] if args else kwargs["hidden_states"])

    def _last(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.seen.update(args=args[1:], kwargs={k: v for k, v in kwargs.items() if k != "hidden_states"})
        self.seen["hidden"] = first(output)

    def _normed(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.seen["normed"] = output

    def stop(self) -> None:
        """Hear nothing from now on."""
        for hook in self._hooks:
            hook.remove()

    def output(self, logits: Tensor | None = None) -> BackboneOutput | None:
        """What was heard; None where the layers were not called."""
        seen, states = self.seen, self.states
        if "hidden" not in seen:
            return None
        if seen["hidden"].ndim > 3:
            shape = list(seen["hidden"].shape)
            raise ValueError(f"its layers give hidden states {shape} and not one of a token, [B, L, d]")
        return BackboneOutput(
            hidden=seen["hidden"],
            normed=seen["normed"].view(seen["hidden"].shape),
            apply_layer=lambda layer, x: first(layer(x, *seen["args"], **seen["kwargs"])),
            states=(*states, seen["hidden"]) if states else (),
            logits=logits,
            given=(seen["args"], seen["kwargs"]),
        )


class Listener:
    """Hooks of the module that owns the layers: a batch with a layout is taken apart, and its pass is heard.

    An object, not closures: a copy of the model copies it, and is not heard by the method of the original.
    """

    def __init__(self, module: nn.Module, facts: ModelFacts, layers: str, norm: str):
        """module: owns the layers and the final norm under these names; facts: of the model."""
        self.facts, self.layers, self.norm = facts, layers, norm
        self.heard: Heard | None = None
        self._under_way: tuple[Layout, Ear] | None = None
        self._hooks = [
            module.register_forward_pre_hook(self.before, with_kwargs=True),
            module.register_forward_hook(self.after, always_call=True),
        ]

    def __deepcopy__(self, memo: dict[int, Any]) -> Listener:
        new = memo[id(self)] = object.__new__(Listener)
        new.__dict__.update(self.__dict__, heard=None, _under_way=None, _hooks=[])
        return new

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Layers get position ids [B, L] and the mask in place of the layout."""
        self.heard, positions = None, kwargs.get("position_ids")
        if positions is None or positions.ndim != 3 or positions.shape[1] != len(fields(Layout)):
            return None
        layout = layout_of(positions)
        facts = copy.copy(self.facts)  # the model may have changed since
        facts.config, facts.dtype = module.config, module.get_input_embeddings().weight.dtype
        self._under_way = layout, Ear(getattr(module, self.layers), getattr(module, self.norm), all_states=True)
        own = {"position_ids": layout.position, "attention_mask": facts.mask(layout), "use_cache": False}
        return args, {**kwargs, **own}

    def after(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        """Put down what was heard."""
        if self._under_way is None:
            return
        (layout, ear), self._under_way = self._under_way, None
        ear.stop()
        if (found := ear.output()) is not None:
            device = layout.ids.device.type
            self.heard = Heard(
                layout, found, torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
            )

    def take(self) -> Heard | None:
        """The last pass, given once: it holds the graph's memory."""
        heard, self.heard = self.heard, None
        return heard

    def remove(self) -> None:
        """Leave the model."""
        for hook in self._hooks:
            hook.remove()


def first(output: Any) -> Tensor:
    """The hidden states that a layer gives, alone or before other things."""
    return output[0] if isinstance(output, tuple) else output
