"""Figures, as .png and .svg. Each function here draws one, from the evidence on a table."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mutor.config.schema import Table
from mutor.files import write
from mutor.registry import METHODS, TASKS, load
from mutor.results.cells import Evidence, stand_ins
from mutor.results.numbers import is_missing
from mutor.results.records import curve
from mutor.results.render import solved, unmeasured

STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "mutor",
    "svg.fonttype": "none",
    "figure.dpi": 160,
    "legend.frameon": False,
    "legend.handlelength": 3,
}
# A method has one colour in all figures, by its place in METHODS: Okabe and Ito's, then Tol's, which colour-blind
# readers tell apart.
COLOURS = [
    "#0072B2", "#E69F00", "#009E73", "#000000", "#AA4499", "#999933", "#882255", "#44AA99", "#777777",
    "#D55E00", "#CC79A7", "#56B4E9", "#6699CC", "#994455", "#117733", "#B8860B", "#332288", "#88CCEE",
]  # fmt: skip
MARKERS = "os^Dv*P"  # of settings of a method
DASHES = ("-", "--", ":", "-.")
STROKES = ("-", "--", "-.")  # where dots are what was published
ROW = 3  # panels side by side


def save(draw: Callable[[], Figure], stem: Path) -> list[Path]:
    """Draw a figure and write it as .png and .svg, without dates, so that the same data gives the same file."""
    files = [stem.with_name(f"{stem.name}{ending}") for ending in (".png", ".svg")]
    with plt.rc_context(STYLE):
        figure = draw()
        # the canvases themselves, as savefig draws twice for each file; the layout found for the first holds for both
        write(files[0], lambda f: FigureCanvasAgg(figure).print_png(f, metadata={"Software": None}))
        figure.set_layout_engine("none")
        write(files[1], lambda f: FigureCanvasSVG(figure).print_svg(f, metadata={"Date": None}))
        plt.close(figure)
    return files


def colour_of(method: str) -> str:
    """A method's colour in all figures."""
    return COLOURS[list(METHODS).index(method) % len(COLOURS)]


def counted(label: str, rows: pd.DataFrame) -> str:
    """A label with the number of seeds behind it: "mutor (n=3)", "mutor (n=1 to 3)"."""
    seeds = sorted({int(n) for n in rows["n_seeds"] if n}) or [0]
    return f"{label} (n={seeds[0]}{f' to {seeds[-1]}' if len(seeds) > 1 else ''})"


def around(rows: pd.DataFrame) -> list[pd.Series]:
    """How far the ends of rows' intervals are from their means, below and above; 0 where there is none."""
    low, mean, high = (rows[column].astype(float) for column in ("ci_low", "mean", "ci_high"))
    return [(mean - low).fillna(0), (high - mean).fillna(0)]


def solve_rates(evidence: Evidence, table: Table) -> Figure:
    """One panel a graph: every seed a point, how many solve it, chance a dashed line, published a cross."""
    frame = evidence.frame(table)
    frame = frame[frame["metric"] == table.metrics[0]]
    groups = list(dict.fromkeys(frame["train_data"].str.replace(" reversed", "")))
    panels = [frame[frame["train_data"].str.replace(" reversed", "") == group].to_dict("records") for group in groups]
    figure, axes = side_by_side(len(groups), (4.1, 1 + 0.3 * max(map(len, panels), default=1)), 1.2)
    for axis, group, rows in zip(axes, groups, panels, strict=False):
        for y, row in enumerate(rows):
            _setting(axis, y, row)
        if rows:
            axis.axvline(rows[0]["chance"], color="#555555", ls="--", lw=1)
            axis.text(rows[0]["chance"], -0.75, " chance 1/n", color="#555555", fontsize=7.5, va="center")
        axis.set(xlim=(0, 100), ylim=(len(rows) - 0.4, -1.05), xlabel="solve rate (%)", title=graph_name(group))
        axis.set_yticks(range(len(rows)), [_named(row) for row in rows])
    said = f"; seeds that solve {frame['solved_at'].max():.0f}% or more, with the exact interval of their share"
    published = "; crosses: published" if frame["reported"].notna().any() else ""
    figure.suptitle(wrapped(title_of(evidence, table, said + published), 20 + 45 * min(len(groups), ROW)), fontsize=10)
    foot(figure, frame, min(len(groups), ROW))
    return figure


def _named(row: Mapping[Any, Any]) -> str:
    """A setting with what stands behind it: "mutor  (n=3)", "mutor  9 of 10 solved (56 to 100%)"."""
    if is_missing(row["solved_at"]):
        return f"{row['label']}  (n={row['n_seeds']})"
    return f"{row['label']}  {solved(row)}" if row["n_seeds"] else row["label"]


