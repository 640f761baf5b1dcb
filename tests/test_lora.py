"""Adapters: what is trained, what is saved, and that it is the same model."""

import pytest
import torch
from mutor.baselines.lora import LoRAMuToR, LoRANextToken
from transformers import AutoConfig, AutoModelForCausalLM

from mutor.checks import from_mapping
from mutor.mtp.method import Context
from mutor.mtp.mutor import MuToR
from mutor.registry import METHODS, load


def made(name, **settings):
    """A method by name."""
    method = load(METHODS, name, "m")
    return method(from_mapping(method.Config, settings, name))


@pytest.mark.parametrize("name", ["lora_next_token", "lora_mutor"])
def test_adapters_and_register_are_trained_and_nothing_else(tiny, family, batch, name):
    model = tiny(family)
    plain = {n: p.clone() for n, p in model.named_parameters()}
    method = made(name, rank=4)
    method.attach(model)
    loss, _ = method.compute_loss(model, method.train_layout(batch.rows, Context()))
    loss.backward()
    trained = [n for n, p in model.named_parameters() if p.grad is not None]
    wanted = [n for n, _ in model.named_parameters() if ".lora_" in n or n.startswith("mtp.")]
    assert trained == wanted and wanted
    assert any(n.startswith("mtp.") for n in trained) == (name == "lora_mutor")
    frozen = {n.replace(".base_layer", ""): p for n, p in model.named_parameters() if n not in trained}
    assert frozen.keys() == plain.keys() and all(torch.equal(frozen[n], plain[n]) for n in plain)
    assert method.added_parameters(model) == sum(p.numel() for n, p in model.named_parameters() if n in trained)


def test_untrained_adapters_change_nothing(tiny, batch):
    """Their second factor starts at zero: loss and register's gradient are plain MuToR's."""
    one, two = tiny("llama"), tiny("llama")
    plain, lora = MuToR.of(d_max=3), made("lora_mutor", d_max=3, rank=4)
    losses = []
    for model, method in ((one, plain), (two, lora)):
        method.attach(model)
        loss, _ = method.compute_loss(model, method.train_layout(batch.rows, Context()))
        loss.backward()
        losses.append(loss.detach())
    assert torch.allclose(*losses)
    table = [m.mtp["registers"].weight.grad for m in (one, two)]
    assert torch.allclose(*table, atol=1e-6)


@pytest.mark.parametrize("name", ["lora_next_token", "lora_mutor"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma"])
def test_exported_model_and_adapter_are_the_trained_model(tiny, batch, tmp_path, name, architecture):
    from peft import PeftModel

    model, base = tiny(architecture), tiny(architecture)
    method = made(name, rank=4, lora_alpha=12)
    method.attach(model)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if ".lora_" in n:
                p.normal_(0, 0.1)
    method.export(model, tmp_path)
    ids = batch.rows.ids
    wanted = model(ids).logits
    assert not torch.allclose(wanted, base(ids).logits, atol=1e-2)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(plain) is type(base) and not [n for n, _ in plain.named_parameters() if "lora" in n]
    torch.testing.assert_close(plain.eval()(ids).logits, wanted, rtol=1e-3, atol=1e-3)
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(adapted(ids).logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_state_dict_is_exported_whatever_the_model_holds(tiny, batch, tmp_path, architecture):
    """Sharded, a model holds a part of its weights and of its adapters' alone."""
    from peft import PeftModel

    model, method = tiny(architecture), made("lora_mutor", rank=4, lora_alpha=12)
    method.attach(model)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.1)
    ids, base = batch.rows.ids, tiny(architecture)
    wanted, state = model(ids).logits, {n: v.clone() for n, v in model.state_dict().items()}
    frozen = {n: v for n, v in state.items() if ".lora_" not in n and not n.startswith("mtp.")}
    base.load_state_dict({n.replace(".base_layer", ""): v for n, v in frozen.items()})
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    method.export(model, tmp_path, state)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(plain(ids).logits, wanted, rtol=1e-3, atol=1e-3)
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(adapted(ids).logits, wanted, rtol=1e-3, atol=1e-3)


def test_size_for_gemma_2b():
    """About 39M trainable parameters at rank 32 (paper, Table 5): counted by hand, and on the meta device."""
    config = AutoConfig.for_model(
        "gemma",
        hidden_size=2048,
        num_hidden_layers=18,
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=256,
        intermediate_size=16384,
        vocab_size=256000,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    method = made("lora_next_token")
    method.attach(model)
    a_layer = 2 * (2048 + 2048) + 2 * (2048 + 256) + 3 * (2048 + 16384)
    assert method.added_parameters(model) == 18 * 32 * a_layer == 39_223_296


def test_classes_are_the_registered_ones():
    assert isinstance(made("lora_mutor"), LoRAMuToR) and isinstance(made("lora_next_token"), LoRANextToken)
