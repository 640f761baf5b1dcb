"""MuToR's promises: the model is untouched, a register sees what the paper says, order in the row is free."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from mutor.mtp import registers as r
from mutor.mtp.attention import attention_mask, dense_mask, mask_mod
from mutor.mtp.layout import regular
from mutor.mtp.method import Context
from mutor.mtp.mutor import MuToR
from mutor.registry import METHODS, load

BOTH = pytest.mark.parametrize("prefix_lm", [False, True])


def forward(model, layout):
    """[B, L, V]: the stock forward on a layout."""
    mask = attention_mask(layout, model.config, model.dtype)
    return model(input_ids=layout.ids, position_ids=layout.position, attention_mask=mask, use_cache=False).logits


def ready(tools, model, **settings):
    """MuToR attached to the model."""
    method = MuToR.of(**{"d_max": 3, "a": 0.3, **settings})
    tools.attach(method, model)
    return method


def vectors(model, ids, register, number, scaled=True):
    """[L, d] input vectors of tokens (number None) and registers, all by hand.

    Gemma scales by sqrt(d) before this point, Granite multiplies whatever it is fed after it.
    """
    gemma = model.config.model_type.startswith("gemma")
    weight, table = model.get_input_embeddings().weight, model.mtp["registers"].weight
    root = weight.shape[1] ** 0.5 if gemma else 1.0
    bare = 1.0 / getattr(model.config, "embedding_multiplier", 1.0)
    rows = [
        table[n] * (root if scaled else bare) if is_register else weight[i] * root
        for i, is_register, n in zip(ids, register, number, strict=True)
    ]
    return torch.stack(rows)


@BOTH
def test_regular_logits_do_not_change(tiny, tools, family, batch, prefix_lm):
    """With registers, without them, and the stock model on each sequence alone."""
    model = tiny(family)
    alone = [tools.plain_logits(model, span.ids, span.prefix, prefix_lm) for span in batch.spans]
    method = ready(tools, model)
    layout = method.train_layout(batch.rows, Context(prefix_lm=prefix_lm))
    length = batch.rows.ids.shape[1]
    with_registers, without = (
        forward(model, layout)[:, :length],
        forward(model, regular(batch.rows, prefix_lm=prefix_lm)),
    )
    assert layout.ids.shape[1] > length and float(without.detach().std()) > 0.05
    real = batch.rows.segment >= 0
    tools.close(with_registers[real], without[real])
    for span, logits in zip(batch.spans, alone, strict=True):
        tools.close(with_registers[span.row, span.start : span.start + len(span.ids)], logits)


def literal_register(model, tools, ids, anchor, position, prefix, prefix_lm, scaled=True):
    """[V]: the logits of one register vector fed behind the tokens up to its anchor."""
    n = anchor + 2
    embeds = vectors(model, [*ids[: anchor + 1], None], [False] * (n - 1) + [True], [0] * n, scaled)
    mask = torch.ones(1, n, dtype=torch.long)
    if prefix_lm:
        mask = tools.given(tools.prefix_mask(n, prefix, True)[None], model)
    positions = torch.tensor([[*range(anchor + 1), position]])
    return model(inputs_embeds=embeds[None], position_ids=positions, attention_mask=mask, use_cache=False).logits[0, -1]


@BOTH
def test_a_register_equals_a_literal_forward(tiny, tools, family, batch, prefix_lm):
    """Tokens up to the anchor, then one vector at position t + d - 1: target and logits."""
    model = tiny(family)
    method = ready(tools, model, d_max=4)
    layout = method.train_layout(batch.rows, Context(seed=2, prefix_lm=prefix_lm))
    logits, checked = forward(model, layout), []
    for span in batch.spans:
        d = int(r.offsets(torch.tensor([[span.sample]]), seed=2, d_min=1, d_max=4))
        number = int(batch.rows.segment[span.row, span.start])
        mine = layout.register[span.row] & (layout.segment[span.row] == number)
        wanted = [p for p in range(span.prefix - 1, len(span.ids) - 1) if p + d < len(span.ids)]
        columns = torch.nonzero(mine).flatten().tolist()
        assert [int(layout.causal_index[span.row, c]) - span.start for c in columns] == wanted
        for column, anchor in list(zip(columns, wanted, strict=True))[:: max(1, len(wanted) - 1)]:
            assert int(layout.target[span.row, column]) == span.ids[anchor + d]
            theirs = literal_register(model, tools, span.ids, anchor, anchor + d - 1, span.prefix, prefix_lm)
            tools.close(logits[span.row, column], theirs)
            checked.append(d)
    assert len(checked) > 4 and max(checked) > 1


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3_text", "granite", "llama"])
@pytest.mark.parametrize("scaled", [True, False])
def test_a_register_is_scaled_as_asked(tiny, tools, batch, family, scaled):
    """Gemma and Granite multiply their embeddings; register_scaled false leaves the register alone."""
    model = tiny(family)
    method = ready(tools, model, register_scaled=scaled, d_min=2, d_max=2)
    layout = method.train_layout(batch.rows, Context())
    span = batch.spans[0]
    column = int(torch.nonzero(layout.register[0])[0])
    ours = forward(model, layout)[0, column]
    tools.close(ours, literal_register(model, tools, span.ids, 3, 4, 4, False, scaled))
    other = literal_register(model, tools, span.ids, 3, 4, 4, False, not scaled)
    assert torch.allclose(ours, other, atol=1e-3) == (family == "llama")


def interleaved(model, batch, seed, settings, prefix_lm):
    """The paper's picture, built by loops: each register right behind its anchor. Returns the loss."""
    lines = []
    for row in range(batch.rows.ids.shape[0]):
        line = []
        for span in (s for s in batch.spans if s.row == row):
            d = int(r.offsets(torch.tensor([[span.sample]]), seed=seed, d_min=1, d_max=settings["d_max"]))
            last = len(span.ids) - 1
            for i, token in enumerate(span.ids):
                answers = span.prefix - 1 <= i < last
                line.append((token, False, i, i, span, span.ids[i + 1] if answers else None))
                if answers and i + d <= last:
                    line.append((None, True, i + d - 1, i, span, span.ids[i + d]))
        lines.append(line)
    width, losses = max(map(len, lines)), {False: [], True: []}
    for line in lines:
        line += [(0, False, 0, 0, None, None)] * (width - len(line))
        sees = torch.eye(width, dtype=torch.bool)
        for q, (_, _, _, at, span, _) in enumerate(line):
            for k, (_, key_register, _, key_at, key_span, _) in enumerate(line):
                both = prefix_lm and span is not None and at < span.prefix and key_at < span.prefix and not line[q][1]
                if span is not None and span is key_span and not key_register and (key_at <= at or both):
                    sees[q, k] = True
        embeds = vectors(model, [e[0] for e in line], [e[1] for e in line], [0] * width)
        mask = sees[None, None]
        if model.config._attn_implementation == "eager":
            mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
        position = torch.tensor([[e[2] for e in line]])
        out = model(inputs_embeds=embeds[None], position_ids=position, attention_mask=mask, use_cache=False).logits[0]
        for j, (_, is_register, _, _, _, target) in enumerate(line):
            if target is not None:
                losses[is_register].append(F.cross_entropy(out[j].float(), torch.tensor(target)))
    plain, extra = torch.stack(losses[False]).mean(), torch.stack(losses[True]).mean()
    return (1 - settings["a"]) * plain + settings["a"] * extra, plain, extra


