"""What every method does alike: what it saves, of the model as it is or of a state given to it."""

import json

import pytest
import torch
from safetensors.torch import load_file

from mutor.mtp.mutor import MuToR


@pytest.mark.parametrize("given", [False, True])
def test_what_is_saved_is_the_models_state_or_the_one_given(tiny, tmp_path, given):
    """A sharded model's own state dict does not hold it whole, so its trainer gives one."""
    method = MuToR.of(d_max=2)
    model = method.attach(tiny())
    wanted = {name: value + 1 if given else value for name, value in model.state_dict().items()}
    state = wanted if given else None
    method.export(model, tmp_path / "plain", state)
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
