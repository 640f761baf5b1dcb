"""Optimisers from a recipe: AdamW, or torch's Muon for the matrices of the layers with AdamW for the rest."""

import math
from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from mutor.config.recipe import Recipe
from mutor.mtp.method import Method, ParameterGroup


class Muon(torch.optim.Muon):
    """torch's Muon; on a CPU its matrices are orthogonalised in their own precision.

    torch does it in bfloat16, which CPUs are slow at: float32 takes half as long or less, and rounds less.
    """

    def step(self, closure: Any = None) -> Any:
        """One step; all parameters are on one kind of device."""
        if self.param_groups[0]["params"][0].device.type != "cpu":
            return super().step(closure)
        with _Unrounded():
            return super().step(closure)


class _Unrounded(TorchFunctionMode):
    """Inside, `Tensor.bfloat16` copies and does not round."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.bfloat16:
            return args[0].clone()
        return func(*args, **(kwargs or {}))


class CombinedOptimizer(torch.optim.Optimizer):
    """Several optimisers used as one; their parameter groups are this one's, so schedules reach them."""

    def __init__(self, parts: list[torch.optim.Optimizer]):
        self.parts = parts
        super().__init__([p for part in parts for group in part.param_groups for p in group["params"]], {})
        self._share()

    def _share(self) -> None:
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of each."""
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """The state of each, by number."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share()


def optimizer(model: nn.Module, method: Method, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimiser over the groups of parameters that the method names; those trained alike become one.

    With `muon`, Muon takes the groups that the method leaves to it and AdamW the rest. Raises ValueError where a
    trained parameter of `model` is not in one group, a frozen one is, or there is nothing to train.
    """
    groups = method.parameter_groups(recipe)
    _check(model, method, groups)
    muon = recipe.optimizer == "muon"
    for_muon = _merged([g for g in groups if muon and g.muon], recipe.muon_rate, recipe)
    for_adamw = _merged([g for g in groups if not (muon and g.muon)], recipe.learning_rate, recipe)
    if muon and not for_muon:
        raise ValueError("optimizer: 'muon' finds no matrices of layers that are trained here; allowed: 'adamw'")
    parts: list[torch.optim.Optimizer] = []
    if for_muon:
        parts.append(Muon(for_muon, lr=recipe.muon_rate, weight_decay=recipe.weight_decay))
    if for_adamw:
        fused = all(p.device.type in ("cpu", "cuda") for group in for_adamw for p in group["params"])
        parts.append(torch.optim.AdamW(for_adamw, lr=recipe.learning_rate, betas=recipe.betas, fused=fused))
    return CombinedOptimizer(parts) if muon else parts[0]


def _check(model: nn.Module, method: Method, groups: list[ParameterGroup]) -> None:
    """Raise ValueError, naming the parameter, where the groups are not the model's trained parameters, each once."""
    where = f"parameter_groups of {type(method).__name__}"
    times = Counter(id(p) for group in groups for p in group.parameters)
    for name, parameter in model.named_parameters():
        if times[id(parameter)] != parameter.requires_grad:
            kind = "trained" if parameter.requires_grad else "frozen"
            raise ValueError(
                f"{where}: {name} is {kind} and in {times[id(parameter)]} groups; allowed: one where requires_grad is "
                "True, none where it is False"
            )
    if not times:
        raise ValueError(f"{where}: all parameters of the model are frozen; nothing would be trained")
    if times.keys() - {id(p) for p in model.parameters()}:
        raise ValueError(f"{where}: a parameter is not the model's; allowed: those of the model and of `trunk.add`")


def _merged(groups: list[ParameterGroup], rate: float, recipe: Recipe) -> list[dict[str, Any]]:
    """Groups as torch's optimisers take them: those of one rate and decay as one, empty ones left out."""
    found: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for group in groups:
        found.setdefault((group.rate, group.decay), []).extend(group.parameters)
    return [
        {"params": parameters, "lr": rate * factor, "weight_decay": recipe.weight_decay if decay else 0.0}
        for (factor, decay), parameters in found.items()
        if parameters
    ]


def schedule(optimizer: torch.optim.Optimizer, recipe: Recipe) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up from zero, `hold` at the peak, then the recipe's decay to `final_rate` of the peak.

    Not transformers' WSD schedule, whose warm-up starts at `final_rate`: none at all where the rate does not decay.
    """
    steps = recipe.steps
    assert steps is not None, "Recipe.for_size comes first"
    warmup = round(recipe.warmup * steps) if recipe.warmup < 1 else int(recipe.warmup)
    hold = round(recipe.hold * (steps - warmup))

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        if recipe.decay == "none":
            return 1.0
        done = min(1.0, max(0, step - warmup - hold) / max(1, steps - warmup - hold))
        shape = 1 - done if recipe.decay == "linear" else (1 + math.cos(math.pi * done)) / 2
        return recipe.final_rate + (1 - recipe.final_rate) * shape

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
