"""Attention without a mask: the values and gradients of a dense one, for all layouts; what it can't do is refused."""

import logging
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mutor.mtp import blockwise, kernels
from mutor.mtp.attention import bounds, dense_mask
from mutor.mtp.backbone import Backbone
from mutor.mtp.layout import Example, Layout, collate, regular
from mutor.mtp.method import Context
from mutor.mtp.mutor import MuToR
from mutor.registry import METHODS, load

SHAPES = [(31, 4), (7, 2), (29, 1), (18, 5), (9, 3)]  # tokens and prefix of five sequences
LAYOUTS = {  # row length or None, prefix-LM, settings
    "padded": (None, False, {}),
    "packed": (50, False, {}),
    "padded, prefix-LM": (None, True, {"placement": "random", "registers": 4}),
    "packed, prefix-LM": (50, True, {}),
    "packed, every third": (50, False, {"placement": "every", "registers": 3}),
    "padded, random": (None, False, {"placement": "random", "registers": 12}),
}


def rows(row_length=None, shapes=tuple(SHAPES)):
    rng = np.random.default_rng(5)
    return collate([Example(rng.integers(3, 61, n), p, 7 * i) for i, (n, p) in enumerate(shapes)], 0, row_length)


def laid(method, name):
    row_length, prefix_lm, _ = LAYOUTS[name]
    return method.train_layout(rows(row_length), Context(prefix_lm=prefix_lm)).compact()


def both(tools, model, method, layout):
    """(loss, gradients) under the dense mask and under the backend."""
    for implementation in ("sdpa", "blockwise"):
        model.set_attn_implementation(implementation)
        loss, _ = method.compute_loss(model, layout)
        yield loss.detach(), tools.gradients(model, loss)


# values and gradients


@pytest.mark.parametrize("name", LAYOUTS)
def test_losses_and_gradients_of_each_family(tiny, tools, family, name):
    """gemma2 caps its scores, which no fused kernel does: transformers loads it under eager, where it stays."""
    model, method = tiny(family, scale=3.0), MuToR.of(**LAYOUTS[name][2])
    tools.attach(method, model)
    if family == "gemma2":
        assert model.config._attn_implementation == "eager"
        return
    assert model.config._attn_implementation == "blockwise"
    (loss, theirs), (again, ours) = both(tools, model, method, laid(method, name))
    assert again.item() == pytest.approx(loss.item(), abs=1e-5)
    for parameter, gradient in theirs.items():
        torch.testing.assert_close(ours[parameter], gradient, rtol=0, atol=1e-5 * float(gradient.abs().max()) + 1e-9)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ["packed", "padded, prefix-LM"])
def test_bfloat16_to_its_rounding(tiny, tools, family, name):
    model, method = tiny(family, scale=3.0).bfloat16(), MuToR.of(**LAYOUTS[name][2])
    tools.attach(method, model)
    (loss, theirs), (again, ours) = both(tools, model, method, laid(method, name))
    assert again.item() == pytest.approx(loss.item(), rel=1e-3)
    for parameter, gradient in theirs.items():
        off = (ours[parameter] - gradient).float().norm() / (gradient.float().norm() + 1e-12)
        assert off < 0.02, parameter


@pytest.mark.parametrize("name", ["parallel_mtp", "sequential_mtp", "next_token", "teacherless"])
def test_methods_beside_registers(tiny, tools, name):
    cls = load(METHODS, name, "method")
    model, method = tiny(scale=3.0), cls(cls.Config())
    tools.attach(method, model)
    for layout in ("packed", "packed, prefix-LM"):
        (loss, theirs), (again, ours) = both(tools, model, method, laid(method, layout))
        assert again.item() == pytest.approx(loss.item(), abs=1e-5)
        tools.same_gradients(ours, theirs)


