"""Scores under teacher forcing against plain loops over the stock model, and what they hold in memory."""

from functools import partial

import numpy as np
import pytest
import torch
from mutor.baselines.next_token import NextToken, NextTokenConfig
from mutor.baselines.teacherless import Teacherless, TeacherlessConfig

from mutor.mtp import teacher_forcing
from mutor.mtp.loss import head_loss
from mutor.mtp.method import Context
from mutor.mtp.teacher_forcing import teacher_forced_scores

DUMMY = 6
EXAMPLES = [
    (np.random.default_rng(length).integers(7, 61, length), prefix)
    for length, prefix in [(9, 4), (5, 1), (8, 6), (7, 3), (6, 2)]
]


def by_hand(tools, model, prefix_lm, dummies):
    """bool [N, 5] and the loss, one sequence at a time, with the stock model's own logits."""
    right, losses = np.zeros((len(EXAMPLES), 5), dtype=bool), []
    for line, (ids, prefix) in zip(right, EXAMPLES, strict=True):
        fed = ids.copy()
        if dummies:
            fed[prefix:] = DUMMY
        logits = tools.plain_logits(model, fed.tolist(), prefix, prefix_lm)[prefix - 1 : -1]
        target = torch.from_numpy(ids[prefix:])
        line[: len(target)] = (logits.argmax(-1) == target).numpy()
        losses.append(torch.nn.functional.cross_entropy(logits, target, reduction="none"))
    return right, float(torch.cat(losses).mean())


@pytest.mark.parametrize("prefix_lm", [False, True])
@pytest.mark.parametrize(
    "method", [NextToken(NextTokenConfig()), Teacherless(TeacherlessConfig())], ids=["", "dummies"]
)
@pytest.mark.parametrize("rows", [None, 2], ids=["whole", "parts"])
def test_scores_are_those_of_the_methods_own_inputs(tiny, tools, family, monkeypatch, method, prefix_lm, rows):
    """Prompts in both directions, dummies in the answer's place: not the scores of plain causal rows."""
    if rows:  # at most two rows of logits at a time
        monkeypatch.setattr(teacher_forcing, "head_loss", partial(head_loss, max_logits=rows * tools.vocabulary))
    model, context = tiny(family), Context(pad_id=DUMMY, prefix_lm=prefix_lm)
    with torch.no_grad():
        wanted, loss = by_hand(tools, model, prefix_lm, isinstance(method, Teacherless))
        _, other = by_hand(tools, model, False, False)
    found, ours = teacher_forced_scores(model, method, context, EXAMPLES, 2)
    assert (found == wanted).all() and ours == pytest.approx(loss, rel=1e-5)
    plain = not prefix_lm and isinstance(method, NextToken)
    assert plain or abs(loss - other) > 5e-4  # so that the wrong inputs would be noticed


def test_right_answers_are_found_where_they_stand(tiny, tools):
    """An answer of the model's own likeliest tokens is right everywhere, and only where tokens are."""
    model, made = tiny(), []
    for ids, prefix in EXAMPLES:
        line = ids[:prefix].tolist()
        while len(line) < len(ids):
            line.append(int(tools.plain_logits(model, line, prefix, True)[-1].argmax()))
        made.append((np.array(line), prefix))
    made[1][0][3] = (made[1][0][3] + 1) % 61  # the third answer token of one sequence, and what follows is another
    found, _ = teacher_forced_scores(model, NextToken(None), Context(prefix_lm=True), made, 3)
    lengths = np.array([len(ids) - prefix for ids, prefix in made])
    wanted = np.arange(5) < lengths[:, None]
    assert (found[[0, 2, 3, 4]] == wanted[[0, 2, 3, 4]]).all()
    assert found[1, :3].tolist() == [True, True, False]


def test_logits_are_computed_where_something_is_predicted(tiny, monkeypatch):
    """As many rows as there are targets, in parts; the model itself gives those of one position."""
    model, seen = tiny("llama"), []
    monkeypatch.setattr(teacher_forcing, "head_loss", partial(head_loss, max_logits=4 * 61))
    method = NextToken(NextTokenConfig())
    method.attach(model)
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape[:-1].numel()))
    teacher_forced_scores(model, method, Context(), EXAMPLES, 5)
    targets = sum(len(ids) - prefix for ids, prefix in EXAMPLES)
    assert seen == [5] + [4] * (targets // 4) + [targets % 4] * (targets % 4 > 0)
