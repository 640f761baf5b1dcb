"""The cost benchmark: its cases, what it counts, and the published recipe that it times, against the suite's."""

import importlib.util
import json
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from mutor.checks import from_mapping
from mutor.cli import main
from mutor.config.cost_cases import Case, cases_of, load_cases, settings_of
from mutor.config.load import load_scale, load_table
from mutor.config.schema import ModelConfig
from mutor.mtp.flops import step_flops
from mutor.mtp.layout import Example, collate
from mutor.mtp.method import Context
from mutor.mtp.mutor import MuToR
from mutor.results.cells import Evidence
from mutor.results.cost import file_of, metrics_of
from mutor.results.drawings import collect_artifact
from mutor.results.records import Records

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def bench():
    """benchmarks/cost.py as a module."""
    spec = importlib.util.spec_from_file_location("cost_benchmark", ROOT / "benchmarks/cost.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TINY = ModelConfig(
    role="gemma-2b",
    architecture="llama",
    config={
        "vocab_size": 61,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
    },
)


def case(**changes):
    values = {"section": "s", "label": "x", "model": "gemma-2b", "method": "mutor", "batch": 3, "tokens": 12,
              "against": "x", "settings": {"d_max": 1, "a": 0.4}}  # fmt: skip
    return from_mapping(Case, values | changes, "case")


def test_the_published_cases_are_there():
    """What the rebuttal measured, at its sizes, and every model and reference named."""
    table = load_table(ROOT, "rebuttal_latency")
    scaling, cases = cases_of(table, replace(load_scale(ROOT, "gpu"), cost={}))
    assert scaling.tokens == scaling.batch == 1
    found = {c.published: c for c in cases if c.published and c.model != "llama-3-8b"}
    assert len(found) == 4
    for c in found.values():
        assert c.model == "gemma-2b" or (c.batch, c.tokens in (256, 512)) == (128, True)
    for c in cases:
        assert c.reference(cases).label == c.against and c.model in table.models
    lengths = next(c.lengths for c in cases if c.lengths)
    assert len(lengths) == 40 and abs(np.mean([sum(pair) for pair in lengths]) - 191.4) < 1  # GSM8K's mean


def test_cases_over_a_value_are_compared_at_the_same_value():
    table = load_table(ROOT, "cost_curves")
    _, cases = cases_of(table, load_scale(ROOT, "laptop"))
    for c in cases:
        same = c.reference(cases)
        assert (c.tokens, c.batch) == (same.tokens, same.batch) and same.method == "next_token"
    assert max(c.tokens for c in cases) <= 1024
    assert not any(c.attention == "flex_attention" for c in cases)  # it trains on no CPU
    assert [settings_of(c)["d_max"] for c in cases if c.label == "parallel_mtp"] == [2, 4, 6, 16]


def test_cells_name_what_they_are_swept_over(tmp_path):
    evidence = Evidence(ROOT, load_scale(ROOT, "paper"), Records(tmp_path))
    frame = evidence.frame(evidence.table("cost_curves"))
    frame = frame[(frame["metric"] == "ratio") & frame["benchmark"].str.contains("registers|^over length")]
    swept = list(zip(frame["label"], frame["sweep"], frame["x"].fillna(0), strict=True))
    mutor = [("mutor", "registers", count) for count in (16, 64, 128, 256)]
    assert swept[:5] == [("next_token", "", 0), *mutor]
    lengths = (256, 1024, 2048, 4096, 8192)
    assert swept[5:10] == [("next_token", "tokens", length) for length in lengths] and len(swept) == 5 + 3 * 5


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"tokns": 3}, "unknown key 'tokns'"),
        ({"against": "nobody"}, "against: 'nobody' is unknown"),
        ({"method": "mutr"}, "did you mean 'mutor'"),
        ({"settings": {"d_max": 0}}, "d_max: 0 is out of range"),
    ],
)
def test_wrong_cases_are_refused(section, says):
    good = {"section": "s", "model": "m", "batch": 2, "against": "x", "cases": [{"label": "x", "method": "mutor"}]}
    load_cases((good,), "here")
    bad = {**good, "cases": [{**good["cases"][0], **section}]}
    with pytest.raises(ValueError, match=says):
        load_cases((bad,), "here")


