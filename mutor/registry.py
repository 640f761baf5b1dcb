"""Names of methods, tasks, attention backends and drawings, resolved when used.

So planning imports neither torch nor matplotlib.

A new method is one file and one line here:

    register(METHODS, "my_method", "mutor.baselines.my_method:MyMethod")
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, TypeVar

from mutor.checks import choose

T = TypeVar("T")


@dataclass(frozen=True)
class AttentionBackend:
    """An attention implementation of transformers, and what it can do.

    mask: "module:function" that builds its mask from (layout, dtype of the model's weights), and for layers with a
    sliding window from (layout, dtype, tokens of the window). Importing the module may make the backend known to
    transformers: it is imported before a model is loaded.
    answers_under: the backend under which a model trained with this one answers; "" means this one. Answers grow token
    by token, and prompts are padded on the left; a backend that can't do that names another one.
    cpu_gradients: whether it trains on a CPU.
    """

    mask: str
    answers_under: str = ""
    cpu_gradients: bool = True


METHODS: dict[str, str] = {}
TASKS: dict[str, str] = {}
ATTENTION: dict[str, AttentionBackend] = {}
AUTO = "auto"  # attention as transformers loads a model, and `attach` makes sdpa blockwise where that is exact
DRAWINGS: dict[str, Drawing] = {}


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure of a drawing, written as <table><suffix>.png and .svg."""

    draw: str  # "module:function"(evidence, table) -> matplotlib's figure
    shows: str = "numbers in the table below"  # for readers who can't see it
    suffix: str = ""


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How a table's cells come about and how they are shown; functions are "module:function", imported when called.

    Every drawing writes <table>.csv, .md and .tex, and its figures beside them.
    """

    made_of: str = "runs"  # where the numbers come from: runs, costs (benchmarks/cost.py) or config (nothing was run)
    rows: str = "mutor.results.cells:run_rows"  # (evidence, table) -> a dict a cell, of columns of cells.py
    figures: tuple[Figure, ...] = ()
    printed: str = ""  # (frame, table) -> the cells printed in .md and .tex, where not all are or under other names
    about: str = ""  # (evidence, table) -> sentences on how the numbers were made
    answer: str = ""  # (evidence, table) -> sentences that stand before all else, in .md, report and what is printed
    heading: str = "Scale: {scale.name} ({scale.description})."  # first line of .md

    @property
    def suffixes(self) -> list[str]:
        """Ends of the files of its figures: .png, .svg, _curves.png, ..."""
        return [figure.suffix + ending for figure in self.figures for ending in (".png", ".svg")]


def register(registry: dict[str, T], name: str, target: T) -> None:
    """Add `name` -> "module:Class", an AttentionBackend or a Drawing; a name that is taken raises ValueError."""
    if name in registry:
        raise ValueError(f"{name!r} is already registered as {registry[name]}; choose another name for {target}")
    registry[name] = target


def load(registry: dict[str, str], name: str, what: str) -> Any:
    """Import and return the class registered as `name`; an unknown name raises ValueError with the nearest one."""
    return resolve(registry[choose(name, registry, what)])


def resolve(target: str) -> Any:
    """Import and return what "module:name" names."""
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def answers_under(attention: str) -> str:
    """The attention implementation under which a model trained with `attention` answers."""
    return (attention in ATTENTION and ATTENTION[attention].answers_under) or attention


register(METHODS, "next_token", "mutor.baselines.next_token:NextToken")
register(METHODS, "parallel_mtp", "mutor.baselines.parallel_mtp:ParallelMTP")
register(METHODS, "sequential_mtp", "mutor.baselines.sequential_mtp:SequentialMTP")
register(METHODS, "teacherless", "mutor.baselines.teacherless:Teacherless")
register(METHODS, "token_masking", "mutor.baselines.token_masking:TokenMasking")
register(METHODS, "same_logits", "mutor.baselines.same_logits:SameLogits")
register(METHODS, "bag_of_words", "mutor.baselines.bag_of_words:BagOfWords")
register(METHODS, "pause", "mutor.baselines.pause:Pause")
register(METHODS, "marginal", "mutor.baselines.marginal:Marginal")
register(METHODS, "mutor", "mutor.mtp.mutor:MuToR")
register(METHODS, "mutor_1d", "mutor.mtp.mutor_images:MuToR1D")
register(METHODS, "mutor_2d", "mutor.mtp.mutor_images:MuToR2D")
register(METHODS, "lora_next_token", "mutor.baselines.lora:LoRANextToken")
register(METHODS, "lora_mutor", "mutor.baselines.lora:LoRAMuToR")
register(METHODS, "token_order", "mutor.baselines.token_order:TokenOrder")
register(METHODS, "ranking", "mutor.baselines.ranking:Ranking")
register(METHODS, "next_latent", "mutor.baselines.next_latent:NextLatent")
register(METHODS, "joint_mtp", "mutor.baselines.joint_mtp:JointMTP")

register(TASKS, "star_graph", "mutor.tasks.star_graph:StarGraph")
register(TASKS, "sat", "mutor.tasks.sat:Sat")
register(TASKS, "countdown", "mutor.tasks.countdown:Countdown")
register(TASKS, "fact_chains", "mutor.tasks.fact_chains:FactChains")
register(TASKS, "text", "mutor.tasks.text:Text")
register(TASKS, "images", "mutor.tasks.images:Images")
register(TASKS, "path_planning", "mutor.tasks.path_planning:PathPlanning")
register(TASKS, "blocksworld", "mutor.tasks.blocksworld:Blocksworld")

register(ATTENTION, "blockwise", AttentionBackend("mutor.mtp.blockwise:bounds_mask"))
register(
    ATTENTION,
    "flex_attention",
    AttentionBackend("mutor.mtp.attention:block_mask", answers_under="sdpa", cpu_gradients=False),
)
register(ATTENTION, "sdpa", AttentionBackend("mutor.mtp.attention:dense_mask"))
register(ATTENTION, "eager", AttentionBackend("mutor.mtp.attention:additive_mask"))
register(DRAWINGS, "table", Drawing())
register(
    DRAWINGS,
    "solve_rates",
    Drawing(
        printed="mutor.results.render:first_metric",
        figures=(
            Figure(draw="mutor.results.figures:solve_rates"),
            Figure(draw="mutor.results.figures:curves", shows="learning curves", suffix="_curves"),
        ),
    ),
)
register(
    DRAWINGS,
    "methods",
    Drawing(figures=(Figure(draw="mutor.results.figures:methods", shows="each setting a line, every seed a point"),)),
)
register(
    DRAWINGS,
    "metrics",
    Drawing(figures=(Figure(draw="mutor.results.figures:metrics", shows="each setting a line, every seed a point"),)),
)
register(
    DRAWINGS,
    "ahead",
    Drawing(
        printed="mutor.results.render:rates_ahead",
        figures=(
            Figure(draw="mutor.results.figures_ahead:ahead"),
            Figure(draw="mutor.results.figures_ahead:ahead_curves", shows="the same while training", suffix="_curves"),
        ),
    ),
)
register(
    DRAWINGS,
    "verdict",
    Drawing(answer="mutor.results.helps:sentences", printed="mutor.results.helps:printed"),
)
register(DRAWINGS, "sweep", Drawing(figures=(Figure(draw="mutor.results.figures:sweep"),)))
register(
    DRAWINGS,
    "images",
    Drawing(
        figures=(
            Figure(draw="mutor.results.figures:progress"),
            Figure(
                draw="mutor.results.figures:samples",
                shows="pictures drawn by the last models, a column a class",
                suffix="_samples",
            ),
        ),
    ),
)
register(
    DRAWINGS,
    "flops",
    Drawing(
        made_of="config",
        rows="mutor.results.flops:rows",
        heading="Worked out from widths and lengths; nothing is trained.",
    ),
)
register(DRAWINGS, "settings", Drawing(made_of="config", rows="mutor.results.cells:settings_rows"))
register(
    DRAWINGS,
    "cost",
    Drawing(
        made_of="costs",
        rows="mutor.results.cost:rows",
        printed="mutor.results.cost:printed",
        about="mutor.results.cost:circumstances",
        figures=(Figure(draw="mutor.results.figures_cost:costs"),),
    ),
)
register(
    DRAWINGS,
    "decoding",
    Drawing(
        printed="mutor.results.decoding:printed",
        figures=(
            Figure(draw="mutor.results.figures_ahead:decoding", shows="tokens a pass and speed-up over drafts a pass"),
        ),
    ),
)
