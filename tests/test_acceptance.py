"""How many drafts the model itself would have written, against what it does write, token by token."""

import numpy as np
import pytest
import torch
from mutor.baselines.joint_mtp import JointMTP, JointMTPConfig
from mutor.baselines.marginal import Marginal, MarginalConfig
from mutor.baselines.next_latent import NextLatent, NextLatentConfig
from mutor.baselines.next_token import NextToken, NextTokenConfig
from mutor.baselines.parallel_mtp import ParallelMTP, ParallelMTPConfig
from mutor.baselines.sequential_mtp import SequentialMTP, SequentialMTPConfig

from mutor.mtp import ahead
from mutor.mtp.layout import Example, collate
from mutor.mtp.method import Context
from mutor.mtp.mutor import MuToR


def said(distance, index, tokens, vocabulary=9):
    """Predictions whose likeliest tokens are these."""
    logits = torch.nn.functional.one_hot(torch.tensor(tokens), vocabulary).float()
    return ahead.Ahead(distance, torch.tensor(index), logits)


@pytest.mark.parametrize("turned", [False, True])
def test_acceptance_by_hand(turned):
    """Answers 3 4 5 6 7 and 3 5; the model's own next tokens are the data's but for 8 after 5 and for 4 in the second.

    t           0  1  2  3  4  5      0  1  2
    tokens      1  3  4  5  6  7      1  3  5
    own         3  4  5  8  7  .      3  4  .
    x_(t+2)     4  5  8  7  .  .      4  .  .
      known     y  y  y  .  .         y           at 3 the model would not go on with 6
    x_(t+3)     5  8  .  .
      known     y  y  .                           at 2 it would be what follows 8
    x_(t+4)     8
      known     y  .
    """
    rows = collate([Example(np.array([1, 3, 4, 5, 6, 7]), 1), Example(np.array([1, 3, 5]), 1)], 0)
    layout = NextToken(NextTokenConfig()).eval_layout(rows, Context())
    parts = [
        said(1, [0, 1, 2, 3, 4, 6, 7], [3, 4, 5, 8, 7, 3, 4]),
        said(2, [3, 1, 0], [7, 5, 4]),  # not known at 3; right at 1 and 0
        said(2, [2, 6], [6, 5]),  # the data's tokens, not the model's
        said(3, [0, 1, 2], [5, 6, 8]),  # right; the data's; not known
        said(4, [1, 0], [7, 8]),  # not known; right
    ]
    tally = ahead.Tally()
    for found in [parts[0], *reversed(parts[1:])] if turned else parts:
        tally.add(found, layout)
    metrics = tally.metrics()
    assert {name: value for name, value in metrics.items() if name.startswith(("accepted", "conditional"))} == {
        "accepted_ahead_2": 50,  # at 0 and 1, of 0, 1, 2 and the second sequence's 0
        "conditional_ahead_2": 50,
        "accepted_ahead_3": 50,
        "conditional_ahead_3": 50,
        "accepted_ahead_4": 100,
        "conditional_ahead_4": 100,
    }


def test_drafts_before_decide():
    """The second draft is right twice, once behind a wrong first one; none of a k that is not asked for in between."""
    rows = collate([Example(np.array([1, 3, 4, 5, 6]), 1)], 0)
    layout = NextToken(NextTokenConfig()).eval_layout(rows, Context())
    tally = ahead.Tally()
    for found in (said(1, [0, 1, 2, 3], [3, 4, 5, 6]), said(2, [0, 1, 2], [4, 8, 6]), said(3, [0, 1], [5, 6])):
        tally.add(found, layout)
    metrics = tally.metrics()
    assert metrics["accepted_ahead_2"] == pytest.approx(200 / 3)
    assert (metrics["accepted_ahead_3"], metrics["conditional_ahead_3"]) == (50, 100)
    tally = ahead.Tally()
    for found in (said(1, [0, 1, 2, 3], [3, 4, 5, 6]), said(3, [0, 1], [5, 6])):
        tally.add(found, layout)
    assert not [name for name in tally.metrics() if name.startswith(("accepted", "conditional"))]


def drafted(method, model, examples):
    """(sequence, t, k) -> the likeliest x_(t+k)."""
    layout = method.eval_layout(collate([Example(ids, prefix) for ids, prefix in examples], 0), Context())
    return {
        (*divmod(where, layout.ids.shape[1]), found.distance): int(logits.argmax())
        for found in method.ahead(model, layout)
        for where, logits in zip(found.index.tolist(), found.logits, strict=True)
    }


@pytest.mark.parametrize(
    ("cls", "config"),
    [
        (ParallelMTP, ParallelMTPConfig(d_max=4)),
        (SequentialMTP, SequentialMTPConfig(d_max=4)),
        (MuToR, MuToR.Config(d_max=4, register_embedding="per_offset")),
        (NextLatent, NextLatentConfig(horizon=3)),
        (JointMTP, JointMTPConfig(horizon=3)),
        (Marginal, MarginalConfig(candidates=2, horizon=3)),
    ],
)
def test_acceptance_is_what_the_model_goes_on_with(tiny, tools, cls, config):
    """Behind the tokens up to t the model really goes on, greedily, on sequences that it mostly wrote itself."""
    model, method, rng = tiny("llama", seed=2, vocab_size=6, eos_token_id=None), cls(config), np.random.default_rng(3)
    tools.attach(method, model)
    examples = [(rng.integers(0, 6, 3), 3 - n % 2) for n in range(9)]
    with torch.no_grad():
        for number, (ids, prefix) in enumerate(examples):
            for _ in range(9):
                own = tools.plain_logits(model, ids.tolist(), prefix, False)[-1].argmax()
                ids = np.append(ids, int(own) if rng.random() < 0.85 else rng.integers(0, 6))
            examples[number] = (ids, prefix)
        drafts = drafted(method, model, examples)
        metrics = method.metrics(model, examples, Context(), 4)
        furthest, asked = max(k for _, _, k in drafts), {}
        for n, (ids, prefix) in enumerate(examples):
            for t in range(prefix - 1, len(ids) - 1):
                known = ids[: t + 1].tolist()
                for k in range(1, min(furthest, len(ids) - 1 - t) + 1):
                    known.append(int(tools.plain_logits(model, known, prefix, False)[-1].argmax()))
                    right = [drafts[n, t, j] == known[t + j] for j in range(2, k + 1)]
                    if k > 1 and known[:-1] == ids[: t + k].tolist():
                        asked.setdefault(k, []).append(right)
    for k in range(2, furthest + 1):
        assert metrics[f"accepted_ahead_{k}"] == pytest.approx(100 * np.mean([all(r) for r in asked[k]]))
        after = [r[-1] for r in asked[k] if all(r[:-1])]
        if after:
            assert metrics[f"conditional_ahead_{k}"] == pytest.approx(100 * np.mean(after))
        else:
            assert f"conditional_ahead_{k}" not in metrics
    assert 0 < metrics["accepted_ahead_3"] < metrics["accepted_ahead_2"] < 100 and len(asked[furthest]) > 20
