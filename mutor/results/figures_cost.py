"""Figures of what training steps cost."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mutor.config.schema import Table
from mutor.results.cells import Evidence
from mutor.results.figures import COLOURS, MARKERS, ROW, colour_of, foot, side_by_side, wrapped
from mutor.results.numbers import is_missing
from mutor.results.render import circumstances


def costs(evidence: Evidence, table: Table) -> Figure:
    """One panel a section: the time of a step, times its reference's; bars, or lines where it is measured over a value.

    The ratio of FLOPs is a dashed line, that of tokens a tick: what a method's tokens alone would cost.
    """
    frame = evidence.frame(table)
    sections = {}
    for name in dict.fromkeys(frame["benchmark"]):
        part = frame[frame["benchmark"] == name]
        about = part.drop_duplicates("train_data").set_index("train_data")[["label", "sweep", "x"]]
        numbers = part.pivot(index="train_data", columns="metric", values="mean")
        sections[part["panel"].iloc[0]] = about.join(numbers[["ratio", "token_ratio", "flop_ratio"]].astype(float))
    lines = all(section["sweep"].any() for section in sections.values())
    if lines:
        figure, axes = side_by_side(len(sections), (3.6, 3.3), 0.6)
        for axis, (name, section) in zip(axes, sections.items(), strict=True):
            _cost_lines(axis, name, section)
        axes[0].set_ylabel("time of a step, times next_token's")
    else:
        heights = [len(section) for section in sections.values()]
        figure, axes = one_above_the_other(heights, 7.2)
        for axis, (name, section) in zip(axes, sections.items(), strict=True):
            _cost_bars(axis, name, section)
        axes[-1].set_xlabel("time of a step, times next_token's")
        figure.legend(*axes[0].get_legend_handles_labels(), fontsize=7, loc="outside right upper")
    wide = min(len(sections), ROW) if lines else 1
    figure.suptitle(wrapped(f"{table.title} — scale {evidence.scale.name}", 20 + 40 * wide), fontsize=10)
    foot(figure, frame, wide, circumstances(evidence, table))
    return figure


def _cost_lines(axis: Axes, name: str, section: pd.DataFrame) -> None:
    """A section's ratios over the value that it is swept over."""
    for number, label in enumerate(dict.fromkeys(section["label"])):
        own = colour_of(label.split(",")[0])
        mine = section[section["label"] == label]
        x = pd.to_numeric(mine["x"])
        if x.notna().any():
            axis.plot(x, mine["ratio"], MARKERS[number], color=own, ms=4, lw=1.4, ls="-", label=label)
            axis.plot(x, mine["flop_ratio"], "--", color=own, lw=1)
    axis.plot([], [], "--", color="#555555", lw=1, label="FLOPs alone")
    axis.axhline(1, color="#555555", lw=0.8)
    axis.set_title(wrapped(name, 42), fontsize=9)
    axis.set(xlabel=next(filter(None, section["sweep"])), ylim=(0, None))
    if section["ratio"].notna().any():
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.legend(fontsize=7)
    else:
        axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", fontsize=7.5)


def _cost_bars(axis: Axes, name: str, section: pd.DataFrame) -> None:
    """A section's ratios, a bar a case."""
    y = range(len(section))
    axis.barh(y, section["ratio"].fillna(0), color=COLOURS[0], alpha=0.35, height=0.65)
    axis.plot(section["token_ratio"], y, "|", color="black", ms=12, mew=1.6, label="tokens alone")
    axis.plot(section["flop_ratio"], y, "x", color=COLOURS[5], ms=6, label="FLOPs alone")
    for at, ratio in zip(y, section["ratio"], strict=True):
        axis.text(0.02, at, "not measured" if is_missing(ratio) else f"{ratio:.2f}", va="center", fontsize=7.5)
    axis.set_yticks(y, list(section.index))
    axis.invert_yaxis()
    widest = section[["ratio", "token_ratio", "flop_ratio"]].max().dropna()
    axis.set_xlim(0, 1.05 * max([1.0, *widest]))
    axis.set_title(wrapped(name, 64), loc="left", fontsize=9)


def one_above_the_other(heights: Sequence[int], width: float) -> tuple[Figure, Sequence[Axes]]:
    """A figure of panels with so many bars each."""
    size = (width, 0.7 + 0.32 * sum(heights))
    ratios = list(heights)
    figure, axes = plt.subplots(len(ratios), 1, figsize=size, squeeze=False, layout="constrained", height_ratios=ratios)
    return figure, list(axes.flat)
