"""Every family of causal language models of transformers: MuToR attached, trained, exported, or refused, and why.

Models are tiny and random, made from each family's configuration. docs/families.md is what came out:

    python tests/test_families.py    # writes it
"""

import contextlib
import io
import logging
import re
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from mutor import MuToR

PAGE = Path(__file__).parent.parent / "docs" / "families.md"
HEADING = """# Families of models

MuToR on a tiny random model of each family, made from its configuration in transformers {version}: attached, trained
for a step, exported and loaded without this package, its logits those of before, bit for bit; or refused by `attach`,
for this reason. Parallel heads, sequential modules and the other methods take what MuToR takes. Attention is the
backend that `attach` found exact: blockwise needs no mask, sdpa and eager have a dense one. Of a checkpoint that reads
images, too, the text model is trained, on texts. Not listed are encoders and the decoders of translators (BERT, BART
and their kin).

Made by `python tests/test_families.py`; `make test-long` makes each line again.

| family | model | attention | |
|---|---|---|---|
"""
NAMES = re.findall(
    r"\S+",
    """
    afmoe apertus arcee aria_text bamba biogpt bitnet bloom codegen cohere cohere2 ctrl cwm deepseek_v2 deepseek_v3
    deepseek_v32 diffllama doge dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon falcon_h1 falcon_mamba
    flex_olmo gemma gemma2 gemma3 gemma3_text gemma3n_text gemma4_text glm glm4 glm4_moe glm4_moe_lite gpt2
    gpt_bigcode gpt_neo gpt_neox gpt_oss gptj granite granitemoe granitemoehybrid granitemoeshared helium
    hunyuan_v1_dense hunyuan_v1_moe hyperclovax jamba jetmoe kimi_linear lfm2 lfm2_moe llama llama4 llama4_text
    llava longcat_flash mamba mamba2 mimo_v2_flash minicpm3 minimax minimax_m2 ministral ministral3 mistral mistral3
    mixtral modernbert-decoder moshi mpt nanochat nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe openai-gpt
    opt persimmon phi phi3 phimoe qwen2 qwen2_5_vl qwen2_moe qwen2_vl qwen3 qwen3_5_text qwen3_moe qwen3_next
    qwen3_vl recurrent_gemma rwkv seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma xglm xlstm youtu zamba
    zamba2
    """,
)
SIZES = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "lru_width", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("intermediate_size", "intermediate_size_mlp", "ffn_dim", "d_ff", "ffn_hidden_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "state_size", "rotary_dim"), 4),
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout", "attention_dropout", "hidden_dropout"), 0.0),
    "vocab_size": 61, "head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TEXT = {k: v for k, v in SIZES.items() if k in (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id",
)}  # fmt: skip
STATE = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2, "mamba_n_groups": 1, "mamba_d_state": 4}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}
LATENT = {"head_dim": 8, "qk_rope_head_dim": 8, "num_key_value_heads": 4}  # one key for all heads, rotated apart
EYE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
QWEN_EYE = {"depth": 1, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "num_heads": 2}
QWEN = {
    "text_config": {**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
    "image_token_id": 60, "video_token_id": 59, "vision_start_token_id": 58, "vision_end_token_id": 57,
}  # fmt: skip
WHOLE = {  # families whose sizes have other names, or go together
    "bamba": {**TEXT, **STATE, "attn_layer_indices": [1]},
    "falcon": {k: v for k, v in TEXT.items() if k not in ("head_dim", "num_key_value_heads", "intermediate_size")},
    "falcon_h1": {**TEXT, **STATE, "mamba_d_ssm": 64},
    "gemma3": {"text_config": {**TEXT, **SLIDING}, "vision_config": EYE, "image_token_index": 60, "boi_token_index": 59,
               "eoi_token_index": 58, "mm_tokens_per_image": 4},
    "gemma3n_text": {**TEXT, **SLIDING, "num_kv_shared_layers": 0, "intermediate_size": [48, 48], "laurel_rank": 4,
                     "activation_sparsity_pattern": [0.0, 0.0], "hidden_size_per_layer_input": 8,
                     "vocab_size_per_layer_input": 61, "altup_num_inputs": 2},
    "gemma4_text": {**TEXT, **SLIDING, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0,
                    "global_head_dim": 8},
    "gpt_neo": {"vocab_size": 61, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 8,
                "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64},
    "granitemoehybrid": {**TEXT, **STATE, "layer_types": ["mamba", "attention"], "num_local_experts": 2,
                         "num_experts_per_tok": 1, "shared_intermediate_size": 16},
    "llama4": {"text_config": {**TEXT, "num_local_experts": 2, "intermediate_size_mlp": 48}, "image_token_index": 60,
               "vision_config": {**EYE, "vision_output_dim": 32, "projector_input_dim": 32,
                                 "projector_output_dim": 32}},
    "llava": {"text_config": {**TEXT, "model_type": "llama"}, "image_token_index": 60,
              "vision_config": {**EYE, "model_type": "clip_vision_model"}},
    "lfm2": {**TEXT, "layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {**TEXT, "layer_types": ["conv", "full_attention"], "num_experts": 2, "num_experts_per_tok": 1,
                 "num_dense_layers": 1, "moe_intermediate_size": 16},
    "mamba2": {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8,
               "n_groups": 1, "state_size": 4},
    "mistral3": {"text_config": {**TEXT, "model_type": "mistral"}, "image_token_index": 60,
                 "vision_config": {**EYE, "model_type": "pixtral", "head_dim": 16}},
    "qwen2_5_vl": {**QWEN, "vision_config": QWEN_EYE},
    "qwen2_vl": {**QWEN, "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2,
                                           "mlp_ratio": 1}},
    "qwen3_vl": {**QWEN, "vision_config": {**QWEN_EYE, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}},
    "recurrent_gemma": {**TEXT, "lru_width": 32, "attention_window_size": 16},
    "xglm": {"vocab_size": 61, "d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48, "dropout": 0.0,
             "attention_dropout": 0.0, "max_position_embeddings": 64, "pad_token_id": 0},
}  # fmt: skip
MORE = {  # beside SIZES
    "dots1": {"n_shared_experts": 1, "first_k_dense_replace": 1},
    "youtu": {"pad_token_id": None},  # transformers forgets that token's row when it loads one
}


def configuration(family):
    """A small one of that family: SIZES of whatever it has, unless it stands in WHOLE."""
    if family in WHOLE:
        return AutoConfig.for_model(family, **WHOLE[family])
    usual = AutoConfig.for_model(family)
    fixed = {name for name in dir(type(usual)) if isinstance(getattr(type(usual), name), property)}
    own = {k: v for k, v in SIZES.items() if hasattr(usual, k) and k not in fixed}
    own |= LATENT if hasattr(usual, "qk_rope_head_dim") else {}
    if getattr(usual, "layer_types", None) and "layer_types" not in fixed:
        own["layer_types"] = [usual.layer_types[0], usual.layer_types[-1]]
    return AutoConfig.for_model(family, **{**own, **MORE.get(family, {})})


def model_of(family):
    """Random weights, loud enough that each layer matters."""
    config = configuration(family)
    auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = auto.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2.0 if parameter.ndim > 1 else 1.0)
    return model.eval()


