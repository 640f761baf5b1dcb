"""Names of methods, tasks and attention backends, resolved when used, so that planning never imports torch.

A new method is one file and one line here:

    register(METHODS, "my_method", "baselines.my_method:MyMethod")
"""

import importlib
from dataclasses import dataclass
from typing import Any, TypeVar

from mutor.checks import choose

Entry = TypeVar("Entry")


@dataclass(frozen=True)
class AttentionBackend:
    """An attention implementation of transformers, and what it can do.

    mask: "module:function" that builds its mask from (layout, dtype of the model's weights).
    answers_under: the backend under which a model trained with this one answers; "" means this one. Answers grow token
    by token, and prompts are padded on the left; a backend that can't do that names another one.
    cpu_gradients: whether it trains on a CPU.
    """

    mask: str
    answers_under: str = ""
    cpu_gradients: bool = True


METHODS: dict[str, str] = {}
TASKS: dict[str, str] = {}
ATTENTION: dict[str, AttentionBackend] = {}  # the fastest in training first


def register(registry: dict[str, Entry], name: str, target: Entry) -> None:
    """Add `name`: "module:Class" or an AttentionBackend; a name that is taken raises ValueError."""
    if name in registry:
        raise ValueError(f"{name!r} is already registered as {registry[name]}; choose another name for {target}")
    registry[name] = target


def load(registry: dict[str, str], name: str, what: str) -> Any:
    """Import and return the class registered as `name`; an unknown name raises ValueError with the nearest one."""
    return imported(registry[choose(name, registry, what)])


def imported(target: str) -> Any:
    """What "module:attribute" names."""
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def answers_under(attention: str) -> str:
    """The attention implementation under which a model trained with `attention` answers."""
    return (attention in ATTENTION and ATTENTION[attention].answers_under) or attention


def fastest_attention(device: str) -> str:
    """The fastest backend that trains on this type of device."""
    return next(name for name, backend in ATTENTION.items() if device != "cpu" or backend.cpu_gradients)


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

register(
    ATTENTION,
    "flex_attention",
    AttentionBackend("mutor.mtp.attention:block_mask", answers_under="sdpa", cpu_gradients=False),
)
register(ATTENTION, "sdpa", AttentionBackend("mutor.mtp.attention:dense_mask"))
register(ATTENTION, "eager", AttentionBackend("mutor.mtp.attention:additive_mask"))