def _setting(axis: Axes, y: int, row: dict[Any, Any]) -> None:
    """One setting's line of a panel: every seed a point, and the mean a stroke with its interval.

    Where a seed either learns the task or does not, a mean over seeds is no seed's rate: none is drawn.
    """
    means = is_missing(row["solved_at"])
    if row["n_seeds"]:
        colour, mean, values = colour_of(row["method"]), row["mean"], row["values"]
        if means:
            axis.plot(mean, y, "|", color=colour, ms=14, mew=2)
            low, high = (mean if is_missing(row[end]) else row[end] for end in ("ci_low", "ci_high"))
            axis.errorbar(mean, y, xerr=[[mean - low], [high - mean]], color=colour, capsize=3, lw=1)
        else:
            axis.axhline(y, color=colour, alpha=0.25, lw=1, zorder=0)
        between = min(0.16, 0.6 / len(values))
        spread = [y + between * (i - (len(values) - 1) / 2) for i in range(len(values))]
        axis.plot(
            values, spread, "o", color=colour, ms=4 if means else 5, mec="white", mew=0.4, clip_on=False, zorder=3
        )
    elif not row.get("unmeasured"):
        where = axis.get_yaxis_transform()
        axis.text(0.01, y, "not run", va="center", color="#777777", style="italic", transform=where)
    if not is_missing(row["reported"]):
        axis.plot(row["reported"], y, "x", color="black", ms=6, zorder=4)


def methods(evidence: Evidence, table: Table) -> Figure:
    """One panel for each of the first two metrics, a line a setting: every seed a point, the mean a stroke."""
    return _by_metric(evidence, table, table.metrics[:2])


def metrics(evidence: Evidence, table: Table) -> Figure:
    """The same for all metrics."""
    return _by_metric(evidence, table, table.metrics)


def _by_metric(evidence: Evidence, table: Table, names: Sequence[str]) -> Figure:
    frame = evidence.frame(table)
    frame = frame.assign(unmeasured=unmeasured(frame))
    if frame["data"].nunique() > 1:
        frame = frame.assign(label=frame["label"] + ", " + frame["data"])
    shown = [metric for metric in names if metric in set(frame["metric"])]
    panels = [frame[frame["metric"] == metric].to_dict("records") for metric in shown]
    figure, axes = side_by_side(len(shown), (3.6, 1.3 + 0.3 * max(map(len, panels), default=1)), 2.2)
    for number, (axis, metric, rows) in enumerate(zip(axes, shown, panels, strict=False)):
        for y, row in enumerate(rows):
            _setting(axis, y, row)
        unit = rows[0]["unit"]
        axis.set(ylim=(len(rows) - 0.4, -0.6), xlabel=f"{metric.replace('_', ' ')} ({unit})")
        axis.set_yticks(range(len(rows)), [_named(row) for row in rows])
        shown_ends = ("mean", "ci_low", "ci_high", "reported")
        ends = [row[end] for row in rows for end in shown_ends if not is_missing(row[end])]
        ends += [value for row in rows if row["n_seeds"] for value in row["values"]]
        if ends:
            room = 0.1 * (max(ends) - min(ends)) + 0.5
            axis.set_xlim(max(0, min(ends) - room), max(ends) + room)
        if number % ROW:
            axis.set_yticklabels([])
    wide, published = min(len(shown), ROW), "; crosses: published" if frame["reported"].notna().any() else ""
    figure.suptitle(wrapped(title_of(evidence, table, published), 20 + 45 * wide), fontsize=10)
    foot(figure, frame, wide)
    return figure


def sweep(evidence: Evidence, table: Table) -> Figure:
    """The first metric over the table's setting, a line a method."""
    frame = evidence.frame(table)
    return _lines(evidence, table, str(table.sweep_over), frame["kind"])


def progress(evidence: Evidence, table: Table) -> Figure:
    """The first metric over the iterations, a line a setting."""
    frame = evidence.frame(table)
    return _lines(evidence, table, "iterations", frame["line"])


