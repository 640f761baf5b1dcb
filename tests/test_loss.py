"""The output layer in parts equals the output layer at once; a batch in parts or packed equals the batch at once."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from mutor.checks import from_mapping
from mutor.mtp.layout import Example, collate
from mutor.mtp.loss import LossTargets, head_loss, one_at_a_time
from mutor.mtp.method import Context
from mutor.registry import METHODS, load

SETTINGS = {
    "next_token": {}, "teacherless": {}, "mutor": {"d_max": 3, "a": 0.4}, "parallel_mtp": {"d_max": 3, "a": 0.4},
    "sequential_mtp": {"d_max": 3, "a": 0.4}, "token_order": {}, "ranking": {}, "next_latent": {"horizon": 2},
    "joint_mtp": {"horizon": 2},
}  # fmt: skip


def made(name, per_sequence=False, **settings):
    kind = load(METHODS, name, "method")
    return kind(from_mapping(kind.Config, SETTINGS[name] | settings, name), per_sequence=per_sequence)


def test_goal_by_hand():
    """Two rows, the first of two documents; what each target counts for, per token and per sequence."""
    target = torch.tensor([[-100, 5, 6, -100, 7], [8, -100, -100, -100, -100]])
    segment = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, -1]])
    targets = LossTargets.of(target, segment)
    assert targets.index.tolist() == [1, 2, 4, 5] and targets.target.tolist() == [5, 6, 7, 8]
    assert targets.share.tolist() == [1, 1, 1, 1] and targets.count == 4
    targets = LossTargets.of(target, segment, per_sequence=True)
    assert targets.share.tolist() == [0.5, 0.5, 1, 1] and targets.count == 3


def test_loss_by_hand(tools):
    """Sequences of one and two tokens; nothing at all is zero with a gradient."""
    hidden = torch.tensor([[[0.0, 1.0], [2.0, 0.0], [0.5, 0.5]]], requires_grad=True)
    each = nn.functional.cross_entropy(hidden[0], torch.tensor([1, 1, 0]), reduction="none")
    target, segment = torch.tensor([[1, 1, 0]]), torch.tensor([[0, 1, 1]])

    def loss(target, per_sequence=False):
        return head_loss(lambda x: x, hidden, LossTargets.of(target, segment, per_sequence), 2)

    tools.close(loss(target), each.mean())
    tools.close(loss(target, True), (each[0] + (each[1] + each[2]) / 2) / 2)
    nothing = loss(torch.full((1, 3), -100))
    assert nothing.detach() == 0 and nothing.requires_grad


@pytest.mark.parametrize("per_sequence", [False, True])
def test_parts_equal_the_whole_and_are_small(tools, per_sequence):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 37, 8, generator=g, requires_grad=True)
    weight = nn.Parameter(torch.randn(50, 8, generator=g))
    targets = LossTargets.of(torch.randint(50, (1, 37), generator=g), torch.arange(37)[None] // 5, per_sequence)
    sizes = []

    def head(x):
        sizes.append(x.shape[0] * 50)
        return x @ weight.T

    found = []
    for max_logits in (10**6, 50 * 7, 1):
        loss = head_loss(head, hidden, targets, 50, max_logits=max_logits)
        found.append((loss.detach(), *torch.autograd.grad(loss, (hidden, weight))))
    for other in found[1:]:
        for ours, theirs in zip(other, found[0], strict=True):
            tools.close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert sizes[0] == 37 * 50 and max(sizes[1:]) == 50 * 7 and sizes.count(50) >= 37


def test_memory_of_a_part_on_a_cpu():
    """At most 2^25 logits at once where nothing else is said: two rows of a vocabulary of 2^24."""
    sizes, hidden = [], torch.zeros(1, 5, 3)
    targets = LossTargets.of(torch.zeros(1, 5, dtype=torch.long), torch.zeros(1, 5, dtype=torch.long))
    for vocabulary in (2**24, 2**25, 2**26):
        head_loss(lambda x: (sizes.append(len(x)), x)[1], hidden, targets, vocabulary)
    assert sizes == [2, 2, 1] + [1] * 5 + [1] * 5


def test_means_inside_sequences_of_several_rows_and_documents():
    """Document 1 of the first row is not document 1 of the second."""
    target = torch.tensor([[5, -100, 6, 7], [8, 9, 5, -100]])
    segment = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    targets = LossTargets.of(target, segment, per_sequence=True)
    assert targets.share.tolist() == pytest.approx([1, 0.5, 0.5, 1 / 3, 1 / 3, 1 / 3]) and targets.count == 3


@pytest.mark.parametrize(
    ("row_tokens", "rows", "width"),
    [
        (None, [[5, 6, 7], [10, 11], [14]], 3),
        (1, [[5, 6, 7], [10, 11], [14]], 3),  # at least the longest's
        (6, [[5, 6, 7], [10, 11, 14]], 3),
        (9, [[5, 6, 7, 10, 11, 14]], 6),
    ],
)
def test_a_prepared_batch_by_hand(tiny, row_tokens, rows, width):
    """Packed as asked, the last token of each sequence left out: it predicts nothing."""
    method = made("next_token")
    method.attach(tiny())
    examples = [Example(np.array(some), 1, 0) for some in ([5, 6, 7, 8], [10, 11, 12], [14, 15])]
    layout, targets = method.prepare_batch(examples, Context(), row_tokens)
    assert [row[there].tolist() for row, there in zip(layout.ids, layout.segment >= 0, strict=True)] == rows
    assert layout.ids.shape[1] == width and targets["next_token"].count == 6
    assert sorted(targets["next_token"].target.tolist()) == [6, 7, 8, 11, 12, 15]


def test_packing_leaves_room_for_registers(tiny):
    """Two sequences of 3 + 2 tokens fill a row of ten, and one of nine holds one; plain ones both fit into six."""
    examples = [Example(np.array([5, 6, 7]), 1, n) for n in range(2)]
    for name, row_tokens, rows in (("mutor", 10, 1), ("mutor", 9, 2), ("next_token", 6, 1), ("next_token", 5, 2)):
        method = made(name)
        method.attach(tiny())
        assert len(method.prepare_batch(examples, Context(), row_tokens)[0].ids) == rows


@pytest.mark.parametrize(
    ("family", "own", "matrices", "query"),
    [
        ("gpt2", {}, 32 * 96 + 32 * 32 + 2 * 32 * 128, 32),  # does not say how wide its heads are
        ("llama", {"head_dim": 16}, 2 * 32 * 64 + 2 * 32 * 32 + 3 * 32 * 48, 64),  # wider than the model, together
    ],
)
def test_flops_of_two_families_by_hand(tiny, family, own, matrices, query):
    """Two layers; four tokens of one row and three of another."""
    method = made("next_token")
    method.attach(tiny(family, **own))
    layout = method.train_layout(collate([Example(np.arange(3, 7), 1), Example(np.arange(3, 6), 1)], 0), Context())
    flops, targets, pairs = method.step_flops(layout, method.loss_targets(layout)), 3 + 2, 10 + 6
    assert flops == 6 * 2 * matrices * 7 + 6 * 61 * 32 * targets + 12 * query * 2 * pairs and isinstance(flops, int)


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "teacherless"])
@pytest.mark.parametrize("per_sequence", [False, True])
def test_methods_lose_nothing(name, per_sequence, tiny, batch, tools, monkeypatch):
    """Losses and gradients of whole methods with ten logits' worth of memory."""
    method = made(name, per_sequence)
    model = tools.attach(method, tiny("gemma2"))
    layout = method.train_layout(batch.rows, Context(seed=1))
    whole, _ = method.compute_loss(model, layout)
    expected = tools.gradients(model, whole)
    monkeypatch.setattr("mutor.mtp.loss.head_loss", partial(head_loss, max_logits=10))
    parts, _ = method.compute_loss(model, layout)
    tools.close(parts, whole)
    tools.same_gradients(tools.gradients(model, parts), expected)


