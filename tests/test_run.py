"""One setting end to end: kill and resume, records, checkpoints as anyone would load them."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mutor.config.load import load_scale
from mutor.config.runs import make_spec
from mutor.results import record_schema, records
from mutor.tasks.star_graph import StarGraph
from mutor.training.devices import claim
from mutor.training.run import RunEnvironment, run, write_index

ROOT = Path(__file__).parent.parent
TIMES = ("seconds", "started", "finished", "memory", "resumed", "git")


def smoke_spec(method="mutor", **recipe):
    scale = load_scale(ROOT, "smoke")
    settings = scale.datasets["g2x3"].settings.get(method, {})
    spec = make_spec(scale, "g2x3", "gpt2-2x32", method, settings, (7,))
    return replace(spec, recipe=replace(spec.recipe, **recipe))


def timeless(value):
    """A record without times, memory and commit."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if not any(t in k for t in TIMES)}
    return [timeless(v) for v in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of MuToR, its spec and folder."""
    runs = tmp_path_factory.mktemp("runs")
    spec = smoke_spec()
    run(spec, spec.seeds, RunEnvironment(root=ROOT, runs=runs))
    return spec, runs, records.seed_folder(runs, spec, 7)


def test_record_says_what_was_run_and_by_what(finished):
    spec, runs, folder = finished
    record = records.read(folder / "metrics.json")
    assert record["test_data_hash"] == StarGraph(spec.task_config).test_data_hash() != record["data_hash"]
    assert (record["method"], record["seed"], record["settings"]) == ("mutor", 7, {"a": 0.5, "d_max": 3, "d_min": 2})
    assert record["added_parameters"] == 32 and record["train_data_name"] == "star_graph n=2 l=3 labels=10"
    assert record["steps"] == 20 and record["tokens"] > 20 * 16 * 18
    assert {"MuToR", "MethodTrainer", "Layout", "StarGraph", "NextToken"} <= set(record["code"])  # its base's too
    assert set(record["versions"]) >= {"python", "torch", "transformers", "numpy"}
    assert [e["step"] for e in record["curve"] if "register" in e] == [5, 10, 15, 20]
    assert [e["step"] for e in record["curve"] if "eval_solve_rate" in e] == [10, 20]
    solved = records.problem_scores(record, "last", "solve_rate")
    assert records.checkpoint_metrics(record, "last")["solve_rate"] == 100 * solved.mean() and len(solved) == 100
    index = json.loads((runs / spec.path / "index.json").read_text())
    assert index["config_hash"] == spec.config_hash and list(index["seeds"]) == ["7"]
    assert not (folder / "checkpoints").exists()


def test_saved_model_is_plain_and_scores_as_recorded(finished):
    spec, _, folder = finished
    plain = AutoModelForCausalLM.from_pretrained(folder / "last")
    assert type(plain).__name__ == "GPT2LMHeadModel" and not [n for n, _ in plain.named_parameters() if "mtp" in n]
    from mutor.mtp.method import Context
    from mutor.registry import METHODS, TASKS, load

    task = load(TASKS, "star_graph", "t")(spec.task_config)
    method = load(METHODS, "next_token", "m")(None)  # anyone's evaluation, no registers involved
    metrics, scores = task.evaluate(plain.eval(), method, Context(pad_id=task.pad_id), "test", 33)
    record = records.read(folder / "metrics.json")
    for metric, values in scores.items():
        assert (values == records.problem_scores(record, "last", metric)).all()
    assert metrics["loss"] == pytest.approx(records.checkpoint_metrics(record, "last")["loss"], rel=1e-5)


def test_finished_seeds_are_left_alone(finished):
    spec, runs, folder = finished
    file = folder / "metrics.json"
    before = file.stat().st_mtime_ns
    run(spec, spec.seeds, RunEnvironment(root=ROOT, runs=runs, rerun_stale=True))
    assert file.stat().st_mtime_ns == before


def test_other_configuration_is_another_run(tmp_path):
    spec = smoke_spec("next_token", steps=5, eval_every=5, save_every=5)
    env = RunEnvironment(root=ROOT, runs=tmp_path)
    run(spec, spec.seeds, env)
    changed = smoke_spec("next_token", steps=5, eval_every=5, save_every=5, learning_rate=1e-3)
    assert changed.path == spec.path and not records.finished(tmp_path, changed, 7)
    assert records.Records(tmp_path).of(changed) == [] and len(records.Records(tmp_path).of(spec)) == 1
    run(changed, changed.seeds, env)
    folder = records.seed_folder(tmp_path, spec, 7)
    old = json.loads((folder / "metrics.superseded-1.json").read_text())
    assert old["config_hash"] == spec.config_hash and records.finished(tmp_path, changed, 7)


SCRIPT = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import test_run
from mutor.training.run import RunEnvironment, run
spec = test_run.smoke_spec("{method}", steps=60, log_every=3, eval_every=6, save_every=6)
from pathlib import Path

def kill(event, args):
    if event == "open" and str(args[0]) == {killed_at!r}:
        os.kill(os.getpid(), signal.SIGKILL)

if {killed_at!r}:
    sys.addaudithook(kill)
run(spec, (7,), RunEnvironment(root=test_run.ROOT, runs=Path({runs!r})))
"""


def start(python, runs, method, killed_at=""):
    """A run in a process of its own, killed when it opens the file `killed_at`.

    Not by the test, which would have to look in time: a checkpoint is there for tenths of a second.
    """
    script = SCRIPT.format(tests=str(Path(__file__).parent), method=method, runs=str(runs), killed_at=str(killed_at))
    file = runs.with_suffix(".py")
    file.write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [python, str(file)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


@pytest.mark.parametrize("method", ["mutor", "parallel_mtp"])
def test_killed_run_goes_on_to_the_same_result(tmp_path, python, method):
    if method == "mutor":
        python = sys.executable  # once with another seed of hash() in each process
    launch = functools.partial(start, python)
    whole = launch(tmp_path / "whole", method)
    output, _ = whole.communicate()
    assert whole.returncode == 0, output
    spec = smoke_spec(method, steps=60, log_every=3, eval_every=6, save_every=6)
    folder = records.seed_folder(tmp_path / "killed", spec, 7)
    # with a half-written checkpoint, twice, and after the model is saved but not yet scored
    for file, resumed in (
        ("checkpoints/checkpoint-12/trainer_state.json", ""),
        ("checkpoints/checkpoint-36/trainer_state.json", "resumed from step 6"),
        ("last/config.json", "resumed from step 30"),
    ):
        process = launch(tmp_path / "killed", method, folder / file)
        output, _ = process.communicate()
        assert process.returncode == -signal.SIGKILL and resumed in output, output
    assert (folder / "last/training.json").exists() and not (folder / "metrics.json").exists()
    last = launch(tmp_path / "killed", method)
    output, _ = last.communicate()
    assert last.returncode == 0 and "step 60/60" not in output, output
    other = records.seed_folder(tmp_path / "whole", spec, 7)
    ours, theirs = (timeless(json.loads((one / "metrics.json").read_text())) for one in (folder, other))
    assert ours == theirs
    for file in ("last/model.safetensors", "last/method/weights.safetensors", "best/method/weights.safetensors"):
        assert (folder / file).read_bytes() == (other / file).read_bytes(), file


def test_the_second_of_two_processes_waits_and_finds_the_run_finished(tmp_path, python):
    both = [start(python, tmp_path / "runs", "next_token") for _ in range(2)]
    outputs = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert sum("step 60/60" in output for output in outputs) == 1  # each may wait for the other, at the base or later


def test_solved_run_stops_early(tmp_path):
    spec = smoke_spec("next_token", stop_at=0.0)
    run(spec, spec.seeds, RunEnvironment(root=ROOT, runs=tmp_path))
    record = records.read(records.seed_folder(tmp_path, spec, 7) / "metrics.json")
    assert record["steps"] == 10


def test_loss_that_is_not_finite_ends_the_run(tmp_path):
    spec = smoke_spec("next_token", learning_rate=1e30, muon_rate=1e30, warmup=0)
    with pytest.raises(FloatingPointError, match="loss is"):
        run(spec, spec.seeds, RunEnvironment(root=ROOT, runs=tmp_path))
    assert not records.finished(tmp_path, spec, 7)


def text_spec(method="mutor", changed=(), **recipe):
    """Word problems of different lengths. changed: settings of the method."""
    scale = load_scale(ROOT, "smoke")
    settings = scale.datasets["gsm8k"].settings.get(method, {}) | dict(changed)
    spec = make_spec(scale, "gsm8k", "llama-2x32", method, settings, (7,))
    changes = {"epochs": None, "steps": 6, "eval_every": 6, "save_every": 6, "log_every": 1, "batch_size": 12}
    return replace(spec, base=None, recipe=replace(spec.recipe, **changes | recipe))


def norm_of_gradients(model):
    """Over all parameters."""
    return float(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm())


@pytest.mark.parametrize("recipe", [{}, {"accumulate": 2}, {"optimizer": "muon"}])
def test_gradients_are_clipped_to_the_recipes_norm(tmp_path, monkeypatch, recipe):
    """Of all parameters together, whole batches; the norm that is logged is that before."""
    from mutor.training import trainer

    used, make = [], trainer.optimizer

    def watched(model, method, recipe):
        made = make(model, method, recipe)
        made.register_step_pre_hook(lambda *_: used.append(norm_of_gradients(model)))
        return made

    monkeypatch.setattr(trainer, "optimizer", watched)
    found = []
    for clip in (0.05, 1e6):
        used.clear()
        changes = {"steps": 4, "eval_every": 4, "save_every": 4, "log_every": 1, "batch_size": 8, "clip": clip}
        spec = replace(smoke_spec(**changes | recipe), base=None)
        run(spec, spec.seeds, RunEnvironment(root=ROOT, runs=tmp_path / str(clip)))
        curve = records.read(records.seed_folder(tmp_path / str(clip), spec, 7) / "metrics.json")["curve"]
        found.append(([e["grad_norm"] for e in curve if "grad_norm" in e], list(used)))
    (logged, clipped), (large, free) = found
    assert min(logged) > 0.06 and clipped == pytest.approx([0.05] * 4, rel=1e-3)
    assert free == pytest.approx(large, rel=1e-3) and large[0] == pytest.approx(logged[0], rel=1e-4)


@pytest.mark.parametrize("loss_mean", ["token", "sequence"])
def test_batches_in_parts_or_packed_train_like_one_padded_batch(tmp_path, loss_mean):
    """Prompts and answers of different lengths, so parts have different numbers of targets."""
    pytest.importorskip("lm_eval")
    losses = []
    for number, changes in enumerate(({}, {"accumulate": 4}, {"row_tokens": 600}, {"accumulate": 3, "row_tokens": 1})):
        spec = text_spec(loss_mean=loss_mean, **changes)
        run(spec, spec.seeds, RunEnvironment(root=ROOT, runs=tmp_path / str(number)))
        record = records.read(records.seed_folder(tmp_path / str(number), spec, 7) / "metrics.json")
        names = ("loss", "next_token", "register", "grad_norm", "tokens")
        losses.append([[e[name] for name in names] for e in record["curve"] if "next_token" in e])
    assert len(losses[0]) == 6
    for other in losses[1:]:
        assert np.allclose(losses[0], other, rtol=2e-3)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_all_backends_train_like_dense_masks(tmp_path, flex_with_gradients):
    """A whole run without a mask, and one under FlexAttention, which answers and is scored under sdpa."""
    pytest.importorskip("lm_eval")
    found = []
    for attention in ("sdpa", "auto", "flex_attention"):
        spec = text_spec(steps=4, eval_every=2, save_every=2)
        spec = replace(spec, model_config=replace(spec.model_config, attention=attention))
        run(spec, spec.seeds, RunEnvironment(root=ROOT, runs=tmp_path / attention))
        record = records.read(records.seed_folder(tmp_path / attention, spec, 7) / "metrics.json")
        losses = [e["loss"] for e in record["curve"] if "loss" in e]
        found.append([*losses, records.checkpoint_metrics(record, "last")["loss"]])
    assert len(found[0]) == 5 and np.allclose(*found[:2], rtol=1e-4) and np.allclose(*found[1:], rtol=1e-3)


def test_two_runs_on_one_machine_get_different_devices(tmp_path):
    code = "import sys; from pathlib import Path; from mutor.training.devices import claim\n"
    code += "print(claim(['cuda-0', 'cuda-1'], Path(sys.argv[1])), flush=True); sys.stdin.read()"
    start = [sys.executable, "-c", code, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    others = [
        subprocess.Popen(start, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    taken = {other.stdout.readline().strip() for other in others}
    assert claim(["own"], tmp_path / "mine") == claim(["own"], tmp_path / "mine") == "own"  # a base, then its run
    assert taken == {"cuda-0", "cuda-1"} and claim(["cuda-0", "cuda-1"], tmp_path) is None
    others[0].kill()  # a killed process gives its device back
    others[0].wait()
    assert claim(["cuda-0", "cuda-1"], tmp_path) is not None
    others[1].kill()
    others[1].wait()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda r: r.pop("seed"), "field 'seed' is missing"),
        (lambda r: r["checkpoints"][0]["metrics"].update(solve_rate=170.0), "solve_rate' is 170.0"),
        (lambda r: r["checkpoints"][0]["metrics"].update(loss=float("nan")), "loss' is nan"),
        (lambda r: r.update(version=0), "field 'version' is 0"),
    ],
)
def test_nonsensical_record_names_file_and_field(finished, tmp_path, change, says):
    record = json.loads((finished[2] / "metrics.json").read_text())
    change(record)
    file = tmp_path / "metrics.json"
    file.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"metrics\.json: ") as error:
        records.read(file)
    assert says in str(error.value)


def test_scores_pack_and_unpack():
    bits = np.array([True, False, True] * 7)
    assert (record_schema.unpack(record_schema.pack(bits)) == bits).all()
    numbers = np.array([0.25, -3.0], dtype=np.float32)
    assert (record_schema.unpack(record_schema.pack(numbers)) == numbers).all()


def test_index_lists_seeds(finished):
    spec, runs, _ = finished
    write_index(spec, (7,), runs)
    assert torch.get_num_threads() == 1


def test_run_starts_from_its_own_seed_of_the_base_model(tmp_path):
    spec = smoke_spec("next_token", steps=5, eval_every=5, save_every=5)
    env = RunEnvironment(root=ROOT, runs=tmp_path)
    run(spec, (7, 8), env)
    from mutor.models.build import build

    states = {}
    for seed in (7, 8):
        base = records.seed_folder(tmp_path, spec.base, seed)
        assert records.read(base / "metrics.json")["steps"] == 20  # made on the way, with its own recipe
        model = build(spec.model_config, vocabulary=14, seed=0, base=base / "last")
        stored = AutoModelForCausalLM.from_pretrained(base / "last").state_dict()
        assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())
        states[seed] = stored["transformer.wte.weight"]
    assert not torch.equal(states[7], states[8])
    with pytest.raises(ValueError, match="has 14 tokens, this task has 15"):
        build(spec.model_config, vocabulary=15, seed=0, base=base / "last")
    # a cleaned-up base model is made again, the same, when a run needs it
    before = states[8]
    shutil.rmtree(base / "last")
    (records.seed_folder(tmp_path, spec, 8) / "metrics.json").unlink()
    shutil.rmtree(records.seed_folder(tmp_path, spec, 8) / "last")
    run(spec, (8,), env)
    again = AutoModelForCausalLM.from_pretrained(base / "last").state_dict()["transformer.wte.weight"]
    assert torch.equal(before, again)


