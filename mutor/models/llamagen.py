"""LlamaGen: class-conditional images as grids of tokens (Sun et al., arXiv 2406.06525), on stock Llama blocks.

model = LlamaGenForCausalLM(LlamaGenConfig(**SIZES["B"]))    # 111M parameters; importing this file registers llamagen
ids = [class token, code, code, ...]                         # codes 0 .. codes - 1, row by row
       codes + class, codes + classes where no class is given (guidance)

What differs from a Llama: positions on a grid, dropouts, an output layer for the codes alone that starts at zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from mutor.mtp.answers import Prompts

# layers, heads, width and inner width as published
SIZES: dict[str, dict[str, int]] = {
    "B": {"num_hidden_layers": 12, "num_attention_heads": 12, "hidden_size": 768, "intermediate_size": 2048},
    "L": {"num_hidden_layers": 24, "num_attention_heads": 16, "hidden_size": 1024, "intermediate_size": 2816},
    "XL": {"num_hidden_layers": 36, "num_attention_heads": 20, "hidden_size": 1280, "intermediate_size": 3584},
}


class LlamaGenConfig(LlamaConfig):
    """Settings of a LlamaGen; defaults are the published ones of size B at 256 x 256 pixels.

    codes: size of the image tokenizer's codebook; classes; rows, columns: of the token grid; class_dropout: share of
    training samples whose class is withheld; dropout: of tokens, residual and feed-forward outputs.
    """

    model_type = "llamagen"

    def __init__(
        self,
        codes: int = 16384,
        classes: int = 1000,
        rows: int = 16,
        columns: int = 16,
        class_dropout: float = 0.1,
        dropout: float = 0.1,
        **kwargs: Any,
    ):
        self.codes, self.classes, self.rows, self.columns = codes, classes, rows, columns
        self.class_dropout, self.dropout = class_dropout, dropout
        heads = kwargs.get("num_attention_heads", SIZES["B"]["num_attention_heads"])
        derived: dict[str, Any] = {
            "vocab_size": codes + classes + 1,
            "max_position_embeddings": 1 + rows * columns,
            "num_key_value_heads": heads,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        }
        super().__init__(**{**derived, **SIZES["B"], **kwargs})
        if self.vocab_size != codes + classes + 1:
            raise ValueError(f"vocab_size: {self.vocab_size}, expected {codes} codes + {classes} classes + 1")
        if _head_width(self) % 4:
            raise ValueError(f"head_dim: {self.head_dim} is not divisible by 4: a half for rows, a half for columns")


def _head_width(config: LlamaGenConfig) -> int:
    return int(config.head_dim or config.hidden_size // config.num_attention_heads)


class GridRotary(nn.Module):
    """Rotary cosines and sines of a grid: a head's first half turns with the row, its second with the column.

    Position 0 is the class token, whose cosines and sines are all zero; position 1 + i is cell i, row by row. Laid out
    for transformers' pairing of dimension j with j + D/2 (the published code pairs 2j with 2j + 1).
    """

    cells: Tensor

    def __init__(self, config: LlamaGenConfig, device: Any = None):
        super().__init__()
        half = _head_width(config) // 2
        base = float((config.rope_parameters or {}).get("rope_theta") or 10000.0)
        rate = 1.0 / base ** (torch.arange(0, half, 2, dtype=torch.float32, device=device) / half)
        row = torch.arange(config.rows, device=device)[:, None, None] * rate
        column = torch.arange(config.columns, device=device)[None, :, None] * rate
        shape = (config.rows, config.columns, half // 2)
        angle = torch.cat([row.expand(shape), column.expand(shape)], -1).flatten(0, 1)
        angle = torch.cat([angle, angle], -1)
        table = torch.stack([angle.cos(), angle.sin()])
        self.register_buffer("cells", torch.cat([torch.zeros_like(table[:, :1]), table], 1), persistent=False)

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin), each [B, L, head_dim], of positions [B, L]."""
        cos, sin = self.cells[:, position_ids].to(x.dtype)
        return cos, sin


class DroppedLinear(nn.Linear):
    """A linear layer whose output is dropped out in training."""

    def __init__(self, linear: nn.Linear, dropout: float):
        weight = linear.weight
        super().__init__(linear.in_features, linear.out_features, bias=False, device=weight.device, dtype=weight.dtype)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return F.dropout(super().forward(x), self.dropout, self.training)


class LlamaGenModel(LlamaModel):
    """Llama's stack of blocks on a grid."""

    config: LlamaGenConfig
    config_class = LlamaGenConfig

    def __init__(self, config: LlamaGenConfig):
        super().__init__(config)
        self.rotary_emb = GridRotary(config)  # type: ignore[assignment]
        for layer in self.layers:
            assert isinstance(layer, LlamaDecoderLayer)
            layer.self_attn.o_proj = DroppedLinear(layer.self_attn.o_proj, config.dropout)
            layer.mlp.down_proj = DroppedLinear(layer.mlp.down_proj, config.dropout)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, GridRotary):  # not in checkpoints: computed again after loading
            module.cells.copy_(GridRotary(self.config, module.cells.device).cells)

    def forward(self, input_ids: Any = None, inputs_embeds: Any = None, **kwargs: Any) -> Any:
        """As LlamaModel's; in training, classes are withheld and embeddings dropped at random."""
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(self._withheld(input_ids))
        inputs_embeds = F.dropout(inputs_embeds, self.config.dropout, self.training)
        return super().forward(inputs_embeds=inputs_embeds, **kwargs)

    def _withheld(self, ids: Tensor) -> Tensor:
        if not (self.training and self.config.class_dropout):
            return ids
        none = self.config.codes + self.config.classes
        named = (ids >= self.config.codes) & (ids < none)
        return torch.where(named & (torch.rand(ids.shape, device=ids.device) < self.config.class_dropout), none, ids)


