"""Claims against runs made up for them, the rule, and what is wrong in claims.yaml."""

import numpy as np
import pytest
import yaml

from mutor.cli import main
from mutor.config.load import find_root, load_scale, load_table
from mutor.config.runs import cells_of
from mutor.files import write_json
from mutor.results import claims, record_schema, records
from mutor.results.cells import Evidence
from mutor.results.stats import Interval
from mutor.results.verdicts import Scored, compare, difference, judge

ROOT = find_root()


def judged(scale, folder):
    """The claims, held against the runs below a folder."""
    return claims.claim_frame(Evidence(ROOT, load_scale(ROOT, scale), records.Records(folder)))


@pytest.mark.parametrize(
    ("direction", "margin", "low", "high", "verdict"),
    [
        ("above", 0, 0.1, 3, "reproduced"), ("above", 0, -0.1, 3, "inconclusive"),
        ("above", 0, -3, -0.1, "contradicted"), ("above", 1, -0.9, 3, "reproduced"),
        ("above", 1, -3, -0.9, "inconclusive"), ("above", 1, -3, -1.1, "contradicted"),
        ("below", 0, -3, -0.1, "reproduced"), ("below", 0, 0.1, 3, "contradicted"),
        ("below", 1, 0.5, 0.9, "reproduced"), ("equal", 1, -0.9, 0.9, "reproduced"),
        ("equal", 1, -0.9, 1.1, "inconclusive"), ("equal", 1, 1.1, 2, "contradicted"),
        ("equal", 1, -2, -1.1, "contradicted"), ("above", 0, np.nan, np.nan, "inconclusive"),
    ],
)  # fmt: skip
def test_rule(direction, margin, low, high, verdict):
    assert judge(direction, margin, Interval((low + high) / 2, low, high, "seeds")) == verdict


def put(folder, cell, seed, solved, test_data_hash="t", count=200, metric="solve_rate", **more):
    """A record that solves the first `solved` of its problems."""
    spec = cell.spec
    metrics = {metric: 100 * solved / count, "first_step_accuracy": 100 * solved / count}
    scores = {metric: record_schema.pack(np.arange(count) < solved)}
    record = {
        "version": 1,
        "scale": spec.scale,
        "train_data": spec.data,
        "model": spec.model,
        "method": spec.method,
        "settings": spec.settings,
        "seed": seed,
        "config": spec.as_dict(),
        "config_hash": spec.config_hash,
        "checkpoints": [{"names": ["best", "last"], "step": 1, "metrics": metrics, "scores": scores}],
        "curve": [],
        "added_parameters": 0,
        "versions": {},
        "steps": 1,
        "seconds_training": 1.0,
        "trainable_parameters": 100,
        "test_data_hash": test_data_hash,
        **more,
    }
    write_json(records.seed_folder(folder, spec, seed) / "metrics.json", record)


def frame_of(folder, solved, scale="smoke", count=200, table="figure4", metric="solve_rate"):
    """The claims frame of runs: label or method -> problems solved by each seed, of `count`."""
    loaded = load_scale(ROOT, scale)
    for cell in cells_of(load_table(ROOT, table), loaded):
        key = cell.row.label or cell.spec.method
        for number, right in enumerate(solved.get(key, ())):
            put(folder, cell, 42 + number, right, count=count, metric=metric)
    return judged(scale, folder)


def problems_of(folder, solved, count=200):
    """The same of generated problems, whose rates have a mean over seeds."""
    return frame_of(folder, solved, count=count, table="table1", metric="accuracy")


def of(frame, words):
    rows = frame[frame["claim"].str.contains(words, regex=False)]
    assert len(rows) >= 1, words
    return rows.iloc[0]


