"""The table of attention backends: a new one is one entry, which says what it can do."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mutor.checks import from_mapping
from mutor.config.schema import ModelConfig
from mutor.mtp.attention import dense_mask
from mutor.mtp.trials import evaluating
from mutor.registry import ATTENTION, METHODS, AttentionBackend, answers_under, load, register
from mutor.results import records
from mutor.training.run import RunEnvironment, run
from tests.test_seams import attached, batch, star_graphs

ROOT = Path(__file__).parent.parent

calls = {"mask": 0, "attention": 0}


def toy_mask(layout, dtype):
    """A mask as a new backend might want it: the places that are not seen."""
    calls["mask"] += 1
    return ~dense_mask(layout)


def toy_attention(module, query, key, value, attention_mask, **more):
    """transformers' signature; without a mask causal."""
    calls["attention"] += 1
    seen = None if attention_mask is None else ~attention_mask
    return sdpa_attention_forward(module, query, key, value, seen, **more)


@pytest.fixture
def toy():
    """A backend that is known to transformers and to the table, which can't answer token by token."""
    AttentionInterface.register("toy", toy_attention)
    calls.update(mask=0, attention=0)
    register(ATTENTION, "toy", AttentionBackend(f"{__name__}:toy_mask", answers_under="sdpa"))
    yield
    del ATTENTION["toy"]


def test_a_new_backend_is_one_entry(toy, tmp_path):
    """A run by its name: the same curve as under sdpa; it trains with its mask and answers under another backend."""
    found = []
    for attention in ("sdpa", "toy"):
        spec = star_graphs("parallel_mtp", attention=attention)
        run(spec, (1,), RunEnvironment(root=ROOT, runs=tmp_path / attention))
        record = records.read(records.seed_folder(tmp_path / attention, spec, 1) / "metrics.json")
        losses = [entry["loss"] for entry in record["curve"] if "loss" in entry]
        found.append([*losses, records.checkpoint_metrics(record, "last")["loss"]])
        assert (calls["mask"], calls["attention"] > 0) == ((0, False) if attention == "sdpa" else (20, True))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_the_table_says_what_a_backend_can_do(toy, tiny):
    """What answers for it, and that one without gradients on a CPU is not trained there."""
    model = tiny("llama", attn_implementation="toy")
    method, layout = attached(load(METHODS, "next_token", "method"), model), batch()
    with evaluating(model):
        assert model.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "toy"
    assert [answers_under(name) for name in ("toy", "flex_attention", "eager", "other")] == [
        "sdpa",
        "sdpa",
        "eager",
        "other",
    ]
    method.compute_loss(model, layout)[0].backward()
    ATTENTION["toy"] = replace(ATTENTION["toy"], cpu_gradients=False)
    with pytest.raises(
        ValueError, match=r"attention: 'toy' has no gradients on a CPU; allowed there: blockwise, sdpa, eager"
    ):
        method.compute_loss(model, layout)
    with torch.no_grad():
        method.compute_loss(model, layout)


def test_an_unknown_backend_is_refused_with_the_known_ones(toy):
    settings = partial(from_mapping, ModelConfig, where="models: m")
    spec = {"role": "m", "architecture": "llama"}
    assert settings({**spec, "attention": "toy"}).attention == "toy"
    with pytest.raises(ValueError, match="attention: 'sdpaa' is unknown, did you mean 'sdpa'") as error:
        settings({**spec, "attention": "sdpaa"})
    assert "models: m" in str(error.value) and "Known: auto, blockwise, eager, flex_attention, sdpa, toy" in str(
        error.value
    )
    with pytest.raises(ValueError, match="'toy' is already registered"):
        register(ATTENTION, "toy", AttentionBackend("x:y"))
