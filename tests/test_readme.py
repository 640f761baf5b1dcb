"""What the pages for people say exists: files, targets, commands, scales, and the numbers in them."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest
import yaml

from mutor.cli import _parser
from mutor.config.load import load_scale, scale_names, table_names
from mutor.config.runs import make_spec
from mutor.results.cells import COLUMNS, Evidence
from mutor.results.claims import COLUMNS as CLAIM_COLUMNS
from mutor.results.claims import load_claims
from mutor.results.drawings import RUN_COLUMNS
from mutor.results.readme import FIGURES, README_MARKS, dictionary, readme
from mutor.results.records import Records

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")  # what CHANGELOG.md names may be gone
README = (ROOT / "README.md").read_text()
RESULTS = README.partition(README_MARKS[0])[2].partition(README_MARKS[1])[0]
TEXT = {page: (ROOT / page).read_text() for page in PAGES}
REFERENCE = ROOT / "results/reference/laptop"


def tracked():
    """The files of the project, which git knows."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a clone")
    return subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()


def test_readme_shows_the_reference():
    """`python -m mutor readme` writes it."""
    assert readme(ROOT, README) == README
    assert all(f"(results/reference/laptop/{name}.png)" in RESULTS for name in ("verdict", *FIGURES))
    with pytest.raises(ValueError, match="needs the lines"):
        readme(ROOT, "nothing")


def test_results_readme_names_every_column():
    """`python -m mutor readme` writes it; of each .csv of the reference, the columns as they stand there."""
    assert dictionary() == (ROOT / "results/README.md").read_text()
    kinds = {"claims": CLAIM_COLUMNS, "runs": RUN_COLUMNS}
    for file in REFERENCE.glob("*.csv"):
        columns = pd.read_csv(file, nrows=0).columns
        if file.stem == "runs":
            assert [*columns[:4]] == ["scale", "role", "model", "method"] and len(columns) > 200
        else:
            assert [*columns] == [*kinds.get(file.stem, COLUMNS)], file.name


def test_analyses_of_the_results_readme_run(capsys, monkeypatch):
    """Each block alone; the join of ours with the published values finds every method of table 1."""
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "results/README.md").read_text(), re.S)
    shown = []
    for block in blocks:
        exec(block, {})
        shown.append(capsys.readouterr().out)
    assert len(shown) == 3 and re.search(r"gemma-4x128 +mutor +-?\d", shown[0])
    assert len(shown[1].splitlines()) - 1 == len(pd.read_csv(REFERENCE / "table1.csv").query("reported.notna()"))
    assert "word-problems/gemma-4x128/mutor" in shown[2]


def test_runs_csv_has_its_columns_in_order_and_none_empty(tmp_path):
    frame = pd.read_csv(REFERENCE / "runs.csv", low_memory=False)
    assert not frame.isna().all().any()
    steps = [c for c in frame if re.fullmatch(r"last\.accuracy_at_\d+", c)]
    assert steps == sorted(steps, key=lambda c: int(c.rpartition("_")[2])) and len(steps) >= 4
    table = pd.read_csv(REFERENCE / "table1.csv")
    for column in ("role", "model", "method", "train_data"):
        assert set(table[column]) <= set(frame[column])


def test_headline_claims_are_shown_whole():
    """Of each that has runs at this scale, every comparison of claims.csv in its order, with its verdict."""
    evidence = Evidence(ROOT, load_scale(ROOT, "laptop"), Records(REFERENCE / "runs"))
    frame = pd.read_csv(REFERENCE / "claims.csv")
    frame = frame[~frame["verdict"].isin(["not at this scale", "not run"])]
    headlines = [claim.claim for claim in load_claims(evidence) if claim.headline]
    names = [name for name in dict.fromkeys(headlines) if name in set(frame["claim"])]
    rows = [line for line in RESULTS.splitlines() if line.startswith("| [")]
    assert len(names) == len(rows) > 0
    for name, row in zip(names, rows, strict=True):
        here = frame[frame["claim"] == name]
        claim, data, measured, _, verdict = (
            cell.split("<br>") for cell in row.replace("\u00a0", " ")[2:-2].split(" | ")
        )
        assert claim[0].startswith(f"[{name}](results/reference/laptop/{here['table'].iloc[0]}.md): ")
        assert len(data) == len(here) and verdict == list(here["verdict"])
        for text, told in zip(measured, here.to_dict("records"), strict=True):
            if isinstance(told["solved"], str):  # seeds that are counted
                assert text.startswith(f"{told['solved']} seeds")
            else:
                assert float(text.split()[0]) == pytest.approx(told["measured"], abs=0.051)