def test_images_in_two_dimensions(tiny, tools):
    """Rows of the same length with as many registers: no copies, no masks."""
    from mutor.models.llamagen import LlamaGenConfig, LlamaGenForCausalLM
    from mutor.mtp.mutor_images import MuToR2D

    size = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 48}
    config = LlamaGenConfig(codes=16, classes=3, rows=4, columns=4, dropout=0.0, class_dropout=0.0, **size)
    model, method = LlamaGenForCausalLM(config).train(), MuToR2D(MuToR2D.Config(d_max=2))
    tools.attach(method, model)
    torch.nn.init.normal_(model.lm_head.weight)
    images = [Example(np.r_[17, np.random.default_rng(n).integers(0, 16, 16)], 1, n) for n in range(3)]
    layout = method.train_layout(collate(images, 0), Context()).compact()
    (group,) = blockwise.planned(blockwise.bounds_mask(layout)).groups
    assert (group.tokens.start, group.registers.start) == (0, 16) and group.sees is group.registers_see is None
    (_, theirs), (_, ours) = both(tools, model, method, layout)
    tools.same_gradients(ours, theirs)


def plain(query, key, value, seen, scale):
    """Attention written out, [B, L, H, D]."""
    shared = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def several(method=None):
    """Five sequences of different lengths in two rows, with padding, some with registers."""
    method = method or MuToR.of(d_max=3)
    method.trunk = type("Trunk", (), {"vocabulary": 61})
    return method.train_layout(rows(50), Context(prefix_lm=True))


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_the_gradient_against_arithmetic_and_finite_differences(key_heads):
    """In float64, for keys that many query heads share and for keys of their own."""
    layout = several()
    mask, there = blockwise.bounds_mask(layout), layout.segment >= 0
    torch.manual_seed(0)
    shape = (len(layout.ids), layout.ids.shape[1], 4)
    parts = [torch.randn(shape[0], h, shape[1], 4, dtype=torch.float64, requires_grad=True)
             for h in (4, key_heads, key_heads)]  # fmt: skip

    def ours(*parts: Tensor) -> Tensor:
        out, _ = blockwise.attention(None, *parts, mask, scaling=0.7, dropout=0.0)
        return out[there]

    wanted = plain(*parts, dense_mask(layout), 0.7)[there]
    torch.testing.assert_close(ours(*parts), wanted, rtol=1e-9, atol=1e-9)
    weight = torch.randn_like(wanted)
    found = [torch.autograd.grad((x * weight).sum(), parts) for x in (ours(*parts), wanted)]
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    assert torch.autograd.gradcheck(ours, parts, fast_mode=True)


def random_mask(rng):
    """int32 [2, 1, L, 4]. Registers may share an anchor, windows be short, prefixes long, columns in any order."""
    lines, alike, window = [], rng.random() < 0.5, int(rng.choice([2, 99]))
    size = int(rng.integers(2, 7))
    for _ in range(2):
        line: list[tuple[int, int, int, int]] = []
        for segment in range(1 if alike else int(rng.integers(1, 4))):
            start, tokens = len(line), size if alike else int(rng.integers(1, 7))
            prefix = 0 if alike else int(rng.integers(0, tokens))
            for i in range(tokens):
                first = start if alike else max(start, start + i + 1 - window)
                line.append((start + i, first, start + max(i, prefix), segment))
            many = int(rng.integers(0, tokens + 1)) * int(rng.random() < 0.7)
            for anchor in start + rng.choice(tokens, many, replace=bool(rng.random() < 0.3)):
                line.append((-1, max(start, int(anchor) + 1 - window), int(anchor), segment))
            if rng.random() < 0.1:  # one that sees itself alone
                line.append((-1, start, start - 1, segment))
        lines.append(line)
    length = max(map(len, lines)) + int(rng.integers(0, 3))
    padded = np.array([line + [(-1, 0, -1, -1)] * (length - len(line)) for line in lines])
    orders = (np.arange(length), np.roll(np.arange(length), 1), rng.permutation(length))
    return torch.tensor(padded[:, orders[rng.integers(3)]]).int()[:, None]


