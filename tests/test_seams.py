"""Seams of the library: what a user adds is one class in one file and one line in the registry.

Two methods are written here as a user would write them: one with a ranking loss and an output layer of its own (token
order prediction), and a frozen trunk whose added parts learn at two rates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from mutor.checks import setting
from mutor.config.load import load_scale
from mutor.config.recipe import Recipe
from mutor.config.runs import make_spec
from mutor.models.build import build
from mutor.mtp.backbone import Backbone
from mutor.mtp.layout import IGNORE, Example, collate, regular, targets_ahead
from mutor.mtp.loss import LossTargets, head_loss
from mutor.mtp.method import Method, ParameterGroup
from mutor.mtp.settings import AuxiliarySettings
from mutor.registry import METHODS, load, register
from mutor.results import records
from mutor.training.optim import optimizer, schedule
from mutor.training.run import RunEnvironment, run

ROOT = Path(__file__).parent.parent
RECIPE = Recipe(steps=6, batch_size=4, learning_rate=2e-3, decay="none")


@dataclass(frozen=True)
class RankingConfig(AuxiliarySettings):
    """Settings of the ranking method."""

    window: int = setting(4, doc="tokens ahead that are ranked", low=1)


class Ranking(Method):
    """A second output layer ranks the next tokens by how soon they come (arXiv 2508.19228)."""

    Config = RankingConfig

    def add_parameters(self):
        self.head = self.trunk.new_linear(self.trunk.width, self.trunk.vocabulary, output=True)
        self.trunk.add(nn.ModuleDict({"head": self.head}))

    def loss_targets(self, layout):
        found = super().loss_targets(layout)
        where = found["next_token"].index
        ahead = [targets_ahead(layout, k).flatten()[where] for k in range(1, self.config.window + 1)]
        return found | {"order": replace(found["next_token"], target=torch.stack(ahead, dim=-1))}

    def compute_loss(self, model, layout, loss_targets=None):
        loss_targets = loss_targets or self.loss_targets(layout)
        normed = self.trunk(model, layout).normed
        plain = self.cross_entropy(normed, loss_targets["next_token"])
        order = head_loss(self.head, normed, loss_targets["order"], self.trunk.vocabulary, listwise)
        a = self.config.a
        return (1 - a) * plain + a * order, {"next_token": plain.detach(), "order": order.detach()}


def listwise(logits, ahead):
    """[n]: cross entropy between softmax of scores, window - distance of a token's first place, and of logits."""
    window = ahead.shape[1]
    scores = torch.full_like(logits, float("-inf"))
    for k in reversed(range(window)):
        here = ahead[:, k] != IGNORE
        scores[here] = scores[here].scatter(1, ahead[here, k, None], float(window - k))
    return -(scores.softmax(-1) * logits.log_softmax(-1)).sum(-1)


@dataclass(frozen=True)
class ProbeConfig:
    """Settings of the probe."""

    head_rate: float = setting(10.0, doc="multiple of the recipe's rate for the output layer", low=0, open_ends=True)


class Probe(Method):
    """What a finished model knows of the token after the next: one more layer and output layer on a frozen trunk."""

    Config = ProbeConfig

    def add_parameters(self):
        self.trunk.model.requires_grad_(False)
        self.layer = self.trunk.new_layer().requires_grad_(True)
        self.head = self.trunk.new_linear(self.trunk.width, self.trunk.vocabulary, output=True)
        self.trunk.add(nn.ModuleDict({"layer": self.layer, "head": self.head}))

    def parameter_groups(self, recipe):
        head = self.usual_groups(self.head.parameters(), rate=self.config.head_rate)
        return [*self.usual_groups(self.layer.parameters()), *head]

    def targets(self, layout):
        return {"after_next": targets_ahead(layout, 2)}

    def compute_loss(self, model, layout, loss_targets=None):
        loss_targets = loss_targets or self.loss_targets(layout)
        out = self.trunk(model, layout)
        hidden = self.trunk.norm(out.apply_layer(self.layer, out.hidden))
        loss = head_loss(self.head, hidden, loss_targets["after_next"], self.trunk.vocabulary)
        return loss, {"after_next": loss.detach()}


