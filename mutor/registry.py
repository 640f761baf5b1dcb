"""Names of methods and tasks, resolved when used, so that planning never imports torch.

A new method is one file and one line here:

    register(METHODS, "my_method", "baselines.my_method:MyMethod")
"""

import importlib
from typing import Any

from mutor.checks import choose

METHODS: dict[str, str] = {}
TASKS: dict[str, str] = {}


def register(registry: dict[str, str], name: str, target: str) -> None:
    """Add `name` -> "module:Class"; a name that is taken raises ValueError."""
    if name in registry:
        raise ValueError(f"{name!r} is already registered as {registry[name]}; choose another name for {target}")
    registry[name] = target


def load(registry: dict[str, str], name: str, what: str) -> Any:
    """Import and return the class registered as `name`; an unknown name raises ValueError with the nearest one."""
    module, _, attribute = registry[choose(name, registry, what)].partition(":")
    return getattr(importlib.import_module(module), attribute)


register(METHODS, "next_token", "baselines.next_token:NextToken")
register(METHODS, "parallel_mtp", "baselines.parallel_mtp:ParallelMTP")
register(METHODS, "sequential_mtp", "baselines.sequential_mtp:SequentialMTP")
register(METHODS, "teacherless", "baselines.teacherless:Teacherless")
register(METHODS, "mutor", "mutor.mtp.mutor:MuToR")
register(METHODS, "mutor_1d", "mutor.mtp.mutor_images:MuToR1D")
register(METHODS, "mutor_2d", "mutor.mtp.mutor_images:MuToR2D")
register(METHODS, "lora_next_token", "baselines.lora:LoRANextToken")
register(METHODS, "lora_mutor", "baselines.lora:LoRAMuToR")

register(TASKS, "star_graph", "mutor.tasks.star_graph:StarGraph")
register(TASKS, "text", "mutor.tasks.text:Text")
register(TASKS, "images", "mutor.tasks.images:Images")