class LlamaGenForCausalLM(LlamaForCausalLM):
    """LlamaGen with its output layer: logits [B, L, codes]."""

    config: LlamaGenConfig
    config_class = LlamaGenConfig

    def __init__(self, config: LlamaGenConfig):
        super(LlamaForCausalLM, self).__init__(config)
        self.model = LlamaGenModel(config)
        self.vocab_size = config.codes
        self.lm_head = nn.Linear(config.hidden_size, config.codes, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is getattr(self, "lm_head", None):
            nn.init.zeros_(module.weight)


def convert(published: Mapping[str, Tensor], config: LlamaGenConfig) -> LlamaGenForCausalLM:
    """A model with the weights of a published checkpoint, in the published names.

    tok_embeddings, cls_embedding.embedding_table, layers.N.attention.{wqkv, wo}, layers.N.feed_forward.{w1, w2, w3},
    layers.N.{attention_norm, ffn_norm}, norm, output; wqkv is queries, keys, values one below the other, its rotary
    pairs are adjacent. Raises ValueError naming a weight that is missing, left over or of another shape.
    """
    heads, width = int(config.num_attention_heads), _head_width(config)
    left = {name: tensor for name, tensor in published.items() if name != "freqs_cis"}

    def take(name: str) -> Tensor:
        if name not in left:
            raise ValueError(f"checkpoint: weight {name!r} is missing")
        return left.pop(name)

    def halves(weight: Tensor) -> Tensor:
        """Rows 2j, 2j + 1 of each head to j, j + D/2."""
        return weight.view(heads, width // 2, 2, -1).transpose(1, 2).reshape(weight.shape)

    state = {
        "model.embed_tokens.weight": torch.cat(
            [take("tok_embeddings.weight"), take("cls_embedding.embedding_table.weight")]
        ),
        "model.norm.weight": take("norm.weight"),
        "lm_head.weight": take("output.weight"),
    }
    for number in range(config.num_hidden_layers):
        theirs, ours = f"layers.{number}", f"model.layers.{number}"
        query, key, value = take(f"{theirs}.attention.wqkv.weight").split(heads * width)
        state |= {
            f"{ours}.self_attn.q_proj.weight": halves(query),
            f"{ours}.self_attn.k_proj.weight": halves(key),
            f"{ours}.self_attn.v_proj.weight": value,
            f"{ours}.self_attn.o_proj.weight": take(f"{theirs}.attention.wo.weight"),
            f"{ours}.mlp.gate_proj.weight": take(f"{theirs}.feed_forward.w1.weight"),
            f"{ours}.mlp.up_proj.weight": take(f"{theirs}.feed_forward.w3.weight"),
            f"{ours}.mlp.down_proj.weight": take(f"{theirs}.feed_forward.w2.weight"),
            f"{ours}.input_layernorm.weight": take(f"{theirs}.attention_norm.weight"),
            f"{ours}.post_attention_layernorm.weight": take(f"{theirs}.ffn_norm.weight"),
        }
    if left:
        raise ValueError(f"checkpoint: weight {sorted(left)[0]!r} is not one of this model's")
    model = LlamaGenForCausalLM(config)
    for name, parameter in model.state_dict().items():
        if state[name].shape != parameter.shape:
            raise ValueError(
                f"checkpoint: the weight that becomes {name!r} has shape {tuple(state[name].shape)}, allowed: "
                f"{tuple(parameter.shape)}"
            )
    model.load_state_dict(state)
    return model


def image_prompts(
    model: Any,
    classes: Tensor,
    *,
    seed: int,
    guidance: float = 2.0,
    temperature: float = 1.0,
    top_k: int = 0,
    compiled: bool = False,
) -> Prompts:
    """Prompts for images of `classes` (int64 [B]), whose answers are their codes: rows 0 .. B - 1, [B, rows * columns].

    Classifier-free guidance as published, l = l_u + guidance (l_c - l_u): behind the B prompts stand B without a class,
    which get the same codes; guidance 1 has none of them. top_k: 0 keeps all codes. The noise depends on `seed`, the
    image's number and the kind of device alone, so two models of equal logits draw equal images.
    """
    config, device, batch, guided = model.config, model.device, len(classes), guidance != 1
    if not 0 <= int(classes.min()) <= int(classes.max()) < config.classes:
        raise ValueError(f"classes: {int(classes.min())}..{int(classes.max())}, allowed: 0 to {config.classes - 1}")
    if temperature <= 0 or top_k < 0:
        raise ValueError(f"temperature: {temperature}, top_k: {top_k}; allowed: above 0, and 0 or more")
    noise = torch.Generator(device)

    def draw(logits: Tensor, step: int) -> Tensor:
        if step == 0:
            noise.manual_seed(seed)
        if guided:
            named, unnamed = logits.split(batch)
            logits = unnamed + guidance * (named - unnamed)
        logits = logits / temperature
        if top_k and top_k < config.codes:
            logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
        gumbel = -torch.empty(batch, config.codes, device=device).exponential_(generator=noise).log()
        chosen = (logits + gumbel).argmax(-1)  # Gumbel's trick: a draw from softmax(logits)
        return chosen.repeat(2) if guided else chosen

    ids = (classes + config.codes).to(device)[:, None]
    if guided:
        ids = torch.cat([ids, torch.full_like(ids, config.codes + config.classes)])
    return Prompts(ids, torch.ones_like(ids), config.rows * config.columns, choose=draw, compiled=compiled)


AutoConfig.register("llamagen", LlamaGenConfig)
AutoModelForCausalLM.register(LlamaGenConfig, LlamaGenForCausalLM)
