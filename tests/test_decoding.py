"""What drafts are worth: the metrics of a run against what `generate` gives, counted by hand."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mutor.baselines.next_token import NextToken, NextTokenConfig
from mutor.baselines.pause import Pause, PauseConfig

from mutor.checks import from_mapping
from mutor.config.load import load_scale
from mutor.config.recipe import Recipe
from mutor.config.runs import Cell
from mutor.decode import PromptLookup, generate
from mutor.mtp.drafts import Drafter
from mutor.mtp.mutor import MuToR, MuToRConfig
from mutor.registry import TASKS, load, resolve
from mutor.results.cells import Evidence
from mutor.results.render import published_shape
from mutor.training import decoding
from mutor.training.decoding import drafting, fitting, measure
from mutor.training.seed import SeedRun

ROOT = Path(__file__).parent.parent
PROMPTS = [np.random.default_rng(n).integers(3, 61, 4 + n) for n in range(3)]
OPTIONS = {"new_tokens": 16, "end_id": None, "prefix_lm": False, "log": print}


class Knows(NextToken):
    """Drafts the model's own tokens, and every third time another one: what is kept is known."""

    def drafter(self, draft):
        """Looks the next tokens up in a second, plain run."""
        if draft > 2:
            raise ValueError("draft: 2 at most")

        def propose(step):
            text = step.text[0, : int(step.last[0]) + 2]
            told = generate(self.trunk.model, None, [text], new_tokens=draft).ids[0]
            step.put(torch.where(torch.tensor(len(text) % 3 == 0), (told + 1) % 61, told)[None])

        return Drafter(propose)


class Careless(Knows):
    """Writes over the token that is known already."""

    def drafter(self, draft):
        """As Knows, but not beside its own drafts alone."""
        drafter = super().drafter(draft)

        def propose(step):
            drafter.propose(step)
            step.text[0, int(step.last[0]) + 1] = 7

        return Drafter(propose)


def attached(tiny, cls, config=None):
    """A tiny model with a method."""
    model, method = tiny(), cls(config or NextTokenConfig())
    method.attach(model)
    return model.eval(), method


def as_long_as_its_passes(model, decode):
    """Instead of a clock: 7 s for a prompt, 1 s for each token that a pass is fed."""
    done = decode()
    return done, 7.0 + len(done.accepted[0]) * (1 + done.draft)


@pytest.mark.parametrize(("cls", "most"), [(Knows, 2), (NextToken, 4)])
def test_metrics_are_what_generate_gives(tiny, monkeypatch, cls, most):
    """By hand, of each text: tokens behind the first over verifications, drafts kept by place; the clock is planted."""
    model, method = attached(tiny, cls)
    monkeypatch.setattr(decoding, "_timed", as_long_as_its_passes)
    monkeypatch.setattr(decoding, "_counted", partial(as_long_as_its_passes, model))
    found = measure(model, method, PROMPTS, **OPTIONS)
    source = PromptLookup() if cls is NextToken else method
    assert len(found) == 1 + 5 * most + most and found["flops_per_token_draft_0"] == 1e-6
    for k in range(1, most + 1):
        texts = [generate(model, source, [prompt], new_tokens=16, draft=k) for prompt in PROMPTS]
        verified = sum(text.passes - 1 for text in texts)
        length = (16 * 3 - 3) / verified
        assert found[f"acceptance_length_draft_{k}"] == pytest.approx(length)
        assert found[f"passes_per_token_draft_{k}"] == pytest.approx((verified + 3) / 48)
        assert found[f"speedup_draft_{k}"] == pytest.approx(length / (1 + k))
        assert found[f"flops_per_token_draft_{k}"] == pytest.approx((1 + k) / length / 1e6)
        assert found[f"identical_draft_{k}"] == 100
    kept = [count for text in texts for count in text.accepted[0]]
    for i in range(1, most + 1):
        assert found[f"accepted_draft_{most}_at_{i}"] == pytest.approx(100 * np.mean([n >= i for n in kept]))
    if cls is Knows:
        assert found["acceptance_length_draft_2"] > 1.5 and 0 < found["accepted_draft_2_at_1"] < 100


def test_texts_are_compared(tiny, monkeypatch):
    monkeypatch.setattr(decoding, "_counted", partial(as_long_as_its_passes, None))
    assert measure(*attached(tiny, Careless), PROMPTS, **OPTIONS)["identical_draft_1"] < 100


