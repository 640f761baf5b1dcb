"""A model that changes after a method was attached: its vocabulary, its embeddings, or that there are two of it."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mutor import MuToR
from mutor.mtp import blockwise
from mutor.mtp.layout import Example, collate
from mutor.mtp.method import Context
from mutor.mtp.trials import carrying, few_rows, why_not

PLAIN = [{"input_ids": [*range(3 + n, 23 + n)], "prefix_length": 2} for n in range(12)]


def collator_of(mutor):
    """A collator that knows its epoch."""
    collator = mutor.collator(0)
    collator.set_epoch(0)
    return collator


def test_new_tokens_are_tokens_and_registers_stay_registers(tiny, tools):
    """resize_token_embeddings after attach: as if attached afterwards, in both paths; tokens as of a plain model."""
    data = [{"input_ids": [60, 61, 62, 5, 61, 9, 62, 7], "prefix_length": 3, "index": 4}]
    losses, tokens = [], []
    for when in ("never", "before", "after"):
        model, mutor = tiny("llama"), MuToR.of(d_max=3)
        if when != "after":
            model.resize_token_embeddings(64, mean_resizing=False)
        if when != "never":
            tools.attach(mutor, model)
        if when == "after":
            model.resize_token_embeddings(64, mean_resizing=False)
        with torch.no_grad():
            for table in (model.get_input_embeddings(), model.get_output_embeddings()):
                table.weight[61:] = torch.randn(3, 32, generator=torch.Generator().manual_seed(3))
        tokens.append(model.train()(torch.tensor([data[0]["input_ids"]])).logits.detach())
        tools.close(tokens[-1], tokens[0])
        if when == "never":
            continue
        inputs = collator_of(mutor)(data)
        assert inputs["input_ids"].max() == 64 == mutor.trunk.vocabulary
        labels = inputs.pop("labels")
        rows = collate([Example(np.array(data[0]["input_ids"]), 3, 4)], 0)
        losses.append(mutor.loss_from_outputs(model(**inputs), labels).detach())
        losses.append(mutor.compute_loss(model, mutor.train_layout(rows, Context()))[0].detach())
    for loss in losses[1:]:
        tools.close(loss, losses[0])


def test_replaced_embeddings_are_refused(tiny):
    """The hooks stayed behind."""
    model, mutor = tiny(), MuToR.of()
    mutor.attach(model)
    model.set_input_embeddings(torch.nn.Embedding(70, 32))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM.*embeddings were wrapped or replaced.*attach afterwards"):
        mutor.loss_from_outputs(None, torch.zeros(1, 1))


def test_a_copy_reads_its_own_register(tiny, tools, family):
    """deepcopy after attach; the method goes on with the model it is attached to."""
    model, mutor = tiny(family), MuToR.of(d_max=3)
    tools.attach(mutor, model)
    inputs = collator_of(mutor)(PLAIN)
    inputs.pop("labels")
    before = model(**inputs).logits.detach()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.mtp["registers"].weight.neg_()
    assert torch.equal(model(**inputs).logits, before)
    after = twin(**inputs).logits.detach()
    tools.close(after[:, :20], before[:, :20])
    assert float((after - before)[:, 20:].abs().max()) > 1e-3
    rows = collate([Example(np.array(PLAIN[0]["input_ids"]), 2, 0)], 0)
    with pytest.raises(ValueError, match="another model than the one"):
        mutor.compute_loss(twin, mutor.train_layout(rows, Context()))


@pytest.mark.parametrize(
    ("family", "config", "words"),
    [
        ("mamba", {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 61}, "it is recurrent: some layers carry"),
        ("bloom", {"hidden_size": 32, "n_layer": 1, "n_head": 2, "vocab_size": 61}, "its positions are biases by"),
        ("falcon", {"alibi": True, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                    "vocab_size": 61}, "its positions are biases by"),
        ("falcon", {"alibi": False, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                    "vocab_size": 61}, ""),
        ("llama", None, ""),
    ],
)  # fmt: skip
def test_a_model_says_itself_why_registers_can_not_be_held(tiny, family, config, words):
    """By what its class and its configuration say; others say nothing."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = tiny(family) if config is None else AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **config))
    found = why_not(model)
    assert found.startswith(words) and bool(found) == bool(words)
    if words:
        with pytest.raises(ValueError, match=words):
            MuToR.of().attach(model)


def test_layers_that_carry_a_state_are_named():
    """By the types of layers in a configuration: attention carries none."""
    kinds = ["full_attention", "linear_attention", "conv", "sliding_attention", "mamba", "recurrent"]
    assert carrying(SimpleNamespace(layer_types=kinds)) == ["conv", "linear_attention", "mamba", "recurrent"]
    assert carrying(SimpleNamespace(layer_types=None)) == carrying(SimpleNamespace()) == []