def test_any_bounds_that_a_layout_may_have():
    rng, two = np.random.default_rng(0), SimpleNamespace(num_key_value_groups=2, is_causal=True)
    for _ in range(150):
        mask = random_mask(rng)
        there, length = mask[:, 0, :, 3] >= 0, mask.shape[2]
        parts = [torch.randn(2, h, length, 8, requires_grad=True) for h in (4, 2, 2)]
        seen = blockwise._dense(mask.clone())
        outs = [plain(*parts, seen, 0.5)[there], blockwise.attention(two, *parts, mask, scaling=0.5)[0][there]]
        torch.testing.assert_close(outs[1], outs[0])
        weight = torch.randn_like(outs[0])
        theirs, ours = (torch.autograd.grad((out * weight).sum(), parts) for out in outs)
        for mine, wanted in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5)


def test_nothing_of_size_l_squared_is_made_for_images():
    """Memory outside the kernel grows with the length: a mask of [L, L] would have 16 million places."""
    made = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            made.extend(x.numel() for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, Tensor))
            return out

    length = 2048
    method = MuToR.of()
    method.trunk = type("Trunk", (), {"vocabulary": 61})
    layout = method.train_layout(rows(shapes=((length + 1, 1),)), Context()).compact()
    parts = [torch.randn(1, 2, layout.ids.shape[1], 8, requires_grad=True) for _ in range(3)]
    with Watch():
        mask = blockwise.bounds_mask(layout)
        out, _ = blockwise.attention(None, *parts, mask, scaling=0.7)
        out.sum().backward()
    assert max(made) <= 2 * 8 * 2 * length


# plans


def hand(key, low, high, segment):
    return torch.tensor([key, low, high, segment]).T[None, None].int()


def test_a_plan_by_hand():
    """Tokens a b c | d e in one row, registers behind a and c, padding last."""
    mask = hand(
        [0, 1, 2, 3, 4, -1, -1, -1], [0, 0, 0, 3, 3, 0, 0, 0], [0, 1, 2, 3, 4, 0, 2, -1], [0, 0, 0, 1, 1, 0, 0, -1]
    )
    plan = blockwise.planned(mask)
    three, two = plan.groups
    assert plan.padded and not plan.masked and not plan.plain and blockwise.planned(mask) is plan
    assert three.tokens.index.tolist() == [[0, 1, 2]] and two.tokens.index.tolist() == [[3, 4]]
    assert two.registers is None and three.seen == 3
    # in the rows of their anchors; b's row has none, so that b stands in for it
    assert three.registers.index.tolist() == [[5, 1, 6]] and three.registers.real.tolist() == [[True, False, True]]


def test_few_registers_get_a_mask_of_their_own():
    """One register behind the last of four tokens: one row with a mask, not four without."""
    mask = hand([0, 1, 2, 3, -1], [0] * 5, [0, 1, 2, 3, 3], [0] * 5)
    (group,) = blockwise.planned(mask).groups
    assert group.sees is None and group.registers.index.tolist() == [[4]]
    assert group.registers_see.tolist() == [[[[True] * 4]]]


def test_a_prefix_gets_a_mask_of_its_tokens():
    layout = regular(rows(shapes=((5, 3),)), prefix_lm=True)
    (group,) = blockwise.planned(blockwise.bounds_mask(layout)).groups
    assert torch.equal(group.sees, dense_mask(layout)) and group.registers is None


def test_sequences_of_about_equal_length_go_together():
    numbers = [some.tolist() for some in blockwise._alike(torch.tensor([10, 100, 71, 9, 70, 69]))]
    assert numbers == [[1, 2, 4], [5], [0, 3]]


def test_whole_rows_without_registers_are_the_plain_kernel():
    """Padding behind the tokens does not matter: nothing that counts sees it."""
    mask = blockwise.bounds_mask(regular(rows()))
    assert blockwise.planned(mask).plain
    assert not blockwise.planned(blockwise.bounds_mask(regular(rows(50)))).plain
    two = ((12, 1), (12, 1), (4, 1), (4, 1))  # in each row a long sequence and a short one behind it
    assert len(blockwise.planned(blockwise.bounds_mask(regular(rows(16, two)))).groups) == 2
    assert not blockwise.planned(blockwise.bounds_mask(regular(rows(16, two)))).plain