def test_a_run_on_star_graphs_needs_torch_transformers_and_numpy_alone():
    """Language tasks need more (datasets, lm-eval, ...), LoRA peft; transformers brings the others by itself."""
    import ast

    from mutor.registry import METHODS, TASKS

    targets = [TASKS["star_graph"], *(target for name, target in METHODS.items() if not name.startswith("lora_"))]
    todo = ["mutor.cli", "mutor.training.run", *(target.partition(":")[0] for target in targets)]
    modules, used = set(), set()
    while todo:
        name = todo.pop()
        file = ROOT / f"{name.replace('mutor.baselines', 'baselines').replace('.', '/')}.py"
        if name in modules or not file.exists():
            continue
        modules.add(name)
        body = ast.parse(file.read_text())
        if name == "mutor.cli":  # `collect` and `plan` import more, when called
            body = ast.Module(body=[n for n in body.body if not isinstance(n, ast.FunctionDef)], type_ignores=[])
        for node in ast.walk(body):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                home = f"mutor.baselines.{node.module}" if node.level else node.module or ""
                names += [home]
                todo += [f"{home}.{a.name}" for a in node.names]
            todo += names
            used |= {n.partition(".")[0] for n in names}
    assert len(modules) > 20
    brought = {"torch", "transformers", "accelerate", "numpy", "yaml", "mutor", "huggingface_hub", "safetensors"}
    assert used - set(sys.stdlib_module_names) == brought | {"peft"}
    script = (  # peft is asked for first, and done without
        "import importlib.util as util, sys; real = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'peft' else real(name, *rest)\n"
        "from mutor.mtp import adapters, collator, method, mutor\n"
        "assert not adapters.PEFT and 'peft' not in sys.modules and adapters.base_model(3) == adapters.merged(3) == 3"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_answers_too_short_for_a_method_are_refused_before_it_trains(tmp_path):
    """With the lengths, in one line; nothing of a model is saved."""
    scale = load_scale(ROOT, "smoke")
    spec = make_spec(scale, "mix", "llama-2x32", "mutor", {"d_min": 300, "d_max": 301, "a": 0.5}, (7,))
    words = r"MuToR: the longest answer has (\d+) tokens, and below 300 nothing .*; allowed: .* d_min of at most \1$"
    with pytest.raises(ValueError, match=words) as error:
        run(spec, (7,), RunEnvironment(root=ROOT, runs=tmp_path))
    assert "\n" not in str(error.value)
    folder = records.seed_folder(tmp_path, spec, 7)
    assert not any((folder / part).exists() for part in ("checkpoints", "last", "best", "metrics.json"))
