"""The drawing over how far ahead: which numbers stand where, and what is left blank."""

from pathlib import Path

import pytest

from mutor.config.load import load_scale
from mutor.files import write_json
from mutor.results import figures_ahead
from mutor.results.cells import Evidence
from mutor.results.records import Records
from mutor.results.render import published_shape

ROOT = Path(__file__).parent.parent
GREY = "#777777"


@pytest.fixture
def drawn(tmp_path):
    """(evidence, table): as if heads, registers and the sum had run, and next_token, which knows the next alone."""
    evidence = Evidence(ROOT, load_scale(ROOT, "laptop"), Records(tmp_path / "runs"))
    table = evidence.table("foresight")
    frame = evidence.frame(table)
    known = {"next_token": 1, "parallel_mtp": 4, "mutor, all offsets": 4, "next_token, summed over tokens between": 4}
    for number, row in frame.iterrows():
        k = row["metric"].rpartition("_")[2]
        if int(k) <= known.get(row["label"], 0):
            values = [10.0 * int(k), 10.0 * int(k) + 2]
            frame.at[number, "values"], frame.at[number, "mean"], frame.at[number, "n_seeds"] = (
                values,
                sum(values) / 2,
                2,
            )
    return evidence, table


def test_a_line_for_each_setting_over_k(drawn):
    figure = figures_ahead.ahead(*drawn)
    accuracy, accepted = figure.axes
    lines = {line.get_label().split(" (n=")[0]: line for line in accuracy.lines if not line.get_label().startswith("_")}
    assert lines["parallel_mtp"].get_xydata().tolist() == [[k, 10 * k + 1] for k in (1, 2, 3, 4)]
    assert lines["next_token"].get_xydata().tolist() == [[1, 11]] and not len(lines["sequential_mtp"].get_xydata())
    summed = lines["next_token, summed over tokens between"]
    assert (summed.get_linestyle(), summed.get_color()) == ("--", GREY)
    assert [line for line in lines.values() if line.get_color() == GREY] == [summed]
    looks = [(line.get_color(), line.get_marker()) for line in lines.values()]
    assert len(set(looks)) == len(looks) == 10
    lines = {line.get_label().split(" (n=")[0]: line for line in accepted.lines if not line.get_label().startswith("_")}
    assert lines["mutor, all offsets"].get_xydata().tolist() == [[k, 10 * k + 1] for k in (2, 3, 4)]
    points = [line.get_xydata().tolist() for line in accepted.lines if line.get_label().startswith("_")]
    assert [[2, 20], [2, 22]] in points


def test_what_a_method_does_not_predict_is_blank(drawn):
    """What did not run says so; losses and others are in the .csv alone."""
    shape = published_shape(*drawn)
    assert list(shape.columns) == [
        *(f"python accuracy_ahead_{k}" for k in (1, 2, 3, 4)),
        *(f"python accepted_ahead_{k}" for k in (2, 3, 4)),
    ]
    assert shape.loc["next_token"].tolist() == ["11.0 (n=2)", *[""] * 6]
    assert shape.loc["parallel_mtp"].iloc[-1] == "41.0 (n=2)"
    assert set(shape.loc["mutor"]) == {"not run"}


def test_curves_of_acceptance(drawn, monkeypatch, tmp_path):
    evidence, table = drawn
    curve = [
        {"step": 60, "eval_accepted_ahead_2": 5.0},
        {"step": 80, "loss": 1.0},
        {"step": 120, "eval_accepted_ahead_2": 9.0},
    ]
    file = tmp_path / "metrics.json"
    write_json(file, {"curve": curve})
    monkeypatch.setattr(Records, "of", lambda self, spec: [{"file": file}] if spec.method == "parallel_mtp" else [])
    figure = figures_ahead.ahead_curves(evidence, table)
    assert [axis.get_ylabel().split(" (")[0] for axis in figure.axes] == [f"accepted ahead {k}" for k in (2, 3, 4)]
    assert [line.get_xydata().tolist() for line in figure.axes[0].lines] == [[[60, 5], [120, 9]]]
    assert not figure.axes[1].lines