def test_verdicts_on_made_up_runs(tmp_path):
    """Seeds are counted: 6 of 6 against 0 of 6 is p = 2 / 924, 3 of 3 against 0 of 6 is 1 / 84, 2 of 3 is 1 / 12."""
    frame = frame_of(
        tmp_path,
        {
            "next_token": (1000, 980, 1020, 1010, 990, 1000),
            "mutor": (1980, 1990, 2000, 1900, 1905, 2000),
            "parallel_mtp": (1000, 1500, 2000, 1000, 1899, 1000),
            "teacherless": (2000, 1990, 1980),
            "mutor, d = 1": (2000, 2000, 1000),
        },
        count=2000,
    )
    chance, solves = of(frame, "stays near chance"), of(frame, "fails on")
    assert (chance["verdict"], chance["solved"], chance["measured"]) == ("same direction", "6 of 6", 100)
    assert (solves["verdict"], solves["solved"], solves["n_seeds"]) == ("same direction", "6 of 6 against 0 of 6", 6)
    assert solves["p"] == pytest.approx(2 / 924) and (solves["measured"], solves["covers"]) == (100, "seeds")
    assert solves["ci_low"] == pytest.approx(100 - 2**0.5 * 100 * (1 - 0.025 ** (1 / 6))) and solves["ci_high"] == 100
    wide = of(frame, "Parallel heads are above")
    assert (wide["verdict"], wide["solved"], wide["p"]) == ("undecided", "1 of 6 against 0 of 6", 1)
    assert wide["to_decide"] == "about 33 seeds a side"  # 6 of 33 are the first of such a share
    assert of(frame, "Teacherless training")["p"] == pytest.approx(1 / 84)
    assert of(frame, "Teacherless training")["verdict"] == "same direction"
    assert of(frame, "no further than the next token")["verdict"] == "undecided"
    text = claims.shown(frame).set_index("claim")["measured"]
    assert (
        text["MuToR solves star graphs that next-token prediction fails on"]
        == "6 of 6 against 0 of 6 seeds (p = 0.0022)"
    )
    missing = of(frame, "Sequential modules are above")
    assert missing["verdict"] == "not run" and "snakemake results/smoke/figure4.csv" in missing["to_decide"]
    assert of(frame, "on summaries")["verdict"] == "not at this scale"
    content = yaml.safe_load((ROOT / "config/claims.yaml").read_text())
    assert {c["claim"] for c in content["claims"]} == set(frame["claim"])


@pytest.mark.parametrize(
    ("ours", "verdict", "low", "high"), [(0, "undecided", -8.66, 8.66), (30, "same direction", 81.69, 100)]
)
def test_none_right_of_three_seeds_is_not_without_doubt(tmp_path, ours, verdict, low, high):
    """Two methods that are always wrong are not known to be equal; one that is always right is known to be better."""
    frame = problems_of(tmp_path, {"next_token": (0, 0, 0), "mutor": (ours,) * 3}, count=30)
    row = of(frame, "above next-token prediction (Gemma")
    assert (row["verdict"], row["n_seeds"]) == (verdict, 3) and row["measured"] == pytest.approx(ours / 0.3)
    assert (row["ci_low"], row["ci_high"]) == pytest.approx((low, high), abs=0.01)
    scored = {s: Scored(ours / 0.3, np.arange(30) < ours, "t") for s in (42, 43, 44)}  # a number: Wilson's of the rate
    number = difference(scored, 95.0, percent=True).difference
    wilson = (0, 11.35) if ours == 0 else (88.65, 100)
    assert (number.low, number.high) == pytest.approx([x - 95 for x in wilson], abs=0.01)