def test_bounds_by_hand():
    """A prefix of two tokens that see each other, an answer of one, a register behind the prefix, padding."""
    ids = torch.tensor([[5, 6, 7, 61, 0]])
    register, prefix = torch.tensor([[0, 0, 0, 1, 0]]).bool(), torch.tensor([[1, 1, 0, 0, 0]]).bool()
    layout = Layout(
        ids, torch.tensor([[0, 1, 2, 2, 0]]), torch.tensor([[0, 0, 0, 0, -1]]), torch.tensor([[0, 1, 2, 1, 0]]),
        prefix, register, ids,
    )  # fmt: skip
    key, low, high = bounds(layout)
    assert key.tolist() == [[0, 1, 2, -1, -1]]
    assert high.tolist() == [[1, 1, 2, 1, -1]] and low.tolist() == [[0, 0, 0, 0, 0]]
    key, low, high = bounds(layout, window=1)  # at position 2 one token, that at 2; in the prefix those one apart
    assert low[0, :4].tolist() == [0, 0, 2, 2] and high[0, :4].tolist() == [1, 1, 2, 1]


# where it does not apply


def test_dropped_out_weights_are_those_of_a_dense_mask(tiny, tools):
    """gpt2 drops attention weights out: the same numbers are drawn for the same pairs."""
    model, method = tiny("gpt2", scale=3.0, attn_pdrop=0.3), MuToR.of()
    tools.attach(method, model)
    model.train()
    layout, losses = laid(method, "packed"), []
    for implementation in ("sdpa", "blockwise"):
        model.set_attn_implementation(implementation)
        torch.manual_seed(3)
        losses.append(method.compute_loss(model, layout)[0].item())
    assert losses[0] == losses[1]
    model.eval()
    assert method.compute_loss(model, layout)[0].item() != losses[0]


@pytest.mark.parametrize("name", ["softcap", "s_aux"])
def test_what_no_kernel_computes_is_refused_by_name(name):
    mask, part = blockwise.bounds_mask(several()), torch.randn(2, 1, 79, 8)
    with pytest.raises(ValueError, match=f"attention: 'blockwise' can't do '{name}' of Linear; allowed: eager"):
        blockwise.attention(torch.nn.Linear(1, 1), part, part, part, mask, **{name: 3.0})


def test_a_wrong_kernel_is_found_and_a_dense_mask_used(tiny, tools, monkeypatch, caplog):
    """One whose backward pass ignores the logsumexp that it is given, as for its keys alone."""
    cpu = kernels.KERNELS["cpu"]

    def forgetful(g, q, k, v, out, lse, state, mask, scale):
        out, lse, state = cpu.forward(q, k, v, mask, scale)
        return cpu.backward(g, q, k, v, out, lse, state, mask, scale)

    layout = several()
    parts = [torch.randn(2, 2, layout.ids.shape[1], 8) for _ in range(3)]
    mask = blockwise.bounds_mask(layout)
    monkeypatch.setitem(kernels.KERNELS, "cpu", replace(cpu, backward=forgetful))
    kernels.kernel_for.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            found, _ = blockwise.attention(None, *parts, mask, scaling=1.0)
        dense, _ = sdpa_attention_forward(torch.nn.Identity(), *parts, dense_mask(layout), scaling=1.0)
        assert torch.equal(found, dense) and "no fused kernel on cpu" in caplog.text
    finally:
        kernels.kernel_for.cache_clear()


def test_a_dense_mask_is_made_once_for_all_layers():
    mask = blockwise.bounds_mask(several())
    assert torch.equal(blockwise._dense(mask), dense_mask(several())) and blockwise._dense(mask) is blockwise._dense(
        mask
    )
    assert blockwise.planned(mask) is blockwise.planned(mask)


