"""Positions of answers to prompts that are padded on the left: those of the prompts alone."""

import numpy as np
import pytest
import torch

from mutor.mtp.answers import Prompts, decode, decode_in_one_pass

PADS, LENGTH, NEW = (0, 3, 5, 6), 7, 5
ATTENDED = (torch.arange(LENGTH) >= torch.tensor(PADS)[:, None]).long()
IDS = torch.tensor(np.random.default_rng(0).integers(3, 61, (4, LENGTH))) * ATTENDED
WAYS = pytest.mark.parametrize("way", [decode, decode_in_one_pass])
BOTH = pytest.mark.parametrize("prefix_lm", [False, True])


def fed_positions(model, way, **prompts):
    """The position ids of each forward, in order."""
    seen, forward = [], model.forward
    model.forward = lambda **given: (seen.append(given["position_ids"].tolist()), forward(**given))[1]
    way(model, Prompts(IDS, ATTENDED, NEW, **prompts))
    del model.forward
    return seen


@BOTH
@WAYS
def test_positions_begin_at_the_prompts_first_token(tiny, family, way, prefix_lm):
    """Whatever the model does with them: rotary ones are blind to a shift of all."""
    prompt = [[max(0, i - pads) for i in range(LENGTH)] for pads in PADS]
    later = [[LENGTH - pads + step for step in range(NEW - 1)] for pads in PADS]
    if way is decode:
        wanted = [prompt, *([[line[step]] for line in later] for step in range(NEW - 1))]
    else:
        wanted = [[a + b for a, b in zip(prompt, later, strict=True)]]
    assert fed_positions(tiny(family), way, prefix_lm=prefix_lm) == wanted


def test_positions_go_on_when_rows_have_left_the_batch(tiny):
    model = tiny()
    first = decode(model, Prompts(IDS, ATTENDED, NEW))[0, 1].item()
    *_, last = fed_positions(model, decode, end_id=first)
    assert last == [[LENGTH - pads + NEW - 2] for pads in PADS[1:]]


@BOTH
@WAYS
def test_learned_positions_count_no_padding(tiny, way, prefix_lm):
    """With positions so loud that a shift of one changes the answers: each row as if it were alone."""
    model = tiny("gpt2")
    with torch.no_grad():
        model.transformer.wpe.weight.mul_(8)
    together = way(model, Prompts(IDS, ATTENDED, NEW, prefix_lm=prefix_lm))
    for line, ids, pads in zip(together, IDS, PADS, strict=True):
        alone = Prompts(ids[None, pads:], torch.ones_like(ids[None, pads:]), NEW, prefix_lm=prefix_lm)
        assert way(model, alone)[0].tolist() == line.tolist()
        with torch.no_grad():
            model.transformer.wpe.weight.copy_(model.transformer.wpe.weight.roll(-1, 0))
            shifted = way(model, alone)[0].tolist()
            model.transformer.wpe.weight.copy_(model.transformer.wpe.weight.roll(1, 0))
        assert shifted != line.tolist()
