"""Schedules and optimisers against literal numbers."""

import pytest
import torch
from torch import nn

from mutor.checks import from_mapping
from mutor.config.recipe import Recipe
from mutor.mtp.method import ParameterGroup
from mutor.registry import METHODS, load
from mutor.training.optim import Muon, optimizer, schedule

MATRICES = [
    f"model.layers.{n}.{part}_proj.weight"
    for n in (0, 1)
    for part in (
        "self_attn.q",
        "self_attn.k",
        "self_attn.v",
        "self_attn.o",
        "mlp.gate",
        "mlp.up",
        "mlp.down",
    )
]
NORMS = [f"model.layers.{n}.{part}_layernorm.weight" for n in (0, 1) for part in ("input", "post_attention")]
TABLES = ["model.embed_tokens.weight", "lm_head.weight"]


@pytest.mark.parametrize(
    ("changes", "rates"),
    [
        ({"warmup": 2, "final_rate": 0.0}, [0, 0.5, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ({"warmup": 0.2, "hold": 0.5, "final_rate": 0.2}, [0, 0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4]),
        ({"decay": "cosine", "warmup": 8}, [0, 1 / 8, 2 / 8, 3 / 8, 4 / 8, 5 / 8, 6 / 8, 7 / 8, 1, 0.5]),
        ({"decay": "none"}, [1] * 10),
        ({"decay": "none", "warmup": 5}, [0, 0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1, 1]),
    ],
)
def test_rates_of_a_schedule(changes, rates):
    model = nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2.0)
    scheduler = schedule(optimizer, Recipe(steps=10, batch_size=1, learning_rate=2.0, **changes))
    got = []
    for _ in range(10):
        got.append(optimizer.param_groups[0]["lr"] / 2)
        optimizer.step()
        scheduler.step()
    assert got == pytest.approx(rates)


def groups_of(model, name, kind, **settings):
    """[(names, rate, weight decay)] of a method's optimiser, in its order."""
    cls = load(METHODS, name, "method")
    method = cls(from_mapping(cls.Config, settings, name))
    method.attach(model)
    recipe = Recipe(steps=1, batch_size=1, learning_rate=3e-3, muon_rate=0.02, weight_decay=0.1, optimizer=kind)
    made = optimizer(model, method, recipe)
    names = {id(p): name for name, p in model.named_parameters()}
    found = [([names[id(p)] for p in g["params"]], g["lr"], g["weight_decay"]) for g in made.param_groups]
    assert all(g["betas"] == recipe.betas for g in made.param_groups if "betas" in g)
    return found


def test_groups_of_a_method_that_says_nothing(tiny):
    """Matrices and tables with weight decay, norms without; registers are a table."""
    adamw = groups_of(tiny("llama"), "mutor", "adamw")
    assert adamw == [
        ([*MATRICES, *TABLES, "mtp.registers.weight"], 3e-3, 0.1),
        ([*NORMS, "model.norm.weight"], 3e-3, 0.0),
    ]
    muon = groups_of(tiny("llama"), "mutor", "muon")
    assert muon == [
        (MATRICES, 0.02, 0.1),
        ([*TABLES, "mtp.registers.weight"], 3e-3, 0.1),
        ([*NORMS, "model.norm.weight"], 3e-3, 0.0),
    ]


def test_muon_takes_the_matrices_of_added_layers(tiny):
    (matrices, _, _), (tables, _, _), (vectors, _, _) = groups_of(tiny("llama"), "sequential_mtp", "muon")
    assert matrices[:14] == MATRICES and len(matrices) == 22 and "mtp.depths.0.projection.weight" in matrices
    assert tables == TABLES and "mtp.depths.0.token_norm.weight" in vectors


def test_muon_without_anything_for_adamw(tiny):
    """Adapters are matrices, and all else is frozen."""
    model = tiny("llama")
    ((names, rate, _),) = groups_of(model, "lora_next_token", "muon", rank=4)
    assert set(names) == {name for name, _ in model.named_parameters() if ".lora_" in name} and rate == 0.02


def test_muon_orthogonalises_in_the_precision_of_the_weights():
    """Its step, momentum at rest, is the published iteration of five steps; with torch's own, rounded to bfloat16."""
    steps = {}
    for kind in (Muon, torch.optim.Muon):
        weights = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((48, 16), (16, 48), (24, 24))]
        for number, p in enumerate(weights):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(number))
        kind(weights, lr=1.0, weight_decay=0.0, momentum=0.0, adjust_lr_fn="match_rms_adamw").step()
        steps[kind] = [-p.detach() / (0.2 * max(p.shape) ** 0.5) for p in weights]
        gradients = [p.grad for p in weights]
    for gradient, ours, theirs in zip(gradients, *steps.values(), strict=True):
        wanted = gradient.double() / gradient.double().norm()
        for _ in range(5):
            square = wanted @ wanted.T
            wanted = 3.4445 * wanted + (-4.7750 * square + 2.0315 * square @ square) @ wanted
        assert (ours - wanted).abs().max() < 1e-5 < 1e-3 < (theirs - wanted).abs().max() < 5e-2


def test_an_output_layer_with_biases_is_trained(tiny):
    """Its bias is in one group, without weight decay."""
    (decayed, _, _), (vectors, _, decay) = groups_of(tiny("phi"), "next_token", "adamw")
    assert "lm_head.weight" in decayed and "lm_head.bias" in vectors and decay == 0.0


def test_the_usual_groups_have_the_rate_that_is_asked_for(tiny):
    method = load(METHODS, "mutor", "method").of()
    model = method.attach(tiny("phi"))
    groups = [g for g in method.usual_groups(model.parameters(), 0.3) if g.parameters]
    assert [(g.rate, bool(g.decay), g.muon) for g in groups] == [
        (0.3, True, True),
        (0.3, True, False),
        (0.3, False, False),
    ]
    for rate in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="is out of range, allowed: "):
            ParameterGroup((), rate)
    assert ParameterGroup((), 1e-9).decay and not ParameterGroup(()).muon


@pytest.mark.parametrize("family", ["llama", "phi", "gpt2"])
@pytest.mark.parametrize(("kind", "name"), [("adamw", "mutor"), ("adamw", "sequential_mtp"), ("muon", "mutor")])
def test_a_step_without_gradients_shrinks_what_decays_and_nothing_else(tiny, family, kind, name):
    """By 1 - rate x decay: matrices, embeddings, output layers, registers; norms and biases stay bit for bit."""
    model = tiny(family)
    cls = load(METHODS, name, "method")
    method = cls(cls.Config())
    method.attach(model)
    recipe = Recipe(steps=1, batch_size=1, learning_rate=0.1, muon_rate=0.1, weight_decay=0.5, optimizer=kind)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer(model, method, recipe).step()
    stay = [name for name in before if name.endswith(".bias") or "norm" in name or ".ln_" in name]
    assert len(stay) > 4 and all(before[name].ndim == 1 for name in stay)
    for name, parameter in model.named_parameters():
        if name in stay:
            assert torch.equal(parameter, before[name]), name
        else:
            torch.testing.assert_close(parameter.detach(), 0.95 * before[name], msg=name)
