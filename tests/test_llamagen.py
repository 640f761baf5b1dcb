"""LlamaGen against a plain forward written from the published equations, on weights in the published layout."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from mutor.models.llamagen import SIZES, LlamaGenConfig, LlamaGenForCausalLM, convert, image_prompts
from mutor.mtp.answers import decode
from mutor.mtp.layout import Example, collate
from mutor.mtp.method import Context
from mutor.mtp.mutor import MuToR

SMALL = {
    "codes": 30, "classes": 5, "rows": 3, "columns": 4, "num_hidden_layers": 2, "num_attention_heads": 2,
    "hidden_size": 32, "intermediate_size": 48,
}  # fmt: skip


def published(config, seed=0):
    """Random weights under the published names, the output layer and the class rows among them."""
    g = torch.Generator().manual_seed(seed)
    d, inner = config.hidden_size, config.intermediate_size

    def draw(*shape):
        return torch.randn(*shape, generator=g) * (1.0 if len(shape) == 1 else 2.0 * shape[-1] ** -0.5)

    weights = {
        "tok_embeddings.weight": draw(config.codes, d) * 3,
        "cls_embedding.embedding_table.weight": draw(config.classes + 1, d) * 3,
        "norm.weight": 1 + 0.2 * draw(d),
        "output.weight": draw(config.codes, d) * 2,
        "freqs_cis": torch.zeros(1),
    }
    for n in range(config.num_hidden_layers):
        weights |= {
            f"layers.{n}.attention.wqkv.weight": draw(3 * d, d),
            f"layers.{n}.attention.wo.weight": draw(d, d),
            f"layers.{n}.feed_forward.w1.weight": draw(inner, d),
            f"layers.{n}.feed_forward.w2.weight": draw(d, inner),
            f"layers.{n}.feed_forward.w3.weight": draw(inner, d),
            f"layers.{n}.attention_norm.weight": 1 + 0.2 * draw(d),
            f"layers.{n}.ffn_norm.weight": 1 + 0.2 * draw(d),
        }
    return weights


def plain_forward(weights, config, label, codes):
    """[1 + T, codes]: token by token in loops, complex rotations of adjacent pairs, as the paper's code states it."""
    heads, d = config.num_attention_heads, config.hidden_size
    width = d // heads

    def norm(x, w):
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) * w

    def turned(x, place):
        """x: [heads, width] of the token at `place`, 0 the class token."""
        if place == 0:
            return torch.zeros_like(x)
        row, column = divmod(place - 1, config.columns)
        out = torch.empty_like(x)
        quarter = width // 4
        for j in range(width // 2):
            along, k = (row, j) if j < quarter else (column, j - quarter)
            angle = along / 10000 ** (2 * k / (width // 2))
            a, b = x[:, 2 * j], x[:, 2 * j + 1]
            out[:, 2 * j] = a * math.cos(angle) - b * math.sin(angle)
            out[:, 2 * j + 1] = b * math.cos(angle) + a * math.sin(angle)
        return out

    x = torch.cat([weights["cls_embedding.embedding_table.weight"][[label]], weights["tok_embeddings.weight"][codes]])
    for n in range(config.num_hidden_layers):
        w = {k.removeprefix(f"layers.{n}."): v for k, v in weights.items() if k.startswith(f"layers.{n}.")}
        q, k, v = (norm(x, w["attention_norm.weight"]) @ w["attention.wqkv.weight"].T).split(d, dim=1)
        q = torch.stack([turned(t.view(heads, width), p) for p, t in enumerate(q)])
        k = torch.stack([turned(t.view(heads, width), p) for p, t in enumerate(k)])
        v = v.view(-1, heads, width)
        mixed = torch.zeros_like(q)
        for t in range(len(x)):
            for h in range(heads):
                weight = torch.softmax(k[: t + 1, h] @ q[t, h] / width**0.5, 0)
                mixed[t, h] = weight @ v[: t + 1, h]
        x = x + mixed.flatten(1) @ w["attention.wo.weight"].T
        y = norm(x, w["ffn_norm.weight"])
        up = torch.nn.functional.silu(y @ w["feed_forward.w1.weight"].T) * (y @ w["feed_forward.w3.weight"].T)
        x = x + up @ w["feed_forward.w2.weight"].T
    return norm(x, weights["norm.weight"]) @ weights["output.weight"].T


@pytest.fixture
def model():
    config = LlamaGenConfig(**SMALL)
    return convert(published(config), config).eval()


def tokens(config, label, codes):
    return torch.tensor([[config.codes + label, *codes]])


def test_equals_the_published_equations(model, tools):
    config, rng = model.config, np.random.default_rng(0)
    for label in (0, 3, config.classes):
        codes = rng.integers(config.codes, size=config.rows * config.columns).tolist()
        theirs = plain_forward(published(config), config, label, codes)
        tools.close(model(tokens(config, label, codes)).logits[0], theirs, rtol=1e-3, atol=1e-4)
        assert theirs.std() > 0.5  # loud enough to tell


def test_sizes_as_published():
    counts = {}
    for name, size in SIZES.items():
        with torch.device("meta"):
            counts[name] = sum(p.numel() for p in LlamaGenForCausalLM(LlamaGenConfig(**size)).parameters())
    assert counts["B"] == 110_888_448 and round(counts["B"] / 1e6) == 111
    assert [round(counts[k] / 1e6) for k in ("L", "XL")] == [343, 775]


def test_new_models_start_as_published():
    """Output layer zero, the rest normal with 0.02."""
    torch.manual_seed(0)
    made = LlamaGenForCausalLM(LlamaGenConfig(**{**SMALL, "hidden_size": 128}))
    assert not made.lm_head.weight.any()
    for part in (made.model.embed_tokens, made.model.layers[0].self_attn.o_proj, made.model.layers[1].mlp.down_proj):
        assert float(part.weight.detach().std()) == pytest.approx(0.02, rel=0.1)


def test_saved_and_loaded(model, tmp_path, tools):
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = tokens(model.config, 2, range(12))
    assert torch.equal(model(ids).logits, again(ids).logits)
    assert not [n for n in model.state_dict() if "rotary" in n]


def test_dropouts_and_withheld_classes_in_training_only(model):
    ids = tokens(model.config, 2, range(12))
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)
    stack = model.model
    none = model.config.codes + model.config.classes
    labels = torch.arange(5).repeat(4000)[:, None] + model.config.codes
    got = stack._withheld(torch.cat([labels, torch.full_like(labels, 7), torch.full_like(labels, none + 1)], 1))
    dropped = got[:, 0] == none
    assert 0.09 < float(dropped.float().mean()) < 0.11 and torch.equal(got[~dropped, 0], labels[~dropped, 0])
    assert (got[:, 1] == 7).all() and (got[:, 2] == none + 1).all()  # codes and registers stay
    model.eval()
    assert torch.equal(stack._withheld(labels), labels)


def sample(model, classes, **settings):
    """int64 [B, cells]: codes of drawn images."""
    return decode(model, image_prompts(model, classes, **settings))[: len(classes)]


def by_hand(model, label, seed, guidance, temperature=1.0, top_k=0, number=0, batch=1):
    """One image of a batch, without cache."""
    config, codes = model.config, []
    noise = torch.Generator().manual_seed(seed)
    for _ in range(config.rows * config.columns):
        named = model(tokens(config, label, codes)).logits[0, -1]
        unnamed = model(tokens(config, config.classes, codes)).logits[0, -1]
        logits = (unnamed + guidance * (named - unnamed)) / temperature
        if top_k:
            logits[logits < logits.sort(descending=True).values[top_k - 1]] = -torch.inf
        draw = torch.empty(batch, config.codes).exponential_(generator=noise)[number]
        codes.append(int((torch.softmax(logits, 0) / draw).argmax()))
    return codes


@pytest.mark.parametrize(("guidance", "temperature", "top_k"), [(1.0, 1.0, 0), (2.0, 1.0, 0), (1.5, 0.7, 5)])
def test_sampling_with_cache_equals_cache_free(model, guidance, temperature, top_k):
    with torch.no_grad():
        model.lm_head.weight.mul_(0.2)
        drawn = sample(
            model, torch.tensor([1, 4]), seed=3, guidance=guidance, temperature=temperature, top_k=top_k
        ).tolist()
        for number, label in enumerate((1, 4)):
            assert drawn[number] == by_hand(model, label, 3, guidance, temperature, top_k, number, 2)
    assert drawn[0] != drawn[1]
    with pytest.MonkeyPatch.context() as patch:  # the cache of fixed size; compiling takes most of a minute
        patch.setattr(torch, "compile", lambda function: function)
        same = sample(
            model, torch.tensor([1, 4]), seed=3, guidance=guidance, temperature=temperature, top_k=top_k, compiled=True
        )
    assert same.tolist() == drawn
    other = sample(model, torch.tensor([1, 4]), seed=4, guidance=guidance, temperature=temperature, top_k=top_k)
    assert other.tolist() != drawn


def test_draws_follow_the_softmax(model):
    """First codes of many images of one class, against the class token's own distribution."""
    with torch.no_grad():
        model.lm_head.weight.mul_(0.1)
        expected = torch.softmax(model(tokens(model.config, 2, [])).logits[0, -1], 0)
        drawn = sample(model, torch.full((6000,), 2), seed=0, guidance=1.0)[:, 0]
    share = torch.bincount(drawn, minlength=model.config.codes) / 6000
    assert float((share - expected).abs().max()) < 0.02 and float(expected.max()) > 0.06


def test_bad_input_is_named(model):
    config = model.config
    weights = published(config)
    lacking = {k: v for k, v in weights.items() if k != "layers.1.attention.wo.weight"}
    with pytest.raises(ValueError, match=r"'layers\.1\.attention\.wo\.weight' is missing"):
        convert(lacking, config)
    with pytest.raises(ValueError, match="'extra' is not one of this model's"):
        convert({**weights, "extra": torch.zeros(1)}, config)
    with pytest.raises(ValueError, match=r"has shape \(29, 32\), allowed: \(30, 32\)"):
        convert({**weights, "output.weight": torch.zeros(29, 32)}, config)
    with pytest.raises(ValueError, match=r"classes: 5\.\.5, allowed: 0 to 4"):
        sample(model, torch.tensor([5]), seed=0)
    with pytest.raises(ValueError, match="temperature: 0"):
        sample(model, torch.tensor([1]), seed=0, temperature=0)
    with pytest.raises(ValueError, match="not divisible by 4"):
        LlamaGenConfig(**{**SMALL, "hidden_size": 36})


def test_holds_registers(model, tools):
    """Regular logits equal with and without registers; a register's equal a literal forward at its place."""
    config = model.config
    rng = np.random.default_rng(1)
    ids = [config.codes + 1, *rng.integers(config.codes, size=12).tolist()]
    alone = model(torch.tensor([ids])).logits
    method = MuToR.of(d_max=3, a=0.5)
    method.attach(model)
    with torch.no_grad():
        nn.init.normal_(model.mtp["registers"].weight)
    layout = method.train_layout(collate([Example(np.array(ids), 1, 5)], 0), Context(seed=2))
    out = method.trunk(model, layout)
    logits = method.trunk.logits(out.normed)
    tools.close(logits[0, :13], alone[0], rtol=1e-3, atol=1e-4)
    offset = int(layout.position[0, 13]) + 1  # behind the class token, at position t + d - 1 with t = 0
    assert int(layout.register.sum()) == 13 - offset and 1 <= offset <= 3  # those whose target exists
    for place in range(13, layout.ids.shape[1]):
        anchor = place - 13
        literal = model(
            torch.tensor([[*ids[: anchor + 1], int(layout.ids[0, place])]]),
            position_ids=torch.tensor([[*range(anchor + 1), anchor + offset - 1]]),
        ).logits[0, -1]
        tools.close(logits[0, place], literal, rtol=1e-3, atol=1e-4)
        assert int(layout.target[0, place]) == ids[anchor + offset]