def stub(model=(), config=(), base=()):
    """A model of nothing but attributes."""
    config = SimpleNamespace(**dict(config))
    return SimpleNamespace(
        config=SimpleNamespace(get_text_config=lambda: config), base_model=SimpleNamespace(**dict(base)), **dict(model)
    )


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({}, ""),
        ({"model": {"_is_stateful": False}, "config": {"alibi": False, "layer_types": ["full_attention"]}}, ""),
        ({"model": {"_is_stateful": True}}, "it is recurrent: some layers carry a state along the row"),
        ({"config": {"layer_types": ["conv", "full_attention"]}}, "it is recurrent"),
        ({"config": {"alibi": True}}, "its positions are biases by the order in the row (ALiBi), and registers stand"),
        ({"base": {"build_alibi_tensor": None}}, "its positions are biases"),
        ({"config": {"alibi": False}, "base": {"use_alibi": False}}, ""),
    ],
)
def test_each_sign_of_what_can_not_be_held_is_enough(said, words):
    found = why_not(stub(**said))
    assert found.startswith(words) and bool(found) == bool(words)


def test_a_copied_listener_has_heard_nothing_and_has_no_hooks(tiny):
    """What it leaves is the copy, not the original."""
    model, mutor = tiny(), MuToR.of(d_max=3)
    mutor.attach(model)
    inputs = collator_of(mutor)(PLAIN)
    inputs.pop("labels")
    model.train()(**inputs)
    listener = mutor.trunk.listener
    listener._under_way = "a pass"
    twin = copy.deepcopy(listener)
    assert (twin.heard, twin._under_way, twin._hooks) == (None, None, []) and listener.heard is not None
    assert (twin.layers, twin.norm) == (listener.layers, listener.norm)
    listener._under_way = None
    twin.remove()
    model(**inputs)
    assert mutor.trunk.listener.take() is not None


def test_detach_puts_attention_back_as_it_was(tiny):
    for attention in ("eager", "sdpa"):
        model, mutor = tiny(attn_implementation=attention), MuToR.of()
        mutor.attach(model)
        assert mutor.detach(model).config._attn_implementation == attention


def test_the_rows_that_a_backend_is_tried_on_are_rows_as_they_come():
    """Two packed sequences, and one with padding; registers one token further than the tokens they stand behind."""
    rows = few_rows(61)
    regular = ~rows.register & (rows.segment >= 0)
    assert regular.sum(1).tolist() == [7, 5] and rows.register.sum(1).tolist() == [3, 2]
    assert rows.segment.tolist()[0] == [0] * 4 + [1] * 3 + [0, 0, 1] and rows.segment.tolist()[1] == [0] * 7 + [-1] * 3
    for row in range(2):
        tokens = regular[row]
        assert tokens.int().argmin() == tokens.sum()  # before all registers
        assert rows.causal_index[row, tokens].tolist() == list(range(int(tokens.sum())))
        for number in (0, 1):
            own = rows.position[row, tokens & (rows.segment[row] == number)]
            assert own.tolist() == list(range(len(own)))
        anchor = rows.causal_index[row, rows.register[row]]
        assert anchor.tolist() == [[1, 2, 4], [1, 2]][row]
        assert torch.equal(rows.position[row, rows.register[row]], rows.position[row, anchor] + 1)
        assert torch.equal(rows.segment[row, rows.register[row]], rows.segment[row, anchor])
        assert rows.prefix[row].nonzero()[:, 0].tolist() == [0, 1]
    padding = rows.segment < 0
    assert not rows.position[padding].any() and not rows.causal_index[padding].any() and not rows.target.any()
    assert rows.ids.flatten().tolist() == [(7 * n + 3) % 61 for n in range(20)] and few_rows(5).ids.max() < 5


@pytest.mark.parametrize(("dtype", "kept"), [(torch.float32, "sdpa"), (torch.bfloat16, "blockwise")])
def test_a_backend_may_be_off_by_rounding(tiny, monkeypatch, dtype, kept):
    """By some percent in bfloat16, and not in float32; of the first sequence of a row, too."""

    def off(module, query, *args, **kwargs):
        out, weights = blockwise.attention(module, query, *args, **kwargs)
        out = out.clone()
        out[:, 0] *= 1.02
        return out, weights

    monkeypatch.setitem(type(blockwise.AttentionInterface())._global_mapping, "blockwise", off)
    model = tiny(scale=1.0).to(dtype)
    MuToR.of().attach(model)
    assert model.config._attn_implementation == kept