def test_one_seed_is_over_problems_and_decides_nothing(tmp_path):
    what = "above next-token prediction (Gemma"
    row = of(problems_of(tmp_path, {"next_token": (0,), "mutor": (200,)}), what)
    assert (row["n_seeds"], row["covers"], row["verdict"]) == (1, "problems", "undecided") and row["ci_low"] > 90
    assert row["to_decide"] == "three seeds or more"
    assert of(problems_of(tmp_path, {"next_token": (0, 0), "mutor": (200, 200)}), what)["verdict"] != "undecided"


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        ((1, 1), (0, 40), "inconclusive"),  # p = 1 / 41, but of a single seed
        ((2, 2), (0, 40), "reproduced"),
        ((0, 40), (2, 2), "contradicted"),
        ((3, 3), (0, 3), "inconclusive"),
        ((4, 4), (0, 4), "reproduced"),
        ((9, 10), (9, 10), "inconclusive"),
    ],
)
def test_a_single_counted_seed_decides_nothing(ours, theirs, verdict):
    sides = [{n: Scored(100.0 if n < k else 50.0, None, None) for n in range(of)} for k, of in (ours, theirs)]
    found = compare("above", 0, None, *sides, percent=True, command="", solved_at=95.0)
    assert found.verdict == verdict and bool(found.to_decide) == (verdict == "inconclusive")
    turned = compare("below", 0, None, *sides, percent=True, command="", solved_at=95.0)
    assert turned.verdict == {"reproduced": "contradicted", "contradicted": "reproduced"}.get(verdict, verdict)


@pytest.mark.parametrize(
    ("values", "direction", "margin", "number", "verdict", "to_decide"),
    [
        ([96.0] * 6, "above", 0, 95.0, "reproduced", ""),
        ([96.0] * 5, "above", 0, 95.0, "inconclusive", "about 6 seeds"),  # six of six: 54 to 100%
        ([50.0] * 6, "above", 0, 95.0, "contradicted", ""), ([94.9] * 6, "above", 1, 95.0, "reproduced", ""),
        ([52.0, 48.0, 50.0, 51.0, 49.0, 54.9], "equal", 5, 50.0, "reproduced", ""),
        ([56.0] * 6, "equal", 5, 50.0, "contradicted", ""), ([96.0] * 6, "below", 0, 95.0, "contradicted", ""),
        ([96.0] * 9 + [50.0], "above", 0, 95.0, "reproduced", ""),
        ([96.0] * 8 + [50.0] * 2, "above", 0, 95.0, "inconclusive", "about 12 seeds"),  # ten of twelve: 52 to 98%
        ([96.0] * 5 + [50.0] * 5, "above", 0, 95.0, "inconclusive", "a larger effect"),
    ],
)  # fmt: skip
def test_most_seeds_are_for_a_claim_about_a_number(values, direction, margin, number, verdict, to_decide):
    side = {seed: Scored(value, None, None) for seed, value in enumerate(values)}
    found = compare(direction, margin, None, side, number, percent=True, command="", solved_at=95.0)
    assert (found.verdict, found.to_decide) == (verdict, to_decide)


@pytest.mark.parametrize(
    ("direction", "published", "error", "verdict"),
    [
        ("above", 5.0, 0.0, "smaller than published"),  # 1.0, -1.5 to 3.5 (a width of 2.48)
        ("above", 3.4, 0.0, "inconclusive"), ("above", 3.6, 0.0, "smaller than published"),
        ("above", 3.6, 1.0, "inconclusive"), ("above", 3.7, 1.0, "smaller than published"),
        ("above", 5.0, None, "inconclusive"), ("above", None, 0.0, "inconclusive"),
        ("above", -9.0, 0.0, "inconclusive"),
        ("below", -5.0, 0.0, "smaller than published"), ("below", -1.4, 0.0, "inconclusive"),
        ("below", 5.0, 0.0, "inconclusive"), ("equal", 5.0, 0.0, "inconclusive"),
    ],
)  # fmt: skip
def test_an_interval_with_zero_but_without_the_published_difference(direction, published, error, verdict):
    """Three seeds of differences 0, 1, 2: 1 +- 4.303 / sqrt(3) = 2.484."""
    ours, theirs = ({seed: Scored(50.0 + k * seed, None, "one") for seed in range(3)} for k in (1, 0))
    found = compare(direction, 0, published, ours, theirs, percent=True, command="", error=error)
    assert found.verdict == verdict and bool(found.to_decide) == (verdict == "inconclusive")
    alone = compare(direction, 0, published, {0: ours[0]}, {0: theirs[0]}, percent=True, command="", error=error)
    assert alone.verdict == "inconclusive"


