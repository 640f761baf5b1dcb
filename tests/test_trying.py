"""`python -m mutor try`: a user's own model and data in one command, from the files to a verdict in words."""

import json
import os
import re
import struct
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import pytest

from mutor import trying
from mutor.cli import main
from mutor.config.load import load_scale
from mutor.config.own import NAME, name_of, own_scale, own_table, quick
from mutor.config.runs import cells_of, specs_of
from mutor.config.schema import Dataset, ModelConfig
from mutor.results import plan
from mutor.results.records import Records
from mutor.results.sizes import lengths, parameters, sized

ROOT = Path(__file__).parent.parent


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def sums(first, count):
    return [{"prompt": f"{n} + 1 =", "answer": str(n + 1)} for n in range(first, first + count)]


@pytest.fixture
def files(tmp_path):
    return {
        "train_file": write(tmp_path / "sums.jsonl", sums(0, 8)),
        "test_file": write(tmp_path / "new.jsonl", sums(50, 4)),
    }


# the scale


def test_the_scale_is_own_yaml_with_the_given_in_its_place(files, monkeypatch, tmp_path):
    """All else is as the file says; paths hold wherever the command is called from."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    file = load_scale(ROOT, "own")
    scale = own_scale(
        ROOT, "./here/", {"train_file": "sums.jsonl", "test_file": files["test_file"]}, {"extract": "boxed"}
    )
    assert scale.models == {
        "here": ModelConfig(**{**asdict(file.models["mine"]), "pretrained": str(tmp_path / "here")})
    }
    (name, data), (_, theirs) = *scale.datasets.items(), *file.datasets.items()
    assert name == "sums" and data.options == theirs.options | files | {"extract": "boxed"}
    assert (data.settings, scale.recipes, scale.seeds) == (theirs.settings, file.recipes, file.seeds)
    assert data.options["prefix_lm"] is False
    hub = own_scale(ROOT, "Someone/A model", files, {})
    assert list(hub.models) == ["A-model"] and hub.models["A-model"].pretrained == "Someone/A model"


def test_settings_find_their_place(files):
    given = {
        "steps": 7,
        "new_tokens": 5,
        "dtype": "bfloat16",
        "threads": 1,
        "mutor.d_max": 2,
        "token_order.weight": 0.5,
    }
    scale = own_scale(ROOT, "m", files, given)
    data = scale.datasets["sums"]
    assert (scale.recipes["mine"]["steps"], scale.recipes["mine"]["epochs"]) == (7, None) and scale.threads == 1
    assert scale.models["m"].dtype == "bfloat16" and data.options["new_tokens"] == 5
    assert data.settings["mutor"] == {"d_max": 2, "a": 0.3} and data.settings["token_order"] == {"weight": 0.5}
    assert own_scale(ROOT, "m", files, {"compare": "rouge"}).datasets["sums"].metrics == {"accuracy": "rougeL"}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"epoch": 3}, "--set: 'epoch' is unknown, did you mean 'epochs'"),
        ({"epochs": "x"}, "recipes: mine (for sums): epochs: 'x' is not"),
        ({"extract": "hash"}, "extract: 'hash' is not allowed; allowed: hashes, boxed, letter, whole"),
        ({"mutr.d_max": 2}, "--set: method: 'mutr' is unknown, did you mean 'mutor'"),
        ({"mutor.d_mx": 2}, "unknown key 'd_mx', did you mean 'd_max'"),
    ],
)
def test_what_is_no_setting_is_refused(files, given, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        own_scale(ROOT, "m", files, given)


def test_methods_bring_what_they_are_compared_with():
    def labels(*methods):
        return [row.label for row in own_table(ROOT, methods).rows]

    assert labels("mutor") == ["before fine-tuning", "next_token", "mutor"]
    assert labels("lora_mutor") == ["before fine-tuning", "next_token", "lora_next_token", "lora_mutor"]
    assert labels("token_order", "mutor") == ["before fine-tuning", "next_token", "mutor", "token_order"]
    assert own_table(ROOT, ["token_order"]).rows[-1].against == ("next_token",)
    with pytest.raises(ValueError, match="did you mean 'mutor'"):
        labels("mutr")


def test_another_model_another_file_or_setting_is_another_folder(files, tmp_path):
    """Seeds, methods and their settings lie beside each other in one."""
    first = name_of(own_scale(ROOT, "m", files, {}))
    assert re.fullmatch(r"m-sums-[0-9a-f]{8}", first)
    assert name_of(own_scale(ROOT, "m", files, {"mutor.d_max": 2, "threads": 1})) == first
    others = {
        name_of(own_scale(ROOT, "other", files, {}))[-8:],
        name_of(own_scale(ROOT, "m", files, {"epochs": 1})),
        name_of(own_scale(ROOT, "m", files, {"extract": "boxed"})),
        name_of(own_scale(ROOT, "m", files | {"valid_file": write(tmp_path / "valid.jsonl", sums(90, 2))}, {})),
    }
    write(Path(files["test_file"]), sums(60, 4))
    others.add(name_of(own_scale(ROOT, "m", files, {})))
    assert len(others) == 5 and first not in others and first[-8:] not in others
    folder = tmp_path / "model"
    folder.mkdir()
    weights = folder / "model.safetensors"
    weights.write_bytes(b"1")
    os.utime(weights, (1, 1))
    before = name_of(own_scale(ROOT, str(folder), files, {}))
    os.utime(weights, (2, 2))
    assert name_of(own_scale(ROOT, str(folder), files, {})) != before
    with pytest.raises(ValueError, match=r"none\.jsonl: there is no such file"):
        name_of(own_scale(ROOT, "m", files | {"train_file": "none.jsonl"}, {}))


def test_a_quick_pass_is_short(files):
    full = own_scale(ROOT, "m", files | {"valid_file": files["test_file"]}, {})
    few = quick(full)
    specs = specs_of(cells_of(own_table(ROOT, None), few))
    assert {len(spec.seeds) for spec in specs} == {1} and len(specs) == 7
    assert {spec.recipe.for_size(100).steps for spec in specs} == {0, 4}
    options = few.datasets["sums"].options
    assert options["test_size"] == options["valid_size"] == 8 and few.models == full.models
    assert "valid_size" not in quick(own_scale(ROOT, "m", files, {})).datasets["sums"].options


# the plan


def header(file, **shapes):
    """A .safetensors file without its numbers."""
    text = json.dumps(
        {"__metadata__": {"format": "pt"}, **{k: {"shape": s, "dtype": "F32"} for k, s in shapes.items()}}
    )
    file.write_bytes(struct.pack("<Q", len(text)) + text.encode())


def test_parameters_are_counted_without_loading(tmp_path):
    header(tmp_path / "model-1.safetensors", one=[3, 5], two=[7])
    header(tmp_path / "model-2.safetensors", three=[], four=[2, 2, 2])
    assert parameters(ModelConfig(role="own", pretrained=str(tmp_path))) == 15 + 7 + 1 + 8
    (tmp_path / "model-2.safetensors").write_bytes(b"no")
    assert parameters(ModelConfig(role="own", pretrained=str(tmp_path))) is None
    assert parameters(ModelConfig(role="own", pretrained="nobody/no-model")) is None
    assert parameters(ModelConfig(role="own", architecture="llama")) is None
    assert parameters(ModelConfig(role="own", pretrained="no/file.gguf")) is None


def test_lengths_are_those_of_the_files(tmp_path):
    """Four characters a token: 8 + 1 + 3 and 4 + 1 + 7 of prompts and answers, 4 + 4 and 9 + 3 of a chat."""
    chat = {"messages": [{"role": "user", "content": "12 +"}, {"role": "assistant", "content": "123"}]}
    rows = [{"prompt": "x" * 8, "answer": "123"}, {"prompt": "x" * 4, "answer": "1" * 7}, chat]
    options = {"train_file": write(tmp_path / "a", rows), "test_file": write(tmp_path / "b", rows[:2]), "max_tokens": 8}
    found = lengths(Dataset(role="own", task="text", options={"corpus": "own", **options}, recipe="mine"))
    assert found == {"examples": 3, "tokens": pytest.approx((12 + 12 + 20) / 3 / 4), "problems": 2}
    few = lengths(
        Dataset(role="own", task="text", options={"corpus": "own", **options, "max_tokens": 4}, recipe="mine")
    )
    assert few["examples"] == 2 and few["tokens"] == 3


def planned(scale, runs, measured=()):
    return plan.lines([own_table(ROOT, ["mutor"])], scale, Records(runs), list(measured))


def test_plan_before_anything_ran(tmp_path, monkeypatch):
    """6 x 1000 parameters x 3 epochs x 32 examples x 25 tokens; 2 x 1000 x (25 + 128) x 4 more for answers.

    At 1000 FLOP/s, of which 40% are reached: (14.4e6 + 1.224e6) / 400 s = 651 minutes a seed; 51 before training.
    """
    header(tmp_path / "model.safetensors", all=[1000])
    rows = [{"prompt": f"{n:>92} +", "answer": "12345"} for n in range(36)]
    files = {"train_file": write(tmp_path / "t", rows[:32]), "test_file": write(tmp_path / "e", rows[32:])}
    monkeypatch.setattr(plan, "products_a_second", lambda: 1000.0)
    text = planned(sized(own_scale(ROOT, str(tmp_path), files, {})), tmp_path / "runs")
    cells = [line.split() for line in text[2:5]]
    name = tmp_path.name
    assert cells[0] == ["0", "1", "51.0", "0", f"own/t/{name}/next_token/budget_factor=0"]
    assert cells[1] == ["0", "3", "1953.0", "~4.3e+07", f"own/t/{name}/next_token/default"]
    assert "3 settings, 7 seeded runs to do: 3957 CPU core minutes, 2 a run, 8.6e+07 FLOPs" in text
    assert any(line.startswith("~: about, with four characters a token") for line in text)
    assert text[-1].endswith("models kept on disk 0 MB, and two checkpoints of up to 0 MB while a run trains")


def test_models_and_checkpoints_on_disk(tmp_path, files):
    """Of 1e6 float32 numbers 4 MB a model, seven, or with a valid_file fourteen; 12 MB a checkpoint of AdamW's."""
    header(tmp_path / "model.safetensors", all=[1000, 1000])
    more = {"valid_file": files["test_file"]}
    for given, kept in ((files, 7 * 4), (files | more, 7 * 8)):
        text = planned(sized(own_scale(ROOT, str(tmp_path), given, {"batch_size": 4})), tmp_path / "runs")
        assert f"disk {kept} MB, and two checkpoints of up to 12 MB while a run trains" in text[-1]


