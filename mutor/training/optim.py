"""Optimisers from a recipe: AdamW, or torch's Muon for the matrices of the layers with AdamW for the rest."""

import math
from typing import Any

import torch
from torch import nn

from mutor.config.recipe import Recipe


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


def optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimiser over the model's trainable parameters.

    Muon takes the matrices inside layers (added ones too); embeddings, output layer, norms, biases and registers
    stay with AdamW, as Muon's author advises. Weight decay is for matrices only.
    """
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    head = model.get_output_embeddings()  # type: ignore[operator]
    tables |= {id(p) for p in head.parameters()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trainable if p.ndim == 2 and id(p) not in tables]
    vectors = [p for p in trainable if p.ndim != 2]
    tables_only = [p for p in trainable if id(p) in tables]
    fused = all(p.device.type in ("cpu", "cuda") for p in trainable)
    adamw: dict[str, Any] = {"lr": recipe.learning_rate, "betas": recipe.betas, "fused": fused}
    decayed = tables_only if recipe.optimizer == "muon" else [*matrices, *tables_only]
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    rest = torch.optim.AdamW([g for g in groups if g["params"]], **adamw)
    if recipe.optimizer == "adamw":
        return rest
    muon = torch.optim.Muon(matrices, lr=recipe.muon_rate, weight_decay=recipe.weight_decay)
    return CombinedOptimizer([muon, rest])


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
