"""README.md's results, written anew from results/reference: three figures and the claims marked `headline`."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from mutor.config.load import load_scale, load_table
from mutor.config.schema import Scale
from mutor.results import claims, records
from mutor.results.figures import _graph as graph_name
from mutor.results.published import read_reported
from mutor.results.render import grid
from mutor.results.report import _cost

README_MARKS = ("<!-- results -->", "<!-- end of results -->")
FIGURES = ("figure4", "table4", "table7")  # the first figure of each kind of task: graphs, texts, images


def readme(root: Path, text: str) -> str:
    """A README with the part between README_MARKS written anew from results/reference."""
    before, _, rest = text.partition(README_MARKS[0])
    _, found, after = rest.partition(README_MARKS[1])
    if not found:
        raise ValueError(f"README.md: needs the lines {README_MARKS[0]} and {README_MARKS[1]}")
    parts = [README_MARKS[0]]
    for folder in sorted((root / "results/reference").iterdir()):
        parts += _reference(root, load_scale(root, folder.name), folder)
    return before + "\n".join([*parts, README_MARKS[1]]) + after


def _reference(root: Path, scale: Scale, folder: Path) -> list[str]:
    runs = records.Records(folder / "runs")
    frame = claims.claim_frame(root, scale, runs, read_reported(root / "config/reported.csv"))
    frame = frame[~frame["verdict"].isin(["not at this scale", "not run"])]
    where = folder.relative_to(root)
    parts = [f"**Scale {scale.name}**: {scale.description}. {_cost(runs.of_scale(scale.name))}", ""]
    drawn = [name for name in FIGURES if (folder / f"{name}.png").exists()]
    parts += [f"![{load_table(root, name).title}]({where}/{name}.png)\n" for name in drawn]
    headlines = frame[frame["claim"].isin([c.claim for c in claims.load_claims(root) if c.headline])]
    if len(headlines):
        parts += [grid(one_row_each(headlines, str(where)).set_index("claim")), ""]
    counts = ", ".join(f"{count} {verdict}" for verdict, count in frame["verdict"].value_counts().items())
    named, known = headlines["claim"].nunique(), frame["claim"].nunique()
    return [
        *parts,
        f"These are {named} of {known} claims. All of them make {len(frame)} comparisons: {counts}.",
        f"[claims.md]({where}/claims.md) has each, with the rule and with what stands in for what. All tables and",
        f"figures are in [{where}]({where}): [report.html]({where}/report.html) shows them on one page,",
        f"[runs.csv]({where}/runs.csv) has a row for each seeded run.",
        "",
    ]


def one_row_each(frame: pd.DataFrame, where: str) -> pd.DataFrame:
    """Rows of a claims frame with one row a claim: in its cells, a line for each dataset that it is about.

    No dataset is left out and none is averaged with another. Spaces inside a line do not break, so that the lines of
    a row stand side by side. where: the folder of the tables, to which the claims link.
    """
    rows = []
    for _, group in frame.groupby("claim", sort=False):
        shown, first = claims.shown(group), group.iloc[0]
        rows.append(
            {
                "claim": f"[{first['claim']}]({where}/{first['table']}.md): {first['metric']}",
                "on": _lines(group["train_data"].map(graph_name)),
                "difference here": _lines(shown["measured"]),
                "published": _lines(shown["published"]),
                "verdict": _lines(shown["verdict"]),
            }
        )
    return pd.DataFrame(rows)


def _lines(texts: pd.Series) -> str:
    return "<br>".join(text.replace(" ", "\u00a0") or "–" for text in texts)