def test_a_quick_pass_tells_how_long_the_whole_takes(files, tmp_path):
    """Steps of 2 s behind a first one of 30 s, 6 a whole run; 0.5 s a problem, 4 of them: 12 + 2 s a seed."""
    scale = sized(own_scale(ROOT, str(tmp_path), files, {"batch_size": 4}))
    spec = specs_of(cells_of(own_table(ROOT, ["next_token"]), scale))[1]
    curve = [{"step": n, "loss": 1.0, "seconds": 30.0 + 2 * (n - 1)} for n in (1, 2)]
    scored = {"names": ["last"], "seconds_evaluating": 4.0, "scores": {"accuracy": {"count": 8}}}
    record = {"path": spec.path, "train_data": spec.data, "model": spec.model, "method": "next_token", "steps": 2,
              "seconds_training": 32.0, "file": tmp_path / "metrics.json", "device": "cpu", "trainable_parameters": 9,
              "tokens": 80, "checkpoints": [scored]}  # fmt: skip
    (tmp_path / "metrics.json").write_text(json.dumps({"curve": curve}))
    found = plan.estimates([spec], scale, Records(tmp_path / "runs"), [record], lambda: 1.0)[0]
    assert spec.recipe.for_size(8).steps == 6 and found.minutes == pytest.approx(3 * 14 / 60)
    assert found.flops == 3 * 6 * (6 * 9 * 80 / 2)


