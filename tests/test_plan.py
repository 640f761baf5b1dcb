"""`mutor plan`: what is to run, what it takes, and how large models are."""

import re
from pathlib import Path

import pytest

from mutor.cli import main
from mutor.config.load import load_scale, load_table
from mutor.config.runs import cells_of
from tests.test_claims import put

ROOT = Path(__file__).parent.parent


def test_plan_lists_runs_and_bounds(capsys, tmp_path):
    assert main(["plan", "results/smoke/figure4.csv", "--scale", "smoke", "--runs", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "12 settings, 24 seeded runs to do" in printed and "smoke/g2x3/gpt2-2x32/mutor/a=0.5,d_max=1" in printed


def test_plan_bounds_what_has_never_run(capsys, tmp_path):
    """6 x 2,506,172,416 parameters x 7473 examples x 5 epochs x 512 tokens, three seeds."""
    assert main(["plan", "table1", "--scale", "paper", "--runs", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert f"<{3 * 6 * 2506172416 * 7473 * 5 * 512:.1e}  paper/gsm8k/gemma-2b/next_token/default" in printed
    assert re.search(r"at 40% of the bf16 peak: [\d,]+ hours of A100 or [\d,]+ hours of H100", printed)


def test_plan_judges_by_finished_runs(capsys, tmp_path):
    """What has run costs as much again, sums are told by task and table, and tokens fed are compared by method."""
    seconds = {"next_token": 60.0, "mutor": 90.0, "token_order": 75.0}
    for cell in cells_of(load_table(ROOT, "figure4"), load_scale(ROOT, "laptop")):
        if not cell.row.control and cell.spec.method in seconds:
            took = {"steps": 800, "seconds_training": seconds[cell.spec.method], "device": "a clock"}
            tokens = 1000 if cell.spec.method == "mutor" else 800
            put(tmp_path, cell, 7, 100, tokens=800 * tokens, **took)  # a seed that is not asked for
    assert main(["plan", "figure4", "--scale", "laptop", "--runs", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    lines = {line.split()[-1]: line.split() for line in printed.splitlines() if "laptop/g2x4/" in line}
    assert lines["laptop/g2x4/gpt2-4x64/next_token/default"][1:3] == ["10", "10.0"]
    assert lines["laptop/g2x4/gpt2-4x64/mutor/a=0.5,d_max=3,d_min=2"][1:3] == ["10", "15.0"]
    assert lines["laptop/g2x4/gpt2-4x64/ranking/default"][1:3] == ["3", "11.2"]  # the median of what ran there, a step
    assert "mutor 1.25" in printed and "judged by 3 finished runs on a clock" in printed
    total = sum(float(line[2]) for line in map(str.split, printed.splitlines()) if line[-1].startswith("laptop/"))
    told = {
        what: float(re.search(rf"by {what}, CPU core minutes: \w+ ([\d.]+)$", printed, re.M)[1])
        for what in ("task", "table")
    }
    assert told["task"] == told["table"] == pytest.approx(total, abs=1)


@pytest.mark.parametrize("steps, minutes", [(2400, "10.0"), (800, "40.0")])
def test_plan_takes_over_where_runs_ended_from_the_same_recipe_alone(capsys, tmp_path, steps, minutes):
    """Runs ended after 600 steps, task solved: of 2,400, as now, the next ones will, too; of 800 nothing follows."""
    for cell in cells_of(load_table(ROOT, "figure4"), load_scale(ROOT, "laptop")):
        if cell.spec.path == "laptop/g2x4/gpt2-4x64/next_token/default":
            config = cell.spec.as_dict()
            config["recipe"] = {**config["recipe"], "steps": steps}
            put(tmp_path, cell, 7, 100, config=config, steps=600, seconds_training=60.0, device="a clock")
    assert main(["plan", "figure4", "--scale", "laptop", "--runs", str(tmp_path)]) == 0
    lines = {line.split()[-1]: line.split() for line in capsys.readouterr().out.splitlines() if line}
    assert lines["laptop/g2x4/gpt2-4x64/next_token/default"][1:3] == ["10", minutes]


@pytest.mark.parametrize("name", ["paper", "gpu"])
def test_plan_knows_how_large_models_are(name):
    """Parameters as transformers builds them from the published configurations."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    published = {
        "gemma-2b": ("gemma", {"vocab_size": 256000, "hidden_size": 2048, "num_hidden_layers": 18, "head_dim": 256,
                               "num_attention_heads": 8, "num_key_value_heads": 1, "intermediate_size": 16384}),
        "llama-3-8b": ("llama", {"vocab_size": 128256, "hidden_size": 4096, "num_hidden_layers": 32,
                                 "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336}),
        "gpt2-large": ("gpt2", {"n_embd": 1280, "n_layer": 36, "n_head": 20}),
        "smollm2-135m-instruct-q4": (
            "llama", {"vocab_size": 49152, "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
                      "num_key_value_heads": 3, "intermediate_size": 1536, "tie_word_embeddings": True}),
    }  # fmt: skip
    scale = load_scale(ROOT, name)
    assert scale.plan
    for model, parameters in scale.plan.items():
        own = scale.models[model]
        # labels and four signs, the stand-in's, numbers and signs, nodes and two signs
        others = {
            "llama-12x384": 104,
            "llama-6x256": 985,
            "llama-12x384-planning": 18,
            "path-1x120": 102,
            "path-1x320": 302,
        }
        tokens = others.get(model, 34)
        family, shape = published.get(model, (own.architecture, {**own.config, "vocab_size": tokens}))
        if family == "llamagen":
            import mutor.models.llamagen  # noqa: F401  # transformers learns its name

            shape = own.config
        with torch.device("meta"):
            built = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape))
        assert sum(p.numel() for p in built.parameters()) == parameters
