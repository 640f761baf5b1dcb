"""The output layer in parts equals the output layer at once."""

from functools import partial

import pytest
import torch
from torch import nn

from mutor.checks import from_mapping
from mutor.loss import head_loss
from mutor.method import Context
from mutor.registry import METHODS, load


@pytest.mark.parametrize("grouped", [False, True])
def test_parts_equal_the_whole_and_are_small(tools, grouped):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 8, generator=g, requires_grad=True)
    weight = nn.Parameter(torch.randn(50, 8, generator=g))
    target = torch.randint(50, (37,), generator=g)
    group = torch.arange(37) // 5 if grouped else None
    sizes = []

    def head(x):
        sizes.append(x.shape[0] * 50)
        return x @ weight.T

    found = []
    for most in (10**6, 50 * 7, 1):
        loss = head_loss(head, hidden, target, 50, group, most=most)
        found.append((loss.detach(), *torch.autograd.grad(loss, (hidden, weight))))
    for other in found[1:]:
        for ours, theirs in zip(other, found[0], strict=True):
            tools.close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert sizes[0] == 37 * 50 and max(sizes[1:]) == 50 * 7 and sizes.count(50) >= 37


@pytest.mark.parametrize("name", ["next_token", "mutor", "parallel_mtp", "sequential_mtp"])
@pytest.mark.parametrize("per_sequence", [False, True])
def test_methods_lose_nothing(name, per_sequence, tiny, batch, tools, monkeypatch):
    """Losses and gradients of whole methods with ten logits' worth of memory."""
    kind = load(METHODS, name, "method")
    settings = {} if name == "next_token" else {"d_max": 3, "a": 0.4}
    method = kind(from_mapping(kind.Config, settings, name), per_sequence=per_sequence)
    model = tools.attach(method, tiny("gemma2"))
    layout = method.layout(batch.rows, Context(seed=1))
    whole, _ = method.losses(model, layout)
    expected = tools.gradients(model, whole)
    monkeypatch.setattr("mutor.loss.head_loss", partial(head_loss, most=10))
    parts, _ = method.losses(model, layout)
    tools.close(parts, whole)
    tools.same_gradients(tools.gradients(model, parts), expected)
