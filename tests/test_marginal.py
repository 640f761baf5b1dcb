"""Marginalisation against sums over plain forward passes of the stock model, one path of tokens at a time."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mutor.baselines import marginal
from mutor.baselines.marginal import Marginal, MarginalConfig
from transformers import AutoModelForCausalLM

from mutor.checks import from_mapping
from mutor.config.load import load_scale
from mutor.config.runs import make_spec
from mutor.mtp import ahead
from mutor.mtp.layout import Example, collate
from mutor.mtp.method import Context
from mutor.results import records
from mutor.training.run import RunEnvironment, run

ROOT = Path(__file__).parent.parent
EXAMPLES = [([1, 4, 2, 3, 0, 5, 2], 3), ([2, 2, 5, 1], 1), ([3, 1, 4, 0, 5, 2], 2)]
BOTH = pytest.mark.parametrize("prefix_lm", [False, True])


def made(tiny, family="llama", vocabulary=6, scale=3.0, **settings):
    """A method on a model of a small vocabulary."""
    special = {} if family == "gpt2" else {"pad_token_id": 0}
    model = tiny(family, vocab_size=vocabulary, bos_token_id=1, eos_token_id=2, scale=scale, **special)
    method = Marginal(MarginalConfig(**settings))
    method.attach(model)
    return method, model


@torch.no_grad()
def predicted(method, model, prefix_lm=False):
    """(sequence, t, k) -> probabilities [V] and what they were summed over."""
    rows = collate([Example(np.array(ids), prefix) for ids, prefix in EXAMPLES], 0)
    layout, out = method.eval_layout(rows, Context(prefix_lm=prefix_lm)), {}
    for found in method.ahead(model, layout):
        for i, where in enumerate(found.index.tolist()):
            key = (*divmod(where, layout.ids.shape[1]), found.distance)
            assert key not in out and (found.mass is None) == (found.distance == 1)
            out[key] = found.logits[i].softmax(-1), 1.0 if found.mass is None else float(found.mass[i])
    return out


class Stock:
    """Probabilities of the next token behind any tokens, by the stock model alone, in float64."""

    def __init__(self, tools, model, prefix_lm):
        self.tools, self.model, self.prefix_lm, self.known = tools, model, prefix_lm, {}

    @torch.no_grad()
    def __call__(self, ids, prefix):
        key = tuple(ids)
        if key not in self.known:
            logits = self.tools.plain_logits(self.model, list(ids), prefix, self.prefix_lm)[-1]
            self.known[key] = logits.double().softmax(-1)
        return self.known[key]


def beam(stock, ids, prefix, k, kept):
    """(probabilities of x_(t+k), sum of its paths): the likeliest `kept` continuations of those one token shorter."""
    paths = [(1.0, [])]
    for _ in range(k - 1):
        longer = [
            (weight * float(p), [*path, v]) for weight, path in paths for v, p in enumerate(stock(ids + path, prefix))
        ]
        paths = sorted(longer, reverse=True)[:kept]
    return sum(w * stock(ids + path, prefix) for w, path in paths), sum(w for w, _ in paths)


def places(horizon):
    """Where x_(t+k) is in the answer, and an answer token follows t."""
    return {
        (n, t, k)
        for n, (ids, prefix) in enumerate(EXAMPLES)
        for k in range(1, horizon + 1)
        for t in range(prefix - 1, len(ids) - k)
    }


@BOTH
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("candidates", [0, 6])
def test_all_candidates_are_the_exact_sum(tiny, tools, family, prefix_lm, candidates):
    """V forward passes for each t, of the tokens up to t and one more."""
    method, model = made(tiny, family, candidates=candidates)
    found, stock = predicted(method, model, prefix_lm), Stock(tools, model, prefix_lm)
    assert found.keys() == places(2)
    for (n, t, k), (ours, mass) in found.items():
        ids, prefix = EXAMPLES[n][0][: t + 1], EXAMPLES[n][1]
        first = stock(ids, prefix)
        theirs = first if k == 1 else sum(first[v] * stock([*ids, v], prefix) for v in range(6))
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-6)
        assert mass == pytest.approx(1, abs=1e-5)


@BOTH
def test_all_paths_are_the_exact_sum_further_ahead(tiny, tools, prefix_lm):
    """V^(k - 1) paths for each t."""
    method, model = made(tiny, candidates=0, horizon=4)
    found, stock = predicted(method, model, prefix_lm), Stock(tools, model, prefix_lm)
    assert found.keys() == places(4)
    for (n, t, k), (ours, mass) in found.items():
        ids, prefix, theirs = EXAMPLES[n][0][: t + 1], EXAMPLES[n][1], 0
        if n and k > 2:
            for path in itertools.product(range(6), repeat=k - 1):
                weight = 1.0
                for i, v in enumerate(path):
                    weight *= float(stock([*ids, *path[:i]], prefix)[v])
                theirs += weight * stock([*ids, *path], prefix)
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-6)
            assert mass == pytest.approx(1, abs=1e-5)


@BOTH
@pytest.mark.parametrize("candidates", [1, 2, 4])
def test_some_candidates_are_a_beam(tiny, tools, prefix_lm, candidates):
    """The likeliest continuations of the paths that were kept; normalised over what is there."""
    method, model = made(tiny, candidates=candidates, horizon=4)
    found, stock = predicted(method, model, prefix_lm), Stock(tools, model, prefix_lm)
    assert found.keys() == places(4)
    for (n, t, k), (ours, mass) in found.items():
        theirs, kept = beam(stock, EXAMPLES[n][0][: t + 1], EXAMPLES[n][1], k, candidates)
        torch.testing.assert_close(ours.double(), theirs / kept, rtol=1e-4, atol=1e-6)
        assert mass == pytest.approx(kept, rel=1e-4)


@BOTH
def test_one_candidate_is_greedy_decoding(tiny, prefix_lm, tools):
    method, model = made(tiny, candidates=1, horizon=4)
    for (n, t, k), (ours, _) in predicted(method, model, prefix_lm).items():
        ids, prefix = EXAMPLES[n][0][: t + 1], EXAMPLES[n][1]
        for _ in range(k):
            ids = [*ids, int(tools.plain_logits(model, ids, prefix, prefix_lm)[-1].argmax())]
        assert int(ours.argmax()) == ids[-1]


def test_coverage_grows_with_candidates(tiny):
    """It is the mean probability of the paths, in percent, and 100 for all."""
    examples, coverage = [(np.array(ids), prefix) for ids, prefix in EXAMPLES], []
    for candidates in (1, 2, 3, 6, 0):
        method, model = made(tiny, candidates=candidates, horizon=3)
        with torch.no_grad():
            metrics = method.metrics(model, examples, Context(), 2)
        assert "coverage_ahead_1" not in metrics and "coverage_ahead_4" not in metrics
        found = predicted(method, model)
        for k in (2, 3):
            mean = np.mean([100 * mass for (_, _, distance), (_, mass) in found.items() if distance == k])
            assert metrics[f"coverage_ahead_{k}"] == pytest.approx(mean, rel=1e-5)
        coverage.append((metrics["coverage_ahead_2"], metrics["coverage_ahead_3"]))
    for k in (0, 1):
        found = [values[k] for values in coverage]
        assert found == sorted(found) and found[0] < found[1] < found[2] < 99.9
        assert found[-1] == pytest.approx(100, abs=1e-3)
    assert coverage[3][0] == pytest.approx(100, abs=1e-3) and coverage[3][1] < 99


def test_two_passes_serve_all(tiny):
    """One for the tokens, one for all candidates of all positions."""
    method, model = made(tiny, candidates=4)
    seen = []
    model.model.register_forward_hook(lambda module, args, out: seen.append(out.last_hidden_state.shape[:2]))
    predicted(method, model)
    assert seen == [(3, 7), (3, 5 + 3 * 4)]  # without the last two tokens of the longest; three positions have most


@BOTH
@pytest.mark.parametrize("candidates", [3, 0])
def test_parts_change_nothing(tiny, monkeypatch, candidates, prefix_lm):
    """Few candidates, few rows of logits and few tokens at a time."""
    method, model = made(tiny, candidates=candidates, horizon=3)
    whole = predicted(method, model, prefix_lm)
    monkeypatch.setattr(marginal, "TOGETHER", 12)
    monkeypatch.setattr(marginal, "IN_A_ROW", 6)
    monkeypatch.setattr(ahead, "TOKENS", 20)
    monkeypatch.setattr(ahead, "rows_at_once", lambda trunk, hidden: 4)
    parts = predicted(method, model, prefix_lm)
    assert parts.keys() == whole.keys()
    for key, (probabilities, mass) in whole.items():
        torch.testing.assert_close(parts[key][0], probabilities, rtol=1e-4, atol=1e-6)
        assert parts[key][1] == pytest.approx(mass, rel=1e-5)


def test_improbable_paths_leave_no_hole(tiny, tools):
    """A model that is all but certain: probabilities that round to 0 are not minus infinity in the loss."""
    method, model = made(tiny, candidates=2, scale=300.0)
    with torch.no_grad():
        metrics = method.metrics(model, [(np.array(ids), prefix) for ids, prefix in EXAMPLES], Context(), 3)
    assert np.isfinite(list(metrics.values())).all()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"horizon": 1}, r"horizon: 1 is out of range, allowed: \[2, 4\]"),
        ({"horizon": 5}, r"horizon: 5 is out of range, allowed: \[2, 4\]"),
        ({"candidates": -1}, r"candidates: -1 is out of range, allowed: \[0, inf\]"),
        ({"candidates": "all"}, "candidates: 'all' is not int"),
    ],
)
def test_settings_out_of_range_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        from_mapping(MarginalConfig, settings, "marginal")


def test_what_a_vocabulary_can_not_have_is_refused(tiny):
    with pytest.raises(ValueError, match="candidates: 7 of a vocabulary of 6; allowed: 1 to 6, or 0 for all"):
        made(tiny, candidates=7)
    with pytest.raises(ValueError, match=r"candidates: 0, all, are 226981 paths of 3 tokens in a vocabulary of 61"):
        made(tiny, vocabulary=61, candidates=0, horizon=4)
    made(tiny, vocabulary=61, candidates=0, horizon=3)


@pytest.fixture
def scale():
    """The smoke scale, with the graphs once more, for models that others have trained."""
    scale = load_scale(ROOT, "smoke")
    scale.recipes["none"] = {**scale.recipes["star_graph"], "steps": 0}
    base = {"data": "g2x3", "method": "next_token"}
    scale.datasets["known"] = replace(scale.datasets["g2x3"], recipe="none", base=base)
    return scale


def test_a_run_measures_what_another_has_trained(scale, tmp_path):
    """Of the same weights, in the same place of the record as what trained methods predict; again, the same."""
    spec = make_spec(scale, "known", "gpt2-2x32", "marginal", {"candidates": 0, "horizon": 3}, (7,))
    env = RunEnvironment(root=ROOT, runs=tmp_path)
    run(spec, spec.seeds, env)
    folder, theirs = (records.seed_folder(tmp_path, s, 7) for s in (spec, spec.base))
    record, trained = (records.read(f / "metrics.json") for f in (folder, theirs))
    ours, other = (records.checkpoint_metrics(r, "last") for r in (record, trained))
    assert record["steps"] == record["added_parameters"] == 0 and record["weights_hash"] == trained["weights_hash"]
    assert {name for name in ours if "_ahead_" in name} == {
        *(f"{name}_ahead_{k}" for k in (1, 2, 3) for name in ("accuracy", "top5_accuracy", "loss")),
        *(f"{name}_ahead_{k}" for k in (2, 3) for name in ("coverage", "accepted", "conditional")),
    }
    assert {name for name in other if "_ahead_" in name} == {
        "accuracy_ahead_1", "top5_accuracy_ahead_1", "loss_ahead_1",
    }  # fmt: skip
    assert all(ours[name] == value for name, value in other.items())
    plain = AutoModelForCausalLM.from_pretrained(folder / "last")
    assert not hasattr(plain, "mtp") and not (folder / "last/method").exists()
    (folder / "metrics.json").unlink()  # killed before the scores
    run(spec, spec.seeds, env)
    assert records.checkpoint_metrics(records.read(folder / "metrics.json"), "last") == ours


def test_training_is_refused(scale, tmp_path):
    spec = replace(make_spec(scale, "g2x3", "gpt2-2x32", "marginal", {}, (7,)), base=None)
    with pytest.raises(ValueError, match="marginal: it is not trained; allowed: a recipe of 0 steps"):
        run(spec, spec.seeds, RunEnvironment(root=ROOT, runs=tmp_path))
