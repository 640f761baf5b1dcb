"""README.md's results, written anew from results/reference."""

from __future__ import annotations

from pathlib import Path

from mutor.config.load import load_scale, load_table
from mutor.config.schema import Scale
from mutor.results import claims, records
from mutor.results.published import read_reported
from mutor.results.render import grid
from mutor.results.report import _cost

README_MARKS = ("<!-- results -->", "<!-- end of results -->")


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
    said = claims.shown(frame)
    where = folder.relative_to(root)
    names = [name for name in scale.artifacts if (folder / f"{name}.csv").exists()]
    parts = [f"**Scale {scale.name}**: {scale.description}. {_cost(runs.of_scale(scale.name))}", ""]
    stands = dict.fromkeys(part for texts in sorted(set(frame["stands_in_for"])) for part in texts.split("; ") if part)
    parts += [f"Stands in for {'; '.join(stands)}.", ""] if stands else []
    parts += [f"![{load_table(root, n).title}]({where}/{n}.png)\n" for n in names if (folder / f"{n}.png").exists()]
    if len(said):
        counts = ", ".join(f"{count} {verdict}" for verdict, count in said["verdict"].value_counts().items())
        table = grid(said[["claim", "on", "verdict", "measured"]].set_index("claim"))
        parts += [f"<details><summary>What the sources claim, and what came out here: {counts}</summary>\n", table, ""]
        parts += ["</details>", ""]
    links = [f"[{n}]({where}/{n}.md)" for n in names]
    links += [f"[{f}]({where}/{f})" for f in ("claims.md", "runs.csv", "report.html") if (folder / f).exists()]
    return [*parts, f"Committed: {', '.join(links)}.", ""]