@BOTH
def test_registers_behind_equal_the_interleaved_picture(tiny, tools, family, batch, prefix_lm):
    """Losses and all gradients, the register's own included."""
    model, settings = tiny(family), {"d_max": 3, "a": 0.3}
    method = ready(tools, model, **settings)
    total, parts = method.compute_loss(model, method.train_layout(batch.rows, Context(seed=4, prefix_lm=prefix_lm)))
    theirs, plain, extra = interleaved(model, batch, 4, settings, prefix_lm)
    tools.close(total, theirs)
    tools.close(parts["next_token"], plain.detach())
    tools.close(parts["register"], extra.detach())
    assert abs(float((plain - extra).detach())) > 1e-3
    ours = tools.gradients(model, total)
    tools.same_gradients(ours, tools.gradients(model, theirs))
    assert ours["mtp.registers.weight"].shape == (1, 32)
    assert float(ours["mtp.registers.weight"].abs().max()) > 1e-4


@BOTH
def test_order_in_the_row_is_free(tiny, tools, batch, prefix_lm):
    """A layout with its columns shuffled gives the same logits, shuffled."""
    model = tiny()
    layout = ready(tools, model).train_layout(batch.rows, Context(prefix_lm=prefix_lm))
    index = torch.stack(
        [
            torch.randperm(layout.ids.shape[1], generator=torch.Generator().manual_seed(s))
            for s in range(layout.ids.shape[0])
        ]
    )
    ours, shuffled = forward(model, layout), forward(model, layout.take(index))
    used = (layout.segment >= 0).gather(1, index)
    tools.close(shuffled[used], ours.gather(1, index[..., None].expand(-1, -1, ours.shape[-1]))[used])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_neox"])