def test_flops_by_hand(bench):
    """Two layers of a llama on one sequence of 12 tokens and its 12 registers of offset 1."""
    one = case(batch=1)
    setup = bench.Setup(one, one, TINY, "cpu")
    tokens, flops = setup.counts(one, bench.examples(one, setup.drawn))
    matrices = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48)
    causal = 12 * 13 // 2
    registers = causal + 12  # the tokens up to its anchor, and itself
    wanted = step_flops(
        matrices=matrices, tokens=24, head=61 * 32, targets=24, query=32, layers=2, pairs=causal + registers
    )
    assert tokens == 24 and flops == wanted == 6 * matrices * 24 + 6 * 61 * 32 * 24 + 12 * 32 * 2 * 168


def test_flops_of_heads_and_modules(bench):
    """Each head is one more layer over all tokens, with its own targets."""
    plain = case(method="next_token", settings={}, batch=1)
    setup = bench.Setup(plain, plain, TINY, "cpu")
    _, base = setup.counts(plain, bench.examples(plain, setup.drawn))
    layer, head, pairs = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48, 61 * 32, 12 * 13 // 2
    for method, more in (("parallel_mtp", 0), ("sequential_mtp", 2 * 32 * 32)):
        one = case(method=method, settings={"d_max": 3, "a": 0.1}, batch=1)
        setup = bench.Setup(one, one, TINY, "cpu")
        _, flops = setup.counts(one, bench.examples(one, setup.drawn))
        added = 2 * (6 * (layer + more) * 12 + 12 * 32 * pairs) + 6 * head * (11 + 10)
        assert flops == base + added


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_layouts_that_are_timed_give_one_loss(bench, tools, interleaved):
    """Packed, padded, grouped or interleaved: the same loss as the suite's plain layout; so does the published recipe,
    one sequence a pass, when its means are taken inside each sequence first."""
    lengths = ((3, 9), (5, 4), (2, 7))
    one = case(lengths=lengths, row_tokens=64, interleaved=interleaved)
    setup = bench.Setup(one, one, TINY, "cpu")
    batch = bench.examples(one, setup.drawn)
    losses = []
    for each in (one, replace(one, padded=True), replace(one, interleaved=False)):
        layout, loss_targets = setup.inputs(each, setup.method, batch)
        token_behind = ~layout.register[:, 1:] & (layout.segment[:, 1:] >= 0)
        assert bool((layout.register[:, :-1] & token_behind).any()) == each.interleaved
        losses.append(setup.method.compute_loss(setup.model, layout, loss_targets)[0])
    tools.close(losses[1], losses[0])
    tools.close(losses[2], losses[0])
    setup.method.per_sequence = True
    layout, loss_targets = setup.inputs(one, setup.method, batch)
    expected = tools.gradients(setup.model, setup.method.compute_loss(setup.model, layout, loss_targets)[0])
    setup.model.zero_grad()
    for example in batch:
        bench.one_sequence(setup.method, setup.model, example, len(batch))
    ours = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in setup.model.named_parameters()}
    tools.same_gradients(ours, expected)


def test_the_published_recipe_places_registers_as_the_suite_does(bench, tools):
    """Offset 2 for every sequence (d_min 2 = d_max on our side, counter 1 of 2 on theirs)."""
    ours = MuToR.of(d_min=2, d_max=2, a=0.4)
    one = case(settings={"d_max": 2, "a": 0.4})
    setup = bench.Setup(one, one, TINY, "cpu")
    example = Example(np.arange(3, 15), 4, 1)
    bench.one_sequence(setup.method, setup.model, example, 1)
    theirs = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in setup.model.named_parameters()}
    ours.trunk = setup.method.trunk
    layout = ours.train_layout(collate([example], 0), Context())
    tools.same_gradients(theirs, tools.gradients(setup.model, ours.compute_loss(setup.model, layout)[0]))


