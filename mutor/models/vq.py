"""Image tokenizers: diffusers' VQModel, trained small or with the weights of LlamaGen's VQ-16.

vq = build(**VQ16); codes = encode(vq, images); images = decode(vq, codes)     # images float [B, C, H, W] in -1 .. 1

VQ-16 compares normalised vectors. A codebook normalised once gives the same codes and the same pictures: among vectors
of one length the nearest is the one of the smallest angle, whatever the length of what is compared.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

VQ16: dict[str, Any] = {
    "codes": 16384,
    "width": 8,
    "channels": [128, 128, 256, 256, 512],
    "latent": 256,
    "layers": 2,
    "groups": 32,
    "colours": 3,
}


def build(
    *, codes: int, width: int, channels: Sequence[int], latent: int, layers: int, groups: int, colours: int
) -> Any:
    """A VQModel: `codes` vectors of `width`; each level of `channels` but the last halves height and width.

    layers: residual blocks a level; latent: channels before the vectors; the last level attends, as published.
    """
    from diffusers import VQModel

    plain = len(channels) - 1
    return VQModel(
        in_channels=colours,
        out_channels=colours,
        latent_channels=latent,
        num_vq_embeddings=codes,
        vq_embed_dim=width,
        block_out_channels=tuple(channels),
        layers_per_block=layers,
        norm_num_groups=groups,
        down_block_types=("DownEncoderBlock2D",) * plain + ("AttnDownEncoderBlock2D",),
        up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * plain,
    )


@torch.no_grad()
def encode(vq: Any, images: Tensor) -> Tensor:
    """int64 [B, rows, columns]: the codes of images [B, C, H, W]."""
    latents = vq.encode(images.to(vq.device)).latents
    return vq.quantize(latents)[2][2].view(len(images), *latents.shape[-2:])


@torch.no_grad()
def decode(vq: Any, codes: Tensor) -> Tensor:
    """float [B, C, H, W] in -1 .. 1: the images of codes [B, rows, columns]."""
    shape = (*codes.shape, vq.config.vq_embed_dim)
    vectors = vq.quantize.get_codebook_entry(codes.reshape(-1).to(vq.device), shape)
    return vq.decode(vectors, force_not_quantize=True).sample.clamp(-1, 1)


def convert(published: Mapping[str, Tensor], **settings: Any) -> Any:
    """A VQModel with the weights of a published checkpoint, in the published names (encoder.conv_blocks.N.res.M, ...).

    settings: as of `build`, VQ16 for the published one. Raises ValueError naming a weight that is missing, left over
    or of another shape.
    """
    vq = build(**settings)
    state, wanted = {}, vq.state_dict()
    for name, tensor in published.items():
        if name.startswith("quantize.codebook_used"):
            continue
        ours = _renamed(name)
        if ours not in wanted:
            raise ValueError(f"checkpoint: weight {name!r} is not one of this tokenizer's")
        if ours == "quantize.embedding.weight":
            tensor = F.normalize(tensor.float(), dim=-1)
        elif tensor.dim() == 4 and wanted[ours].dim() == 2:  # attention as convolutions of size 1
            tensor = tensor[:, :, 0, 0]
        if tensor.shape != wanted[ours].shape:
            raise ValueError(
                f"checkpoint: weight {name!r} has shape {tuple(tensor.shape)}, allowed: {tuple(wanted[ours].shape)}"
            )
        state[ours] = tensor
    lacking = sorted(wanted.keys() - state.keys())
    if lacking:
        raise ValueError(f"checkpoint: the weight that becomes {lacking[0]!r} is missing")
    vq.load_state_dict(state)
    return vq.eval()


_NAMES: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"^encoder\.conv_blocks\.(\d+)\.", r"encoder.down_blocks.\1."),
    (r"^decoder\.conv_blocks\.(\d+)\.", r"decoder.up_blocks.\1."),
    (r"\.res\.", ".resnets."),
    (r"\.attn\.", ".attentions."),
    (r"\.downsample\.", ".downsamplers.0."),
    (r"\.upsample\.", ".upsamplers.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.mid\.0\.", ".mid_block.resnets.0."),
    (r"\.mid\.2\.", ".mid_block.resnets.1."),
    (r"\.mid\.1\.", ".mid_block.attentions.0."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
]


def _renamed(name: str) -> str:
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def train(
    vq: Any, pictures: Any, *, steps: int, batch_size: int, rate: float, seed: int, log: Callable[[str], None]
) -> float:
    """Fit a small tokenizer to pictures (a length, and batches by index); returns its squared error at the end.

    Codes that no image used for a while move to where an image is, so that the codebook does not collapse.
    """
    rng = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(vq.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, (s + 1) / 50) * (1 - 0.95 * s / steps))
    used, error = torch.zeros(vq.config.num_vq_embeddings), 0.0
    vq.train()
    for step in range(steps):
        batch = pictures.batch(torch.randint(len(pictures), (batch_size,), generator=rng).numpy()).to(vq.device)
        latents = vq.encode(batch).latents
        vectors, commitment, (_, _, index) = vq.quantize(latents)
        shown = vq.decode(vectors, force_not_quantize=True).sample
        loss = F.mse_loss(shown, batch)
        optimizer.zero_grad()
        (loss + commitment).backward()
        optimizer.step()
        schedule.step()
        used = 0.97 * used + torch.bincount(index.flatten().cpu(), minlength=len(used))
        if step % 20 == 19 and step < 0.8 * steps:
            unused = (used < 0.5).nonzero()[:, 0]
            found = latents.detach().movedim(1, -1).flatten(0, 2)
            chosen = torch.randint(len(found), (len(unused),), generator=rng)
            vq.quantize.embedding.weight.data[unused] = found[chosen.to(found.device)]
        error = loss.item() if step == 0 else 0.95 * error + 0.05 * loss.item()
        if step % 50 == 49:
            log(
                f"tokenizer: step {step + 1}/{steps}  squared error {error:.4f}  codes in use {int((used > 0.5).sum())}"
            )
    vq.eval()
    return error
