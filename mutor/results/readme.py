"""README.md's results, written anew from results/reference, and results/README.md: what the .csv files say."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from mutor.config.load import load_scale
from mutor.results.cells import COLUMNS, Evidence
from mutor.results.claims import COLUMNS as CLAIM_COLUMNS
from mutor.results.claims import claim_frame, counted, load_claims, shown
from mutor.results.drawings import RUN_COLUMNS
from mutor.results.figures import graph_name
from mutor.results.records import Records
from mutor.results.render import grid, plain
from mutor.results.report import spent
from mutor.results.verdict import three_answers

EXAMPLES = """
## Three analyses

Run from the top folder, with pandas; `results/reference/laptop` may be any folder of results.

How far every method is from next-token prediction, in all tables of accuracy:

```python
import pandas as pd

cells = pd.read_csv("results/reference/laptop/table1.csv")
plain = cells[cells["method"] == "next_token"].set_index(["model", "train_data"])["mean"]
cells = cells.join(plain.rename("next_token"), on=["model", "train_data"])
print((cells["mean"] - cells["next_token"]).groupby([cells["model"], cells["method"]]).mean().round(1))
```

Ours beside the published values, whatever stands in:

```python
import pandas as pd

ours = pd.read_csv("results/reference/laptop/table1.csv")
published = pd.read_csv("config/reported.csv").query("artifact == 'table1'")
keys = ["role", "method", "train_data", "metric"]
both = ours.merge(published, on=keys, suffixes=("", "_published"))
print(both[[*keys, "mean", "value", "stands_in_for"]].to_string())
```

What seeds differ by, and what a run takes:

```python
import pandas as pd

runs = pd.read_csv("results/reference/laptop/runs.csv", low_memory=False)
by = runs.groupby(["train_data", "model", "path"])
table = by.agg(seeds=("seed", "count"), spread=("last.accuracy", "std"), minutes=("seconds_training", "mean"))
print(table.assign(minutes=table["minutes"] / 60).dropna().round(2).to_string())
```
"""
README_MARKS = ("<!-- results -->", "<!-- end of results -->")
FIGURES = ("figure4", "table7")  # beside that of verdict.md


def readme(root: Path, text: str) -> str:
    """A README with the part between README_MARKS written anew from results/reference."""
    before, _, rest = text.partition(README_MARKS[0])
    _, found, after = rest.partition(README_MARKS[1])
    if not found:
        raise ValueError(f"README.md: needs the lines {README_MARKS[0]} and {README_MARKS[1]}")
    parts = [README_MARKS[0]]
    for folder in sorted(part for part in (root / "results/reference").iterdir() if part.is_dir()):
        evidence = Evidence(root, load_scale(root, folder.name), Records(folder / "runs"))
        if evidence.runs.of_scale(folder.name):  # else costs alone, which benchmarks/README.md tells
            parts += _reference(evidence, folder)
    return before + "\n".join([*parts, README_MARKS[1]]) + after


def dictionary() -> str:
    """results/README.md: every column of the .csv files, from the code that writes them, and how to use them."""
    parts = [
        "# Results",
        "",
        "Every table and figure has a `.csv` with a row a cell, all with the same columns. `runs.csv` has a row a run,",
        "`claims.csv` a row a comparison. What does not apply or was not run is empty. `role`, `model`, `method`,",
        "`train_data` and `metric` mean the same in all of them. `config/reported.csv` has the published values under",
        "the same `role`. Written by `python -m mutor readme`.",
    ]
    for name, columns in (("a table or figure", COLUMNS), ("claims.csv", CLAIM_COLUMNS), ("runs.csv", RUN_COLUMNS)):
        parts += ["", f"## Columns of {name}", "", "| column | what it says |", "|---|---|"]
        parts += [f"| `{column}` | {words} |" for column, words in columns.items()]
    return "\n".join([*parts, "", *EXAMPLES.strip().splitlines()]) + "\n"


def _reference(evidence: Evidence, folder: Path) -> list[str]:
    whole, scale = claim_frame(evidence), evidence.scale
    frame = whole[~whole["verdict"].isin(["not at this scale", "not run"])]
    waiting = int((whole["verdict"] == "not run").sum())
    where = folder.relative_to(evidence.root)
    parts = [f"**Scale {scale.name}**: {scale.description}. {spent(evidence.runs.of_scale(scale.name))}", ""]
    tables = [evidence.table(name) for name in scale.artifacts]
    parts += [f"**{one.question}** {one.sentences[0]}\n" for one in three_answers(evidence, tables)]
    titles = {"verdict": "Gain over next-token prediction by task and method"}
    titles |= {name: evidence.table(name).title for name in FIGURES}
    drawn = [name for name in titles if (folder / f"{name}.png").exists()]
    parts += [f"![{titles[name]}]({where}/{name}.png)\n" for name in drawn]
    headlines = frame[frame["claim"].isin([c.claim for c in load_claims(evidence) if c.headline])]
    if len(headlines):
        parts += [grid(one_row_each(headlines, str(where)).set_index("claim"), str), ""]
    named, known = headlines["claim"].nunique(), frame["claim"].nunique()
    if known:
        parts += [f"These are {named} of {known} claims. All of them make {len(frame)} comparisons: {counted(frame)}."]
    if waiting:
        parts += [f"{waiting} comparisons wait for runs that are not there yet."]
    return [
        *parts,
        f"[verdict.md]({where}/verdict.md) has each, with the rule and with what stands in for what. All tables and",
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
        said, first = shown(group), group.iloc[0]
        rows.append(
            {
                "claim": f"[{plain(first['claim'])}]({where}/{first['table']}.md): {first['metric']}",
                "on": _lines(group["data"].map(graph_name) + ", " + group["ran"]),
                "difference here": _lines(said["measured"]),
                "published": _lines(said["published"]),
                "verdict": _lines(said["verdict"]),
            }
        )
    return pd.DataFrame(rows)


def _lines(texts: pd.Series) -> str:
    return "<br>".join(plain(text).replace(" ", "\u00a0") or "–" for text in texts)