def test_flops_by_hand(tiny):
    """Without drafts twice the weights of the matrices and two products a key; two tokens take twice as many."""
    model, method = attached(tiny, NextToken)
    found = measure(model, method, PROMPTS[:1], **OPTIONS)
    assert sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n) == 17312
    keys = np.arange(6, 20).mean()  # behind a prompt of 4 the first pass that counts is fed token 5
    assert found["flops_per_token_draft_0"] == pytest.approx((2 * 17312 + 2 * 4 * 32 * keys) / 1e6, rel=1e-3)
    ratio = found["flops_per_token_draft_1"] / found["flops_per_token_draft_0"]
    assert ratio * found["acceptance_length_draft_1"] == pytest.approx(2, rel=0.02)


def test_what_can_not_draft_looks_up(tiny):
    assert drafting(attached(tiny, MuToR, MuToRConfig(d_max=3))[1])[1] == 2
    assert drafting(attached(tiny, MuToR, MuToRConfig(d_max=8))[1])[1] == 4
    for cls, config in ((NextToken, NextTokenConfig()), (MuToR, MuToRConfig(d_min=3, d_max=4))):
        source, most = drafting(attached(tiny, cls, config)[1])
        assert isinstance(source, PromptLookup) and most == 4


def test_what_is_not_measured(tiny, capsys):
    """Answers by a rule of their own; a model that is refused; texts that end at once."""
    assert measure(*attached(tiny, Pause, PauseConfig()), PROMPTS, **OPTIONS) == {}
    model, method = attached(tiny, NextToken)
    every = list(range(61))
    assert measure(model, method, PROMPTS, **{**OPTIONS, "end_id": every}) == {}
    assert "no text of 3 needs more than two passes" in capsys.readouterr().out
    assert measure(model, method, PROMPTS, **{**OPTIONS, "new_tokens": 64}) == {}
    assert "not decoded with drafts: max_position_embeddings: 64" in capsys.readouterr().out


def test_prompts_without_room_are_passed_over(tiny):
    long = [np.arange(n) % 61 for n in (48, 49, 10)]
    assert [len(prompt) for prompt in fitting(tiny(), long, 16)] == [48, 10]
    windowed = tiny("mistral", sliding_window=20)
    assert [len(prompt) for prompt in fitting(windowed, [*long, long[0][:4]], 16)] == [4]


@pytest.mark.parametrize(("key", "value", "allowed"), [("decode_prompts", -1, 0), ("decode_tokens", 7, 8)])
def test_recipe_keys_have_a_range(key, value, allowed):
    with pytest.raises(ValueError, match=rf"{key}: {value} is out of range, allowed: .*{allowed}"):
        from_mapping(Recipe, {"steps": 1, "batch_size": 1, "learning_rate": 1.0, key: value}, "recipe")


@pytest.mark.parametrize(
    ("metric", "unit"),
    [
        ("acceptance_length_draft_3", "tokens"),
        ("passes_per_token_draft_1", "passes"),
        ("flops_per_token_draft_0", "1e6 FLOP"),
        ("speedup_draft_2", "times"),
        ("identical_draft_2", "percent"),
        ("accepted_draft_3_at_1", "percent"),
    ],
)
def test_units(metric, unit):
    assert Cell(None, None, metric, "last").unit == unit


def test_drawn_answers_are_not_decoded():
    """Of a task that draws its answers nothing is asked; a recipe without prompts asks nothing either."""
    recipe = Recipe(steps=1, batch_size=1, learning_rate=1.0, decode_prompts=3)
    drawn = SimpleNamespace(spec=SimpleNamespace(recipe=recipe), task=load(TASKS, "images", "task"))
    assert SeedRun._decoded(drawn, None) == {}
    none = SimpleNamespace(recipe=Recipe(steps=1, batch_size=1, learning_rate=1.0))
    assert SeedRun._decoded(SimpleNamespace(spec=none, task=load(TASKS, "text", "task")), None) == {}


DRAFTS = {"next_token": 4, "parallel_mtp": 3, "sequential_mtp": 3, "next_latent": 3, "mutor": 3}