def test_a_scale_with_too_few_seeds_leaves_a_claim_to_others(tmp_path):
    words = "MuToR is above parallel heads on star graphs"
    heads = {name: of(judged(name, tmp_path), words)["verdict"] for name in ("laptop", "gpu")}
    assert heads == {"laptop": "not at this scale", "gpu": "not run"}


def test_best_of_all_is_held_against_each_other_setting(tmp_path):
    """d_max 4 above 2 and 3 but not clearly above 6: undecided, and 6 is what is shown."""
    scale = load_scale(ROOT, "paper")
    accuracy = {2: (38, 39, 38), 3: (40, 41, 40), 4: (60, 61, 62), 6: (59, 62, 61)}
    for cell in cells_of(load_table(ROOT, "table4"), scale):
        if cell.spec.method == "mutor" and cell.spec.data == "gsm8k":
            for seed, right in zip((42, 43, 44), accuracy[cell.spec.method_config.d_max], strict=True):
                put(tmp_path, cell, seed, right, count=100, metric="accuracy")
    frame = judged("paper", tmp_path)
    row = frame[(frame["claim"] == "MuToR is best at d_max 4") & (frame["train_data"] == "gsm8k")].iloc[0]
    assert row["verdict"] == "inconclusive" and row["measured"] == pytest.approx(61 - 182 / 3, abs=1e-6)
    assert row["published"] == pytest.approx(42.10 - 41.93) and row["stands_in_for"] == ""


def test_published_effects_stand_beside(tmp_path):
    frame = judged("paper", tmp_path)
    assert frame["verdict"].isin(["not run", "not at this scale"]).all()
    table1 = frame[(frame["table"] == "table1") & (frame["theirs"] == "next_token") & (frame["direction"] == "above")]
    gains = {(r["role"], r["train_data"]): round(r["published"], 2) for _, r in table1.iterrows()}
    assert gains["gemma-2b", "gsm8k"] == 3.23 and gains["gemma-2b", "2m-gsm"] == 1.54
    assert gains["gemma-2b", "1m-math"] == 1.4
    longer = frame[(frame["table"] == "table13") & frame["theirs"].str.contains("1.667 times")]
    assert sorted(round(v, 2) for v in longer["published"]) == [0.51, 0.77, 1.23, 1.61]
    extra = of(frame, "1.4 times the data")
    assert extra["published"] == pytest.approx(68.33 - 66.69)
    # not of images, and of those who print no numbers, or none of this paper's model
    without = ["figure4", "table7", "mehra", "gentle", "path_planning", "blocksworld", "sat"]
    language = frame[~frame["table"].isin(without)]
    assert language["published"].notna().all() and (language["verdict"] == "not run").all()
    agree = np.where(language["direction"] == "above", language["published"] > -language["margin"].fillna(0), True)
    assert agree.all()  # the sources' own numbers support what they claim


def test_problems_of_each_side_are_compared_by_seeds():
    ours, theirs = (
        {42: Scored(45.0 + more, None, name), 43: Scored(55.0 + more, None, name)}
        for name, more in (("a", 25), ("b", 0))
    )
    found = difference(ours, theirs, percent=True).difference
    assert found.covers == "seeds" and found.estimate == pytest.approx(25)
    half = 4.302653 * (2 * 7.0710678**2 / 2) ** 0.5 / 1  # Welch at equal variances: t with 2 degrees of freedom
    assert found.high - 25 == pytest.approx(half, rel=1e-4)


