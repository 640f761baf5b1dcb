"""Figures, as .png and .svg."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd

from mutor.config.runs import cells_of
from mutor.config.schema import Scale, Table
from mutor.registry import TASKS, load
from mutor.results import records

STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "mutor",
    "svg.fonttype": "none",
    "figure.dpi": 110,
    "savefig.dpi": 160,
    "legend.frameon": False,
}
# Okabe and Ito's palette, told apart by colour-blind readers
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#000000"]


def save(figure: Any, folder: Path, name: str) -> list[Path]:
    """Write a figure as .png and .svg without dates, so that the same data gives the same file."""
    from mutor.files import write

    files = [folder / f"{name}.png", folder / f"{name}.svg"]
    write(files[0], lambda f: figure.savefig(f, metadata={"Software": None}))
    write(files[1], lambda f: figure.savefig(f, metadata={"Date": None}))
    plt.close(figure)
    return files


def solve_rates(table: Table, scale: Scale, frame: pd.DataFrame, folder: Path) -> list[Path]:
    """One panel a graph: every seed a point, mean and interval a bar, chance a dashed line, published a cross."""
    frame = frame[frame["metric"] == "solve_rate"]
    groups = list(dict.fromkeys(frame["train_data"].str.replace(" reversed", "")))
    labels = list(dict.fromkeys(frame["label"].str.replace(r", d_max \d+$", "", regex=True)))
    colour = {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(labels)}
    with plt.rc_context(STYLE):
        longest = max((len(_panel(frame, g)) for g in groups), default=1)
        figure, axes = plt.subplots(
            1,
            max(len(groups), 1),
            figsize=(1.2 + 4.1 * max(len(groups), 1), 1.3 + 0.38 * longest),
            squeeze=False,
            layout="constrained",
        )
        for axis, group in zip(axes[0], groups, strict=False):
            rows = _panel(frame, group)
            for y, row in enumerate(rows):
                own = colour[row["label"].split(", d_max")[0]]
                if row["n_seeds"]:
                    axis.barh(y, row["mean"], color=own, alpha=0.25, height=0.7)
                    low, high = _or(row["ci_low"], row["mean"]), _or(row["ci_high"], row["mean"])
                    error = [[row["mean"] - low], [high - row["mean"]]]
                    axis.errorbar(row["mean"], y, xerr=error, color=own, capsize=3, lw=1)
                    between = min(0.16, 0.6 / len(row["values"]))
                    spread = [y + between * (i - (len(row["values"]) - 1) / 2) for i in range(len(row["values"]))]
                    axis.plot(
                        row["values"], spread, "o", color=own, ms=4, mec="white", mew=0.4, clip_on=False, zorder=3
                    )
                else:
                    axis.text(1, y, "not run", va="center", color="#777777", style="italic")
                if row["reported"] is not None and not pd.isna(row["reported"]):
                    axis.plot(row["reported"], y, "x", color="black", ms=6, zorder=4)
            if rows:
                axis.axvline(rows[0]["chance"], color="#555555", ls="--", lw=1)
                axis.text(rows[0]["chance"], -0.75, " chance 1/n", color="#555555", fontsize=7.5, va="center")
            axis.set(xlim=(0, 100), ylim=(len(rows) - 0.4, -1.05), xlabel="solve rate (%)", title=_graph(group))
            axis.set_yticks(range(len(rows)), [f"{r['label']}  (n={r['n_seeds']})" for r in rows])
        figure.suptitle(f"{table.title} — scale {scale.name}", fontsize=10)
        _stands_in(figure, frame, len(groups))
        return save(figure, folder, table.name)


def _stands_in(figure: Any, frame: pd.DataFrame, panels: int) -> None:
    """What stands in for what, below a figure."""
    stands = "; ".join(sorted(set(filter(None, frame["stands_in_for"])))[:2])
    if stands:
        figure.supxlabel("Stands in for " + _wrap(stands, 22 + 45 * panels), fontsize=7, color="#555555")


def sweep(table: Table, scale: Scale, frame: pd.DataFrame, folder: Path) -> list[Path]:
    """One panel a training set: the first metric over a setting; mean a line, every seed a point, published dotted.

    With draw images the axis is the iterations. Methods without the setting (next-token prediction) are a horizontal
    line; published values are only drawn where nothing stands in.
    """
    metric = frame["metric"].iloc[0]
    unit = "%" if frame["unit"].iloc[0] == "percent" else frame["unit"].iloc[0]
    frame = frame[frame["metric"] == metric].copy()
    frame.loc[frame["stands_in_for"] != "", "reported"] = None
    over, frame["line"] = table.sweep_over, frame["method"]
    if table.draw == "images":
        over, frame["line"] = "iterations", frame["label"].str.replace(r", \d+K$", "", regex=True)
    groups, lines = (list(dict.fromkeys(frame[key])) for key in ("train_data", "line"))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, max(len(groups), 1), figsize=(0.6 + 3.8 * max(len(groups), 1), 3.1), squeeze=False, layout="constrained"
        )
        for axis, group in zip(axes[0], groups, strict=False):
            for line, own in zip(lines, COLOURS, strict=False):
                rows = frame[(frame["train_data"] == group) & (frame["line"] == line)]
                x = pd.to_numeric(rows[over], errors="coerce").fillna(table.x_if_absent).tolist()
                if len(x) == 1 and over != "iterations":
                    for column, style in (("mean", "-"), ("reported", ":")):
                        for value in rows[column].dropna():
                            axis.axhline(value, color=own, ls=style, lw=1.2)
                axis.plot(x, rows["mean"].astype(float), "-", color=own, label=line, lw=1.4)
                axis.plot(x, rows["reported"].astype(float), "x:", color=own, lw=1, ms=5)
                for at, values in zip(x, rows["values"], strict=True):
                    axis.plot([at] * len(values), values, "o", color=own, ms=4, mec="white", mew=0.4)
            axis.set(title=group, xlabel=over, ylabel=f"{metric} ({unit})")
        axes[0][0].legend(fontsize=8)
        published = "; crosses and dots: published" if frame["reported"].notna().any() else ""
        title = f"{table.title} — scale {scale.name}{published}"
        figure.suptitle(_wrap(title, 15 + 45 * len(groups)), fontsize=9)
        _stands_in(figure, frame, len(groups))
        return save(figure, folder, table.name)


def costs(table: Table, scale: Scale, frame: pd.DataFrame, folder: Path) -> list[Path]:
    """One panel a section: the time of a step, times its reference's; bars, or lines where it is measured over a value.

    The ratio of FLOPs is a dashed line, that of tokens a tick: what a method's tokens alone would cost.
    """
    sections = list(dict.fromkeys(frame["benchmark"]))
    wide = {
        name: part.pivot(index=["label", "train_data", "path"], columns="metric", values="mean").reset_index()
        for name, part in frame.groupby("benchmark")
    }
    lines = all(frame[frame["benchmark"] == name]["data"].any() for name in sections)
    with plt.rc_context(STYLE):
        size = (0.6 + 3.6 * len(sections), 3.3) if lines else (7.2, 0.7 + 0.32 * sum(map(len, wide.values())))
        shape = (1, len(sections)) if lines else (len(sections), 1)
        heights = {} if lines else {"height_ratios": [len(wide[name]) for name in sections]}
        figure, axes = plt.subplots(*shape, figsize=size, squeeze=False, layout="constrained", gridspec_kw=heights)
        for axis, name in zip(axes.flat, sections, strict=True):
            order = list(dict.fromkeys(frame[frame["benchmark"] == name]["train_data"]))
            part = wide[name].set_index("train_data").loc[order]
            numbers = part[["ratio", "token_ratio", "flop_ratio"]].astype(float)
            if lines:
                for label, own in zip(dict.fromkeys(part["label"]), COLOURS, strict=False):
                    mine = part["label"] == label
                    x = pd.to_numeric(part["path"][mine])
                    if x.notna().any():
                        axis.plot(x, numbers["ratio"][mine], "o-", color=own, ms=4, lw=1.4, label=label)
                        axis.plot(x, numbers["flop_ratio"][mine], "--", color=own, lw=1)
                axis.axhline(1, color="#555555", lw=0.8)
                over = next(filter(None, frame[frame["benchmark"] == name]["data"]))
                axis.set(title=name, xlabel=over, ylim=(0, None))
                if numbers["ratio"].notna().any():
                    axis.set_xscale("log", base=2)
                    axis.xaxis.set_major_formatter("{x:.0f}")
                    axis.legend(fontsize=7)
                else:
                    axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", fontsize=7.5)
            else:
                y = range(len(part))
                axis.barh(y, numbers["ratio"].fillna(0), color=COLOURS[0], alpha=0.35, height=0.65)
                axis.plot(numbers["token_ratio"], y, "|", color="black", ms=12, mew=1.6, label="tokens alone")
                axis.plot(numbers["flop_ratio"], y, "x", color=COLOURS[5], ms=6, label="FLOPs alone")
                for at, ratio in zip(y, numbers["ratio"], strict=True):
                    axis.text(0.02, at, "not measured" if pd.isna(ratio) else f"{ratio:.2f}", va="center", fontsize=7.5)
                axis.set_yticks(y, order)
                axis.invert_yaxis()
                axis.set_xlim(0, 1.05 * max([1.0, *numbers.max().dropna()]))
                axis.set_title(name, loc="left")
        if lines:
            axes[0][0].set_ylabel("time of a step, times next_token's")
        else:
            axes.flat[-1].set_xlabel("time of a step, times next_token's")
            axes.flat[0].legend(fontsize=7, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
        figure.suptitle(_wrap(f"{table.title} — scale {scale.name}", 20 + 40 * shape[1]), fontsize=10)
        _stands_in(figure, frame, shape[1])
        return save(figure, folder, table.name)


def samples(table: Table, scale: Scale, runs: records.Records, folder: Path) -> list[Path]:
    """Pictures drawn by the last model of each setting, its first seed, side by side; a column is a class."""
    chosen = {cell.spec.path: cell for cell in cells_of(table, scale) if cell.checkpoint == "last"}
    found = {}
    for path, cell in chosen.items():
        files = sorted((runs.runs / path).glob("seed*/samples-last.png"))
        if files:
            found[cell.row.label] = files[0]  # whole: what was trained longer differs in its iterations alone
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, max(len(found), 1), figsize=(3.2 * max(len(found), 1), 3.7), squeeze=False, layout="constrained"
        )
        for axis in axes[0]:
            axis.axis("off")
        for axis, (label, file) in zip(axes[0], found.items(), strict=False):
            axis.imshow(plt.imread(file), cmap="gray", interpolation="nearest")
            axis.set_title(label)
        if not found:
            axes[0][0].text(0.5, 0.5, "no pictures in the folder of runs", ha="center", color="#777777")
        title = f"{table.title}: samples of the last models — scale {scale.name}"
        figure.suptitle(_wrap(title, 45 * max(len(found), 1)), fontsize=9)
        return save(figure, folder, f"{table.name}_samples")


def _panel(frame: pd.DataFrame, group: str) -> list[dict[str, Any]]:
    rows = frame[frame["train_data"].str.replace(" reversed", "") == group]
    return [dict(row) for _, row in rows.iterrows()]


def curves(table: Table, scale: Scale, runs: records.Records, folder: Path) -> list[Path]:
    """Learning curves: a row a graph; validation solve rate, next-token loss and auxiliary losses over steps."""
    chosen = {c.spec.path: c for c in cells_of(table, scale) if not c.row.control}
    groups = list(dict.fromkeys(c.spec.data for c in chosen.values()))
    labels = list(dict.fromkeys(c.row.label or c.row.method for c in chosen.values()))
    panels = ["solve rate (%, validation)", "next-token loss (nats)", "auxiliary losses (nats)"]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            max(len(groups), 1), 3, figsize=(11, 0.6 + 2.5 * max(len(groups), 1)), squeeze=False, layout="constrained"
        )
        for row, group in zip(axes, groups, strict=False):
            for cell in (c for c in chosen.values() if c.spec.data == group):
                label = cell.row.label or cell.row.method
                own = COLOURS[labels.index(label) % len(COLOURS)]
                for number, record in enumerate(runs.of(cell.spec)):
                    _draw_curves(row, record, own, label if number == 0 else None)
            for axis, name in zip(row, panels, strict=True):
                axis.set(xlabel="step", ylabel=name)
            for axis in row[1:]:
                axis.set_yscale("log")
            spec = next(c.spec for c in chosen.values() if c.spec.data == group)
            task = load(TASKS, spec.dataset.task, "task")
            row[0].set_title(_graph(task.describe(spec.task_config)), loc="left")
            row[0].axhline(task.chance(spec.task_config), color="#555555", ls="--", lw=1)
            row[0].set_ylim(0, 102)
        drawn = {line.get_label(): line for axis in axes[:, 0] for line in axis.get_legend_handles_labels()[0]}
        if drawn:
            figure.legend(handles=drawn.values(), fontsize=7, loc="outside lower center", ncols=len(drawn))
        figure.suptitle(f"{table.title}: learning curves, a line a seed — scale {scale.name}", fontsize=10)
        return save(figure, folder, f"{table.name}_curves")


def _draw_curves(axes: Any, record: dict[str, Any], colour: str, label: str | None) -> None:
    known = {"loss", "grad_norm", "learning_rate", "tokens", "seconds", "epoch", "step", "next_token"}
    scores = [(e["step"], e["eval_solve_rate"]) for e in record["curve"] if "eval_solve_rate" in e]
    losses = [e for e in record["curve"] if "next_token" in e]
    axes[0].plot(*zip(*scores, strict=True), color=colour, lw=1.2, marker=".", ms=4, label=label)
    axes[1].plot([e["step"] for e in losses], [e["next_token"] for e in losses], color=colour, lw=0.9)
    for style, key in zip(("-", "--", ":", "-."), sorted({k for e in losses for k in e} - known), strict=False):
        axes[2].plot([e["step"] for e in losses], [e.get(key) for e in losses], color=colour, lw=0.9, ls=style)


def _or(value: Any, other: float) -> float:
    return other if value is None or pd.isna(value) else value


def _graph(name: str) -> str:
    """ "star_graph n=3 l=3 labels=30" -> "G(3, 3), 30 labels"."""
    values = dict(part.split("=") for part in name.split() if "=" in part)
    return (
        f"G({values['n']}, {values['l']}), {values['labels']} labels" if {"n", "l", "labels"} <= set(values) else name
    )


def _wrap(text: str, width: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width))