def recorded(spec):
    """Records of two seeds, in which a pass of k drafts gives 1 + k / 2 tokens for 1 + k, or 2 + k times the FLOPs."""
    out = []
    for seed in (0, 1):
        metrics = {"flops_per_token_draft_0": 2.0 + seed}
        for k in range(1, DRAFTS[spec.method] + 1):
            length = 1 + k / 2
            metrics |= {
                f"acceptance_length_draft_{k}": length,
                f"passes_per_token_draft_{k}": 1 / length,
                f"flops_per_token_draft_{k}": (2.0 + seed) * (1 + k + seed) / length,
                f"speedup_draft_{k}": 0.9 * length,
                f"identical_draft_{k}": 100.0,
            }
        out.append({"file": "x", "added_parameters": 0, "checkpoints": [{"names": ["last"], "metrics": metrics}]})
    return out


@pytest.fixture(params=[recorded, lambda spec: []], ids=["run", "not run"])
def evidence(request):
    """The table at smoke scale, with planted records or none."""
    return Evidence(ROOT, load_scale(ROOT, "smoke"), SimpleNamespace(of=request.param, problems=[]))


def test_a_row_has_as_many_drafts_as_its_method(evidence):
    shape = published_shape(evidence, evidence.table("decoding"))
    rows = [*DRAFTS, "mutor", "mutor", "mutor", "mutor"]
    assert [name.split(": ")[1].split(",")[0] for name in shape.index] == rows and not evidence.runs.problems
    if not evidence.runs.of(evidence.cells(evidence.table("decoding"))[0].spec):
        assert (shape == "not run").all(axis=None)
        return
    assert shape["drafts"].tolist() == ["4", *["3"] * 8]
    assert shape["acceptance length"].tolist()[-1] == "2.50 ± 0.00 (n=2)"
    assert shape["FLOPs a token, times those without"].tolist()[-1] == "1.80 ± 0.28 (n=2)"  # 4 and 5 over 2.5
    assert shape["speed-up"].tolist()[1] == "2.25 ± 0.00 (n=2)"


def test_the_figure_has_a_line_a_method(evidence):
    table = evidence.table("decoding")
    drawn = resolve(table.drawing.figures[0].draw)(evidence, table)
    left, right = drawn.axes[-2:]
    labels = {line: line.get_label().split(" (n=")[0] for line in left.get_lines()}
    lines = {label: line for line, label in labels.items() if not label.startswith("_")}
    if not evidence.runs.of(evidence.cells(table)[0].spec):
        assert not lines and "not run" in [text.get_text() for text in left.texts]
        return
    looked_up = lines.pop("next_token, drafts looked up in the text")
    assert looked_up.get_linestyle() == "--" and looked_up.get_color() == "#777777"
    assert "#777777" not in {line.get_color() for line in lines.values()} and len(lines) == 8
    assert lines["mutor"].get_xydata().tolist() == [[1, 1.5], [2, 2], [3, 2.5]]
    ideal = [line.get_ydata().tolist() for line in right.get_lines() if line.get_marker() == "."]
    by_hand = [(1.5 / 2 + 1.5 / 3) / 2, (2 / 3 + 2 / 4) / 2, (2.5 / 4 + 2.5 / 5) / 2]
    assert len(ideal) == 9 and ideal[-1] == pytest.approx(by_hand)


@pytest.mark.parametrize(
    ("dtype", "off", "refused"),
    [
        (torch.float32, 2e-3, False),
        (torch.float32, 2e-2, True),
        (torch.bfloat16, 2e-2, False),
        (torch.bfloat16, 2e-1, True),
    ],
)
def test_logits_with_a_cache_may_be_off_by_rounding(tiny, dtype, off, refused):
    """So far by a share of the largest, more in bfloat16."""
    model = tiny().to(dtype)
    forward = model.forward

    def shifted(**given):
        out = forward(**given)
        if given.get("use_cache"):
            out.logits = out.logits + off * out.logits.abs().max()
        return out

    model.forward = shifted
    if refused:
        with pytest.raises(ValueError, match=r"place of its own \(its logits differ from those of one plain pass\)$"):
            generate(model, None, [[3, 4]], new_tokens=2)
    else:
        assert generate(model, None, [[3, 4]], new_tokens=2).ids[0].shape == (2,)


def test_why_a_cache_can_not_be_used_is_told(tiny):
    model = tiny()

    def broken(**given):
        raise RuntimeError("out of place")

    model.forward = broken
    with pytest.raises(ValueError, match=r"place of its own \(RuntimeError: out of place\)$"):
        generate(model, None, [[3, 4]], new_tokens=2)