def test_pages_are_short():
    assert len(README.splitlines()) <= 240 and len(TEXT["CONTRIBUTING.md"].splitlines()) <= 170


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text()):
        assert ((ROOT / page).parent / link).exists(), link


def test_files_of_the_readme_are_the_files():
    """Every folder named exists; every folder of the package, and every top-level folder with code, is named."""
    block = README.partition("## Files")[2].split("```")[1]
    named = {name for line in block.splitlines() for name in re.findall(r"\S+/|Snakefile", line.split("   ")[0])}
    assert named and all((ROOT / name).exists() for name in named)
    packages = {f"{file.parent.relative_to(ROOT)}/" for file in ROOT.glob("mutor/**/__init__.py")}
    top = {f"{path.split('/')[0]}/" for path in tracked() if "/" in path and not path.startswith(".")}
    missing = {name for name in packages | top if not any(known.startswith(name) for known in named)}
    assert packages and not missing


def test_files_named_in_prose_exist():
    """In pages, comments and docstrings, from the root; but for the file that the first download writes."""
    roots, endings = "mutor|baselines|config|tests|benchmarks|workflow|profiles", "py|yaml|csv|html|md|smk"
    kinds = {".md", ".py", ".yaml", ".yml", ".toml", ".smk", ".rst", ".html", ".cff", ""}
    files = [ROOT / path for path in tracked() if not path.startswith(("results/", "tests/"))]
    prose = [file for file in files if file.suffix in kinds and file.name != "CHANGELOG.md"]
    found = [
        (file.name, path)
        for file in prose
        for path in re.findall(rf"(?<![\w/.>])((?:{roots})/[\w/-]+\.(?:{endings}))\b", file.read_text())
    ]
    assert len(found) > 20
    assert [(name, path) for name, path in found if not (ROOT / path).exists()] == []


def commands(words):
    """Command lines of all pages that begin with `words`, up to where a remark begins."""
    for page, text in TEXT.items():
        for line in re.findall(rf"{re.escape(words)} [^\n`]*", re.sub(r" \\\n *", " ", text)):
            yield page, re.split(r"\s{3,}|\s#|[:;,)]\s|[.,:;)]$", line)[0]


def test_commands_are_those_of_the_package(capsys):
    """Each line is one that the parser takes, with its options; settings of `run` are those of the scale and method."""
    found = list(commands("python -m mutor"))
    assert len(found) >= 10
    for page, line in found:
        try:
            args = _parser().parse_args(shlex.split(line)[3:])
        except SystemExit:
            pytest.fail(f"{page}: {line}: {capsys.readouterr().err}")
        if args.scale:
            load_scale(ROOT, args.scale)
        if hasattr(args, "method"):
            settings = {key: yaml.safe_load(value) for key, value in (pair.split("=") for pair in args.set)}
            make_spec(load_scale(ROOT, args.scale), args.data, args.model, args.method, settings)
        for name in getattr(args, "target", []) + getattr(args, "artifact", []):
            assert name in [*table_names(ROOT), "claims", "verdict", "runs", "report"], line


def test_targets_are_those_of_the_makefile():
    rules = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    found = {name for text in TEXT.values() for name in re.findall(r"(?:`|^|> )make ([a-z-]+)", text, re.M)}
    assert {"smoke", "reproduce", "test", "check", "format"} <= found <= rules


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
def test_make_alone_lists_all_targets():
    printed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True).stdout
    rules = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    listed = re.findall(r"^make ([\w-]+) +\S", printed, re.M)
    assert sorted(listed) == sorted(set(rules) - {"env"})


def test_scales_and_artifacts_exist():
    for page, text in TEXT.items():
        assert set(re.findall(r"scale=(\w+)", text)) <= set(scale_names(ROOT)), page
        assert set(re.findall(r"snakemake results/(?:\w+/)?(\w+)\.csv", text)) <= set(table_names(ROOT)), page
    table = README.partition("## Scales")[2].partition("## ")[0]
    assert set(re.findall(r"^\| (\w+)(?: \(default\))? \|", table, re.M)) - {"scale"} == set(scale_names(ROOT))


