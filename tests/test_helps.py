"""Whether a method helps on a user's own data: from planted records to words, by hand and by simulation."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mutor.config.load import load_scale, load_table
from mutor.config.own import own_table
from mutor.config.runs import cells_of
from mutor.files import write_json
from mutor.results import records, render
from mutor.results.cells import Evidence
from mutor.results.helps import sentences
from mutor.results.record_schema import VERSION, pack
from mutor.results.stats import Interval, interval, problems_needed, seeds_needed, to_decide

ROOT = Path(__file__).parent.parent


# what would decide


def test_problems_needed_by_hand():
    """An interval of half the width takes four times the problems."""
    assert problems_needed(4.0, 8.0, 100) == problems_needed(-0.04, 0.08, 100) == 400
    assert (
        problems_needed(5.0, 5.0, 70) == 70 and problems_needed(3.0, 4.0, 9) == 16 and problems_needed(3, 4, 10) == 18
    )


def test_seeds_needed_by_hand():
    """t(0.975, 2) = 4.303 and t(0.975, 3) = 3.182: half widths 2.484 and 1.591 of a spread of 1."""
    assert seeds_needed(2.5, 1.0) == 3 and seeds_needed(2.4, 1.0) == 4
    assert seeds_needed(9.0, 1.0) == 2  # 12.71 / 1.41
    assert seeds_needed(2.4, 1.0, max_seeds=4) == 4
    assert seeds_needed(2.4, 1.0, max_seeds=3) is None and seeds_needed(2.5, 1.0, over_problems=1.0) == 4


POINTS = 1 + 0.8416 / 1.95996  # what an effect is in half widths when four of five repetitions decide


@pytest.mark.parametrize(
    ("estimate", "spread", "half", "seeds", "says"),
    [
        # 200 (6 x 1.4294 / 3)^2 = 1634
        (3.0, None, 6.0, 1, "three seeds or more, with about 1,600 problems (now 200), would decide"),
        (-3.0, None, 6.0, 1, "three seeds or more, with about 1,600 problems (now 200), would decide"),
        (30.0, None, 6.0, 1, "three seeds or more would decide"),
        # seeds add nothing: 200 (6 / (6 / 1.4294))^2 = 409, and as many seeds as you like do not help
        (6.0, 0.0, 6.0, 3, "about 410 problems (now 200) would decide"),
        # no problem adds anything: 4.303 / 3^0.5 = 2.48 > 3 / 1.4294 = 2.10 > 3.182 / 2 = 1.59
        (3.0, 1.0, 0.0, 3, "about 4 seeds (now 3) would decide"),
        # 2.10 is above 2.484 x 0.5 = 1.24 and above 2.0: (2.10^2 - 1.24^2)^0.5 = 1.69; 200 (2 / 1.69)^2 = 279;
        # what is left for seeds, (2.10^2 - 2^2)^0.5 = 0.636: t / S^0.5 < 1.27 at 5 (1.242)
        (3.0, 0.5, 2.0, 3, "about 280 problems (now 200) or about 5 seeds (now 3) would decide"),
        # neither is enough alone: 2.10 / 2^0.5 = 1.484 each: 4 seeds are 1.591, 5 are 1.242; 200 (5 / 1.484)^2 = 2270
        (3.0, 1.0, 5.0, 3, "about 5 seeds (now 3) with about 2,300 problems (now 200) would decide"),
        (0.0, 1.0, 5.0, 3, "no number of problems or seeds can be told, as there is no difference"),
        (0.01, 1.0, 5.0, 3, "too small a difference for any number within reach"),
        (0.01, 0.5, 0.0, 3, "too small a difference for any number within reach"),
    ],
)
def test_what_would_decide_by_hand(estimate, spread, half, seeds, says):
    found = Interval(estimate, estimate - 50, estimate + 50, "", spread, half, 200)
    assert to_decide(found, seeds) == says
    assert to_decide(replace(found, estimate=7.0), seeds, effect=estimate) == says  # told from something else than zero


def test_what_would_decide_where_only_seeds_are_known():
    """With n seeds half the width is t(n - 1) s / sqrt(n): of s = 2.45, 2.57 at 6 seeds, 2.27 at 7."""
    found, says = Interval(2.5, -9, 9, "seeds", 2.45), "about 7 seeds (now 3) would decide"
    assert (
        to_decide(found, 3, power=0.5) == to_decide(found, 3, -2.5, power=0.5) == says
    )  # half the width is the effect
    assert to_decide(found, 3, 2.3, power=0.5) == says  # with the degrees of freedom of 6 seeds it were 2.38
    assert to_decide(found, 3) == "about 11 seeds (now 3) would decide"  # 2.5 / 1.4294 = 1.749: of 10, 1.753
    assert to_decide(replace(found, spread=None), 1) == "three seeds or more would decide"


def test_four_of_five_repetitions_decide_with_as_many_problems():
    """Ours alone solves 20% of problems, theirs alone 10%: told from the interval of 60, tried on new problems."""
    rng = np.random.default_rng(0)
    one = rng.permutation(np.repeat([1, -1, 0], [12, 6, 42]))[None]
    found = interval(one, difference=True)
    assert found.low < 0 < found.high and found.estimate == pytest.approx(0.1)
    count = problems_needed(found.estimate / POINTS, found.over_problems, 60)
    assert f"about {float(f'{count:.2g}'):.0f} problems (now 60)" in to_decide(found, 1)
    draws = rng.choice([1, -1, 0], p=[0.2, 0.1, 0.7], size=(1000, count))
    decided = np.mean([interval(draw[None], difference=True).low > 0 for draw in draws])
    assert 0.75 < decided < 0.87
    few = np.mean([interval(draw[None, :60], difference=True).low > 0 for draw in draws])
    assert few < 0.4


# records planted into the scale own


def bits(right, count=50):
    """Scores of problems, the first so many right."""
    return np.arange(count) < right


def planted(folder, scores, **more):
    """Evidence of the scale own: label -> seed -> scores of problems; more: label -> fields of its records."""
    scale = load_scale(ROOT, "own")
    for cell in cells_of(load_table(ROOT, "own"), scale):
        for seed, right in scores.get(cell.row.label, {}).items():
            tokens = {"mutor": 1500, "before fine-tuning": 0}.get(cell.row.label, 1000)
            record = {
                "version": VERSION, "scale": "own", "train_data": "mine", "model": "mine", "method": cell.spec.method,
                "settings": cell.spec.settings, "seed": seed, "config": cell.spec.as_dict(), "curve": [], "code": {},
                "config_hash": cell.spec.config_hash, "steps": tokens and 30, "tokens": tokens, "test_data_hash": "t",
                "seconds_training": {"mutor": 26.0}.get(cell.row.label, 20.0), "trainable_parameters": 9,
                "added_parameters": 0, "versions": {}, "device": "cpu", "threads": 1,
                "checkpoints": [{"names": ["best", "last"], "step": 30, "scores": {"accuracy": pack(right)},
                                 "metrics": {"accuracy": 100 * right.mean(), "loss": 1.23456}}],
                **more.get(cell.row.label, {}),
            }  # fmt: skip
            write_json(records.seed_folder(folder, cell.spec, seed) / "metrics.json", record)
    return Evidence(ROOT, scale, records.Records(folder))


def said(folder, scores, **more):
    evidence = planted(folder, scores, **more)
    return sentences(evidence, evidence.table("own"))


def seeds(*rights):
    return {42 + number: bits(right) for number, right in enumerate(rights)}


def test_nothing_has_run(tmp_path):
    first, *others = said(tmp_path, {})
    assert first == "mine, accuracy on test.jsonl: nothing can be said before the runs."
    assert "mutor against next_token: not run." in others


def test_fine_tuning_alone_is_no_method(tmp_path):
    evidence = planted(tmp_path, {"before fine-tuning": seeds(5), "next_token": seeds(20, 21, 19)})
    first, _, *others = sentences(evidence, own_table(ROOT, ["next_token"]))
    assert first == "mine, accuracy on test.jsonl: no method is compared with plain fine-tuning."
    assert others[0].startswith("next_token against before fine-tuning: helps")


def test_a_method_that_helps_and_one_that_hurts(tmp_path):
    """30, 31, 29 of 50 right against 20, 21, 19: the same problems more, whatever the seed."""
    scores = {"before fine-tuning": seeds(5), "next_token": seeds(20, 21, 19), "mutor": seeds(30, 31, 29)}
    first, scored, *others = said(tmp_path, scores | {"parallel_mtp": seeds(2, 3, 1)})
    assert first == (
        "mine, accuracy on test.jsonl: does multi-token prediction help? Yes: mutor helps; parallel_mtp hurts."
    )
    assert scored == "Scores in percent: before fine-tuning 10.0, next_token 40.0, parallel_mtp 4.0, mutor 60.0."
    line = next(line for line in others if line.startswith("mutor against"))
    found = interval(np.array([bits(30 + n) * 1.0 - bits(20 + n) for n in (0, 1, -1)]), difference=True).times(100)
    assert line == (
        f"mutor against next_token: helps, +20.0 points (95% interval {found.low:+.1f} to {found.high:+.1f}, over "
        "seeds and problems). Training takes 1.30 times the time and 1.50 times the tokens; inference costs the same."
    )
    line = next(line for line in others if line.startswith("next_token against"))
    assert line.startswith("next_token against before fine-tuning: helps, +30.0 points") and line.endswith("problems).")
    assert not any("would decide" in line for line in others)


def test_a_single_seed_decides_nothing(tmp_path):
    first, _, *others = said(tmp_path, {"next_token": seeds(5), "mutor": seeds(45)})
    assert first.endswith("does multi-token prediction help? Not decided: mutor is undecided.")
    line = next(line for line in others if line.startswith("mutor against"))
    assert ": undecided, +80.0 points (95% interval +6" in line
    assert "over problems; three seeds or more would decide)" in line
    assert "One seed decides nothing" in others[-1]


def test_undecided_says_what_would_decide(tmp_path):
    rng = np.random.default_rng(3)
    noisy = {name: {s: rng.random(50) < p for s in (42, 43, 44)} for name, p in (("next_token", 0.3), ("mutor", 0.5))}
    first, *others = said(tmp_path, noisy)
    line = next(line for line in others if line.startswith("mutor against"))
    assert "Not decided: mutor is undecided." in first and ": undecided, +" in line
    assert " would decide)" in line and "problems (now 50)" in line
    assert others[-1].startswith("How many would decide: ")


def test_lora_is_first_compared_with_its_like(tmp_path):
    """Above plain fine-tuning, and level with plain fine-tuning of adapters: the latter is multi-token prediction's."""
    level = {"next_token": seeds(5, 6, 4), "lora_next_token": seeds(30, 31, 29), "lora_mutor": seeds(30, 31, 29)}
    first, _, *others = said(tmp_path, level)
    assert first.endswith("Not decided: lora_mutor is undecided.")
    assert any(line.startswith("lora_mutor against next_token: helps") for line in others)


