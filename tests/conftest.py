"""Tiny random models of many families, and small batches together with where each sequence lies in them."""

import functools
import gc
import os
import shutil
import subprocess
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mutor.mtp.layout import Example, TokenBatch, collate
from mutor.registry import ATTENTION

ROOT = Path(__file__).parent.parent
VOCABULARY = 61
FROZEN = [0]  # how many modules there were whenever the garbage collector was told to look at new objects only
# these begin, so that two processes end together
LONG = ("test_workflow.py", "test_dry_runs.py", "test_distributed.py", "test_run.py")
FAMILIES = (
    "llama", "gpt2", "gemma", "gemma2", "gemma3_text", "qwen3", "mistral", "gpt_neox", "phi3", "olmo2", "granite",
    "cohere",
)  # fmt: skip
COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT2 = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1,
    "eos_token_id": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip
OWN = {
    "gpt2": GPT2,
    "gpt_neox": {k: v for k, v in COMMON.items() if k not in ("head_dim", "num_key_value_heads")},
    "granite": {**COMMON, "logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.7},
    "cohere": {**COMMON, "logit_scale": 0.5},
    "gemma2": {**COMMON, "final_logit_softcapping": 3.0},
    "lfm2": {**COMMON, "layer_types": ["conv", "full_attention"]},
    "qwen3_next": {**COMMON, "layer_types": ["linear_attention", "full_attention"]},
    "mamba": {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4},
}


@dataclass
class Span:
    """One sequence of a batch: its row, where it starts there, its ids, prefix length and counter."""

    row: int
    start: int
    ids: list[int]
    prefix: int
    sample: int

    def example(self) -> Example:
        """The sequence as the package takes it."""
        return Example(np.array(self.ids), self.prefix, self.sample)


@dataclass
class Batch:
    """Rows of the package, and the spans that they were laid from."""

    rows: TokenBatch
    spans: list[Span]

    def alone(self) -> list[TokenBatch]:
        """Each sequence as a batch of one."""
        return [collate([span.example()], 0) for span in self.spans]


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Files that take minutes come first."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


def pytest_runtest_setup() -> None:
    """The Trainer collects garbage with every run: not among the objects of what is imported, which stay anyway."""
    if len(sys.modules) > FROZEN[-1] + 50:
        gc.freeze()
        FROZEN.append(len(sys.modules))


def close(ours: Tensor, theirs: Tensor, rtol: float = 1e-4, atol: float = 2e-5) -> None:
    """Equal up to float32 rounding."""
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The machine is shared."""
    torch.set_num_threads(1)


@pytest.fixture(params=FAMILIES)
def family(request: Any) -> str:
    """Each supported family in turn."""
    return request.param


@pytest.fixture(params=["padded", "packed"])
def batch(request: Any) -> Batch:
    """Four sequences of different lengths and prefixes, padded to four rows or packed into two."""
    rng = np.random.default_rng(5)
    shapes = [(11, 4), (7, 2), (9, 1), (8, 5)]
    where = [(0, 0), (1, 0), (2, 0), (3, 0)] if request.param == "padded" else [(0, 0), (0, 11), (1, 0), (1, 9)]
    spans = [
        Span(row, start, rng.integers(3, VOCABULARY, length).tolist(), prefix, 7 * n + 3)
        for n, ((row, start), (length, prefix)) in enumerate(zip(where, shapes, strict=True))
    ]
    rows = collate([span.example() for span in spans], 0, None if request.param == "padded" else 20)
    return Batch(rows, spans)


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Any]:
    """tiny(family, seed=0, attn_implementation=None, scale=8, **config): a small model with loud random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    def make(
        family: str = "llama", *, seed: int = 0, attn_implementation: Any = None, scale: float = 8.0, **own: Any
    ) -> Any:
        config = AutoConfig.for_model(family, **{**OWN.get(family, COMMON), **own})
        extra = {"attn_implementation": attn_implementation} if attn_implementation else {}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, **extra)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() > 1:
                        parameter.mul_(scale)
                    else:
                        parameter.add_(0.2 * torch.randn_like(parameter))
        return model.eval()

    return make


def attach(method: Any, model: Any) -> Any:
    """Attach, with a fixed seed, and make what was added loud as well."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        method.attach(model)
        if hasattr(model, "mtp"):
            with torch.no_grad():
                for parameter in model.mtp.parameters():
                    if parameter.dim() > 1:
                        parameter.normal_(0, 0.2)
                    else:
                        parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    """Gradients of all parameters by name, zeros where none arrives."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Equal for every parameter, relative to the largest entry."""
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        close(ours[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()) + 1e-7)


def picture(mask: Tensor) -> list[str]:
    """A bool [L, L] mask as lines of 1 and '.'."""
    return ["".join("1" if seen else "." for seen in line) for line in mask.tolist()]


def given(sees: Tensor, model: Any) -> Tensor:
    """A bool [B, L, L] mask as the model's attention takes it."""
    if model.config._attn_implementation == "eager":
        return torch.where(sees, 0.0, torch.finfo(torch.float32).min)[:, None]
    return sees[:, None]


def prefix_mask(length: int, prefix: int, prefix_lm: bool) -> Tensor:
    """bool [L, L] written as a loop: causal, the prefix in both directions with `prefix_lm`."""
    rows = [[k <= q or (prefix_lm and k < prefix and q < prefix) for k in range(length)] for q in range(length)]
    return torch.tensor(rows)