@pytest.fixture
def ranking():
    """The registry's one line."""
    register(METHODS, "my_ranking", f"{__name__}:Ranking")
    yield "my_ranking"
    del METHODS["my_ranking"]


@pytest.fixture
def probe():
    """The registry's one line."""
    register(METHODS, "probe", f"{__name__}:Probe")
    yield "probe"
    del METHODS["probe"]


def star_graphs(method, **model):
    """A setting of the smoke scale, from a new model."""
    spec = make_spec(load_scale(ROOT, "smoke"), "g2x3", "gpt2-2x32", method, {})
    return replace(spec, base=None, model_config=replace(spec.model_config, **model))


def attached(method, model, **settings):
    """A method of this file on a model."""
    made = method(method.Config(**settings))
    made.attach(model)
    return made


def batch():
    """A layout of three sequences."""
    rng = np.random.default_rng(0)
    shapes = [(12, 3), (9, 2), (7, 4)]
    return regular(collate([Example(rng.integers(3, 60, n), p, number) for number, (n, p) in enumerate(shapes)], 0))


def names_of(model, parameters):
    """The names of some parameters of a model."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)] for p in parameters}


# a ranking loss and an output layer of its own


def test_a_ranking_method_trains_and_exports_plainly(ranking, tmp_path):
    """A whole run by name, under Muon: both parts of the loss fall, and the saved model is a stock one."""
    spec = star_graphs(ranking)
    assert spec.recipe.optimizer == "muon"
    run(spec, (1,), RunEnvironment(root=ROOT, runs=tmp_path))
    folder = records.seed_folder(tmp_path, spec, 1)
    record = records.read(folder / "metrics.json")
    curve = [entry for entry in record["curve"] if "order" in entry]
    assert len(curve) == 4
    assert all(curve[-1][part] < 0.97 * curve[0][part] for part in ("loss", "next_token", "order"))
    plain, info = AutoModelForCausalLM.from_pretrained(folder / "last", output_loading_info=True)
    assert not any(info.values())
    assert record["added_parameters"] == plain.get_output_embeddings().weight.numel()


def test_an_added_output_layer_is_not_for_muon(tiny):
    """Nor are embeddings and registers; a vocabulary-wide layer is an output layer without being called one."""
    model = tiny("llama", tie_word_embeddings=False)
    method = attached(Ranking, model)
    found = optimizer(model, method, replace(RECIPE, optimizer="muon"))
    muon, adamw = (names_of(model, (p for g in part.param_groups for p in g["params"])) for part in found.parts)
    assert muon == {n for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n}
    assert {"mtp.head.weight", "lm_head.weight", "model.embed_tokens.weight"} < adamw
    assert muon | adamw == {n for n, _ in model.named_parameters()} and not muon & adamw


@pytest.mark.parametrize("output", [True, False])
@pytest.mark.parametrize("width", [5, 61])
def test_what_an_output_layer_is(tiny, output, width):
    """What new_linear is told, and any module as wide as the vocabulary, if it stands outside of decoder layers."""
    model = tiny("llama", intermediate_size=61)
    trunk = Backbone(model)
    trunk.add(nn.ModuleList([trunk.new_linear(32, width, output=output), trunk.new_layer()]))
    tables = names_of(model, trunk.tables())
    assert tables - {"mtp.0.weight"} == {"model.embed_tokens.weight", "lm_head.weight"}
    assert ("mtp.0.weight" in tables) == (output or width == 61)


def test_the_ranking_method_counts_its_own_output_layer(tiny):
    """Its targets pass an output layer as the next tokens do; the layer is no matrix that all tokens pass."""
    model = tiny("llama")
    plain, layout = attached(load(METHODS, "next_token", "method"), model), batch()
    targets = plain.loss_targets(layout)
    base = plain.step_flops(layout, targets)
    ranking = attached(Ranking, model)
    more = ranking.step_flops(layout, ranking.loss_targets(layout)) - base
    assert more == 6 * 61 * 32 * len(targets["next_token"].index)


def test_a_criterion_is_given(tools):
    """Any loss of logits and targets, here of several ids a target, in parts as at once, against a loop."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(1, 9, 8, generator=g, requires_grad=True), torch.randn(20, 8, generator=g)
    ahead = torch.randint(20, (5, 3), generator=g)
    ahead[3, 1:] = IGNORE
    targets = LossTargets(torch.tensor([0, 2, 3, 5, 8]), ahead, torch.tensor([1, 0.5, 0.5, 1, 1]), torch.tensor(4))
    losses = []
    for at, tokens in zip(targets.index.tolist(), ahead.tolist(), strict=True):
        soon = [token for token in tokens if token != IGNORE]
        wanted = torch.zeros(20)
        for token in soon:
            wanted[token] = torch.tensor(3.0 - soon.index(token)).exp()
        losses.append(-(wanted / wanted.sum() * (weight @ hidden[0, at]).log_softmax(-1)).sum())
    theirs = (torch.stack(losses) * targets.share).sum() / 4
    for most in (10**6, 40, 1):
        ours = head_loss(lambda x: x @ weight.T, hidden, targets, 20, listwise, max_logits=most)
        tools.close(ours, theirs)
        tools.close(*(torch.autograd.grad(loss, hidden, retain_graph=True)[0] for loss in (ours, theirs)))