def test_what_time_costs_is_only_told_of_one_machine(tmp_path):
    scores = {"next_token": seeds(20, 21, 19), "mutor": seeds(30, 31, 29)}
    lines = said(tmp_path, scores, mutor={"device": "NVIDIA H100"})
    assert any("Training takes 1.50 times the tokens; inference" in line for line in lines)


@pytest.mark.parametrize(
    ("right", "says"),
    [
        (0, ["WARNING: every method scores 0, so nothing can be decided", "does `extract` find them", "`compare`",
             "extract whole, compare text, new_tokens 128", "predictions-last.jsonl"]),
        (50, ["WARNING: every method scores 100, so nothing can be decided", "harder test problems"]),
    ],
)  # fmt: skip
def test_all_wrong_or_all_right_is_a_warning(tmp_path, right, says):
    """Whatever the model did before it was fine-tuned."""
    scores = {"before fine-tuning": seeds(7), "next_token": seeds(right, right), "mutor": seeds(right, right)}
    first, _, *others = said(tmp_path, scores)
    assert all(words in first for words in says), first
    assert (
        "mutor against next_token: undecided. Training takes 1.30 times the time and 1.50 times the tokens; "
        in "".join(others)
    )
    assert "interval" not in "".join(others)
    assert "WARNING" not in said(tmp_path / "other", scores | {"mutor": seeds(right, 1)})[0]


