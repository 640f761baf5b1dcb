"""How large a user's own model and data are, told without loading them, for a plan before anything has run. No torch.

scale = sized(load_scale(root, "own"))      # its models' parameters and its data's lengths stand in `plan`
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

from mutor.config.schema import Dataset, ModelConfig, Scale
from mutor.tasks.corpora import CORPORA, Origin, problems
from mutor.tasks.formats import Problem

CHARACTERS = 4  # a token, about


def sized(scale: Scale) -> Scale:
    """The scale with `plan` of pretrained models that are on this machine, and of data that are the user's own.

    What the scale says itself stays. Files that can't be read have no size; `mutor.config.inputs` says what is wrong.
    """
    found = {name: parameters(model) for name, model in scale.models.items() if name not in scale.plan}
    counted = {name: count for name, count in found.items() if count}
    datasets = {
        name: replace(d, plan={**lengths(d), **d.plan}) if d.options.get("corpus") == "own" else d
        for name, d in scale.datasets.items()
    }
    return replace(scale, plan={**counted, **scale.plan}, datasets=datasets)


def lengths(dataset: Dataset) -> dict[str, float]:
    """Of a user's own data: training examples, tokens of one and test problems, with four characters a token."""
    options = dataset.options
    try:
        train, test = (
            problems(CORPORA["own"], split, Origin("file", options[f"{split}_file"]), options.get(f"{split}_size"))
            for split in ("train", "test")
        )
    except (ValueError, OSError, KeyError):
        return {}
    tokens = [_characters(problem) / CHARACTERS for problem in train]
    kept = [count for count in tokens if count <= options.get("max_tokens", math.inf)]
    if not kept:
        return {"problems": len(test)}
    return {"examples": len(kept), "tokens": sum(kept) / len(kept), "problems": len(test)}


def _characters(problem: Problem) -> int:
    chat = sum(len(message["role"]) + len(message["content"]) for message in problem.messages)
    return chat or len(problem.prompt) + len(problem.answer)


def parameters(model: ModelConfig) -> int | None:
    """Parameters of a pretrained model, as its files say; None for one that is not on this machine."""
    name = str(model.pretrained)
    if model.pretrained is None:
        return None
    if name.endswith(".gguf"):
        return _of_gguf(model)
    files = sorted((_folder(name, model.revision) or Path("/dev/null")).glob("*.safetensors"))
    try:
        return sum(map(_of_safetensors, files)) or None
    except (OSError, ValueError, KeyError, struct.error):  # loading it says what is wrong
        return None


def _folder(name: str, revision: str | None) -> Path | None:
    """A folder, or the hub's local copy of a repository."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except Exception:  # whatever the client raises of a name that is none, or not here
        return None


def _of_safetensors(file: Path) -> int:
    """Numbers in a .safetensors file: its header is JSON behind eight bytes of its length."""
    with open(file, "rb") as handle:
        size = struct.unpack("<Q", handle.read(8))[0]
        header: dict[str, Any] = json.loads(handle.read(size))
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")


def _of_gguf(model: ModelConfig) -> int | None:
    from mutor.models.build import _source

    try:
        folder, more = _source(model)
        from gguf import GGUFReader
    except (ImportError, ValueError):
        return None
    return sum(int(tensor.n_elements) for tensor in GGUFReader(Path(folder) / more["gguf_file"]).tensors)