# a frozen trunk and two rates


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_frozen_trunk_with_two_rates(probe, tmp_path, kind):
    """A whole run by name: its loss falls, and no weight of the trunk has changed by a bit."""
    spec = star_graphs(probe)
    spec = replace(spec, recipe=replace(spec.recipe, optimizer=kind, weight_decay=0.1))
    run(spec, (1,), RunEnvironment(root=ROOT, runs=tmp_path))
    folder = records.seed_folder(tmp_path, spec, 1)
    record = records.read(folder / "metrics.json")
    losses = [entry["after_next"] for entry in record["curve"] if "after_next" in entry]
    assert len(losses) == 4 and losses[-1] < 0.97 * losses[0]
    assert record["trainable_parameters"] == record["added_parameters"] > 0
    after = AutoModelForCausalLM.from_pretrained(folder / "last")
    before = build(spec.model_config, vocabulary=after.config.vocab_size, seed=1).state_dict()
    assert before.keys() == after.state_dict().keys()
    assert all(torch.equal(before[name], value) for name, value in after.state_dict().items())


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_rates_are_what_the_method_says(tiny, kind):
    """The output layer's is its multiple of AdamW's, matrices have Muon's or AdamW's; they stay so in a schedule."""
    model = tiny("llama")
    method = attached(Probe, model)
    recipe = replace(RECIPE, optimizer=kind, weight_decay=0.1, warmup=4)
    made = optimizer(model, method, recipe)
    rates = schedule(made, recipe)
    for factor in (0, 0.25, 0.5):
        groups = made.param_groups
        rate = {name: group["lr"] for group in groups for name in names_of(model, group["params"])}
        decay = {name: group["weight_decay"] for group in groups for name in names_of(model, group["params"])}
        assert rate.keys() == {n for n, _ in model.named_parameters() if n.startswith("mtp.")}
        assert rate.pop("mtp.head.weight") == pytest.approx(10 * factor * recipe.learning_rate)
        matrices = {name: rate.pop(name) for name in list(rate) if "norm" not in name}
        assert len(matrices) == 7 and len(rate) == 2
        wanted = recipe.muon_rate if kind == "muon" else recipe.learning_rate
        assert list(matrices.values()) == pytest.approx([factor * wanted] * 7)
        assert list(rate.values()) == pytest.approx([factor * recipe.learning_rate] * 2)
        assert all(value == (0.0 if "norm" in name else 0.1) for name, value in decay.items())
        made.step()
        rates.step()