def test_the_answer_stands_first_in_markdown_and_report(tmp_path):
    from mutor.results.report import collect_all

    evidence = planted(tmp_path / "runs", {"next_token": seeds(20, 21, 19), "mutor": seeds(30, 31, 29)})
    files, answers = collect_all(evidence, ["own", "report"], ["own"], tmp_path)
    assert answers == sentences(evidence, evidence.table("own"))
    lines = (tmp_path / "own.md").read_text().splitlines()
    assert lines[2] == f"**{answers[0]}**" and lines[4:6] == [f"- {sentence}" for sentence in answers[1:3]]
    table = [line for line in lines if line.startswith("| ")]
    assert table[0] == "| mine | accuracy on test.jsonl | loss on test.jsonl |"
    assert "| mutor | 60.0 ± 2.0 (n=3) | 1.2346 ± 0.0000 (n=3) |" in table
    assert "| before fine-tuning | not run | not run |" in table
    html = (tmp_path / "report.html").read_text()
    assert html.index("Yes: mutor helps") < html.index("A reproduction of")
    assert (tmp_path / "report.html") in files


def test_what_is_compared_with_what_is_checked():
    table = load_table(ROOT, "own")
    assert [row.label for row in table.rows][:2] == ["before fine-tuning", "next_token"]
    assert all(row.against for row in table.rows[1:])
    assert render.answer(Evidence(ROOT, load_scale(ROOT, "smoke"), records.Records(ROOT / "none")), table) == []
