"""Rivals of MuToR against literal cases and plain loops, one sequence at a time, that share no code with them."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from mutor.baselines import token_order
from mutor.baselines.joint_mtp import JointMTP, JointMTPConfig
from mutor.baselines.ranking import Ranking, RankingConfig, other_tokens, pairwise_hinge
from mutor.baselines.token_order import TokenOrder, TokenOrderConfig, coming_tokens, listwise
from test_faults import Killed, kill
from test_run import ROOT, smoke_spec, timeless
from torch.nn.functional import cross_entropy, layer_norm, rms_norm
from transformers import AutoModelForCausalLM

from mutor.checks import from_mapping
from mutor.mtp.layout import IGNORE, Example, collate, regular
from mutor.mtp.method import Context
from mutor.registry import METHODS, load
from mutor.results import records
from mutor.training.run import RunEnvironment, run
from mutor.training.trainer import MethodTrainer

NONE = IGNORE
RIVALS = {"token_order": {}, "ranking": {}, "next_latent": {"horizon": 3}, "joint_mtp": {"horizon": 3}}


def made(name, **settings):
    kind = load(METHODS, name, "method")
    return kind(from_mapping(kind.Config, RIVALS[name] | settings, name))


def one_row(*sequences):
    """A layout of sequences (prompt, answer), packed into one row, as training feeds them."""
    examples = [Example(np.array([*prompt, *answer]), len(prompt), n) for n, (prompt, answer) in enumerate(sequences)]
    return regular(collate(examples, 0, sum(len(e.ids) for e in examples) + 2)).compact()


def answers(span):
    """[(t, the next token there)] of a sequence's answer."""
    return [(t, span.ids[t + 1]) for t in range(span.prefix - 1, len(span.ids) - 1)]


def normed_states(tools, model, span):
    """[T, d]: the stock model's states behind its final norm, one sequence alone."""
    mask = tools.prefix_mask(len(span.ids), span.prefix, False)
    return tools.parts_of(model)[1](tools.trunk_hidden(model, span.ids, mask))[0]


def agree(tools, model, total, parts, theirs, expected):
    """Loss, parts and gradients are those of the loops."""
    for name, value in expected.items():
        tools.close(parts[name], value.detach())
    tools.close(total, theirs)
    ours = tools.gradients(model, total)
    tools.same_gradients(ours, tools.gradients(model, theirs))
    return ours


# token order


def test_order_of_the_coming_tokens_by_hand():
    """Answers A B A C and B A, behind prompts that hold them too: nothing crosses into the other answer."""
    layout = one_row(([9, 5, 6], [5, 6, 5, 7]), ([5], [6, 5]))
    assert coming_tokens(layout, 0).tolist() == [
        [5, 6, NONE, 7],
        [6, 5, 7, NONE],
        [5, 7, NONE, NONE],
        [7, NONE, NONE, NONE],
        [6, 5, NONE, NONE],
        [5, NONE, NONE, NONE],
    ]
    assert coming_tokens(layout, 2).tolist() == [[5, 6], [6, 5], [5, 7], [7, NONE], [6, 5], [5, NONE]]


