"""The model under heads and registers: frozen, adapted, slower, or waiting at first; and what its loss counts for."""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_faults import Killed, kill
from transformers import AutoModelForCausalLM

from mutor.checks import from_mapping
from mutor.config.load import load_scale
from mutor.config.recipe import Recipe
from mutor.config.runs import make_spec
from mutor.models.build import build
from mutor.mtp.layout import Example, collate
from mutor.mtp.method import Context
from mutor.mtp.settings import AheadSettings, Progress, TrunkSettings
from mutor.registry import METHODS, load
from mutor.results import records
from mutor.training.optim import optimizer
from mutor.training.run import RunEnvironment, run
from mutor.training.trainer import MethodTrainer

ROOT = Path(__file__).parent.parent
THREE = pytest.mark.parametrize("name", ["parallel_mtp", "sequential_mtp", "mutor"])


def made(name, **settings):
    """A method by name."""
    cls = load(METHODS, name, "method")
    return cls(from_mapping(cls.Config, settings, name))


def finished(name, folder, *, recipe=None, **settings):
    """The folder of a whole run on star graphs from a new model, its record, and the model before it."""
    spec = make_spec(load_scale(ROOT, "smoke"), "g2x3", "gpt2-2x32", name, settings)
    changed = {"weight_decay": 0.1, "optimizer": "adamw", "learning_rate": 0.01, **(recipe or {})}
    spec = replace(spec, base=None, recipe=replace(spec.recipe, **changed))
    run(spec, (1,), RunEnvironment(root=ROOT, runs=folder))
    found = records.seed_folder(folder, spec, 1)
    return found, records.read(found / "metrics.json"), spec


def weights(folder):
    """Of a saved plain model."""
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def at_the_start(spec, vocabulary):
    """Weights of the model that a run begins with."""
    return build(spec.model_config, vocabulary=vocabulary, seed=1).state_dict()


def unchanged(before, after):
    """Names of the weights that are as they were, bit for bit."""
    assert before.keys() == after.keys()
    return {name for name in before if torch.equal(before[name], after[name])}


@THREE
def test_a_frozen_trunk_does_not_change_by_a_bit(name, tmp_path):
    """Over a whole run with weight decay, while the auxiliary loss falls."""
    folder, record, spec = finished(name, tmp_path, d_max=3, trunk="frozen")
    after = weights(folder / "last")
    before = at_the_start(spec, len(after["transformer.wte.weight"]))
    assert unchanged(before, after) == set(before)
    assert record["trainable_parameters"] == record["added_parameters"] > 0
    part = {"mutor": "register", "parallel_mtp": "head_2", "sequential_mtp": "depth_1"}[name]
    losses = [entry[part] for entry in record["curve"] if part in entry]
    assert losses[-1] < losses[0]


def test_the_trunk_waits_and_a_killed_run_goes_on_alike(tmp_path, monkeypatch):
    """Killed in the warm-up and behind it, with a batch in two parts: bit for bit as one that was not."""
    recipe = {"steps": 12, "log_every": 3, "save_every": 3, "eval_every": 3, "keep_steps": (3, 6), "accumulate": 2}
    name, settings = "mutor", {"d_max": 3, "warm_up": 5, "a_schedule": "linear", "d_max_schedule": "reverse"}
    whole, _, spec = finished(name, tmp_path / "whole", recipe=recipe, **settings)
    kept = {step: weights(whole / f"step{step}") for step in (3, 6)}
    before = at_the_start(spec, len(kept[3]["transformer.wte.weight"]))
    assert unchanged(before, kept[3]) == set(before)
    assert not [n for n in unchanged(before, kept[6]) if before[n].ndim == 2]
    added = len(load_file(whole / "last/method/weights.safetensors"))
    for step in (6, 12):
        with monkeypatch.context() as patch:
            kill(patch, MethodTrainer, "_save_checkpoint", lambda self, *_, step=step: self.state.global_step == step)
            with pytest.raises(Killed):
                finished(name, tmp_path / "killed", recipe=recipe, **settings)
        left = records.seed_folder(tmp_path / "killed", spec, 1) / f"checkpoints/checkpoint-{step - 3}"
        steps = [int(state["step"]) for state in torch.load(left / "optimizer.pt")["state"].values()]
        assert Counter(steps) == ({3: added} if step == 6 else {9: added, 4: len(before)})
    killed, record, _ = finished(name, tmp_path / "killed", recipe=recipe, **settings)
    assert record["resumed"]
    for file in ("last/model.safetensors", "last/method/weights.safetensors"):
        assert (killed / file).read_bytes() == (whole / file).read_bytes(), file


