"""Sliding windows and position limits: exactly the model's own beside registers, or refused by name."""

import copy
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mutor.mtp.answers import Prompts, decode_in_one_pass
from mutor.mtp.attention import attention_mask, dense_mask, mask_mod, sliding_window
from mutor.mtp.backbone import Backbone
from mutor.mtp.blockwise import bounds_mask
from mutor.mtp.layout import Example, collate, regular
from mutor.mtp.method import Context
from mutor.mtp.mutor import MuToR
from mutor.mtp.teacher_forcing import teacher_forced_scores
from mutor.registry import METHODS, load

W = 8
MIXED = {"sliding_window": W, "layer_types": ["sliding_attention", "full_attention"]}
WINDOWS = {
    "mistral": {"sliding_window": W},
    "phi3": {"sliding_window": W},
    "starcoder2": {"sliding_window": W},
    "gemma2": MIXED,
    "gemma3_text": MIXED,
    "cohere2": MIXED,
    "olmo3": MIXED,
    "gpt_oss": {**MIXED, "num_local_experts": 2, "num_experts_per_tok": 1},
    "qwen2": {"sliding_window": W, "use_sliding_window": True, "max_window_layers": 1},
}
BOTH = pytest.mark.parametrize("prefix_lm", [False, True])


@pytest.fixture(params=sorted(WINDOWS))
def windowed(tiny, request):
    """A model with sliding windows of 8 in one layer or in both."""
    return tiny(request.param, **WINDOWS[request.param])


def sample(length=40, prefix=17):
    """One sequence far beyond the window."""
    ids = np.random.default_rng(3).integers(3, 60, length)
    return {"input_ids": ids, "prefix_length": prefix, "index": 5}


@torch.no_grad()
def stock_logits(model, example, prefix_lm):
    """[T, V] by the stock model alone, without any mask of ours; of a prefix-LM's prompt only the last token's."""
    ids = torch.tensor(example["input_ids"])[None]
    if not prefix_lm:
        return model(input_ids=ids, use_cache=False).logits[0]
    start = example["prefix_length"]
    prompt = model(input_ids=ids[:, :start], use_cache=True, is_causal=False)
    rest = [model(input_ids=ids[:, start : start + 1], past_key_values=prompt.past_key_values, use_cache=True)]
    for at in range(start + 1, ids.shape[1]):
        cache = rest[-1].past_key_values
        rest.append(model(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True))
    return torch.cat([prompt.logits[0], *(state.logits[0] for state in rest)])


@BOTH
def test_tokens_beside_registers_are_the_plain_models(windowed, tools, prefix_lm):
    """What a stock Trainer feeds, in a row five times as long as the window."""
    method, example = MuToR.of(d_max=4), sample()
    tools.attach(method, windowed)
    collator = method.collator(0, prefix_lm=prefix_lm)
    collator.set_epoch(0)
    inputs = collator([example])
    inputs.pop("labels")
    ours = windowed(**inputs, use_cache=False).logits[0, :40].detach()
    theirs, first = stock_logits(windowed, example, prefix_lm), example["prefix_length"] - 1 if prefix_lm else 0
    tools.close(ours[first:], theirs[first:], rtol=1e-3, atol=1e-3)


@BOTH
@pytest.mark.parametrize("implementation", ["blockwise", "eager"])
def test_a_packed_row_has_the_losses_of_its_sequences(tiny, tools, implementation, prefix_lm):
    """Windows are counted inside a sequence; the suite's path, the register loss included."""
    model, method = tiny("mistral", sliding_window=W, attn_implementation=implementation), MuToR.of(d_max=3)
    tools.attach(method, model)
    examples = [Example(sample(n, p)["input_ids"], p, n) for n, p in [(25, 10), (18, 9)]]
    context, losses = Context(prefix_lm=prefix_lm), []
    for rows in (collate(examples, 0, 43), collate(examples, 0)):
        loss, _ = method.compute_loss(model, method.train_layout(rows, context))
        losses.append(loss.detach())
    tools.close(*losses)


def test_the_rule_against_a_loop():
    """A layout with a prefix, registers and two sequences; dense and as FlexAttention's rule."""
    from torch.nn.attention.flex_attention import create_mask

    method = MuToR.of(d_min=2, d_max=2)
    method.trunk = SimpleNamespace(vocabulary=61)
    rows = collate([Example(np.arange(3, 15), 5, 0), Example(np.arange(20, 27), 2, 1)], 0, 19)
    layout = method.train_layout(rows, Context(prefix_lm=True))
    length, names = layout.ids.shape[1], ("segment", "position", "causal_index", "prefix", "register")
    assert int(layout.register.sum()) == 10
    what = [SimpleNamespace(**{n: getattr(layout, n)[0, i].item() for n in names}) for i in range(length)]

    def sees(q, k):
        if q.segment != k.segment or k.register:
            return False
        if q.prefix and k.prefix:
            return abs(q.position - k.position) <= 3
        return k.causal_index <= q.causal_index and k.position > q.position - 3

    wanted = torch.tensor([[q is k or sees(q, k) for k in what] for q in what])
    assert torch.equal(dense_mask(layout, window=3)[0, 0], wanted)
    assert not torch.equal(dense_mask(layout)[0, 0], wanted)
    assert torch.equal(create_mask(mask_mod(layout, 3), 1, None, length, length, device="cpu")[0, 0], wanted)