@pytest.mark.parametrize("name", list(SETTINGS))
@pytest.mark.parametrize("per_sequence", [False, True])
@pytest.mark.parametrize("row_length", [None, 40])
def test_a_batch_in_parts_equals_the_batch(name, per_sequence, row_length, tiny, tools):
    """Losses and gradients of unequal parts, each divided by the whole batch's counts, add up; one part has no
    targets for the furthest heads. Without the counts they do not."""
    rng = np.random.default_rng(3)
    shapes = [(19, 4), (5, 2), (9, 1), (8, 5), (6, 4), (3, 2)]
    examples = [Example(rng.integers(3, 60, n), p, 5 * c) for c, (n, p) in enumerate(shapes)]
    method = made(name, per_sequence)
    model = tools.attach(method, tiny("llama"))

    def laid(some, row_length=None):
        layout = method.train_layout(
            collate(some, 0, row_length, method.tokens), Context(seed=2, prefix_lm=True)
        ).compact()
        return layout, method.loss_targets(layout)

    whole, parts = method.compute_loss(model, *laid(examples))
    expected = tools.gradients(model, whole)
    split = [laid(some, row_length) for some in (examples[:1], examples[1:5], examples[5:])]
    counts = {key: sum(int(loss_targets[key].count) for _, loss_targets in split) for key in split[0][1]}
    total, sums, naive = 0, dict.fromkeys(parts, 0), 0
    for layout, loss_targets in split:
        shared = {key: replace(targets, count=torch.tensor(counts[key])) for key, targets in loss_targets.items()}
        loss, of_part = method.compute_loss(model, layout, shared)
        total, sums = total + loss, {key: sums[key] + of_part[key] for key in sums}
        naive += method.compute_loss(model, layout)[0].detach() / len(split)
    tools.close(total, whole)
    for key, value in parts.items():
        tools.close(sums[key], value)
    tools.same_gradients(tools.gradients(model, total), expected)
    assert abs(naive - whole.detach()) > 1e-3


