"""Rows, captions, panels and axes say what ran, and for what it stands."""

import re
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from matplotlib.text import Text

from mutor.config.load import load_scale
from mutor.registry import resolve
from mutor.results.cells import Evidence, stand_ins
from mutor.results.claims import claim_frame, shown
from mutor.results.figures import progress
from mutor.results.readme import one_row_each
from mutor.results.records import Records
from mutor.results.render import latex, markdown, published_shape

ROOT = Path(__file__).parent.parent
LAPTOP = load_scale(ROOT, "laptop")
MODELS = {name: model.role for name, model in LAPTOP.models.items()}


@pytest.fixture(scope="module")
def laptop(tmp_path_factory):
    """Scale laptop, where everything stands in; nothing has run."""
    return Evidence(ROOT, LAPTOP, Records(tmp_path_factory.mktemp("runs")))


def words(figure):
    """All texts of a figure, line breaks taken out."""
    return [text.get_text().replace("\n", " ") for text in figure.findobj(Text) if text.get_text()]


@pytest.mark.parametrize("name", LAPTOP.artifacts)
def test_every_table_says_what_ran(laptop, name):
    table = laptop.table(name)
    frame, shape = laptop.frame(table), published_shape(laptop, table)
    stands, tex, md = stand_ins(frame), latex(laptop, table), markdown(laptop, table)
    if name == "rebuttal_flops":  # worked out for the published shapes
        assert not stands and frame["ran"].tolist() == frame["role"].tolist()
        return
    if name in ("foresight", "decoding", "path_planning", "blocksworld", "fact_chains"):
        assert not stands  # for no published model or data
        return
    assert stands and all(f"- Stands in for {text}." in md for text in stands)
    caption = tex[tex.index(r"\caption") :].replace("\\", "")
    assert all(f"Stands in for {text}." in caption for text in stands)
    ran = set(frame["model"])
    assert ran <= MODELS.keys()
    for row in shape.index:
        assert any(model in f"{shape.index.name} {row}" for model in ran), row
    for role in set(frame["role"]):
        for text in (*shape.index, str(shape.index.name)):
            assert role not in text or re.search(rf"\S+ for {role}\b", text), text
    for column in {"gsm8k", "1m-gsm", "samsum", "aqua-rat"} & set(frame["train_data"]):
        assert not any(re.search(rf"\b{column}(?! stand-in|-)", text) for text in (*shape.columns, *shape.index))


@pytest.mark.parametrize(
    "name", [n for n in LAPTOP.artifacts if n.startswith(("figure", "table", "cost", "rebuttal_l"))]
)
def test_every_figure_says_what_ran(laptop, name):
    table = laptop.table(name)
    frame = laptop.frame(table)
    for figure in table.drawing.figures:
        found = words(resolve(figure.draw)(laptop, table))
        foot = next(text for text in found if text.startswith("Stands in for "))
        assert all(text in foot for text in stand_ins(frame))
        assert any(model in text for text in found for model in set(frame["model"]) if text != foot)
        assert not {"gsm8k", "1m-gsm", "LlamaGen-B, 128 images", "Gemma 2B, 40 problems of GSM8K's lengths"} & {*found}
        assert not any(re.search(r"(?<!steps for )\b\d+K\b", text) for text in found)


@pytest.mark.parametrize("name", ["path_planning", "blocksworld", "sat", "figure4", "mehra"])
def test_every_seed_lies_inside_its_panel(name):
    """Points are not clipped, so one beyond the axis would lie in another panel. All of it ran, and an axis that does
    not begin at zero has no bars, whose lengths would mean nothing.
    """
    evidence = Evidence(ROOT, LAPTOP, Records(ROOT / "results/reference/laptop/runs"))
    drawn = resolve(evidence.table(name).drawing.figures[0].draw)(evidence, evidence.table(name))
    points = 0
    for axis in drawn.axes:
        low, high = axis.get_xlim()
        for line in axis.get_lines():
            if line.get_marker() == "o":
                assert all(low <= x <= high for x in line.get_xdata()), axis.get_xlabel()
                points += len(line.get_xdata())
        assert not axis.patches
    assert points > 20 and "not run" not in words(drawn)


def test_a_panel_of_costs_is_named_by_what_is_measured(laptop):
    panels = dict.fromkeys(laptop.frame(laptop.table("rebuttal_latency"))["panel"])
    assert list(panels)[1] == "gemma-4x128, 0.2 x batch, 0.5 x lengths (case: Gemma 2B, 40 problems of GSM8K's lengths)"


def test_steps_are_those_that_ran(laptop, tmp_path):
    label = laptop.frame(laptop.table("table15"))["label"].drop_duplicates().tolist()
    assert label == [
        "next_token, 90 steps for 360K",
        "next_token, 125 steps for 500K",
        "mutor_2d, random registers, 90 steps for 360K",
    ]
    paper = Evidence(ROOT, load_scale(ROOT, "paper"), Records(tmp_path))
    frame = paper.frame(paper.table("table15"))
    assert frame["label"].drop_duplicates().tolist() == [re.sub(r"\d+ steps for ", "", text) for text in label]
    assert set(frame["ran"]) == {"llamagen-b"} and "Stands in" not in latex(paper, paper.table("table15"))


@pytest.mark.parametrize("scale", ["laptop", "gpu", "smoke"])
def test_no_published_value_of_another_metric_stands_in_a_cell(tmp_path, scale):
    """FID is not a small classifier's; its precision and recall are not Inception's either."""
    found = Evidence(ROOT, load_scale(ROOT, scale), Records(tmp_path))
    for name in {"table7", "table8", "table9", "table15"} & set(found.scale.artifacts):
        table = found.table(name)
        frame = found.frame(table)
        assert "classifier_fid" in set(frame["metric"]) and frame["reported"].isna().all()
        assert "[published" not in latex(found, table) and "| fid |" in markdown(found, table)  # listed below
        assert "| 360000 |" in markdown(found, table)


@pytest.mark.parametrize("name", ["table8", "table9"])
def test_settings_of_one_method_are_lines_that_can_be_told_apart(laptop, name):
    lines = [line for line in progress(laptop, laptop.table(name)).axes[0].get_lines() if "(n=" in line.get_label()]
    plt.close("all")
    assert len({line.get_color() for line in lines}) == 1 < len(lines)
    assert len({line.get_linestyle() for line in lines}) == len(lines)


def test_claims_say_what_they_were_held_against(laptop):
    frame = claim_frame(laptop)
    here = frame[frame["verdict"] != "not at this scale"]
    assert all(any(model in text for model in MODELS) for text in shown(here)["on"])
    graphs = shown(here[here["table"] == "figure4"])
    assert "gpt2-4x64 for gpt2-large, star_graph n=2 l=4 labels=8, solve_rate" in set(graphs["on"])
    images = here[here["table"] == "table7"]
    assert len(images) and images["published"].isna().all()
    of_models = here[~here["table"].isin(["path_planning", "blocksworld", "sat"])]  # those are of no published model
    rows = one_row_each(of_models, "results")
    assert isinstance(rows, pd.DataFrame) and all("for" in text for text in rows["on"])
