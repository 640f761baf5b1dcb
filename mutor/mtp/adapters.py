"""Where peft meets a method: adapters beside what the method adds to a model, in either order.

method.attach(get_peft_model(model, LoraConfig(...)))      # or: get_peft_model(method.attach(model), ...)

What the method added is trained and saved with the adapter, and loads with it. Without peft these functions do nothing.
"""

from __future__ import annotations

import copy
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor, nn

PEFT = find_spec("peft") is not None

if PEFT:
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    class KeptModules(nn.ModuleDict, AuxiliaryTrainingWrapper):  # type: ignore[misc]  # two `update`
        """Modules that peft takes for its own: it freezes every other parameter, and saves none of them."""

        _active_adapter: Any = ()
        _adapters: Any = ()
        _disable_adapters = False
        __getattr__ = nn.Module.__getattr__

        def __init__(self, modules: nn.ModuleDict):
            nn.Module.__init__(self)
            nn.ModuleDict.update(self, dict(modules.items()))

        def adapter_state_dict(self, adapter_name: str, state_dict: Any = None) -> Any:
            """All of it belongs to every adapter."""
            return state_dict

        def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
            """Names in a file are names in the model; an adapter without them loads, too."""
            return {}

        def check_set_adapter(self, adapter_name: Any) -> None:
            """None of them is chosen by adapter."""

        def set_adapter(self, *args: Any, **kwargs: Any) -> None:
            """None of them is chosen by adapter."""

        enable_adapters = set_requires_grad = delete_adapter = set_adapter

        def _get_available_adapters(self) -> set[str]:
            return set()

        @property
        def unload_and_optionally_merge_module(self) -> Any:
            """Not there: peft leaves the modules in their place."""
            raise AttributeError("there is nothing to merge")


def kept(module: nn.Module) -> nn.Module:
    """The same modules, which peft neither freezes nor forgets."""
    return KeptModules(module) if PEFT and type(module) is nn.ModuleDict else module


def base_model(model: Any) -> Any:
    """The model of transformers inside a PeftModel, adapters in its layers; any other model itself.

    Raises ValueError for adapters that add tokens to a row.
    """
    if not PEFT or not isinstance(model, PeftModel):
        return model
    if model.active_peft_config.is_prompt_learning:
        raise ValueError(
            f"{model.active_peft_config.peft_type.value} adds tokens to each row, which a method's rows do not have; "
            "allowed: adapters inside the layers, as LoRA"
        )
    return model.get_base_model()


def inject(model: Any, rank: int, alpha: int) -> None:
    """Put LoRA adapters on all linear layers but the output layer, and freeze everything else.

    Raises ValueError without peft, and for a model that has adapters.
    """
    if not PEFT:
        raise ValueError("trunk: 'lora' needs the package peft; allowed without it: trained, frozen")
    if reached(base_model(model)):
        raise ValueError("trunk: 'lora' puts adapters into a model, and this one has some; allowed with them: trained")
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", bias="none", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # GPT-2's transposed layers are recognised, with a warning each
        inject_adapter_in_model(config, model)


def taken_in(model: Any) -> None:
    """Merge the adapters by `inject` into the model's weights, in place."""
    without(model, merge=True)
    for name in ("peft_config", "_hf_peft_config_loaded"):
        vars(model).pop(name, None)


def folded(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The plain model's state dict from a state dict of the model with adapters by `inject`.

    All values are the state dict's: a sharded model holds a part of each weight alone.
    """
    from peft.tuners.lora import LoraLayer

    layers: dict[str, Any] = {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
    plain = {}
    for name, value in state.items():
        if ".lora_" in name:
            continue
        owner = name.rpartition(".base_layer.")[0]
        if owner in layers and name.endswith(".weight"):
            layer = layers[owner]
            down, up = (state[f"{owner}.lora_{part}.default.weight"] for part in "AB")
            change = up @ down * layer.scaling["default"]
            value = value + (change.T if layer.fan_in_fan_out else change).to(value.dtype)
        plain[name.replace(".base_layer.", ".")] = value
    return plain


def save(model: Any, state: dict[str, Tensor], folder: Path, leave_out: str) -> None:
    """Save adapters by `inject` as peft does, their weights from the model's state dict.

    leave_out: what names of weights that are none begin with.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    model.peft_config["default"].save_pretrained(folder)
    tensors = get_peft_model_state_dict(model, state, adapter_name="default")
    tensors = {f"base_model.model.{k}": v.contiguous() for k, v in tensors.items() if not k.startswith(leave_out)}
    save_file(tensors, folder / "adapter_model.safetensors")


def reached(module: nn.Module) -> bool:
    """Whether adapters, or modules that peft copied, stand inside."""
    return PEFT and any(_adapted(part) for part in module.modules())


def merged(model: Any) -> Any:
    """The model with its adapters merged into its weights: a copy, or without adapters the model itself."""
    model = base_model(model)
    return without(copy.deepcopy(model), merge=True) if reached(model) else model


def without(module: Any, merge: bool) -> Any:
    """The module itself, its adapters taken out, or merged into its weights first."""
    done: list[str] = []
    for name, part in list(module.named_modules()):
        if not PEFT or not _adapted(part) or any(name.startswith(f"{outer}.") for outer in done):
            continue
        done.append(name)
        if isinstance(part, BaseTunerLayer):
            if merge:
                part.merge(safe_merge=True)
            module.set_submodule(name, part.get_base_layer())
        else:
            whole = part.unload_and_optionally_merge_module(True, True, None) if merge else part.original_module
            module.set_submodule(name, whole)
    return module


def _adapted(part: nn.Module) -> bool:
    return isinstance(part, (BaseTunerLayer, AuxiliaryTrainingWrapper)) and not isinstance(part, KeptModules)
