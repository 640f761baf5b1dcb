"""Adapters at registers alone: the plain model stays as it was, bit for bit."""

import copy
from pathlib import Path

import pytest
import torch
from test_trunk import at_the_start, finished, made, unchanged, weights
from transformers import AutoModelForCausalLM

from mutor.mtp.layout import regular
from mutor.mtp.method import Context


def loud(model):
    """Adapters that matter."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".up." in name:
                parameter.normal_(0, 0.2)
    return model


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma", "gpt_neox", "phi3"])
def test_tokens_are_the_base_models_and_registers_are_not(tiny, batch, tmp_path, architecture):
    model, method = tiny(architecture), made("mutor", d_max=3, trunk="frozen", register_lora=4)
    base = copy.deepcopy(model)
    method.attach(model)
    fed = method.train_layout(batch.rows, Context(prefix_lm=True))
    token = (fed.segment >= 0) & ~fed.register
    with torch.no_grad():
        before = method.trunk(model, fed).normed
        loud(model)
        after = method.trunk(model, fed).normed
        alone = method.trunk(model, regular(batch.rows)).normed
        other = made("next_token")
        other.attach(base)
        assert torch.equal(alone, other.trunk(base, regular(batch.rows)).normed)
    assert torch.equal(before[token], after[token])
    assert float((before - after)[fed.register].abs().max()) > 0.01
    linear = {"llama": 7, "gemma": 7, "gpt2": 4, "gpt_neox": 4, "phi3": 4}[architecture]
    assert len(model.mtp["adapters"]) == 2 * linear
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(model(ids).logits, base(ids).logits)
    method.export(model, tmp_path)
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and unchanged(base.state_dict(), plain.state_dict()) == set(base.state_dict())
    method.save_own(model, tmp_path / "method")
    again = made("mutor", d_max=3, trunk="frozen", register_lora=4)
    loaded = again.load_own(plain, tmp_path / "method").eval()
    with torch.no_grad():
        assert torch.equal(again.trunk(loaded, fed).normed, after)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_adapters_and_the_register_alone(tiny, batch, checkpointing):
    """The same with recomputed activations; a copy of the model has a gate and adapters of its own."""
    found = []
    for again in (False, checkpointing):
        model, method = tiny("llama"), made("mutor", d_max=3, trunk="frozen", register_lora=4)
        torch.manual_seed(0)
        method.attach(model)
        loud(model).train()
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(1)
        method.compute_loss(model, method.train_layout(batch.rows, Context()))[0].backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        assert set(found[-1]) == {n for n, _ in model.named_parameters() if n.startswith("mtp.")}
        loud(method.trunk.model)
    twin = copy.deepcopy(model)
    assert twin.mtp["adapters"][0].gate is not model.mtp["adapters"][0].gate
    assert len({id(adapter.gate) for adapter in twin.mtp["adapters"]}) == 1
    ids = torch.tensor([[5, 6, 61]])
    want = model(ids).logits
    with torch.no_grad():
        for adapter in model.mtp["adapters"]:
            adapter.up.weight.zero_()
    assert torch.equal(twin(ids).logits, want) and not torch.equal(model(ids).logits, want)


def test_by_hand_on_one_layer(tiny):
    """W x + B A x at the register, W x at the token before it."""
    model, method = tiny("llama", num_hidden_layers=1), made("mutor", d_max=2, trunk="frozen", register_lora=3)
    method.attach(loud(model))
    loud(model)
    layer, adapter, seen = model.model.layers[0].self_attn.q_proj, model.mtp["adapters"][0], []
    hook = layer.register_forward_hook(lambda module, args, output: seen.append((args[0][0], output[0])))
    model(torch.tensor([[5, 61]]))
    hook.remove()
    (given, got) = seen[0]
    plain = given @ layer.weight.T
    torch.testing.assert_close(got[0], plain[0])
    torch.testing.assert_close(got[1], plain[1] + adapter.up.weight @ (adapter.down.weight @ given[1]))


def test_a_whole_run_leaves_the_model_as_it_was(tmp_path):
    folder, record, spec = finished("mutor", tmp_path, d_max=3, trunk="frozen", register_lora=4)
    after = weights(folder / "last")
    before = at_the_start(spec, len(after["transformer.wte.weight"]))
    assert unchanged(before, after) == set(before)
    matrices = [p for n, p in before.items() if p.ndim == 2 and ".h." in n]
    assert record["added_parameters"] == 32 + sum(4 * sum(p.shape) for p in matrices) == record["trainable_parameters"]
    losses = [entry["register"] for entry in record["curve"] if "register" in entry]
    assert losses[-1] < losses[0] and Path(folder / "last/method/weights.safetensors").exists()