def plain_logits(model: Any, ids: list[int], prefix: int, prefix_lm: bool) -> Tensor:
    """[T, V]: the stock model on one sequence alone."""
    mask = given(prefix_mask(len(ids), prefix, True)[None], model) if prefix_lm else None
    return model(input_ids=torch.tensor([ids]), attention_mask=mask, use_cache=False).logits[0].float()


def parts_of(model: Any) -> tuple[Any, ...]:
    """(layers, norm, head, run) of a llama or gpt2; run(layer, x, mask): one layer at positions 0, 1, .."""
    if model.config.model_type == "gpt2":
        base = model.transformer
        return base.h, base.ln_f, model.lm_head, lambda layer, x, mask: first(layer(x, attention_mask=mask[None, None]))
    base = model.model

    def run(layer: Any, x: Tensor, mask: Tensor) -> Tensor:
        rotary = base.rotary_emb(x, torch.arange(x.shape[1])[None])
        return first(layer(x, attention_mask=mask[None, None], position_embeddings=rotary))

    return base.layers, base.norm, model.lm_head, run


def first(output: Any) -> Tensor:
    """The hidden state of a layer's output."""
    return output[0] if isinstance(output, tuple) else output


def trunk_hidden(model: Any, ids: list[int], mask: Tensor) -> Tensor:
    """[1, T, d] the last layer's output before the norm, one sequence alone."""
    seen = []
    hook = parts_of(model)[0][-1].register_forward_hook(lambda module, args, output: seen.append(first(output)))
    model(input_ids=torch.tensor([ids]), attention_mask=mask[None, None], use_cache=False)
    hook.remove()
    return seen[0]


@pytest.fixture
def flex_with_gradients(monkeypatch: Any) -> None:
    """transformers' FlexAttention path with the unfused kernel, which has gradients on a CPU too."""
    from torch.nn.attention import flex_attention as torch_flex
    from transformers.integrations import flex_attention as transformers_flex

    with_gradients = replace(ATTENTION["flex_attention"], cpu_gradients=True)
    monkeypatch.setitem(ATTENTION, "flex_attention", with_gradients)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(transformers_flex, "WrappedFlexAttention", lambda training: lambda: torch_flex.flex_attention)


@pytest.fixture
def impatient(monkeypatch: Any) -> Iterator[None]:
    """Answers that are not compared as mathematics within a second are given up."""
    from mutor.tasks import mathematics

    monkeypatch.setattr(mathematics, "SECONDS", 1)
    mathematics._worker.cache_clear()
    yield
    mathematics._worker.cache_clear()


@pytest.fixture
def short_corpora(monkeypatch: Any) -> None:
    """Of the generated corpora a twentieth of the training rows, the first ones: enough where a test asks for few."""
    from mutor.tasks import standins

    for splits in standins.SIZES.values():
        for split in splits.keys() - {*standins.HELD_OUT}:
            monkeypatch.setitem(splits, split, splits[split] // 20)


@pytest.fixture(scope="session")
def python(tmp_path_factory: Any) -> Iterator[str]:
    """An executable that does what Python does, with torch, transformers and others imported; see forks.py."""
    import forks

    with forks.python(tmp_path_factory.mktemp("forks") / "python") as executable:
        yield executable


@pytest.fixture(scope="session")
def programs() -> Callable[[str], Callable[..., Any]]:
    """programs(python)("snakemake", folder, ...): what `python -m snakemake ...` does in a folder."""

    def of(python: str) -> Callable[..., Any]:
        def program(name: str, folder: Path, *arguments: Any) -> Any:
            environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
            command = [python, "-m", name, *map(str, arguments)]
            return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)

        return program

    return of


@pytest.fixture(scope="session")
def program(programs: Any, python: str) -> Callable[..., Any]:
    """Programs by a Python that has imported what they need, and so have those that Snakemake starts."""
    return programs(python)


@pytest.fixture(scope="session")
def snakemake(program: Callable[..., Any]) -> Callable[..., Any]:
    """snakemake(folder, ...)"""
    return functools.partial(program, "snakemake")


@pytest.fixture(scope="session")
def copied() -> Callable[[Path], Path]:
    """copied(folder): a copy there of the project without its runs and results."""

    def done(folder: Path) -> Path:
        folder.mkdir(exist_ok=True)
        for name in (
            "Snakefile",
            "workflow",
            "config",
            "profiles",
            "mutor",
            "baselines",
            "benchmarks",
            "environment.yml",
        ):
            source = ROOT / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
        return folder

    return done


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: Any, copied: Callable[[Path], Path]) -> Path:
    """A copy of the project, shared by tests, in a folder with a space and a quote."""
    return copied(tmp_path_factory.mktemp("it's a project"))


@pytest.fixture(scope="session")
def tools() -> Any:
    """The helper functions of this file, for tests that can't import a conftest."""
    from types import SimpleNamespace

    return SimpleNamespace(
        close=close,
        attach=attach,
        gradients=gradients,
        same_gradients=same_gradients,
        picture=picture,
        given=given,
        prefix_mask=prefix_mask,
        plain_logits=plain_logits,
        vocabulary=VOCABULARY,
        parts_of=parts_of,
        trunk_hidden=trunk_hidden,
    )
