"""verdict.md: published values inside or outside, gains over next-token prediction, what is path only, and its cost."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mutor.cli import main
from mutor.config.load import load_scale, load_table, scale_content
from mutor.config.runs import cells_of, run_cells
from mutor.results import records
from mutor.results.cells import Evidence
from mutor.results.claims import claim_frame
from mutor.results.gains import Gain, gains, sentences
from mutor.results.plan import gpu_hours
from mutor.results.render import PATH_ONLY, markdown
from mutor.results.stats import Interval
from mutor.results.verdict import _rightness, against_published, collect_verdict, three_answers
from mutor.results.verdicts import Found
from tests.test_claims import put

ROOT = Path(__file__).parent.parent


def evidence(folder, scale="smoke", **changes):
    """What the runs below a folder say at a scale, some of whose settings differ."""
    return Evidence(ROOT, replace(load_scale(ROOT, scale), **changes), records.Records(folder))


def planted(folder, table, right, scale="smoke", count=200, metric="accuracy"):
    """Records: method -> how many of `count` problems each seed solves, the first ones."""
    for cell in cells_of(load_table(ROOT, table), load_scale(ROOT, scale)):
        for number, solved in enumerate(right.get(cell.row.label or cell.spec.method, ())):
            put(folder, cell, 42 + number, solved, count=count, metric=metric)


def compared(ours, published, error, low, high, gained=(), **more):
    """What against_published says of one cell, and of next_token with 40 +- 1 published; gained: found gains."""
    row = {"data": "d", "ran": "m", "label": "x", "metric": "accuracy", "mean": ours, "ci_low": low, "ci_high": high}
    row |= {"reported": published, "reported_error": error, "stands_in_for": "", "n_seeds": 3, **more}
    plain = {**row, "label": "next_token", "reported": 40.0, "reported_error": 1.0}

    class Told(Evidence):
        def frame(self, table):
            return pd.DataFrame([row, plain] if gained else [row])

    found = Told(ROOT, load_scale(ROOT, "smoke"), records.Records(ROOT / "none"))
    return against_published(found, [load_table(ROOT, "table1")], gained)


@pytest.mark.parametrize(
    ("published", "error", "inside"),
    [
        (52.9, None, "yes"), (53.1, None, "no"), (46.1, None, "yes"), (45.9, None, "no"),  # 50 - 4 to 50 + 3
        (54.9, 2.0, "yes"), (55.0, 2.0, "no"),  # + (3^2 + (1.96 x 2)^2)^0.5 = 4.94
        (44.5, 2.0, "yes"), (44.3, 2.0, "no"),  # - (4^2 + 3.92^2)^0.5 = 5.60
    ],
)  # fmt: skip
def test_published_values_inside_the_combined_interval(published, error, inside):
    assert compared(50.0, published, error, 46.0, 53.0)["inside"].tolist() == [inside]


@pytest.mark.parametrize(
    ("published", "error", "inside"),
    [
        (54.9, None, "yes"), (55.0, None, "no"),  # 10 + (4.5^2 + 1.96^2)^0.5 = 14.91
        (46.5, None, "yes"), (46.4, None, "no"),  # 10 - (3^2 + 1.96^2)^0.5 = 6.42
        (55.7, 1.5, "yes"), (55.8, 1.5, "no"),  # 10 + (4.5^2 + 1.96^2 (1 + 1.5^2))^0.5 = 15.72
    ],
)  # fmt: skip
def test_published_gains_inside_the_combined_interval(published, error, inside):
    """Over next_token's published value, with both errors; the cell's own interval and the gain's are two things."""
    gain = Gain("table1", "d, m", "mutor", "x", "accuracy", "percent", Found(Interval(10.0, 7.0, 14.5, "seeds"), 3))
    found = compared(30.0, published, error, 29.0, 31.0, [gain])
    assert found["gain inside"].tolist() == [inside, ""] and found["inside"].tolist() == ["no", "no"]
    error = f" ± {1.96 * (1 + (error or 0) ** 2) ** 0.5:.1f}"
    assert found["gain published"].tolist() == [f"{published - 40:+.2f}{error}", ""]
    assert found["gain"].tolist() == ["+10.0 (+7.0 to +14.5)", ""]
    first, *rest = _rightness(found)
    one = int(inside == "yes")
    assert first.startswith(f"0 of 2 published values and {one} of 1 published gains over next-token prediction lie")
    assert rest[0] == f"table1: 0 of 2 values, {one} of 1 gains over next-token prediction."
    assert rest[1].startswith("Why values lie outside")
    assert len(_rightness(compared(50.0, 50.0, None, 46.0, 53.0))) == 2  # all inside