def test_a_share_of_all_steps_is_warm_up_too():
    assert [TrunkSettings(warm_up=w).warm_up_steps(200) for w in (0.0, 0.1, 0.5, 1.0, 7.0)] == [0, 20, 100, 1, 7]
    for warm_up in (10.0, 0.99):
        method = made("mutor", warm_up=warm_up)
        with pytest.raises(ValueError, match=rf"warm_up: {warm_up:g} leaves none of 10 steps to train the trunk"):
            method.trunk = type("Trunk", (), {"added": None})()
            method.parameter_groups(Recipe(steps=10, batch_size=1, learning_rate=1.0))


@THREE
@pytest.mark.parametrize("trunk", ["trained", "lora"])
def test_the_trunk_has_a_rate_of_its_own(tiny, name, trunk):
    """Its weights or adapters; what is added keeps the recipe's."""
    model, method = tiny("llama"), made(name, trunk=trunk, trunk_rate=0.1)
    method.attach(model)
    recipe = Recipe(steps=1, batch_size=1, learning_rate=3e-3, muon_rate=0.02, optimizer="muon")
    names = {id(p): n for n, p in model.named_parameters()}
    for kind, matrices in (("adamw", 3e-3), ("muon", 0.02)):
        made_ = optimizer(model, method, replace(recipe, optimizer=kind))
        rate = {names[id(p)]: g["lr"] for g in made_.param_groups for p in g["params"]}
        assert rate.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
        for n, value in rate.items():
            table = "embed" in n or "lm_head" in n or "registers" in n or "norm" in n
            assert value == pytest.approx((3e-3 if table else matrices) * (1 if n.startswith("mtp.") else 0.1)), n
        assert {n.startswith("mtp.") for n in rate} == {True, False}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ["parallel_mtp", "sequential_mtp"])
def test_adapters_under_heads(tiny, batch, tmp_path, name, architecture):
    """They and the heads are trained, nothing else; the exported model is the trained one, without both."""
    model = tiny(architecture)
    method = made(name, trunk="lora", rank=4, d_max=3)
    method.attach(model)
    method.compute_loss(model, method.train_layout(batch.rows, Context()))[0].backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained == {n for n, p in model.named_parameters() if p.requires_grad}
    assert {".lora_" in n or n.startswith("mtp.") for n in trained} == {True}
    assert not any(".lora_" in n and n.startswith("mtp.") for n in trained)
    assert method.added_parameters(model) == sum(p.numel() for p in model.parameters() if p.grad is not None)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if ".lora_" in n:
                p.normal_(0, 0.1)
    state = {n: value + 0 for n, value in model.state_dict().items()}
    for number, given in enumerate((None, state)):
        method.export(model, tmp_path / str(number), given)
        plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / str(number), output_loading_info=True)
        assert not any(info.values())
        torch.testing.assert_close(plain(batch.rows.ids).logits, model(batch.rows.ids).logits, rtol=1e-3, atol=1e-3)
    method.save_own(model, tmp_path / "own")
    again = made(name, trunk="lora", rank=4, d_max=3).load_own(plain, tmp_path / "own")
    assert all(torch.equal(value, model.mtp.state_dict()[n]) for n, value in again.mtp.state_dict().items())
    assert not any(".lora_" in n for n, _ in again.named_parameters())


def test_adapters_twice_are_refused(tiny):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="trunk: 'lora' puts adapters into a model, and this one has some"):
        made("mutor", trunk="lora").attach(model)