def test_a_kernel_without_masks_gets_none(monkeypatch):
    """A prefix-LM's tokens need one, so that all of it goes with a dense mask."""
    layout = several()
    assert blockwise.planned(blockwise.bounds_mask(layout)).masked
    assert goes_dense(layout, monkeypatch)


@pytest.mark.parametrize(("lengths", "dense"), [((20, 9), False), ((20, 9, 4), True)])
def test_a_gpu_gets_few_groups(lengths, dense, monkeypatch):
    """Each group is some dozens of small kernels a layer, which take longer than a dense mask."""
    method = MuToR.of()
    method.trunk = SimpleNamespace(vocabulary=50, check_tokens=lambda rows: None)
    layout, _ = method.prepare_batch([Example(np.arange(n + 1), 1, n) for n in lengths], Context(), None)
    plan = blockwise.planned(blockwise.bounds_mask(layout))
    assert len(plan.groups) == len(lengths) and not plan.masked
    assert goes_dense(layout, monkeypatch) == dense


def goes_dense(layout, monkeypatch):
    """Whether a kernel that takes no masks, as a GPU's, leaves this layout to a dense mask."""
    parts = [torch.randn(len(layout.ids), 2, layout.ids.shape[1], 8) for _ in range(3)]
    monkeypatch.setattr(blockwise, "kernel_for", lambda *of: replace(kernels.KERNELS["cpu"], takes_masks=False))
    called = []
    monkeypatch.setattr(blockwise, "_dense", lambda mask: called.append(1) or dense_mask(layout))
    found, _ = blockwise.attention(torch.nn.Identity(), *parts, blockwise.bounds_mask(layout), scaling=1.0)
    dense, _ = sdpa_attention_forward(torch.nn.Identity(), *parts, dense_mask(layout), scaling=1.0)
    there = layout.segment >= 0
    assert torch.allclose(found[there], dense[there], atol=1e-5)
    return bool(called)


def test_a_model_that_it_would_change_keeps_the_dense_mask(tiny, monkeypatch, caplog):
    """Said once, with the reason."""
    off = partial(_changed, blockwise.attention)
    monkeypatch.setitem(type(blockwise.AttentionInterface())._global_mapping, "blockwise", off)
    model = tiny()
    with caplog.at_level(logging.WARNING):
        Backbone(model)
    assert model.config._attn_implementation == "sdpa"
    assert "LlamaForCausalLM: attention with a dense mask: its hidden states differ" in caplog.text
    none = partial(blockwise.attention, softcap=3.0)
    monkeypatch.setitem(type(blockwise.AttentionInterface())._global_mapping, "blockwise", none)
    with caplog.at_level(logging.WARNING):
        Backbone(tiny())
    assert "a dense mask: LlamaForCausalLM (llama) can't be trained here" in caplog.text


def _changed(attention, *args, **kwargs):
    out, weights = attention(*args, **kwargs)
    return out * 1.1, weights


def test_after_attach_the_dense_mask_is_a_word_away(tiny):
    method, model = MuToR.of(), tiny()
    method.attach(model)
    layout = laid(method, "packed")
    assert method.trunk.mask(layout).dtype == torch.int32
    model.set_attn_implementation("sdpa")
    assert torch.equal(method.trunk.mask(layout), dense_mask(layout))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: its kernel is not tried")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu(tiny, tools, dtype):
    assert kernels.kernel_for(torch.device("cuda", 0), dtype, 32) is not None
    model, method = tiny(scale=3.0).to("cuda", dtype), MuToR.of()
    tools.attach(method, model)
    layout = laid(method, "padded").to("cuda")
    (loss, theirs), (again, ours) = both(tools, model, method, layout)
    assert again.item() == pytest.approx(loss.item(), rel=1e-2)
    for parameter, gradient in theirs.items():
        assert (ours[parameter] - gradient).float().norm() <= 0.03 * gradient.float().norm() + 1e-6, parameter