@pytest.mark.parametrize(
    "change",
    [{"stands_in_for": "a smaller one"}, {"n_seeds": 1}, {"ci_low": None}, {"n_seeds": ""}, {"reported": None}],
)
def test_what_is_no_reproduction_is_not_compared(change):
    """Stand-ins, a single seed, counted seeds, settings, and cells without a published value."""
    row = {"ours": 50.0, "published": 50.0, "error": None, "low": 46.0, "high": 53.0}
    assert len(compared(**row)) == 1 and compared(**row, **change).empty if "ci_low" not in change else True
    if "ci_low" in change:
        assert compared(50.0, 50.0, None, None, 53.0).empty


def test_gains_over_next_token_prediction(tmp_path):
    planted(tmp_path, "table1", {"next_token": (100, 98), "mutor": (150, 148), "parallel_mtp": (20, 22)})
    planted(
        tmp_path,
        "figure4",
        {"next_token": (100,) * 5, "mutor": (200,) * 5, "token_order": (200, 200, 0, 0, 0), "mutor, d = 1": (0,) * 5},
        metric="solve_rate",
    )
    found = evidence(tmp_path)
    told = {(gain.table, gain.label): gain for gain in gains(found, [found.table("figure4"), found.table("table1")])}
    assert not any("d = 1" in label for _, label in told)  # controls
    helped = told["table1", "mutor"]
    assert (helped.word, told["table1", "parallel_mtp"].word) == ("helps", "hurts")
    assert helped.found.difference.estimate == pytest.approx(25) and helped.unit == "percent"
    solved = told["figure4", "mutor, d_max 3"]
    assert (solved.word, solved.found.counted, solved.unit) == ("helps", "5 of 5 against 0 of 5", "percent of seeds")
    assert told["figure4", "token_order"].word == "undecided"  # 2 of 5 against 0 of 5: p = 0.44
    first, *rest = sentences(list(told.values()))
    assert first == "4 comparisons with next-token prediction: looking ahead helps in 2, hurts in 1, undecided in 1."
    assert any("helps: mutor. hurts: parallel_mtp." in line for line in rest)


def test_every_degree_is_compared_with_itself():
    """In the reference: seeds of both sides, and the difference of their means in each degree."""
    found = Evidence(ROOT, load_scale(ROOT, "laptop"), records.Records(ROOT / "results/reference/laptop/runs"))
    table = found.table("path_planning")
    told = gains(found, [table])
    assert list(dict.fromkeys(gain.metric for gain in told)) == [f"accuracy_degree_{degree}" for degree in range(4)]
    means = found.frame(table).set_index(["label", "metric"])["mean"]
    for gain in told:
        if gain.label.endswith("own output layers"):  # on all graphs of next_token
            apart = means[gain.label, gain.metric] - means["next_token", gain.metric]
            assert gain.found.difference.estimate == pytest.approx(apart)


def test_one_seed_neither_helps_nor_hurts(tmp_path):
    planted(tmp_path, "table1", {"next_token": (0,), "mutor": (200,)})
    found = evidence(tmp_path)
    assert [gain.word for gain in gains(found, [found.table("table1")])] == ["undecided"]
    planted(tmp_path, "table1", {"next_token": (0, 1), "mutor": (200,), "parallel_mtp": (100, 101)})
    found = evidence(tmp_path)
    assert [gain.method for gain in gains(found, [found.table("table1")])] == ["parallel_mtp"]  # nor stands beside more


def test_nothing_is_concluded_from_what_is_path_only(tmp_path):
    planted(tmp_path, "table1", {"next_token": (100, 98), "mutor": (150, 148)})
    what = "MuToR is above next-token prediction (Gemma 2B)"
    said = {}
    for only in ((), ("table1",)):
        found = evidence(tmp_path, path_only=only)
        table = found.table("table1")
        frame = claim_frame(found)
        said[only] = set(frame[frame["claim"] == what]["verdict"])
        assert bool(gains(found, [table])) != bool(only) and (PATH_ONLY in markdown(found, table)) == bool(only)
        assert set(found.frame(table)["scale"]) == {"smoke, path only" if only else "smoke"}
    assert "same direction" in said[()] and said["table1",] == {"not at this scale"}