def test_registers_do_not_see_each_other(tiny, tools, batch, family):
    """Leaving registers out, or changing the vector of some, changes no other."""
    model = tiny(family)
    method = ready(tools, model, offsets="mixed", register_embedding="per_offset")
    layout = method.train_layout(batch.rows, Context())
    before = forward(model, layout)
    length = batch.rows.ids.shape[1]
    fewer = torch.tensor([*range(length), *range(length + 1, layout.ids.shape[1], 2)])
    used = layout.segment[:, fewer] >= 0
    tools.close(forward(model, layout.take(fewer))[used], before[:, fewer][used])
    with torch.no_grad():
        model.mtp["registers"].weight[1].neg_()
    after, changed = forward(model, layout), layout.register & (layout.ids == tools.vocabulary + 1)
    assert changed.any() and (layout.register & ~changed).any()
    tools.close(after[~changed], before[~changed])
    assert float((after - before)[changed].detach().abs().amax(-1).min()) > 1e-3


def test_size_and_start_of_the_register(tiny, tools):
    """One vector, or one per offset; the mean embedding, or as the model's rows."""
    for settings, count in [({}, 1), ({"register_embedding": "per_offset", "d_min": 2, "d_max": 5}, 4)]:
        model = tiny()
        parameters = sum(p.numel() for p in model.parameters())
        method = MuToR.of(**settings)
        method.attach(model)
        table = model.mtp["registers"].weight
        assert table.shape == (count, 32) and method.added_parameters(model) == count * 32
        assert sum(p.numel() for p in model.parameters()) == parameters + count * 32
        tools.close(table.detach(), model.get_input_embeddings().weight.detach().mean(0).expand(count, -1))
    model = tiny()
    MuToR.of(register_init="model", register_embedding="per_offset", d_max=30).attach(model)
    std = float(model.get_input_embeddings().weight.std())
    assert 0.85 * std < float(model.mtp["registers"].weight.std()) < 1.15 * std


