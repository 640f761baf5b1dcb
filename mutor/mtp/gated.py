"""LoRA that acts at registers alone (gated LoRA, "Your LLM knows the future", arXiv 2507.11851).

At a register each linear layer of the trunk gives W x + B A x, at every other token W x, bit for bit. So the plain
model stays the one that it was, and the adapters are a part of what the method added. A starts as peft's does, B at
zero; the scale is 1. The source's rank is 128; its sampler is not built here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from mutor.mtp.backbone import Backbone


class _Gate:
    """Which tokens of the forward pass under way are registers: those with ids beyond the vocabulary."""

    registers: Tensor

    def see(self, module: Any, args: tuple[Any, ...]) -> None:
        """Before the embedding clamps the ids."""
        self.registers = args[0] >= module.weight.shape[0]


class GatedLoRA(nn.Module):
    """The adapter of one linear layer."""

    def __init__(self, width: int, out: int, rank: int, gate: _Gate):
        super().__init__()
        self.gate, self.down, self.up = gate, nn.Linear(width, rank, bias=False), nn.Linear(rank, out, bias=False)
        nn.init.zeros_(self.up.weight)

    def act(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Behind the linear layer, with its input."""
        at_register = self.gate.registers.reshape(*output.shape[:-1], 1)
        return torch.where(at_register, output + self.up(self.down(args[0])), output)


def gated_lora(trunk: Backbone, rank: int) -> nn.ModuleList:
    """An adapter for each linear layer in the trunk's layers; part of the model once `add`ed."""
    gate = _Gate()
    trunk.embedding.register_forward_pre_hook(gate.see, prepend=True)
    adapters = nn.ModuleList()
    with torch.device(trunk.embedding.weight.device):
        for layer in trunk.layers.modules():
            if isinstance(layer, (nn.Linear, Conv1D)):
                width, out = layer.weight.shape if isinstance(layer, Conv1D) else reversed(layer.weight.shape)
                adapter = GatedLoRA(width, out, rank, gate)
                layer.register_forward_hook(adapter.act)
                adapters.append(adapter)
    return adapters
