"""What runs on images share: tokenizer, classifier and codes, made once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


# what decides tokenizer, classifier and codes; the rest may differ between datasets that share them
ASSETS = (
    "source",
    "folder",
    "classes",
    "pixels",
    "test_size",
    "copies",
    "flip",
    "shift",
    "turn",
    "zoom",
    "codes",
    "code_width",
    "channels",
    "tokenizer",
    "tokenizer_steps",
    "features",
    "classifier_steps",
    "real_samples",
    "data_seed",
)


def _parts(what: int | np.ndarray, size: int = 250) -> list[np.ndarray]:
    """Indices (0 .. N - 1, or those given) in parts."""
    index = np.arange(what) if isinstance(what, int) else what
    return [index[start : start + size] for start in range(0, len(index), size)]


def _published(file: str) -> dict[str, Tensor]:
    import torch

    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"tokenizer: {file} can't be read: {error}") from None
    return found.get("model", found.get("ema", found))