@pytest.mark.parametrize("tied", [True, False])
def test_export_is_the_plain_model(tiny, tools, family, batch, tmp_path, tied):
    """After a few steps: no extra keys, no missing ones, the same logits bit for bit."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model = tiny(family, tie_word_embeddings=tied)
    keys = set(model.state_dict())
    method = ready(tools, model)
    optimiser = torch.optim.AdamW(model.parameters(), 1e-2)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    for seed in range(3):
        optimiser.zero_grad()
        method.compute_loss(model, method.train_layout(batch.rows, Context(seed=seed)))[0].backward()
        optimiser.step()
    assert not torch.equal(start["mtp.registers.weight"], model.mtp["registers"].weight)
    method.export(model, tmp_path / "ours")
    tiny(family, tie_word_embeddings=tied).save_pretrained(tmp_path / "stock")
    ours, stock = ({file.name: file for file in (tmp_path / name).iterdir()} for name in ("ours", "stock"))
    assert set(ours) == {*stock, "method"} and ours["config.json"].read_text() == stock["config.json"].read_text()
    assert set(load_file(ours["model.safetensors"])) == set(load_file(stock["model.safetensors"]))
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert set(plain.state_dict()) == keys and type(plain) is type(model)
    embeddings = plain.get_input_embeddings().weight
    assert (plain.get_output_embeddings().weight.data_ptr() == embeddings.data_ptr()) == tied
    model.set_attn_implementation(plain.config._attn_implementation)
    ids = batch.rows.ids[:, :7]
    assert torch.equal(plain(ids).logits, model(ids).logits)
    assert not torch.equal(
        embeddings, start[next(n for n, p in model.named_parameters() if p.shape == embeddings.shape)]
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma", "gemma3_text", "qwen3", "mistral", "gpt_neox", "cohere"])
def test_eager_equals_sdpa(tiny, tools, family, batch):
    """A bool mask, and floats to add."""
    seen = []
    for implementation in ("sdpa", "eager"):
        model = tiny(family, attn_implementation=implementation)
        assert model.config._attn_implementation == implementation
        method = ready(tools, model)
        layout = method.train_layout(batch.rows, Context(prefix_lm=True))
        seen.append(forward(model, layout)[layout.segment >= 0])
    tools.close(*seen)


@BOTH
def test_the_block_mask_rule_equals_the_dense_mask(tiny, tools, batch, prefix_lm):
    """FlexAttention's mask_mod, evaluated densely."""
    from torch.nn.attention.flex_attention import create_mask

    layout = ready(tools, tiny()).train_layout(batch.rows, Context(prefix_lm=prefix_lm))
    batch_size, length = layout.ids.shape
    theirs = create_mask(mask_mod(layout), batch_size, None, length, length, device="cpu")
    assert torch.equal(theirs, dense_mask(layout))
    unknown = SimpleNamespace(_attn_implementation="flash_attention_2")
    with pytest.raises(ValueError, match="flash_attention_2"):
        attention_mask(layout, unknown, torch.float32)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("family", ["llama", "gemma", "gemma2", "qwen3", "mistral"])
@pytest.mark.parametrize("name", ["mutor", "parallel_mtp", "sequential_mtp"])
def test_both_backends_give_the_same_losses_and_gradients(tiny, tools, batch, flex_with_gradients, family, name):
    """A dense mask under sdpa or eager against a block mask under FlexAttention, prefix-LM, padded and packed."""
    cls = load(METHODS, name, "method")
    method, model = cls(cls.Config(d_max=3, a=0.3)), tiny(family)
    tools.attach(method, model)
    layout = method.train_layout(batch.rows, Context(seed=1, prefix_lm=True)).compact()
    found = []
    for implementation in (model.config._attn_implementation, "flex_attention"):
        model.set_attn_implementation(implementation)
        loss, _ = method.compute_loss(model, layout)
        found.append((loss.detach(), tools.gradients(model, loss)))
    tools.close(found[1][0], found[0][0])
    tools.same_gradients(found[1][1], found[0][1])


@pytest.mark.parametrize(
    ("family", "name"),
    [("lfm2", "Lfm2"), ("mamba", "Mamba"), ("bloom", "Bloom"), ("qwen3_next", "Qwen3Next")],
)
def test_models_that_cannot_hold_registers_are_refused(tiny, family, name):
    """Mixers that ignore the mask, and models that take neither mask nor positions."""
    with pytest.raises(ValueError, match=name):
        MuToR.of().attach(tiny(family))