def test_problems_of_each_seed_are_compared_seed_by_seed():
    """A graph a seed: what differs between graphs is not what differs between methods."""
    rates = {42: (10.0, 12.0), 43: (50.0, 53.0), 44: (90.0, 94.0), 45: (30.0, 33.0)}
    ours, theirs = (
        {seed: Scored(pair[side], np.zeros(5), f"graph {seed}") for seed, pair in rates.items()} for side in (1, 0)
    )
    found = difference(ours, theirs, percent=True).difference
    assert (found.estimate, found.covers, found.spread) == (3.0, "seeds", pytest.approx((2 / 3) ** 0.5))
    del theirs[45]  # the seeds that both have
    fewer = difference(ours, theirs, percent=True)
    assert (fewer.difference.estimate, fewer.seeds, fewer.difference.spread) == (3.0, 3, 1.0)
    assert fewer.difference.high - 3 == pytest.approx(4.302653 / 3**0.5, rel=1e-5)  # t(0.975, 2), a spread of 1
    del ours[42]  # neither side has all seeds of the other: Welch's
    assert difference(ours, theirs, percent=True).difference.spread > 40


def test_a_difference_by_seeds_is_no_more_than_possible():
    """Welch's half-width of (0, 100) against (0, 10) is far above 100."""
    ours, theirs = ({42: Scored(0.0, None, None), 43: Scored(value, None, None)} for value in (100.0, 10.0))
    row, number = (difference(ours, other, percent=True).difference for other in (theirs, 95.0))
    assert row.covers == number.covers == "seeds" and row.estimate == pytest.approx(45)
    assert (row.low, row.high, number.low, number.high) == (-100, 100, -95, 5)


def test_other_training_data_are_compared_problem_by_problem(tmp_path):
    """1.4 times the data, one seed a side: the test problems are the same, so they tell how sure the difference is."""
    for test_data_hash in ("t", None):
        for cell in cells_of(load_table(ROOT, "table3"), load_scale(ROOT, "paper")):
            right = {"mutor": 120, "next_token": 100}[cell.spec.method]
            put(tmp_path, cell, 42, right, test_data_hash, metric="accuracy", data_hash=cell.spec.data)
        row = of(judged("paper", tmp_path), "1.4 times the data")
        assert row["measured"] == pytest.approx(10) and row["n_seeds"] == 1
        if test_data_hash:
            assert row["covers"] == "problems" and 5 < row["ci_low"] < row["ci_high"] < 15
        else:  # a record that does not name its problems
            assert row["covers"] == "nothing" and np.isnan(row["ci_low"]) and row["verdict"] == "inconclusive"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"table": "tabel1"}, "claim 1: table: 'tabel1' is unknown"),
        ({"metric": "accuracy"}, "claim 1: metric: 'accuracy' is unknown"),
        ({"not_at": ["laptp"]}, "claim 1: not_at: 'laptp' is unknown, did you mean 'laptop'"),
        ({"ours": {"method": "mutr"}}, "claim 1: ours: method: 'mutr' is unknown, did you mean 'mutor'"),
        ({"direction": "better"}, "direction: 'better' is not allowed; allowed: above, below, equal"),
        ({"theirs": "luck"}, "theirs: 'luck' is unknown"),
        ({"train_data": "star_graf"}, "did you mean 'star_graph'"),
    ],
)
def test_wrong_claims_are_named(tmp_path, change, says):
    (tmp_path / "config").symlink_to(ROOT / "config")
    content = yaml.safe_load((ROOT / "config/claims.yaml").read_text())
    content["claims"][0].update(change)
    root = tmp_path / "other"
    (root / "config").mkdir(parents=True)
    for name in ("tables", "scales", "config.yaml"):
        (root / "config" / name).symlink_to(ROOT / "config" / name)
    (root / "config/claims.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match="claim 1") as error:
        claims.load_claims(Evidence(root, load_scale(ROOT, "smoke"), records.Records(tmp_path)))
    assert says in str(error.value)


def test_collect_writes_them(tmp_path, capsys):
    args = ["--scale", "smoke", "--runs", str(tmp_path), "--results", str(tmp_path)]
    assert main(["collect", "claims", "verdict", *args]) == 0
    text = (tmp_path / "verdict.md").read_text()
    assert "whole\ninterval lies above" in text and "| not run |" in text and "MuToR is best at d_max 4" in text
    assert "| not run |" not in text.split("## Needs the paper scale")[1] and (tmp_path / "claims.csv").exists()