@pytest.mark.parametrize(
    ("groups", "says"),
    [
        (lambda m: 2 * m.usual_groups(m.trunk.model.parameters()), "weight is trained and in 2 groups"),
        (lambda m: m.usual_groups(m.layer.parameters()), "head.weight is trained and in 0 groups"),
        (
            lambda m: [ParameterGroup(tuple(m.trunk.model.parameters()))],
            "embed_tokens.weight is frozen and in 1 groups",
        ),
        (
            lambda m: [*m.usual_groups(m.trunk.model.parameters()), ParameterGroup((nn.Parameter(torch.ones(2)),))],
            "not the model's",
        ),
        (lambda m: m.usual_groups(m.trunk.model.parameters(), rate=0.0), "rate: 0.0 is out of range"),
    ],
)
def test_wrong_groups_are_refused(tiny, groups, says):
    """A parameter in two groups, in none, of no model, or at no rate."""
    model = tiny("llama")
    method = attached(Probe, model)
    method.parameter_groups = lambda recipe: groups(method)
    with pytest.raises(ValueError, match=says):
        optimizer(model, method, RECIPE)


def test_nothing_to_train_is_refused(tiny):
    """By the optimiser's name where Muon has no matrix, and where all is frozen."""
    model = tiny("llama")
    method = attached(Probe, model)
    method.layer.requires_grad_(False)
    optimizer(model, method, RECIPE)
    with pytest.raises(ValueError, match=r"optimizer: 'muon'.*allowed: 'adamw'"):
        optimizer(model, method, replace(RECIPE, optimizer="muon"))
    method.head.requires_grad_(False)
    with pytest.raises(ValueError, match="all parameters of the model are frozen"):
        optimizer(model, method, RECIPE)


# what a method adds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_linear_is_initialised_like_the_models_own(tiny, dtype):
    """By the model's class, or by the function that the model itself was initialised with."""
    model = tiny("llama", initializer_range=0.3).to(dtype)
    made = Backbone(model).new_linear(200, 300, bias=True)
    assert made.weight.dtype == dtype and made.weight.shape == (300, 200) and not made.bias.any()
    assert float(made.weight.detach().float().std()) == pytest.approx(0.3, rel=0.05)
    own = Backbone(model, lambda module: nn.init.constant_(module.weight, 3.0)).new_linear(4, 5)
    assert own.bias is None and (own.weight == 3).all()


@pytest.mark.parametrize("family", ["llama", "gemma", "granite"])
@pytest.mark.parametrize("scaled", [True, False])
def test_extra_rows_are_fed_beyond_the_vocabulary(tiny, tools, family, scaled):
    """Id 61 + n is row n, also in the middle of a prompt and while it is answered; the vocabulary stays as it is."""
    model = tiny(family)
    ids = torch.tensor([[5, 6, 61, 7, 63, 62]])
    root = 32**0.5 if family == "gemma" else 1.0
    weight = model.get_input_embeddings().weight.detach()
    plain = model(ids.clamp(max=60)).logits
    trunk = Backbone(model)
    rows = trunk.extra_rows(3, "model", scaled=scaled)
    trunk.add(nn.ModuleDict({"rows": rows}))
    assert torch.equal(model(ids.clamp(max=60)).logits, plain)
    by = root if scaled else 1 / getattr(model.config, "embedding_multiplier", 1.0)
    fed = torch.stack([rows.weight[i - 61] * by if i > 60 else weight[i] * root for i in ids[0].tolist()])[None]
    ours, theirs = model(ids).logits, model(inputs_embeds=fed).logits
    tools.close(ours, theirs)
    wanted = torch.autograd.grad(theirs.square().mean(), rows.weight)[0]
    tools.close(torch.autograd.grad(ours.square().mean(), rows.weight)[0], wanted)
    assert (wanted.abs().sum(1) > 0).all()
    answer = model.generate(ids, max_new_tokens=1, do_sample=False, attention_mask=torch.ones_like(ids))
    assert answer[0, -1] == theirs[0, -1].argmax()
    with pytest.raises(ValueError, match="has 3 extra rows already"):
        trunk.extra_rows(1)


def test_extra_rows_start_as_asked(tiny):
    model = tiny("llama")
    mean = model.get_input_embeddings().weight.mean(0)
    assert torch.allclose(Backbone(model).extra_rows(2).weight, mean.expand(2, -1))
    std = float(model.get_input_embeddings().weight.detach().std())
    assert float(Backbone(model).extra_rows(40, "model").weight.detach().std()) == pytest.approx(std, rel=0.15)
    with pytest.raises(ValueError, match="init of extra rows: 'means' is unknown, did you mean 'mean'"):
        Backbone(model).extra_rows(2, "means")