def test_listwise_loss_by_hand(tools):
    """Weights proportional to 1, 1/e and 1/e^3 for a, b and c at distances 0, 1 and 3; window 1 is a cross entropy."""
    logits = torch.randn(1, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ahead = coming_tokens(one_row(([8], [2, 4, 2, 7])), 4)[:1]
    wanted = torch.zeros(9, dtype=torch.float64)
    wanted[[2, 4, 7]] = torch.tensor([1, np.exp(-1), np.exp(-3)])
    theirs = -(wanted / wanted.sum() * logits[0].log_softmax(-1)).sum()
    tools.close(listwise(logits, ahead)[0], theirs)
    tools.close(listwise(logits, ahead[:, :1]), cross_entropy(logits, torch.tensor([2]), reduction="none"))


def test_what_is_too_far_to_weigh_anything_is_left_out():
    """Beyond 104 tokens nothing changes, by a bit, of values and gradients; one less does."""
    ahead = torch.arange(130)[None]
    logits = (torch.linspace(0, 40, 130) * 1e30)[None].requires_grad_()

    def weights(width):
        return torch.autograd.grad(listwise(logits * 1e-30, ahead[:, :width]).sum(), logits)[0]

    assert torch.equal(weights(token_order.WEIGHTLESS), weights(130))
    distances = -torch.arange(130.0)
    assert distances.softmax(-1)[token_order.WEIGHTLESS] == 0 < distances.softmax(-1)[token_order.WEIGHTLESS - 2]


@pytest.mark.parametrize("window", [0, 1, 3])
def test_token_order_is_a_plain_loop(tiny, tools, batch, window):
    model, method = tiny("llama"), TokenOrder(TokenOrderConfig(window=window, weight=0.7))
    tools.attach(method, model)
    total, parts = method.compute_loss(model, method.train_layout(batch.rows, Context()))
    plain, order = [], []
    for span in batch.spans:
        normed = normed_states(tools, model, span)
        for t, token in answers(span):
            plain.append(cross_entropy(model.lm_head(normed[t]), torch.tensor(token)))
            rest, weights = span.ids[t + 1 :][: window or None], torch.zeros(tools.vocabulary)
            for distance, later in reversed(list(enumerate(rest))):
                weights[later] = np.exp(-distance)  # the nearest stays
            order.append(-(weights / weights.sum() * (model.mtp["order"].weight @ normed[t]).log_softmax(-1)).sum())
    expected = {"next_token": torch.stack(plain).mean(), "order": torch.stack(order).mean()}
    agree(tools, model, total, parts, expected["next_token"] + 0.7 * expected["order"], expected)


# ranking


def test_ranked_tokens_by_hand():
    """The prompt's tokens that stand nowhere in its own answer, each once, whatever other sequences hold."""
    layout = one_row(([9, 5, 9, 3, 6], [5, 7]), ([7, 6, 7], [6]), ([4, 3], [3, 4]))
    assert other_tokens(layout).tolist() == [[3, 6, 9], [3, 6, 9], [7, NONE, NONE], [NONE] * 3, [NONE] * 3]
    assert other_tokens(one_row(([4], [4, 4]))).shape == (2, 0)


def test_hinge_by_hand():
    """2 over 4 over 1, and each over 0; 3 is no one's business. Margins of 1: 2 over 4 lacks .5, 4 over 0 lacks 2."""
    logits = torch.tensor([[2.0, 0.0, 1.5, 99.0, 1.0]])
    ahead, others = torch.tensor([[2, 4, NONE, 1]]), torch.tensor([[0, NONE]])
    pairs = {"2>4": 0.5, "2>1": 0, "4>1": 0, "2>0": 1.5, "4>0": 2, "1>0": 3}
    assert pairwise_hinge(logits, ahead, others).tolist() == [sum(pairs.values())]
    assert pairwise_hinge(logits, ahead[:, :1], others[:, 1:]).tolist() == [0]
    assert pairwise_hinge(logits, ahead, others[:, :0]).tolist() == [0.5]


@pytest.mark.parametrize("settings", [{}, {"others": False}, {"window": 2, "weight": 3.0}])
def test_ranking_is_a_plain_loop(tiny, tools, batch, settings):
    model, method = tiny("gemma2"), Ranking(RankingConfig(**settings))
    tools.attach(method, model)
    total, parts = method.compute_loss(model, method.train_layout(batch.rows, Context()))
    assert method.added_parameters(model) == 0
    plain, ranking = [], []
    for span in batch.spans:
        logits = tools.plain_logits(model, span.ids, span.prefix, False)
        others = {*span.ids[: span.prefix]} - {*span.ids[span.prefix :]} if settings.get("others", True) else set()
        for t, token in answers(span):
            plain.append(cross_entropy(logits[t], torch.tensor(token)))
            ahead = span.ids[t + 1 :]
            ahead = [v for i, v in enumerate(ahead[: settings.get("window")]) if v not in ahead[:i]]
            pairs = [(a, b) for i, a in enumerate(ahead) for b in (*ahead[i + 1 :], *others)]
            ranking.append(
                sum((max(logits[t, a] * 0, 1 - logits[t, a] + logits[t, b]) for a, b in pairs), 0 * logits[t, 0])
            )
    expected = {"next_token": torch.stack(plain).mean(), "ranking": torch.stack(ranking).mean()}
    theirs = expected["next_token"] + settings.get("weight", 1.0) * expected["ranking"]
    agree(tools, model, total, parts, theirs, expected)


# joint


def test_joint_heads_are_plain_loops(tiny, tools, batch):
    """From each token, answer tokens alone; entry i of a head's attention sees 0 .. i."""
    model, method = tiny("gpt2"), JointMTP(JointMTPConfig(horizon=3, weight=0.7))
    tools.attach(method, model)
    total, parts = method.compute_loss(model, method.train_layout(batch.rows, Context()))
    part, embedding = model.mtp["planner"], model.get_input_embeddings().weight
    gamma, bias = model.mtp["bare"]["gamma"], model.mtp["bare"]["bias"]
    assert gamma.shape == (1,) and bias.shape == (4, 3, 4)
    plain, losses = [], [[], [], []]
    for span in batch.spans:
        states = normed_states(tools, model, span)
        plain += [cross_entropy(model.lm_head(states[t]), torch.tensor(token)) for t, token in answers(span)]
        for t in range(len(span.ids)):
            for i in (1, 2, 3):
                if not span.prefix <= t + 1 + i < len(span.ids):
                    continue
                entries = torch.stack([embedding[span.ids[t + k]] + gamma * states[t] for k in range(i + 1)])
                entries = layer_norm(entries, (32,), part["combine"].weight, part["combine"].bias)
                out = []
                for head in range(4):
                    some = slice(8 * head, 8 * head + 8)
                    query, key, value = (entries @ part[name].weight[some].T for name in ("query", "key", "value"))
                    seen = (key @ query[i] / 8**0.5 + bias[head, i - 1, : i + 1]).softmax(-1)
                    out.append(seen @ value)
                state = part["output"].weight @ torch.cat(out) + states[t]
                logits = model.lm_head(rms_norm(state, (32,), part["norm"].weight, 1e-5))
                losses[i - 1].append(cross_entropy(logits, torch.tensor(span.ids[t + 1 + i])))
    means = [torch.stack(some).mean() for some in losses]
    expected = {"next_token": torch.stack(plain).mean(), **{f"head_{k}": mean for k, mean in enumerate(means, 2)}}
    ours = agree(tools, model, total, parts, expected["next_token"] + 0.7 * torch.stack(means).mean(), expected)
    assert all(float(gradient.abs().max()) > 0 for name, gradient in ours.items() if "mtp" in name)
    later = torch.ones(3, 4).triu(2).bool()
    assert not ours["mtp.bare.bias"][:, later].any()


def test_muon_takes_the_matrices_of_rivals_alone(tiny):
    """Not biases by pair and head, gamma, norms, nor the second output layer."""
    taken = set()
    for name in RIVALS:
        model, method = tiny("llama"), made(name)
        method.attach(model)
        (matrices, *_) = method.usual_groups(model.parameters())
        names = {id(p): n for n, p in model.named_parameters()}
        taken |= {names[id(p)] for p in matrices.parameters if names[id(p)].startswith("mtp.")}
    linear = {f"mtp.planner.{part}.weight" for part in ("query", "key", "value", "output")}
    assert taken == linear | {f"mtp.dynamics.{layer}.weight" for layer in (1, 3, 5)}


# all of them


def test_flops_of_what_rivals_add(tiny):
    """By hand, for a prompt of 3 tokens and an answer of 4 (6 tokens are fed), width 32, 61 tokens of vocabulary."""
    layout, head, more = one_row(([3, 4, 5], [6, 7, 8, 9])), 61 * 32, {}
    for name in ("next_token", *RIVALS):
        kind, model = load(METHODS, name, "method"), tiny("llama")
        method = kind(kind.Config(**RIVALS.get(name, {})))
        method.attach(model)
        more[name] = method.step_flops(layout, method.loss_targets(layout))
    base = more.pop("next_token")
    more = {name: flops - base for name, flops in more.items()}
    assert more["ranking"] == 0 and more["token_order"] == 6 * head * 4
    # states 1 .. 5, 2 .. 5 and 3 .. 5 from those before; an answer token is predicted from states 2 .. 5, whose own
    # logits are computed without gradients, and the logits of predictions without gradients of the output layer
    moves, scored = 5 + 4 + 3, 4 + 4 + 3
    assert more["next_latent"] == 6 * moves * (64 * 128 + 128**2 + 128 * 32) + 4 * head * scored + 2 * head * 4
    # tokens 0 .. 4 predict: head_2 from 1 .. 4, head_3 from 0 .. 3, head_4 from 0 .. 2
    planned, scored = 5, 4 + 4 + 3
    matrices = 32**2 * (3 + 4 + 4 + 3) * planned
    assert more["joint_mtp"] == 6 * matrices + 6 * head * scored + 12 * 32 * (2 + 3 + 4) * planned


@pytest.mark.parametrize("name", RIVALS)
def test_a_batch_without_targets_is_no_loss(tiny, tools, name):
    """Zero, finite, and part of the graph; a horizon beyond the answer adds nothing but what the prompt gives."""
    model, method = tiny("llama"), made(name)
    tools.attach(method, model)
    layout = one_row(([5, 6, 7], [8, 9]))
    nothing = replace(layout, target=torch.full_like(layout.target, IGNORE))
    total, parts = method.compute_loss(model, nothing)
    assert all(float(value) == 0 for key, value in parts.items() if key != "latent") and total.requires_grad
    assert all(torch.isfinite(gradient).all() for gradient in tools.gradients(model, total).values())
    short = method.compute_loss(model, one_row(([5], [6])))[0]
    assert torch.isfinite(short) and all(torch.isfinite(g).all() for g in tools.gradients(model, short).values())


@pytest.mark.parametrize("name", RIVALS)
def test_rivals_read_no_token_that_they_predict(tiny, tools, name):
    """All that is fed is compact: without the last token. With it, the same loss; other ids there change nothing."""
    model, method = tiny("llama"), made(name)
    tools.attach(method, model)
    rows = collate([Example(np.array([5, 6, 7, 8, 9, 4]), 3), Example(np.array([9, 3, 5]), 1)], 0)
    whole = method.train_layout(rows, Context(prefix_lm=True))
    wanted = method.compute_loss(model, whole.compact())[0]
    tools.close(method.compute_loss(model, whole)[0], wanted)
    ids = whole.ids.clone()
    ids[0, 5], ids[1, 2:] = 44, 33
    tools.close(method.compute_loss(model, replace(whole, ids=ids))[0], wanted)


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("token_order", {"window": -1}, r"window: -1 is out of range, allowed: \[0"),
        ("token_order", {"weight": 0}, r"weight: 0\.0 is out of range, allowed: \(0"),
        ("ranking", {"window": 1, "others": False}, "window: 1 token without others has nothing to be ranked over"),
        ("ranking", {"others": 1}, "others: 1 is not bool"),
        ("next_latent", {"horizon": 0}, "horizon: 0 is out of range"),
        ("next_latent", {"lambda_h": 0, "lambda_kl": 0}, "lambda_h, lambda_kl: both are 0, which is next_token"),
        ("next_latent", {"lambda_kl": -1}, r"lambda_kl: -1\.0 is out of range"),
        ("next_latent", {"proj_factor": 0}, r"proj_factor: 0\.0 is out of range"),
        ("joint_mtp", {"horizon": 0}, "horizon: 0 is out of range"),
        ("joint_mtp", {"weight": -1}, r"weight: -1\.0 is out of range"),
        ("joint_mtp", {"d_max": 4}, "unknown key 'd_max'"),
    ],
)
def test_settings_of_rivals_are_refused_by_name(name, settings, says):
    with pytest.raises(ValueError, match=f"{name}: {says}"):
        made(name, **settings)


