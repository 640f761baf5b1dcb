"""README.md's results, written anew from results/reference."""

from __future__ import annotations

from pathlib import Path

from mutor.config.load import load_scale
from mutor.results.cells import Evidence
from mutor.results.claims import claim_frame, shown
from mutor.results.records import Records
from mutor.results.render import grid
from mutor.results.report import spent

README_MARKS = ("<!-- results -->", "<!-- end of results -->")


def readme(root: Path, text: str) -> str:
    """A README with the part between README_MARKS written anew from results/reference."""
    before, _, rest = text.partition(README_MARKS[0])
    _, found, after = rest.partition(README_MARKS[1])
    if not found:
        raise ValueError(f"README.md: needs the lines {README_MARKS[0]} and {README_MARKS[1]}")
    parts = [README_MARKS[0]]
    for folder in sorted((root / "results/reference").iterdir()):
        evidence = Evidence(root, load_scale(root, folder.name), Records(folder / "runs"))
        parts += _reference(evidence, folder)
    return before + "\n".join([*parts, README_MARKS[1]]) + after


def _reference(evidence: Evidence, folder: Path) -> list[str]:
    frame, scale = claim_frame(evidence), evidence.scale
    frame = frame[~frame["verdict"].isin(["not at this scale", "not run"])]
    said = shown(frame)
    where = folder.relative_to(evidence.root)
    names = [name for name in scale.artifacts if (folder / f"{name}.csv").exists()]
    parts = [f"**Scale {scale.name}**: {scale.description}. {spent(evidence.runs.of_scale(scale.name))}", ""]
    stands = dict.fromkeys(part for texts in sorted(set(frame["stands_in_for"])) for part in texts.split("; ") if part)
    parts += [f"Stands in for {'; '.join(stands)}.", ""] if stands else []
    parts += [f"![{evidence.table(n).title}]({where}/{n}.png)\n" for n in names if (folder / f"{n}.png").exists()]
    if len(said):
        counts = ", ".join(f"{count} {verdict}" for verdict, count in said["verdict"].value_counts().items())
        table = grid(said[["claim", "on", "verdict", "measured"]].set_index("claim"))
        parts += [f"<details><summary>What the sources claim, and what came out here: {counts}</summary>\n", table, ""]
        parts += ["</details>", ""]
    links = [f"[{n}]({where}/{n}.md)" for n in names]
    links += [f"[{f}]({where}/{f})" for f in ("claims.md", "runs.csv", "report.html") if (folder / f).exists()]
    return [*parts, f"Committed: {', '.join(links)}.", ""]
