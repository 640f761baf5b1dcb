"""All files of an artifact, from its cells; what is drawn, and by which functions, says DRAWINGS in mutor/registry.py.

collect_artifact(evidence, evidence.table("figure4"), folder)
"""

from __future__ import annotations

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
    csv = evidence.frame(table)[COLUMNS].to_csv(index=False, lineterminator="\n", float_format="%.6g")
    write_text(files[0], csv)
    write_text(files[1], markdown(evidence, table))
    write_text(files[2], latex(evidence, table))
    if table.drawing.figures:
        from mutor.results.figures import save  # matplotlib, which tables do without

        for figure in table.drawing.figures:
            files += save(resolve(figure.draw), evidence, table, folder / f"{table.name}{figure.suffix}")
    return files


def collect_runs(evidence: Evidence, folder: Path) -> list[Path]:
    """runs.csv: one row a seeded run, every setting and metric, and what made it."""
    rows = []
    for record in evidence.runs.of_scale(evidence.scale.name):
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
    write_text(file, pd.DataFrame(rows).to_csv(index=False, lineterminator="\n"))
    return [file]