def test_plan_of_the_scale_own_reads_its_files(tmp_path, monkeypatch, capsys):
    """`python -m mutor plan --scale own`, from a folder with the files that it names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    write(tmp_path / "data/train.jsonl", sums(0, 40))
    write(tmp_path / "data/test.jsonl", sums(50, 4))
    monkeypatch.setattr("mutor.cli.find_root", lambda: ROOT)
    monkeypatch.setattr("mutor.results.sizes.parameters", lambda model: 1000)
    assert main(["plan", "--scale", "own", "--runs", str(tmp_path / "runs")]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"0 +3 +\d+\.\d +~\d\.\de\+\d+ +own/mine/mine/mutor/default", printed)


# from end to end


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    """A tiny random Qwen3 with a tokenizer that has a chat template."""
    import copy

    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from mutor.tasks import standins

    folder = tmp_path_factory.mktemp("models") / "qwen3"
    words = copy.deepcopy(standins.tokenizer())
    words.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, intermediate_size=16, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    for part in (Qwen3ForCausalLM(config), words):
        part.save_pretrained(folder)
    return str(folder)


def test_one_command_from_files_to_a_verdict(qwen3, tmp_path, capsys, monkeypatch):
    """Killed behind its first run and called again: what stands on the terminal and on disk."""
    chats = [
        {"messages": [{"role": "user", "content": f"{n} +"}, {"role": "assistant", "content": f"{n % 3} and more"}]}
        for n in range(8)
    ]
    train, test = write(tmp_path / "t.jsonl", chats), write(tmp_path / "new.jsonl", sums(50, 3))
    out = tmp_path / "tries"
    words = [qwen3, train, test, "--methods", "mutor", "--seeds", "1", "2", "--out", str(out)]
    words += [
        "--set",
        "steps=2",
        "batch_size=4",
        "new_tokens=3",
        "log_every=1",
        "save_every=1",
        "threads=1",
        "mutor.d_max=2",
    ]
    from mutor.training import run as training

    real, begun = training.run, []

    def killed(spec, seeds, env):
        begun.append(spec.path)
        if len(begun) == 2:
            raise KeyboardInterrupt
        real(spec, seeds, env)

    monkeypatch.setattr(training, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        main(["try", *words])
    monkeypatch.setattr(training, "run", real)
    (folder,) = out.iterdir()
    first = next(folder.glob("runs/own/t/qwen3/next_token/budget_factor=0/seed1/metrics.json"))
    written = first.stat().st_mtime_ns
    capsys.readouterr()
    assert main(["try", *words]) == 0 and first.stat().st_mtime_ns == written
    printed = capsys.readouterr().out
    plan_lines = [line for line in printed.splitlines() if re.match(r" +\d+ +\d.* own/t/qwen3/", line)]
    assert [line.split()[:2] for line in plan_lines] == [["1", "0"], ["0", "2"], ["0", "2"]]
    end = [line for line in printed.partition("qwen3, accuracy on new.jsonl: ")[2].splitlines() if line]
    assert end[0].startswith("WARNING: every method scores 0")
    assert end[1].startswith("Scores in percent: before fine-tuning 0.0, next_token 0.0, mutor 0.0.")
    assert any(line.startswith("mutor against next_token: undecided. Training takes") for line in end)
    assert end[-1].startswith(f"In {folder}: own.csv, own.md, own.tex, runs.csv, report.html")
    frame = pd.read_csv(folder / "own.csv")
    assert list(frame["n_seeds"]) == [1, 1, 2, 2, 2, 2] and set(frame["benchmark"]) == {"new.jsonl"}
    assert f"qwen3, accuracy on new.jsonl: {end[0]}" in (folder / "own.md").read_text().replace("&lt;", "<")
    file = next(folder.glob("runs/own/t/qwen3/mutor/*/seed2/predictions-last.jsonl"))
    assert [json.loads(line)["prompt"] for line in file.read_text().splitlines()] == [
        f"{n} + 1 =" for n in (50, 51, 52)
    ]
    record = Records(folder / "runs").of_scale(NAME)[-1]
    assert record["config"]["task_options"]["prefix_lm"] is False


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("./none", "there is no folder ./none"),
        ("empty", "{here}/empty is a folder without config.json"),
        ("sums.jsonl", "{here}/sums.jsonl is a file; allowed: a folder, as save_pretrained writes it, or a .gguf file"),
    ],
)
def test_a_model_that_is_none_is_one_line(files, tmp_path, capsys, monkeypatch, model, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert main(["try", model, files["train_file"], files["test_file"]]) == 2
    assert capsys.readouterr().err == f"error: MODEL: {says.format(here=tmp_path)}\n"
    assert not (tmp_path / "tries").exists()


def test_a_model_that_the_hub_does_not_give_is_one_line(files, tmp_path, capsys, monkeypatch):
    """The tokenizer is asked for first: where there is no network, transformers' error has a page of traceback."""
    from huggingface_hub import constants
    from transformers import AutoTokenizer

    def no_network(*args, **kwargs):
        raise OSError("We couldn't connect to 'https://huggingface.co'.\nCheck your internet connection.")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", no_network)
    call = ["try", "some/model", files["train_file"], files["test_file"], "--out", str(tmp_path / "tries")]
    assert main(call) == 2
    told = "MODEL: some/model can't be had (We couldn't connect to 'https://huggingface.co'.); allowed: a model of the"
    assert capsys.readouterr().err == f"error: {told} hub, with a network, or a local folder\n"


