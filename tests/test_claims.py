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
from mutor.results.verdicts import judge

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


def frame_of(folder, solved, scale="smoke", count=200):
    """The claims frame of runs: label or method -> problems solved by each seed, of `count`."""
    loaded = load_scale(ROOT, scale)
    for cell in cells_of(load_table(ROOT, "figure4"), loaded):
        key = cell.row.label or cell.spec.method
        for seed, right in zip((42, 43, 44), solved.get(key, ()), strict=False):
            put(folder, cell, seed, right, count=count)
    return judged(scale, folder)


def of(frame, words):
    rows = frame[frame["claim"].str.contains(words, regex=False)]
    assert len(rows) >= 1, words
    return rows.iloc[0]


def test_verdicts_on_made_up_runs(tmp_path):
    frame = frame_of(
        tmp_path,
        {
            "next_token": (1000, 980, 1020),
            "mutor": (1980, 1990, 2000),
            "parallel_mtp": (1000, 1500, 2000),
            "mutor, d = 1": (1500, 1520, 1480),
        },
        count=2000,
    )
    chance, solves = of(frame, "stays at chance"), of(frame, "fails on")
    assert (chance["verdict"], solves["verdict"]) == ("same direction", "same direction")
    assert solves["measured"] == pytest.approx(99.5 - 50) and solves["n_seeds"] == 3
    assert solves["covers"] == "seeds and problems" and solves["ci_low"] > 40
    wide = of(frame, "Parallel heads are above")
    assert wide["verdict"] == "undecided" and wide["to_decide"].startswith("about ") and "seeds" in wide["to_decide"]
    assert of(frame, "no further than the next token")["verdict"] == "opposite direction"
    missing = of(frame, "Sequential modules are above")
    assert missing["verdict"] == "not run" and "snakemake results/smoke/figure4.csv" in missing["to_decide"]
    assert of(frame, "Llama 3 8B")["verdict"] == "not at this scale"
    content = yaml.safe_load((ROOT / "config/claims.yaml").read_text())
    assert {c["claim"] for c in content["claims"]} == set(frame["claim"])


@pytest.mark.parametrize(
    ("ours", "verdict", "low", "high"), [(0, "undecided", -8.66, 8.66), (30, "same direction", 81.69, 100)]
)
def test_none_right_of_three_seeds_is_not_without_doubt(tmp_path, ours, verdict, low, high):
    """Two methods that are always wrong are not known to be equal; one that is always right is known to be better."""
    frame = frame_of(tmp_path, {"next_token": (0, 0, 0), "mutor": (ours,) * 3}, count=30)
    row = of(frame, "fails on")
    assert (row["verdict"], row["n_seeds"]) == (verdict, 3) and row["measured"] == pytest.approx(ours / 0.3)
    assert (row["ci_low"], row["ci_high"]) == pytest.approx((low, high), abs=0.01)
    chance = of(frame, "95% or more")  # against a number: Wilson's of the rate
    wilson = (0, 11.35) if ours == 0 else (88.65, 100)
    assert (chance["ci_low"], chance["ci_high"]) == pytest.approx([x - 95 for x in wilson], abs=0.01)


def test_one_seed_is_over_problems_and_decides_nothing(tmp_path):
    row = of(frame_of(tmp_path, {"next_token": (0,), "mutor": (200,)}), "fails on")
    assert (row["n_seeds"], row["covers"], row["verdict"]) == (1, "problems", "undecided") and row["ci_low"] > 90
    assert row["to_decide"] == "three seeds or more"
    assert of(frame_of(tmp_path, {"next_token": (0, 0), "mutor": (200, 200)}), "fails on")["verdict"] != "undecided"


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
    assert gains["llama-3-8b", "1m-math"] == 2.0
    longer = frame[(frame["table"] == "table13") & frame["theirs"].str.contains("1.667 times")]
    assert sorted(round(v, 2) for v in longer["published"]) == [0.51, 0.77, 1.23, 1.61]
    extra = of(frame, "1.4 times the data")
    assert extra["published"] == pytest.approx(68.33 - 66.69)
    language = frame[~frame["table"].isin(["figure4", "table7", "table8", "table9", "table15"])]
    assert language["published"].notna().all() and (language["verdict"] == "not run").all()
    agree = np.where(language["direction"] == "above", language["published"] > -language["margin"].fillna(0), True)
    assert agree.all()  # the sources' own numbers support what they claim


@pytest.mark.parametrize("by", ["method", "seed"])
def test_different_problems_are_compared_by_seeds(tmp_path, by):
    """Each side has its own, or each seed."""
    scale = load_scale(ROOT, "smoke")
    for cell in cells_of(load_table(ROOT, "figure4"), scale):
        if not cell.row.control and cell.spec.method in ("next_token", "mutor"):
            for seed, right in ((42, 90), (43, 110)):
                mutor = cell.spec.method == "mutor"
                put(tmp_path, cell, seed, right + 50 * mutor, cell.spec.method if by == "method" else str(seed))
    row = of(judged("smoke", tmp_path), "fails on")
    assert row["covers"] == "seeds" and row["measured"] == pytest.approx(25)
    half = 4.302653 * (2 * 7.0710678**2 / 2) ** 0.5 / 1  # Welch at equal variances: t with 2 degrees of freedom
    assert row["ci_high"] - 25 == pytest.approx(half, rel=1e-4)


def test_a_difference_by_seeds_is_no_more_than_possible(tmp_path):
    """Welch's half-width of (0, 100) against (0, 10) is far above 100."""
    for cell in cells_of(load_table(ROOT, "figure4"), load_scale(ROOT, "smoke")):
        if not cell.row.control and cell.spec.method in ("next_token", "mutor"):
            for seed, right in ((42, 0), (43, 200 if cell.spec.method == "mutor" else 20)):
                put(tmp_path, cell, seed, right, test_data_hash=cell.spec.method + str(seed))
    frame = judged("smoke", tmp_path)
    row, number = of(frame, "fails on"), of(frame, "95% or more")
    assert row["covers"] == number["covers"] == "seeds" and row["measured"] == pytest.approx(45)
    assert (row["ci_low"], row["ci_high"], number["ci_low"], number["ci_high"]) == (-100, 100, -95, 5)


def test_other_training_data_are_compared_problem_by_problem(tmp_path):
    """1.4 times the data, one seed a side: the test problems are the same, so they tell how sure the difference is."""
    for test_data_hash in ("t", None):
        for cell in cells_of(load_table(ROOT, "table3"), load_scale(ROOT, "laptop")):
            right = {"mutor": 120, "next_token": 100}[cell.spec.method]
            put(tmp_path, cell, 42, right, test_data_hash, metric="accuracy", data_hash=cell.spec.data)
        row = of(judged("laptop", tmp_path), "1.4 times the data")
        assert row["measured"] == pytest.approx(10) and row["n_seeds"] == 1
        if test_data_hash:
            assert row["covers"] == "problems" and 5 < row["ci_low"] < row["ci_high"] < 15
        else:  # a record that does not name its problems
            assert row["covers"] == "nothing" and np.isnan(row["ci_low"]) and row["verdict"] == "undecided"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"table": "tabel1"}, "claim 1: table: 'tabel1' is unknown"),
        ({"metric": "accuracy"}, "claim 1: metric: 'accuracy' is unknown"),
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
    assert main(["collect", "claims", "--scale", "smoke", "--runs", str(tmp_path), "--results", str(tmp_path)]) == 0
    text = (tmp_path / "claims.md").read_text()
    assert "whole\ninterval lies above" in text and "| not run |" in text and "MuToR is best at d_max 4" in text