def test_a_convolution_between_tokens_is_refused(tiny):
    """A causal mixer behind a known norm: its registers see the tokens and registers that stand before them."""
    model = tiny("lfm2")
    model.model.norm = model.model.embedding_norm  # as if the adapter knew the name
    with pytest.raises(ValueError, match="Lfm2"):
        MuToR.of().attach(model)


@pytest.mark.parametrize(
    ("first", "second"), [("mutor", "mutor"), ("mutor", "parallel_mtp"), ("sequential_mtp", "mutor")]
)
def test_attaching_twice_is_refused(tiny, first, second):
    """Two methods' parameters would mix."""
    model = tiny()
    one, two = (load(METHODS, name, "method") for name in (first, second))
    one(one.Config()).attach(model)
    with pytest.raises(ValueError, match=r"already attached.*LlamaForCausalLM"):
        two(two.Config()).attach(model)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("name", ["mutor", "parallel_mtp", "sequential_mtp"])
def test_gradient_checkpointing(tiny, tools, batch, family, name):
    """The same loss and gradients, enabled before or after attaching."""
    seen = []
    for when in ("never", "before", "after"):
        model, method = tiny(family), load(METHODS, name, "method")
        method = method(method.Config(d_max=3))
        if when == "before":
            model.gradient_checkpointing_enable()
        tools.attach(method, model)
        if when == "after":
            model.gradient_checkpointing_enable()
        model.train()
        total, _ = method.compute_loss(model, method.train_layout(batch.rows, Context()))
        seen.append((total.detach(), tools.gradients(model, total)))
    for total, gradients in seen[1:]:
        tools.close(total, seen[0][0])
        tools.same_gradients(gradients, seen[0][1])


def test_loss_weights_and_missing_registers(tiny, tools, batch):
    """a weighs the register loss; a batch whose registers all run past the end still trains."""
    for a in (0.2, 0.9):
        model = tiny()
        method = ready(tools, model, a=a)
        total, parts = method.compute_loss(model, method.train_layout(batch.rows, Context()))
        tools.close(total.detach(), (1 - a) * parts["next_token"] + a * parts["register"])
    method = ready(tools, model := tiny(), d_min=30, d_max=30)
    total, parts = method.compute_loss(model, method.train_layout(batch.rows, Context()))
    assert torch.isfinite(total) and float(parts["register"]) == 0
    assert all(torch.isfinite(g).all() for g in tools.gradients(model, total).values())


def test_lengths_beyond_the_model_are_refused(tiny, tools, batch):
    """Learned positions end, rotary ones were never trained further on."""
    for family, own, name in [
        ("gpt2", {"n_positions": 9}, "GPT2LMHeadModel"),
        ("llama", {"max_position_embeddings": 9}, "LlamaForCausalLM"),
    ]:
        model = tiny(family, **own)
        method = ready(tools, model)
        with pytest.raises(ValueError, match=f"{name}.*11 tokens.*max_position_embeddings of 9; shorten"):
            method.compute_loss(model, method.train_layout(batch.rows, Context()))


def test_shuffled_targets_are_others_for_each_seed_and_batch():
    """Drawn once for all, a shuffle could be learned; drawn from the global generator, no run would be repeated."""
    from mutor.mtp.mutor import _shuffled

    target, has = torch.arange(40).reshape(2, 20), torch.ones(2, 20, dtype=torch.bool)
    has[0, :3] = False
    found = {(seed, sample): _shuffled(target, has, seed, sample) for seed in (0, 1) for sample in (0, 1, 5)}
    assert len({tuple(out.flatten().tolist()) for out in found.values()}) == 6
    for (seed, sample), out in found.items():
        assert out[0, :3].tolist() == [0, 1, 2] and sorted(out.flatten().tolist()) == list(range(40))
        assert torch.equal(out, _shuffled(target, has, seed, sample))
