"""What every method does alike: what it saves, of the model as it is or of a state given to it."""

import contextlib
import json

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

import mutor
from mutor.mtp.backbone import Backbone
from mutor.mtp.mutor import MuToR
from mutor.mtp.trials import evaluating
from mutor.registry import answers_under


@pytest.mark.parametrize("given", [False, True])
def test_what_is_saved_is_the_models_state_or_the_one_given(tiny, tmp_path, given):
    """A sharded model's own state dict does not hold it whole, so its trainer gives one."""
    method = MuToR.of(d_max=2)
    model = method.attach(tiny())
    wanted = {name: value + 1 if given else value for name, value in model.state_dict().items()}
    state = wanted if given else None
    method.export(model, tmp_path / "plain", state)
    beside = load_file(tmp_path / "plain/method/weights.safetensors")
    assert torch.equal(beside["registers.weight"], wanted["mtp.registers.weight"])
    method.save_own(model, tmp_path / "plain/deep/method", state)
    plain, own = (
        load_file(tmp_path / "plain/model.safetensors"),
        load_file(tmp_path / "plain/deep/method/weights.safetensors"),
    )
    assert set(plain) | {f"mtp.{name}" for name in own} == set(wanted) and set(own) == {"registers.weight"}
    assert all(torch.equal(value, wanted[name]) for name, value in plain.items())
    assert torch.equal(own["registers.weight"], wanted["mtp.registers.weight"])
    method.save_own(model, tmp_path / "plain/deep/method", state)  # again, into the same folder
    made = json.loads((tmp_path / "plain/deep/method/method.json").read_text())
    assert made["class"] == "mutor.mtp.mutor:MuToR" and made["settings"]["d_max"] == 2


def test_own_weights_have_to_be_there(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"has no weights\.safetensors, the weights that MuToR adds"):
        MuToR.of().load_own(tiny(), tmp_path)


def test_numbers_of_added_parameters(tiny):
    method, model = MuToR.of(), tiny()
    assert method.added_parameters(model) == 0 and method.added_parameters(method.attach(model)) == 32


def test_a_loss_from_outputs_by_hand(tiny):
    """Four tokens, registers of offset 2 behind the last three but one; token 0 is a target like any other."""
    method = MuToR.of(d_min=2, d_max=2, a=0.25)
    model = method.attach(tiny()).train()
    collator = method.collator(3)
    collator.set_epoch(0)
    for ids, prefix, following, further in [
        ([5, 9, 0, 7, 0, 60], 2, [(1, 0), (2, 7), (3, 0), (4, 60)], [(6, 7), (7, 0), (8, 60)]),
        ([5, 9], 1, [(0, 9)], []),
    ]:
        batch = collator([{"input_ids": ids, "prefix_length": prefix}])
        labels = batch.pop("labels")
        assert (
            labels[0, : len(ids)].tolist() == [-100] * prefix + ids[prefix:] and (labels[0, len(ids) :] == -100).all()
        )
        logits = model(**batch).logits[0].detach()
        one, two = (
            [float(cross_entropy(logits[at], torch.tensor(token))) for at, token in some]
            for some in (following, further)
        )
        wanted = 0.75 * sum(one) / len(one) + 0.25 * sum(two) / max(1, len(two))
        assert method.loss_from_outputs(None, labels).item() == pytest.approx(wanted, rel=1e-5)
        model(**batch)
        half = method.loss_from_outputs(None, labels, torch.tensor(2 * len(one))).item()
        assert half == pytest.approx(wanted / 2, rel=1e-5)


def test_a_new_layer_stands_where_the_last_one_does(tiny):
    """Same class, number and configuration, the very object, so that a change of it counts here, too; other weights."""
    model = tiny("llama", num_hidden_layers=3)
    last, layer = model.model.layers[2], Backbone(model).new_layer()
    assert type(layer) is type(last) and layer.self_attn.layer_idx == 2 and layer.self_attn.config is model.config
    assert not torch.equal(layer.mlp.up_proj.weight, last.mlp.up_proj.weight)
    assert layer.mlp.up_proj.weight.std().item() == pytest.approx(model.config.initializer_range, rel=0.1)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
def test_what_is_added_to_a_bfloat16_model_is_bfloat16(tiny, family):
    """Rounding alone does not make it look unfit; inputs and outputs keep its type."""
    method = MuToR.of()
    model = method.attach(tiny(family).bfloat16())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    fed = model.get_input_embeddings()(torch.tensor([[5, method.trunk.vocabulary]]))
    assert fed.dtype == torch.bfloat16 and method.trunk.new_linear(32, 4).weight.dtype == torch.bfloat16


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
def test_a_model_is_evaluated_and_then_as_it_was(tiny, attention, training):
    """Under the backend that its own answers under; after an error, too."""
    model = tiny("llama").train(training)
    model.set_attn_implementation(attention)
    for error in (False, True):
        with contextlib.suppress(KeyError), evaluating(model):
            assert not model.training and model.config._attn_implementation == answers_under(attention)
            if error:
                raise KeyError
        assert model.training is training and model.config._attn_implementation == attention


@pytest.mark.parametrize("head", ["layer", "linear", "output"])
def test_new_layers_begin_as_the_recipe_says(tiny, head):
    """And what the model has stays; without a word they begin as the model's own do."""

    def half(module):
        for parameter in module.parameters():
            parameter.detach().fill_(0.5)

    model, plain = tiny(), tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    method = mutor.method("parallel_mtp", head=head)
    method.attach(model, half)
    assert all((parameter == 0.5).all() for parameter in method.heads.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if name in before)
    again = mutor.method("parallel_mtp", head=head)
    again.attach(plain)
    assert not any((parameter == 0.5).all() for parameter in again.heads.parameters())