def test_the_line_of_data_is_read_and_scored_as_the_readme_says(tmp_path):
    """Found after ####, compared as a number: right for its own answer, wrong for another."""
    from mutor.tasks.text import Text, TextConfig

    line = re.search(r'^\{"prompt".*\}$', README, re.M)[0]
    files = {f"{name}_file": str(tmp_path / f"{name}.jsonl") for name in ("train", "test")}
    for name, text in (("train", line.replace("3 + 4 = ?", "4 + 3 = ?")), ("test", line)):
        Path(files[f"{name}_file"]).write_text(text + "\n")
    task = Text(TextConfig(corpus="own", extract="hashes", compare="number", tokens="standin", **files))
    problem = task.problems["test"][0]
    assert task.train(0).size == 1 and problem.gold == "7"
    assert task.score(problem.answer, problem.gold) == {"accuracy": 1}
    assert task.score(problem.answer.replace("#### 7", "#### 8"), problem.gold) == {"accuracy": 0}


GEMMA = "Gemma 2B, 40 problems of GSM8K's lengths"
IMAGES = "LlamaGen-B, 128 images"
COSTS = {
    "laptop": [(GEMMA, "mutor"), (GEMMA, "mutor, one at a time"), (GEMMA, "parallel_mtp"), (GEMMA, "sequential_mtp"),
               (IMAGES, "mutor, 256 + 256 grouped"), (IMAGES, "next_token, 512")],
    "gpu": [(IMAGES, "mutor, 256 + 256 grouped"), (IMAGES, "mutor, 256 + 256 grouped, block mask"),
            (IMAGES, "mutor, 256 + 256 interleaved"), (IMAGES, "mutor, 256 + 80 grouped"), (IMAGES, "next_token, 512"),
            (GEMMA, "mutor"), (GEMMA, "mutor, block mask"), (GEMMA, "parallel_mtp"), (GEMMA, "sequential_mtp"),
            (GEMMA, "mutor, one at a time")],
}  # fmt: skip


def measured(scale, what, case, metric="ratio"):
    """A case's median of a cost table."""
    folder = ROOT / "results/reference" / scale
    frame = pd.concat([pd.read_csv(folder / f"{name}.csv") for name in ("rebuttal_latency", "cost_curves")])
    rows = frame[(frame["benchmark"] == what) & (frame["train_data"] == case)].set_index("metric")["mean"]
    return float(rows[metric])


@pytest.mark.parametrize("scale", COSTS)
def test_costs_told_are_those_measured(scale):
    """Rows of the page's tables: tokens, FLOPs and time, each against next-token prediction's."""
    part = TEXT["benchmarks/README.md"].split("## Measured on a ")[{"laptop": 1, "gpu": 2}[scale]]
    assert f"results/reference/{scale}/rebuttal_latency.md" in part
    told = [list(map(float, row)) for row in re.findall(r"\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", part, re.M)]
    for row, case in zip(told, COSTS[scale], strict=True):
        assert row == pytest.approx([measured(scale, *case, f"{m}ratio") for m in ("token_", "flop_", "")], abs=0.0051)


def test_costs_in_the_text_are_those_measured():
    def told(pattern):
        return list(map(float, re.search(pattern, " ".join(TEXT["benchmarks/README.md"].split())).groups()))

    far = [
        measured("laptop", "over d_max", f"{name}, d_max 16") for name in ("parallel_mtp", "sequential_mtp", "mutor")
    ]
    number = r"([\d.]+\d)"
    said = told(rf"with d_max 16 they take {number} and {number} times .* MuToR on the same images {number} times")
    assert said == pytest.approx(far, abs=0.051)
    alone, together = (measured("laptop", GEMMA, case) for case in ("mutor, one at a time", "mutor"))
    assert told(rf"One sequence at a time costs {number} times") == pytest.approx([alone / together], abs=0.051)
    behind, between = (
        measured("gpu", "block mask, over length", f"mutor, {way}, tokens 8192") for way in ("grouped", "interleaved")
    )
    assert told(rf"takes {number} times that of .* and {number} times with") == pytest.approx(
        [behind, between], abs=0.06
    )
    cases = ("next_token, 256", "next_token, 512", "mutor, 256 + 256 grouped")
    seconds = [measured("gpu", IMAGES, case, "seconds_per_step") for case in cases]
    assert told(rf"Here they are {number}, {number} and {number} s") == pytest.approx(seconds, abs=0.0051)
