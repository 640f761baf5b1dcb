"""Next latent prediction against plain loops, one sequence at a time, that share no code with it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from mutor.baselines.next_latent import NextLatent, NextLatentConfig
from test_rivals import agree, answers, normed_states, one_row
from torch import nn
from torch.nn.functional import cross_entropy, rms_norm, smooth_l1_loss

from mutor.mtp.layout import Example, collate
from mutor.mtp.method import Context


def dynamics(model, token, state):
    """The network f as the paper has it, of one state."""
    weights = [p for p in model.mtp["dynamics"].parameters() if p.ndim == 2]
    x = rms_norm(torch.cat([token, state]), (64,), model.mtp["dynamics"][0].weight, 1e-5)
    for weight in weights[:-1]:
        x = nn.functional.gelu(weight @ x)
    return state + weights[-1] @ x


@pytest.mark.parametrize("lambda_kl", [0.0, 0.6])
def test_next_latent_is_a_plain_loop(tiny, tools, batch, lambda_kl):
    """Rolled out from each token with the true ones; states of all but the last tokens, predictions of answers."""
    model, method = tiny("llama"), NextLatent(NextLatentConfig(horizon=3, lambda_h=0.4, lambda_kl=lambda_kl))
    tools.attach(method, model)
    total, parts = method.compute_loss(model, method.train_layout(batch.rows, Context()))
    head, embedding = model.lm_head.weight.detach(), model.get_input_embeddings().weight
    plain, latent, kl = [], [[], [], []], [[], [], []]
    for span in batch.spans:
        states = normed_states(tools, model, span)
        plain += [cross_entropy(model.lm_head(states[t]), torch.tensor(token)) for t, token in answers(span)]
        for t in range(len(span.ids)):
            state = states[t]
            for i in range(min(3, len(span.ids) - 2 - t)):
                state, true = dynamics(model, embedding[span.ids[t + i + 1]], state), states[t + i + 1].detach()
                latent[i].append(smooth_l1_loss(state, true))
                if t + i + 1 >= span.prefix - 1:
                    log_q, log_p = (head @ true).log_softmax(-1), (head @ state).log_softmax(-1)
                    kl[i].append((log_q.exp() * (log_q - log_p)).sum())
    expected = {"next_token": torch.stack(plain).mean()}
    expected |= {"latent": torch.stack([torch.stack(some).mean() for some in latent]).mean()}
    theirs = expected["next_token"] + 0.4 * expected["latent"]
    if lambda_kl:
        expected["kl"] = torch.stack([torch.stack(some).mean() for some in kl]).mean()
        theirs = theirs + lambda_kl * expected["kl"]
    assert parts.keys() == expected.keys()
    agree(tools, model, total, parts, theirs, expected)


def test_next_latent_without_a_network_predicts_no_change(tiny, tools, batch):
    """f = 0: a state for all that follow. And a perfect one: no loss at all."""
    model, method = tiny("llama"), NextLatent(NextLatentConfig(horizon=2))
    tools.attach(method, model)
    with torch.no_grad():
        method.dynamics[-1].weight.zero_()
        states = [normed_states(tools, model, span) for span in batch.spans]
        layout = method.train_layout(batch.rows, Context())
        found = method.compute_loss(model, layout)[1]["latent"]
        apart = [
            torch.stack([smooth_l1_loss(some[t], some[t + i]) for some in states for t in range(len(some) - 1 - i)])
            for i in (1, 2)
        ]
        tools.close(found, torch.stack([each.mean() for each in apart]).mean())
        same = method.train_layout(collate([Example(np.full(9, 5), 3)], 0), Context())
        parts = method.compute_loss(model, replace(same, position=same.position * 0))[1]
        assert float(parts["latent"]) < 1e-8 and float(parts["kl"]) < 1e-5  # without positions all states are equal


def test_next_latent_gives_no_gradient_to_targets_and_output_layer(tiny, tools):
    """L_kl leaves the output layer alone, which is trained by the next token as before, and stays frozen if it is."""
    model, method = tiny("llama"), NextLatent(NextLatentConfig(horizon=2, lambda_h=1e-9, lambda_kl=1e3))
    tools.attach(method, model)
    layout = one_row(([5, 6, 7], [8, 9, 4]), ([9, 3], [5, 5]))
    plain = method.cross_entropy(method.trunk(model, layout).normed, method.loss_targets(layout)["next_token"])
    alone = tools.gradients(model, plain)
    total, parts = method.compute_loss(model, layout)
    both = tools.gradients(model, total)
    assert float(parts["kl"]) > 0.1 and all(p.requires_grad for p in model.parameters())
    tools.close(both["lm_head.weight"], alone["lm_head.weight"])
    assert float((both["model.embed_tokens.weight"] - alone["model.embed_tokens.weight"]).abs().max()) > 1
    for name in ("mtp.dynamics.1.weight", "model.layers.0.mlp.up_proj.weight"):
        assert float(both[name].abs().max()) > 1
    model.lm_head.requires_grad_(False)
    method.compute_loss(model, layout)
    assert not model.lm_head.weight.requires_grad  # what was frozen stays so


def test_parameters_of_next_latent(tiny):
    """590,592 at width 384 (arXiv 2511.05963: H = 384), and as many as its formula says elsewhere."""
    for width, share, inner in ((384, 0.5, 384), (384, 1.0, 768), (32, 0.5, 128), (64, 3.0, 384)):
        model = tiny("llama", hidden_size=width, scale=1.0)
        method = NextLatent(NextLatentConfig(proj_factor=share))
        method.attach(model)
        assert method.added_parameters(model) == 2 * width * inner + inner**2 + inner * width + 2 * width
        if (width, share) == (384, 0.5):
            assert method.added_parameters(model) == 590_592
