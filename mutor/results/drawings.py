"""All files of an artifact, from its cells; what is drawn, and by which functions, says DRAWINGS in mutor/registry.py.

collect_artifact(evidence, evidence.table("figure4"), folder)
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import pandas as pd

from mutor.config.schema import Table
from mutor.files import write_text
from mutor.registry import resolve
from mutor.results.cells import COLUMNS, Evidence
from mutor.results.render import latex, markdown


def collect_artifact(evidence: Evidence, table: Table, folder: Path) -> list[Path]:
    """Build all files of one table or figure from whatever runs exist; returns them.

    What is wrong with a record, which is then left out, stands below the table.
    """
    files = [folder / f"{table.name}.{ending}" for ending in ("csv", "md", "tex")]
    csv = evidence.frame(table)[[*COLUMNS]].to_csv(index=False, lineterminator="\n", float_format="%.6g")
    write_text(files[0], csv)
    write_text(files[1], markdown(evidence, table))
    write_text(files[2], latex(evidence, table))
    if table.drawing.figures:
        from mutor.results.figures import save  # matplotlib, which tables do without

        for figure in table.drawing.figures:
            draw = partial(resolve(figure.draw), evidence, table)
            files += save(draw, folder / f"{table.name}{figure.suffix}")
    return files


RUN_COLUMNS = {  # of runs.csv, first to last, by name or pattern, and what they say
    "scale": "the scale, a file of config/scales",
    "role": "the published model whose place is taken, as in config/reported.csv",
    "model": "the model that ran",
    "method": "the training method",
    "train_data_role": "the published training data whose place is taken",
    "train_data": "what it was trained on",
    "seed": "of everything random",
    "path": "folder of the setting below the folder of runs",
    "stands_in_for": "what stands in for which published model and data",
    "last.*": "a metric of the last checkpoint, and its step",
    "best.*": "of the one chosen on the problems that chosen_on names",
    "step[0-9]*.*": "the same of a checkpoint kept on the way, after so many steps",
    "chosen_on": "what chose the best checkpoint: valid, test, or nothing",
    "setting.*": "a setting of the method",
    "recipe.*": "a setting of the training recipe",
    "version.*": "of a package",
    "*": "what the run took, on what it was made, and hashes of what made it: as in metrics.json",
}


def collect_runs(evidence: Evidence, folder: Path) -> list[Path]:
    """runs.csv: one row a seeded run, every setting and metric, and what made it. No column is empty."""
    rows = []
    for record in evidence.runs.of_scale(evidence.scale.name):
        flat = {k: v for k, v in record.items() if isinstance(v, (str, int, float, bool)) or v is None}
        flat["role"], flat["train_data"] = flat.pop("model_role", ""), flat.pop("train_data_name", flat["train_data"])
        flat |= {f"setting.{k}": v for k, v in record["config"]["settings"].items()}
        flat |= {f"recipe.{k}": v for k, v in record["config"]["recipe"].items()}
        flat |= {f"version.{k}": v for k, v in record["versions"].items()}
        for checkpoint in record["checkpoints"]:
            for name in checkpoint["names"]:
                flat |= {f"{name}.{k}": v for k, v in checkpoint["metrics"].items()}
                flat[f"{name}.step"] = checkpoint["step"]
        rows.append(flat)
    frame = pd.DataFrame(rows).replace({"": None}).dropna(axis="columns", how="all")
    ordered = frame[sorted(frame, key=lambda column: _place(str(column)))]
    file = folder / "runs.csv"
    write_text(file, ordered.to_csv(index=False, lineterminator="\n"))
    return [file]


def _place(column: str) -> tuple[int, list[int | str]]:
    """Where a column of runs.csv stands: as in RUN_COLUMNS, then by name, numbers in it by size."""
    place = next(n for n, pattern in enumerate(RUN_COLUMNS) if fnmatchcase(column, pattern))
    return place, [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", column)]