def _lines(evidence: Evidence, table: Table, over: str, line: pd.Series) -> Figure:
    """One panel a training set: mean a line with its interval, every seed a point, published dotted.

    A method without the setting (next-token prediction) is a horizontal line; published values are only drawn where
    nothing stands in. Settings of a method differ by dashes and markers.
    """
    frame = evidence.frame(table).assign(line=line)
    metric, unit = frame["metric"].iloc[0], frame["unit"].iloc[0]
    frame = frame[frame["metric"] == metric].copy()
    frame.loc[frame["stands_in_for"] != "", "reported"] = None
    groups, lines = (list(dict.fromkeys(frame[key])) for key in ("data", "line"))
    of_method = frame.drop_duplicates("line").groupby("method", sort=False).cumcount().tolist()  # 0: its first setting
    figure, axes = side_by_side(len(groups), (3.8, 3.1), 0.6)
    for axis, group in zip(axes, groups, strict=False):
        for number, (name, nth) in enumerate(zip(lines, of_method, strict=True)):
            rows = frame[(frame["data"] == group) & (frame["line"] == name)]
            if rows.empty:
                continue
            own = colour_of(rows["method"].iloc[0])
            x = pd.to_numeric(rows[over], errors="coerce").fillna(table.x_if_absent).tolist()
            if len(x) == 1 and over == table.sweep_over:
                for column, style in (("mean", "-"), ("reported", ":")):
                    for value in rows[column].dropna():
                        axis.axhline(value, color=own, ls=style, lw=1.2)
            mean = rows["mean"].astype(float)
            marker = MARKERS[nth % len(MARKERS)]
            axis.plot(x, mean, color=own, ls=STROKES[nth % len(STROKES)], label=counted(name, rows), lw=1.4)
            axis.plot(x, rows["reported"].astype(float), "x:", color=own, lw=1, ms=5)
            apart = (number - (len(lines) - 1) / 2) * 0.012 * (max(x) - min(x))  # so that no interval hides another
            axis.errorbar(
                [at + apart for at in x], mean, yerr=around(rows), fmt="none", color=own, capsize=2, lw=0.9, alpha=0.7
            )
            for at, values in zip(x, rows["values"], strict=True):
                axis.plot([at + apart] * len(values), values, marker, color=own, ms=4, mec="white", mew=0.4)
        axis.set(
            title=group,
            xlabel=over.replace("iterations", "training steps"),
            ylabel=f"{metric} ({'%' if unit == 'percent' else unit})",
        )
        axis.legend(fontsize=7)
    published = "; crosses and dots: published" if frame["reported"].notna().any() else ""
    figure.suptitle(wrapped(title_of(evidence, table, published), 15 + 45 * min(len(groups), ROW)), fontsize=9)
    foot(figure, frame, min(len(groups), ROW))
    return figure


def samples(evidence: Evidence, table: Table) -> Figure:
    """Pictures drawn by the last model of each setting, its first seed, side by side; a column is a class."""
    frame = evidence.frame(table)
    labels = zip(evidence.cells(table), frame["label"], strict=True)
    chosen = {cell.spec.path: label for cell, label in labels if cell.checkpoint == "last"}
    found = {}
    for path, label in chosen.items():
        files = sorted((evidence.runs.runs / path).glob("seed*/samples-last.png"))
        if files:
            found[label] = files[0]
    figure, axes = side_by_side(len(found), (3.2, 3.7))
    for axis in axes:
        axis.axis("off")
    for axis, (label, file) in zip(axes, found.items(), strict=False):
        axis.imshow(plt.imread(file), cmap="gray", interpolation="nearest")
        axis.set_title(wrapped(label, 40), fontsize=9)
    if not found:
        axes[0].text(0.5, 0.5, "no pictures in the folder of runs", ha="center", color="#777777")
    title = title_of(evidence, table, "; samples of the last models")
    figure.suptitle(wrapped(title, 45 * min(max(len(found), 1), ROW)), fontsize=9)
    foot(figure, frame, min(len(found), ROW))
    return figure