def test_measurements_are_kept_and_drawn(bench, tmp_path, monkeypatch):
    """Killed and called again, only what is missing is measured; unmeasured cells are rows without numbers."""
    done = []
    real = bench.measure
    monkeypatch.setattr(bench, "measure", lambda case, *rest: (done.append(case.key), real(case, *rest))[1])
    call = ["cost.py", "--scale", "smoke", "--tables", "rebuttal_latency", "--runs", str(tmp_path / "runs"), "--only"]
    monkeypatch.setattr("sys.argv", [*call, "Gemma 2B"])
    bench.main()
    first = len(done)
    monkeypatch.setattr("sys.argv", [*call, "Gemma 2B", "grouped"])
    bench.main()
    assert first == 6 and done[first:] == [k for k in done[first:] if "grouped" in k] and len(done) == 8
    evidence = Evidence(ROOT, load_scale(ROOT, "smoke"), Records(tmp_path / "runs"))
    files = collect_artifact(evidence, evidence.table("rebuttal_latency"), tmp_path)
    assert {f.suffix for f in files} == {".csv", ".md", ".tex", ".png", ".svg"}
    frame = pd.read_csv(tmp_path / "rebuttal_latency.csv")
    ratios = frame[frame["metric"] == "ratio"]
    measured = ratios[ratios["n_seeds"] > 0]
    assert len(ratios) == 17 and len(measured) == 8 and measured["mean"].gt(0).all()
    assert ratios[ratios["n_seeds"] == 0]["mean"].isna().all()
    assert frame["reported"].isna().all() and frame["stands_in_for"].ne("").all()
    assert "not run" in (tmp_path / "rebuttal_latency.md").read_text()
    gpu = Evidence(ROOT, load_scale(ROOT, "gpu"), Records(tmp_path / "runs"))
    whole = gpu.frame(gpu.table("rebuttal_latency"))
    assert set(whole["reported"].dropna()) == {0.35, 0.34, 0.16, 1.4} and (whole["n_seeds"] == 0).all()
    content = json.loads(file_of(tmp_path / "runs", "smoke", "rebuttal_latency").read_text())
    assert all(found["device"] and found["versions"]["torch"] for found in content["cases"].values())


def test_metrics_of_a_case_by_hand():
    found = {"seconds": [0.4, 0.2, 0.3], "reference_seconds": [0.2, 0.2, 0.1], "sequences": 4, "tokens": 60,
             "reference_tokens": 30, "flops": 9e13, "reference_flops": 6e13, "peak_memory_bytes": 5e9}  # fmt: skip
    got = {name: value for name, (value, _) in metrics_of(found, "NVIDIA H200").items()}
    assert got == pytest.approx(
        {
            "ratio": 2.0,
            "token_ratio": 2.0,
            "flop_ratio": 1.5,
            "seconds_per_step": 0.3,
            "sequences_per_second": 4 / 0.3,
            "tokens_per_second": 200.0,
            "utilisation": 100 * 9e13 / 0.3 / 989e12,
            "peak_memory": 5.0,
        }
    )
    assert "utilisation" not in metrics_of(found, "cpu (AMD EPYC)")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "empty"),
        ("[1]", "no measurements as benchmarks/cost.py writes them"),
        ('{"cases": {"a": []}}', "no measurements as benchmarks/cost.py writes them"),
        ('{"cases": {"a": {"case": {}, "device": "d", "seconds": ["1"]}}}', "no measurements as benchmarks/cost.py"),
    ],
)
def test_damaged_measurements_leave_their_table_and_stop_no_other(tmp_path, capsys, content, says):
    file = file_of(tmp_path / "runs", "smoke", "rebuttal_latency")
    file.parent.mkdir(parents=True)
    file.write_text(content)
    words = ["--scale", "smoke", "--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    assert main(["collect", "rebuttal_latency", "rebuttal_flops", *words]) == 0
    said = capsys.readouterr().err
    assert said.startswith(f"left out: {file}: {says}") and said.count("\n") == 1
    assert (pd.read_csv(tmp_path / "results/rebuttal_latency.csv")["n_seeds"] == 0).all()
    assert (tmp_path / "results/rebuttal_flops.csv").exists()


def test_freed_memory_stays_with_the_process():
    """128 MB that are asked for again after they were freed come with few of their 32,768 pages new."""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("another libc keeps memory as it likes")
    code = (
        "import resource, torch\n"
        "from mutor.cli import keep_memory\n"
        "keep_memory()\n"
        "for _ in range(6):\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    blocks = [torch.ones(1 << 21) for _ in range(16)]\n"
        "    del blocks\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    assert int(found.stdout) < 1000