def test_seeds_of_rows(tmp_path):
    """A number for a table, or one at the label of a row and one for the others; one seed of what is path only."""

    def seeds(given, **more):
        content = {
            **scale_content(ROOT, "smoke"),
            "seeds": [1, 2, 3, 4],
            "max_seeds": {} if given == {} else {"figure4": given},
        }
        scale = load_scale(ROOT, "smoke", {**content, **more})
        return {c.row.label or c.row.method: len(c.spec.seeds) for c in cells_of(load_table(ROOT, "figure4"), scale)}

    told = seeds({"next_token": 4, "mutor, d = 1": 2, "others": 3})
    assert (told["next_token"], told["mutor, d = 1"], told["mutor"], told["ranking"]) == (4, 2, 3, 3)
    assert set(seeds(2).values()) == {2} and seeds({"mutor": 1})["ranking"] == 4
    assert set(seeds({}).values()) == {4} and set(seeds({}, path_only=["figure4"]).values()) == {1}
    assert seeds({"mutor": 3}, path_only=["figure4"])["mutor"] == 3
    with pytest.raises(ValueError, match=r"max_seeds: figure4: 'mutr' is unknown, did you mean 'mutor'"):
        seeds({"mutr": 3})
    few = seeds({"mutor": 2, "next_token": 4, "others": 0})
    assert few == {"mutor": 2, "next_token": 4}  # no other row is there
    with pytest.raises(ValueError, match=r"max_seeds: figure4: mutor: -1 is not allowed; allowed: 0, 1, \.\.\."):
        seeds({"mutor": -1})
    with pytest.raises(ValueError, match=r"max_seeds: figure4: 0 is not allowed; allowed: 1, 2, \.\.\."):
        seeds(0)
    with pytest.raises(ValueError, match="path_only: 'tabel1' is unknown, did you mean 'table1'"):
        load_scale(ROOT, "smoke", {**scale_content(ROOT, "smoke"), "path_only": ["tabel1"]})


def test_three_questions_stand_first(tmp_path):
    planted(tmp_path / "runs", "table1", {"next_token": (100, 98), "mutor": (150, 148)})
    found = evidence(tmp_path / "runs")
    files = collect_verdict(found, ["figure4", "table1"], tmp_path)
    assert [file.name for file in files] == ["verdict.md", "verdict.png", "verdict.svg"]
    text = files[0].read_text()
    heads = re.findall("^## (.*)", text, re.M)
    assert heads == [*(one.question for one in three_answers(found, [])), "Claims", "Needs the paper scale"]
    assert "there is nothing to compare" in text and "mutor try MODEL" in text
    assert "gsm8k" in files[2].read_text() and np.all([file.stat().st_size > 500 for file in files])


def test_what_needs_the_paper_scale_is_listed_once_with_its_cost(tmp_path):
    """Table 14's claim costs what the plan bounds: 6 x parameters x tokens, at two fifths of an H100's peak."""
    runs = str(tmp_path / "none")
    assert main(["collect", "verdict", "--scale", "smoke", "--runs", runs, "--results", str(tmp_path)]) == 0
    part = (tmp_path / "verdict.md").read_text().split("## Needs the paper scale")[1]
    line = next(line for line in part.splitlines() if line.startswith("- table2:"))
    assert part.count("MuToR is above next-token prediction on summaries") == 1
    paper = load_scale(ROOT, "paper")
    specs = {cell.spec.path: cell.spec for cell in cells_of(load_table(ROOT, "table2"), paper)}.values()
    sequences = {"samsum": 14700, "dialogsum": 12500}
    flops = sum(3 * 6 * 2506172416 * 768 * 3 * sequences[spec.data] for spec in specs)
    assert line.endswith(f"At the paper scale: at most {flops / 989e12 / 0.4 / 3600:,.0f} hours of H100.")
    assert gpu_hours(list(specs), paper) in line and gpu_hours([], paper) == "not known"


def test_the_laptop_scale_draws_no_verdict_from_generated_problems():
    scale = load_scale(ROOT, "laptop")
    language = {f"table{n}" for n in (*range(1, 7), *range(10, 15), 16, 17)}
    assert language <= {*scale.path_only} and not {"figure4", "table7", "gentle"} & {*scale.path_only}
    for name in scale.path_only:
        assert all(len(cell.spec.seeds) == 1 for cell in run_cells(load_table(ROOT, name), scale)), name
    seeds = {c.row.label or c.row.method: len(c.spec.seeds) for c in cells_of(load_table(ROOT, "figure4"), scale)}
    many = {"next_token": 10, "mutor": 10, "token_order": 10, "parallel_mtp": 10}
    many |= {"teacherless": 6, "mutor, d = 1": 6, "mutor, shuffled targets": 3}
    assert {name: seeds[name] for name in many} == many and min(seeds.values()) == 3
