"""FLOPs against the published figures and against counting multiplications."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mutor.config.load import load_scale
from mutor.config.schema import Shape
from mutor.results.cells import Evidence
from mutor.results.drawings import collect_artifact
from mutor.results.flops import attention_exceeds_feed_forward, layer_flops, tipping_point
from mutor.results.records import Records

ROOT = Path(__file__).parent.parent


@pytest.fixture
def flops(tmp_path):
    """The artifact's frame."""
    evidence = Evidence(ROOT, load_scale(ROOT, "smoke"), Records(tmp_path / "runs"))
    table = evidence.table("rebuttal_flops")
    collect_artifact(evidence, table, tmp_path)
    return evidence.frame(table), tmp_path


def test_every_published_figure_cut_at_two_decimals(flops):
    frame, _ = flops
    stated = frame[frame["reported"].notna()]
    assert len(stated) == 24
    for ours, theirs in zip(stated["mean"], stated["reported"], strict=True):
        assert int(ours * 100 + 1e-9) / 100 == theirs
    assert (stated["reported_difference"].abs() < 0.01).all()


def test_tipping_points_as_published(flops):
    frame, folder = flops
    points = frame[frame["unit"] == "tokens"].set_index(["role", "metric"])["mean"]
    assert points["gemma-2b", "tipping_point"] == 26880 and points["llama-3-8b", "tipping_point"] == 26624
    assert points["gemma-2b", "attention_exceeds_feed_forward"] == pytest.approx(22300, abs=50)
    assert points["llama-3-8b", "attention_exceeds_feed_forward"] == pytest.approx(16400, abs=50)
    text = (folder / "rebuttal_flops.md").read_text()
    assert "26880" in text and "[published 27.91]" in text and "not run" not in text


def test_definitions_hold_at_their_own_lengths():
    shape = Shape(width=8, query=8, key_value=4, feed_forward=32)
    at = attention_exceeds_feed_forward(shape)
    d, q, kv, f = 8, 8, 4, 32
    assert 2 * at * (d * q + 2 * d * kv + q * d) + 4 * at**2 * d == pytest.approx(6 * at * d * f)
    assert 4 * tipping_point(shape) ** 2 * d == pytest.approx(
        tipping_point(shape) * (2 * (d * q + 2 * d * kv + q * d) + 6 * d * f)
    )


def test_counted_by_torch():
    """torch's own counter on one layer of a stock model, without its output layer."""
    from torch.utils.flop_counter import FlopCounterMode

    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "llama",
            hidden_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=96,
            vocab_size=32,
            max_position_embeddings=64,
        ),
        attn_implementation="eager",
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 24, dtype=torch.long))
    head = 2 * 24 * 64 * 32
    rotary = 2 * 8 * 24  # the angles: an outer product
    counted = counter.get_total_flops() - head
    assert counted - sum(layer_flops(Shape(width=64, query=64, key_value=32, feed_forward=96), 24)) in (0, rotary)