def test_schedules_of_the_weight():
    """Literal values of four steps; quarter_sine is CAFT's s(t) = sin((T - t) / T x pi / 2)."""
    steps = [Progress(step, 4) for step in range(4)]
    found = {kind: [AheadSettings(a=0.5, a_schedule=kind).weight(p) for p in steps] for kind in
             ("constant", "linear", "quarter_sine")}  # fmt: skip
    assert found["constant"] == [0.5] * 4 and found["linear"] == [0.5, 0.375, 0.25, 0.125]
    assert found["quarter_sine"] == pytest.approx([0.5, 0.4619397663, 0.3535533906, 0.1913417162])
    assert AheadSettings(a_schedule="quarter_sine", a=0.3).weight(Progress()) == 0.3


@THREE
def test_the_loss_follows_the_schedule(tiny, tools, batch, name):
    """(1 - a s) L_1 + a s L_aux, from the losses that are logged."""
    model, method = tiny("llama"), made(name, d_max=3, a=0.4, a_schedule="quarter_sine")
    tools.attach(method, model)
    layout = method.train_layout(batch.rows, Context())
    for step in (0, 3, 9):
        method.progress = Progress(step, 10)
        total, parts = method.compute_loss(model, layout)
        a, plain = 0.4 * math.cos(step / 10 * math.pi / 2), float(parts.pop("next_token"))
        assert float(total.detach()) == pytest.approx((1 - a) * plain + a * float(sum(parts.values())) / len(parts))


def test_flops_of_a_frozen_trunk_by_hand(tiny, tools):
    """Forward alone where no gradient passes; with registers, back through their rows; adapters spare weights."""
    rows = collate([Example(np.arange(3, 8), 2)], 0)  # five tokens; four pairs of next tokens is not all: three targets
    layer, head, causal = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48, 61 * 32, 5 * 6 // 2

    def flops(name, **settings):
        method = made(name, **settings)
        method.attach(tiny("llama"))
        layout = method.train_layout(rows, Context())
        return method.step_flops(layout, method.loss_targets(layout))

    heads = flops("parallel_mtp", trunk="frozen")
    assert heads == (
        2 * 2 * layer * 5 + 6 * layer * 5 + 2 * head * 3 + 4 * head * 2 + 4 * 32 * 2 * causal + 12 * 32 * causal
    )
    registers, pairs = 3, 2 + 3 + 4 + 3  # behind tokens 2, 3, 4: what these see, and themselves
    one = flops("mutor", d_max=1, trunk="frozen")
    assert one == 4 * 2 * layer * (5 + registers) + 2 * head * 3 + 4 * head * 3 + 12 * 32 * 2 * (causal + pairs)
    adapters = 2 * 4 * (4 * 32 + 2 * (32 + 16) + 3 * (32 + 48))
    lora = flops("mutor", d_max=1, trunk="lora", rank=4)
    assert lora == (4 * 2 * layer + 6 * adapters) * 8 + 4 * head * 6 + 12 * 32 * 2 * (causal + pairs)


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("mutor", {"trunk": "frozen", "warm_up": 3}, r"warm_up: 3\.0 means nothing with trunk 'frozen'; leave it out"),
        ("mutor", {"trunk": "frozen", "trunk_rate": 0.1}, r"trunk_rate: 0\.1 means nothing with trunk 'frozen'"),
        ("parallel_mtp", {"trunk": "frozen", "a_schedule": "linear"}, "a_schedule: linear means nothing with trunk 'f"),
        ("sequential_mtp", {"rank": 4}, "rank: 4 means nothing with trunk 'trained'"),
        ("mutor", {"trunk": "frozen", "lora_alpha": 4}, "lora_alpha: 4 means nothing with trunk 'frozen'"),
        ("mutor", {"trunk": "thawed"}, "trunk: 'thawed' is not allowed; allowed: trained, frozen, lora"),
        ("mutor", {"trunk_rate": 0}, r"trunk_rate: 0\.0 is out of range, allowed: \(0, inf\)"),
        ("mutor", {"warm_up": -1}, "warm_up: -1.0 is out of range"),
        ("parallel_mtp", {"a_schedule": "sine"}, "a_schedule: 'sine' is not allowed; allowed: constant, linear, qu"),
        ("lora_mutor", {"trunk": "trained"}, "trunk: 'trained' is not allowed; allowed: lora"),
    ],
)
def test_what_means_nothing_is_refused(name, settings, says):
    with pytest.raises(ValueError, match=says):
        made(name, **settings)
