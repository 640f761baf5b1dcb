"""LoRA: low-rank adapters on all linear layers, everything else frozen (Hu et al., arXiv 2106.09685), by peft.

lora_next_token    adapters trained by next-token prediction
lora_mutor         adapters and registers trained by MuToR
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baselines.next_token import NextToken
from mutor.checks import setting
from mutor.mtp.method import Method
from mutor.mtp.mutor import MuToR, MuToRConfig

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class LoRAConfig:
    """Settings of the adapters; the paper's rank, its scale is not stated."""

    rank: int = setting(32, doc="rank of the adapters", low=1)
    lora_alpha: int = setting(32, doc="their scale is lora_alpha / rank", low=1)


@dataclass(frozen=True)
class LoRAMuToRConfig(LoRAConfig, MuToRConfig):
    """Settings of MuToR and of the adapters."""


class _Adapters(Method):
    """Freezes the model, adds adapters, and exports it with the adapters merged, and the adapters beside it."""

    shardable = False  # adapters are merged into whole weights
    source = "Hu et al., arXiv 2106.09685"
    adds = "adapters"
    at_inference = "the plain model, adapters merged"

    def attach(self, model: Any, initialise: Callable[[nn.Module], None] | None = None) -> Any:
        """Put adapters on all linear layers but the output layer, then add what the method adds."""
        import warnings

        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(
            r=self.config.rank,
            lora_alpha=self.config.lora_alpha,
            target_modules="all-linear",
            bias="none",
            task_type="CAUSAL_LM",
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # GPT-2's transposed layers are recognised, with a warning each
            inject_adapter_in_model(config, model)
        return super().attach(model, initialise)

    def added_parameters(self, model: nn.Module) -> int:
        """Number of trainable parameters: adapters, and registers."""
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    def export(self, model: Any, folder: Path, state: dict[str, Any] | None = None) -> None:
        """Save the plain base architecture with the adapters merged, and the adapters alone in `folder`/adapter.

        `PeftModel.from_pretrained(base, folder / "adapter")` gives the same model, from the same base.
        """
        from peft import get_peft_model_state_dict
        from peft.tuners.lora import LoraLayer
        from safetensors.torch import save_file

        from mutor.mtp.backbone import EXTRA

        layers: dict[str, Any] = {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
        whole, state = state or model.state_dict(), {}
        for name, value in whole.items():
            if name.startswith(f"{EXTRA}.") or ".lora_" in name:
                continue
            owner = name.rpartition(".base_layer.")[0]
            if owner in layers and name.endswith(".weight"):
                value = value + layers[owner].get_delta_weight("default").to(value.dtype)
            state[name.replace(".base_layer.", ".")] = value
        model.save_pretrained(folder, state_dict=state)
        adapter = Path(folder) / "adapter"
        model.peft_config["default"].save_pretrained(adapter)
        tensors = get_peft_model_state_dict(model, adapter_name="default")
        tensors = {k: v for k, v in tensors.items() if not k.startswith(f"{EXTRA}.")}
        save_file(
            {f"base_model.model.{k}": v.contiguous() for k, v in tensors.items()},
            adapter / "adapter_model.safetensors",
        )


class LoRANextToken(_Adapters, NextToken):
    """Next-token prediction with adapters."""

    Config = LoRAConfig


class LoRAMuToR(_Adapters, MuToR):
    """MuToR with adapters: they and the register are trained, nothing else."""

    Config = LoRAMuToRConfig
    source = f"{_Adapters.source}; {MuToR.source}"
    adds = f"{_Adapters.adds}; {MuToR.adds}"