@pytest.mark.parametrize("name", RIVALS)
def test_rivals_train_and_resume_bit_by_bit(tmp_path, monkeypatch, name):
    """The loss falls; a run killed at step 6 of 8 goes on to the same record, model and own weights."""
    spec = smoke_spec(name, steps=8, warmup=0, save_every=2, eval_every=8, log_every=2, learning_rate=0.01)
    spec = replace(spec, base=None)
    whole, killed = (records.seed_folder(tmp_path / runs, spec, 7) for runs in ("whole", "killed"))
    run(spec, (7,), RunEnvironment(root=ROOT, runs=tmp_path / "whole"))
    with monkeypatch.context() as patch:
        kill(patch, MethodTrainer, "_save_checkpoint", lambda self, *_: self.state.global_step == 6)
        with pytest.raises(Killed):
            run(spec, (7,), RunEnvironment(root=ROOT, runs=tmp_path / "killed"))
    run(spec, (7,), RunEnvironment(root=ROOT, runs=tmp_path / "killed"))
    ours, theirs = (timeless(json.loads((folder / "metrics.json").read_text())) for folder in (killed, whole))
    assert ours == theirs and ours["steps"] == 8
    losses = [entry["loss"] for entry in ours["curve"] if "next_token" in entry]
    assert len(losses) == 4 and losses[-1] < 0.97 * losses[0]
    files = ["last/model.safetensors", *(["last/method/weights.safetensors"] if name != "ranking" else [])]
    assert all((killed / file).read_bytes() == (whole / file).read_bytes() for file in files)
    plain, info = AutoModelForCausalLM.from_pretrained(killed / "last", output_loading_info=True)
    assert not any(info.values())
    method = load(METHODS, name, "method")(spec.method_config)
    method.load_own(plain, killed / "last/method")
    assert ours["added_parameters"] == method.added_parameters(plain)


@pytest.mark.parametrize("name", RIVALS)
def test_rivals_in_bfloat16(tiny, tools, name):
    """Weights, or products alone, in bfloat16: about the same loss, itself in float32, and all gradients there."""
    model, method = tiny("llama", scale=2.0), made(name)
    tools.attach(method, model)
    layout = one_row(([5, 6, 7], [8, 9, 4]), ([9, 3], [5, 5]))
    wanted = method.compute_loss(model, layout)[0].item()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = method.compute_loss(model, layout)[0]
    mixed.backward()
    model.zero_grad()
    half = method.compute_loss(model.bfloat16(), layout)[0]
    half.backward()
    assert mixed.dtype == half.dtype == torch.float32
    assert [mixed.item(), half.item()] == pytest.approx([wanted] * 2, rel=0.05)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