def outcome(family, folder):
    """The family's line of the table. Whatever goes wrong behind `attach` is an error."""
    model, method = model_of(family), MuToR.of(d_max=3)
    name, ids = type(model).__name__, torch.tensor([[5, 6, 7, 8, 9, 10]])
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits
    try:
        method.attach(model)
    except ValueError as error:
        kind = model.config.get_text_config().model_type
        said = str(error).removeprefix(name).removeprefix(f" ({kind})").lstrip(": ")
        said = re.sub(r": its tokens change by .* reordered", "", said)
        return f"| {family} | {name} | | {said} |"
    attention = model.config.get_text_config()._attn_implementation
    with torch.no_grad():
        after = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))
    collator = method.collator(0)
    collator.set_epoch(0)
    batch = collator([{"input_ids": list(range(3, 15)), "prefix_length": 4}, {"input_ids": [5, 6, 7, 8, 9]}])
    labels, optimizer = batch.pop("labels"), torch.optim.SGD(model.parameters(), lr=1e-3)
    method.loss_from_outputs(model.train()(**batch), labels).backward()
    assert float(model.mtp["registers"].weight.grad.abs().max()) > 0
    optimizer.step()
    method.export(model.eval(), folder)
    plain, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    plain.set_attn_implementation(attention)
    with torch.no_grad():
        trained, loaded = (each(input_ids=ids, use_cache=False).logits for each in (model, plain.eval()))
    assert torch.equal(trained, loaded) and not torch.equal(trained, after)
    return f"| {family} | {name} | {attention} | identical |"


def test_the_table_has_a_line_for_each_family():
    lines = [line.split("|")[1:-1] for line in PAGE.read_text().splitlines() if line.startswith("| ")][1:]
    assert [line[0].strip() for line in lines] == sorted(NAMES) and len(NAMES) > 67
    assert all(len(line) == 4 and len(line[3]) > 8 for line in lines)


@pytest.mark.long
@pytest.mark.parametrize("family", NAMES)
def test_a_family_is_as_the_table_says(tmp_path, family):
    """Identical, or refused for the reason that stands there."""
    assert outcome(family, tmp_path) in PAGE.read_text().splitlines()


if __name__ == "__main__":
    import transformers

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    written = []
    for each in sorted(NAMES):
        with tempfile.TemporaryDirectory() as place, contextlib.redirect_stderr(io.StringIO()):
            written.append(outcome(each, place))
        print(written[-1], flush=True)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(HEADING.format(version=transformers.__version__) + "\n".join(written) + "\n")