def test_what_a_method_is_refused_for_does_not_stop_the_others(qwen3, tmp_path, capsys, monkeypatch):
    """A quick pass: d_min above every answer's length; and how long the whole takes, in words."""
    train, test = write(tmp_path / "t.jsonl", sums(0, 8)), write(tmp_path / "new.jsonl", sums(50, 2))
    words = [qwen3, train, test, "--methods", "mutor", "--seeds", "1", "--quick", "--out", str(tmp_path / "tries")]
    settings = ["batch_size=4", "new_tokens=3", "threads=1", "mutor.d_min=30", "mutor.d_max=40"]
    assert main(["try", *words, "--set", *settings]) == 1
    printed = capsys.readouterr().out
    assert "2 of 3 settings work: 4 steps of training, answers to 2 problems." in printed
    assert "refused: mutor: MuToR: the longest answer has" in printed and "against" not in printed
    assert "judged by 2 finished runs" in printed.partition("The whole takes")[2]
    (folder,) = (tmp_path / "tries").iterdir()
    assert folder.name.startswith("qwen3-t-") and [file.name for file in folder.iterdir()] == ["quick"]


def test_data_are_refused_before_anything_is_trained(qwen3, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(trying, "_run", lambda *rest: pytest.fail("trained"))
    train, test = write(tmp_path / "t.jsonl", sums(0, 8)), write(tmp_path / "new.jsonl", sums(7, 2))
    assert main(["try", qwen3, train, test, "--out", str(tmp_path / "tries")]) == 2
    assert "this prompt is scored on, too" in capsys.readouterr().err and not (tmp_path / "tries").exists()