def curves(evidence: Evidence, table: Table) -> Figure:
    """Learning curves: a row a graph; validation solve rate, next-token loss and auxiliary losses over steps.

    Auxiliary losses differ by their dashes; each panel of them says which are which.
    """
    chosen = {c.spec.path: c for c in evidence.cells(table) if not c.row.control}
    groups = list(dict.fromkeys(c.spec.data for c in chosen.values()))
    height = 0.6 + 2.5 * max(len(groups), 1)
    figure, axes = plt.subplots(max(len(groups), 1), 3, figsize=(11, height), squeeze=False, layout="constrained")
    for row, group in zip(axes, groups, strict=False):
        own = [c for c in chosen.values() if c.spec.data == group]
        for cell in own:
            label = cell.row.label or cell.row.method
            _draw_curves(row, [curve(record) for record in evidence.runs.of(cell.spec)], cell.row.method, label)
        _dashes(row[2])
        names = ("solve rate (%, validation)", "next-token loss (nats)", "auxiliary losses (nats)")
        for axis, name in zip(row, names, strict=True):
            axis.set(xlabel="step", ylabel=name)
        for axis in row[1:]:
            axis.set_yscale("log")
        spec = own[0].spec
        task = load(TASKS, spec.dataset.task, "task")
        row[0].set_title(graph_name(task.describe(spec.task_config)), loc="left")
        row[0].axhline(task.chance(spec.task_config), color="#555555", ls="--", lw=1)
        row[0].set_ylim(0, 102)
    drawn = {line.get_label(): line for axis in axes[:, 0] for line in axis.get_legend_handles_labels()[0]}
    if drawn:
        axes[0, 1].legend(handles=drawn.values(), fontsize=7)
    figure.suptitle(title_of(evidence, table, "; learning curves, a line a seed"), fontsize=10)
    foot(figure, evidence.frame(table), 3)
    return figure


def _draw_curves(axes: Sequence[Axes], runs: list[list[dict[str, float]]], method: str, label: str) -> None:
    """The learning curves of a setting's seeds."""
    colour = colour_of(method)
    if not runs:
        return
    known = {"loss", "grad_norm", "learning_rate", "tokens", "seconds", "epoch", "step", "next_token"}

    def points(key: str) -> list[list[tuple[float, float]]]:
        return [[(e["step"], e[key]) for e in curve if key in e] for curve in runs]

    axes[0].plot(*broken_line(points("eval_solve_rate")), color=colour, lw=1.2, marker=".", ms=4, label=label)
    axes[1].plot(*broken_line(points("next_token")), color=colour, lw=0.9)
    others = {key for curve in runs for e in curve if "next_token" in e for key in e}
    for number, key in enumerate(sorted(others - known)):
        axes[2].plot(*broken_line(points(key)), color=colour, lw=0.9, ls=DASHES[number % len(DASHES)], label=key)


def _dashes(axis: Axes) -> None:
    """A legend of what is drawn with which dashes, of all methods together."""
    names: dict[Any, dict[str, None]] = {}
    for line in axis.lines:
        names.setdefault(line.get_linestyle(), {})[str(line.get_label())] = None
    handles = [Line2D([], [], color="#555555", ls=style, lw=0.9, label=", ".join(of)) for style, of in names.items()]
    if handles:
        axis.legend(handles=handles, fontsize=6.5)


def broken_line(runs: Sequence[Sequence[tuple[float, float]]]) -> tuple[list[float], list[float]]:
    """x and y of several lines as those of one that is drawn at once, with a gap between them."""
    broken = [point for run in runs for point in ((math.nan, math.nan), *run)][1:]
    return [x for x, _ in broken], [y for _, y in broken]


def side_by_side(count: int, panel: tuple[float, float], margin: float = 0.0) -> tuple[Figure, Sequence[Axes]]:
    """A figure of `count` panels of this size in inches, one at the least, at most ROW side by side."""
    wide = min(max(count, 1), ROW)
    high = math.ceil(max(count, 1) / wide)
    size = (margin + panel[0] * wide, panel[1] * high)
    figure, axes = plt.subplots(high, wide, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[max(count, 1) :]:
        axis.remove()
    return figure, list(axes.flat[: max(count, 1)])


def title_of(evidence: Evidence, table: Table, more: str) -> str:
    """What is shown, what ran, and at which scale."""
    ran = ", ".join(dict.fromkeys(evidence.frame(table)["ran"]))
    return f"{table.title}{more} — {ran} — scale {evidence.scale.name}{', path only' * evidence.path_only(table)}"


def foot(figure: Figure, frame: pd.DataFrame, panels: int, about: Sequence[str] = ()) -> None:
    """What stands in for what, all of it, and how the numbers were made, below a figure."""
    stands = stand_ins(frame)
    words = [*([f"Stands in for {'; '.join(stands)}."] if stands else []), *about]
    if words:
        figure.supxlabel(wrapped(" ".join(words), 35 + 50 * panels), fontsize=7, color="#555555")


def graph_name(name: str) -> str:
    """ "star_graph n=3 l=3 labels=30" -> "G(3, 3), 30 labels"."""
    values = dict(part.split("=") for part in name.split() if "=" in part)
    return (
        f"G({values['n']}, {values['l']}), {values['labels']} labels" if {"n", "l", "labels"} <= set(values) else name
    )


def wrapped(text: str, width: int) -> str:
    """Lines of at most so many characters."""
    return "\n".join(textwrap.wrap(text, width))