@pytest.mark.parametrize("name", list(SETTINGS))
def test_packed_rows_hold_little_padding_and_change_nothing(name, tiny, tools):
    """Sequences of GSM8K's spread of lengths: the same loss as one a row, under 5% padding instead of about half."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(22), 0.45, 48).astype(int), 8, 60)
    examples = [Example(rng.integers(3, 60, n), max(1, int(0.45 * n)), c) for c, n in enumerate(lengths)]
    method = made(name)
    model = tools.attach(method, tiny("llama"))
    found = []
    for row_length in (None, 400):
        layout = method.train_layout(collate(examples, 0, row_length, method.tokens), Context(seed=2)).compact()
        padding = float((layout.segment < 0).float().mean())
        loss, _ = method.compute_loss(model, layout)
        found.append((padding, loss.detach(), tools.gradients(model, loss)))
    (loose, plain, expected), (tight, packed, gradients) = found
    assert loose > 0.3 and tight < 0.05
    tools.close(packed, plain)
    tools.same_gradients(gradients, expected)


def test_one_at_a_time_equals_the_plain_mean(tools):
    """Values and gradients, of the hidden state and of all parameters, with some of them unused by some losses."""
    torch.manual_seed(0)
    weights = [torch.randn(6, 6, requires_grad=True) for _ in range(3)]
    shared, start = torch.randn(6, requires_grad=True), torch.randn(2, 5, 6, requires_grad=True)
    losses = [lambda h, w=w: (torch.tanh(h @ w) * shared).pow(2).mean() for w in weights]
    results = []
    for plain in (True, False):
        hidden = torch.tanh(start)
        if plain:
            mean = torch.stack([loss(hidden) for loss in losses]).mean()
        else:
            mean, values = one_at_a_time(losses, hidden, [*weights, shared])
            tools.close(values, torch.stack([loss(hidden) for loss in losses]).detach())
        results.append((mean.detach(), *torch.autograd.grad(3 * mean + hidden.sum(), [start, shared, *weights])))
    for ours, theirs in zip(*results, strict=True):
        tools.close(ours, theirs, atol=1e-6)
    frozen, _ = one_at_a_time(losses, torch.tanh(start).detach(), [*weights, shared])
    for ours, theirs in zip(torch.autograd.grad(3 * frozen, [shared, *weights]), results[0][2:], strict=True):
        tools.close(ours, theirs, atol=1e-6)
    with torch.no_grad():
        tools.close(one_at_a_time(losses, torch.tanh(start), [*weights, shared])[0], results[0][0])


def test_sharded_parameters_take_the_plain_mean(tools):
    """Those of FSDP have a mesh, and may not be named to autograd; values are given without their graph."""
    weight, hidden = torch.ones(3, requires_grad=True), torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True)
    seen = []
    losses = [lambda h: (seen.append(h is hidden), (h * weight).sum())[1], lambda h: (h * weight).pow(2).sum()]
    for sharded in (False, True):
        if sharded:
            weight.device_mesh = "as FSDP's"
        mean, values = one_at_a_time(losses, hidden, [weight])
        assert mean.item() == 10 and values.tolist() == [6, 14] and not values.requires_grad
        assert seen.pop() == sharded and not seen
        found = torch.autograd.grad(mean, [weight, hidden])
        assert found[0].tolist() == [1.5, 5, 10.5] and found[1].tolist() == [[1.5, 2.5, 3.5]]


def test_losses_without_gradients_are_only_computed():
    """Nothing is differentiated under no_grad, nor where nothing is trained; what no loss reads gets no gradient."""
    weight, idle, hidden = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True), torch.ones(1, 3)
    enabled = []
    losses = [lambda h: (enabled.append(torch.is_grad_enabled() and h.requires_grad), (h * weight).sum())[1]]
    with torch.no_grad():
        assert one_at_a_time(losses, hidden, [weight])[0] == 3
    assert one_at_a_time(losses, hidden, [weight.detach()])[0] == 3
    mean, _ = one_at_a_time(losses, hidden, [weight, idle])
    mean.backward()
    assert enabled == [False, False, True] and weight.grad.tolist() == [1, 1, 1] and idle.grad is None
