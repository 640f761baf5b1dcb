"""All files of an artifact, from its cells."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from mutor.config.schema import Scale, Table
from mutor.files import write
from mutor.results import records
from mutor.results.cells import COLUMNS, cell_frame
from mutor.results.published import published_rows
from mutor.results.render import latex, markdown, published_shape


def collect_artifact(
    table: Table, scale: Scale, runs: records.Records, reported: pd.DataFrame, folder: Path
) -> list[Path]:
    """Build all files of one table or figure from whatever runs exist; returns them.

    What is wrong with a record, which is then left out, stands below the table.
    """
    frame = cell_frame(table, scale, runs, reported)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{table.name}.{ending}" for ending in ("csv", "md", "tex")]
    write(files[0], lambda f: frame[COLUMNS].to_csv(f, index=False, lineterminator="\n", float_format="%.6g"))
    shown = published_shape(frame, table)
    beside = published_rows(reported, table)
    write(files[1], lambda f: f.write_text(markdown(table, scale, shown, beside, runs)))
    write(files[2], lambda f: f.write_text(latex(table, scale, shown)))
    if table.draw == "solve_rates":
        from mutor.results.figures import curves, solve_rates

        files += solve_rates(table, scale, frame, folder)
        files += curves(table, scale, runs, folder)
    if table.draw == "sweep":
        from mutor.results.figures import sweep

        files += sweep(table, scale, frame, folder)
    if table.draw == "cost":
        from mutor.results.figures import costs

        files += costs(table, scale, frame, folder)
    if table.draw == "images":
        from mutor.results.figures import samples, sweep

        files += sweep(table, scale, frame, folder)
        files += samples(table, scale, runs, folder)
    return files


def collect_runs(runs: records.Records, scale: str, folder: Path) -> list[Path]:
    """runs.csv: one row a seeded run, every setting and metric, and what made it."""
    rows = []
    for record in runs.of_scale(scale):
        flat = {k: v for k, v in record.items() if isinstance(v, (str, int, float, bool)) or v is None}
        flat |= {f"setting.{k}": v for k, v in record["config"]["settings"].items()}
        flat |= {f"recipe.{k}": v for k, v in record["config"]["recipe"].items()}
        flat |= {f"version.{k}": v for k, v in record["versions"].items()}
        for checkpoint in record["checkpoints"]:
            for name in checkpoint["names"]:
                flat |= {f"{name}.{k}": v for k, v in checkpoint["metrics"].items()}
                flat[f"{name}.step"] = checkpoint["step"]
        rows.append(flat)
    file = folder / "runs.csv"
    folder.mkdir(parents=True, exist_ok=True)
    write(file, lambda f: pd.DataFrame(rows).to_csv(f, index=False, lineterminator="\n"))
    return [file]