def test_a_short_row_has_one_plain_mask(tiny, tools):
    """Nothing changes where no window is reached."""
    model = tiny("gemma3_text", **MIXED)
    layout = regular(collate([Example(np.arange(3, 11), 2, 0)], 0))
    mask = attention_mask(layout, model.config, torch.float32)
    assert torch.equal(mask, dense_mask(layout))


@pytest.mark.parametrize("name", ["parallel_mtp", "sequential_mtp"])
def test_layers_that_a_method_adds_slide_as_the_last_one(tiny, tools, name):
    """A padded and a packed batch: the same loss."""
    model = tiny("gemma3_text", sliding_window=W, layer_types=["full_attention", "sliding_attention"])
    cls = load(METHODS, name, "method")
    method = cls(cls.Config(d_max=3))
    tools.attach(method, model)
    examples = [Example(sample(n, p)["input_ids"], p, n) for n, p in [(25, 10), (18, 9)]]
    losses = [
        method.compute_loss(model, method.train_layout(rows, Context()))[0].detach()
        for rows in (collate(examples, 0, 43), collate(examples, 0))
    ]
    tools.close(*losses)


def test_scores_see_the_windows_too(tiny, tools):
    """Teacher forcing and answers in one pass, on the plain model, against the stock forward."""
    model, example = tiny("mistral", sliding_window=W), sample()
    theirs, start = stock_logits(model, example, False), example["prefix_length"]
    targets = torch.tensor(example["input_ids"][start:])
    method = load(METHODS, "next_token", "method")
    right, loss = teacher_forced_scores(model, method(method.Config()), Context(), [(example["input_ids"], start)], 1)
    assert loss == pytest.approx(float(F.cross_entropy(theirs[start - 1 : -1], targets)), rel=1e-4)
    assert right[0].tolist() == (theirs[start - 1 : -1].argmax(-1) == targets).tolist()
    dummies = {**example, "input_ids": np.where(np.arange(40) < start, example["input_ids"], 0)}
    ids = torch.tensor(example["input_ids"][:start])[None]
    answer = decode_in_one_pass(model, Prompts(ids, torch.ones_like(ids), length=24))
    assert torch.equal(answer[0], stock_logits(model, dummies, False)[start - 1 :].argmax(-1))


def refusals(method, model, example):
    """What the suite's path and the library's say of an example."""
    rows = collate([Example(example["input_ids"], example["prefix_length"], 0)], 0)
    collator = method.collator(0)
    collator.set_epoch(0)
    for refused in (
        lambda: method.compute_loss(model, method.train_layout(rows, Context())),
        lambda: collator([example]),
    ):
        with pytest.raises(ValueError) as error:
            refused()
        yield str(error.value)


@pytest.mark.parametrize(
    ("family", "own", "words"),
    [
        (
            "llama",
            {"max_position_embeddings": 20},
            "LlamaForCausalLM: a sequence of 40 tokens .*position_embeddings of 20;",
        ),
        ("gpt2", {"n_positions": 20}, "GPT2LMHeadModel: a sequence of 40 tokens .*position_embeddings of 20; shorten"),
        (
            "llama",
            {"attention_chunk_size": 20},
            "LlamaForCausalLM: a sequence of 40 tokens .*chunk_size of 20; shorten",
        ),
    ],
)
def test_what_is_beyond_the_model_is_refused_in_both_paths(tiny, tools, family, own, words):
    """By name, in one line, with the length, the limit and the remedy."""
    model, method = tiny(family, **own), MuToR.of()
    tools.attach(method, model)
    for said in refusals(method, model, sample()):
        assert re.match(words, said) and "\n" not in said


def test_a_window_that_no_mask_can_tell_is_refused(tiny, tools):
    """A model that does not read its window where it says it does: short sequences train, long ones don't."""
    model, method = tiny("mistral", sliding_window=W), MuToR.of()
    model.model.config = copy.deepcopy(model.config)  # its masks follow a window of their own
    tools.attach(method, model)
    for said in refusals(method, model, sample()):
        assert said.startswith(
            "MistralForCausalLM: a sequence of 40 tokens is longer than the model's sliding_window of 8"
        )
    short = method.train_layout(collate([Example(sample(W)["input_ids"], 3, 0)], 0), Context())
    assert short.ids.shape[1] > W and torch.isfinite(method.compute_loss(model, short)[0])
    assert torch.equal(method.trunk.mask(short), bounds_mask(short))
    assert Backbone(tiny("mistral", sliding_window=W)).exact_windows


@pytest.mark.parametrize(
    ("config", "slides"),
    [
        ({}, False),
        ({"sliding_window": None}, False),
        ({"sliding_window": 8}, True),
        ({"sliding_window": 8, "layer_types": None}, True),
        ({"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]}, True),
        ({"sliding_window": 8, "layer_types": ["full_attention", "full_attention"]}, False),
        ({"sliding_window": 8, "use_sliding_window": False}, False),
        ({"sliding_window": 8, "use_sliding_window": False, "layer_types": ["sliding_attention"]}, False),
    ],
)
def test_a_configuration_says_whether_windows_slide(config, slides):
    assert bool(sliding_window(SimpleNamespace(**config))) == slides
