"""Several processes train what one does: DDP and FSDP2, real processes on the CPU, started by `accelerate launch`.

accelerate launch ... tests/test_distributed.py FOLDER ddp|fsdp   # what each of them does in the first test
"""

import gc
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import test_run
import yaml

from mutor.cli import main
from mutor.config.load import load_scale
from mutor.config.runs import make_spec
from mutor.results import records
from mutor.training import devices
from mutor.training.devices import claim, leave
from mutor.training.run import RunEnvironment, run

ROOT = Path(__file__).parent.parent
TWO = [
    sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
    "--gpu_ids", "all", "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no",
]  # fmt: skip
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
HEADS = {"hidden": "weighted", "injection": 0.1, "warm_up": 2, "a_schedule": "linear", "entropy_limit": 3.0}
RUNS = {
    "next_token": ("next_token", {}, {}, {}),
    "mutor": ("mutor", {}, {}, {"warm_up": 2, "d_max_schedule": "reverse"}),
    "by_sequence": ("mutor", {"loss_mean": "sequence"}, {}, {"trunk": "frozen", "register_lora": 4}),
    "parallel_mtp": ("parallel_mtp", {"accumulate": 2}, {}, HEADS),
    "sequential_mtp": ("sequential_mtp", {}, {}, {"d_max": 3, "d_max_schedule": "forward"}),
    "tied": ("sequential_mtp", {"gradient_checkpointing": True}, {"tie_word_embeddings": True}, {}),
    "images": ("mutor_2d", {"keep_steps": (3,)}, {"dropout": 0.0, "class_dropout": 0.0}, {"d_max": 4, "a": 0.5}),
}


def train(folder, name, sharded=False):
    """One of the runs, scored and saved in its middle: word problems of different lengths, or images."""
    method, recipe, changes, settings = RUNS[name]
    recipe = {"accumulate": 4, "steps": 6, "log_every": 1, "eval_every": 3, "save_every": 3, **recipe}
    if name == "images":
        scale = load_scale(ROOT, "smoke")
        spec = make_spec(scale, "digits", "llamagen-1x32", method, settings, (7,))
        spec = replace(spec, recipe=replace(spec.recipe, **recipe))
    else:
        spec = test_run.text_spec(method, settings, **recipe)
    model = replace(spec.model_config, config=spec.model_config.config | changes)
    spec = replace(spec, model_config=model, sharded=sharded)
    run(spec, spec.seeds, RunEnvironment(root=ROOT, runs=folder / name))


def read(folder, name="*"):
    """The record and the last model's weights of a run."""
    from safetensors.torch import load_file

    file = next(folder.glob(f"{name}/**/seed7/metrics.json"))
    return records.read(file), load_file(file.parent / "last/model.safetensors"), file.parent


def same(ours, theirs, names):
    """Whether two learning curves agree, step by step, up to rounding."""
    pairs = zip(ours["curve"], theirs["curve"], strict=True)
    assert all(a.keys() == b.keys() and a["step"] == b["step"] for a, b in pairs)
    lines = [[[e[n] for n in names] for e in r["curve"] if "loss" in e] for r in (ours, theirs)]
    assert len(lines[0]) >= 6 and np.allclose(*lines, rtol=1e-5), names


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The runs of one process."""
    for needed in ("lm_eval", "sklearn", "diffusers", "torchmetrics"):
        pytest.importorskip(needed)
    folder = tmp_path_factory.mktemp("one")
    for name in RUNS:
        train(folder, name)
    return folder


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_train_like_one(one, tmp_path, kind):
    from transformers import AutoModelForCausalLM

    done = subprocess.run([*TWO, __file__, str(tmp_path), kind], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = {"next_token": [], "parallel_mtp": ["head_2"], "sequential_mtp": ["depth_1"], "tied": ["depth_1"]}
    for name in RUNS:
        (ours, weights, folder), (theirs, expected, _) = read(tmp_path, name), read(one, name)
        assert (ours["processes"], theirs["processes"]) == (2, 1) and ours["resumed"] == (name == "mutor")
        assert ours["config_hash"] == theirs["config_hash"]
        same(ours, theirs, ["loss", "next_token", *parts.get(name, ["register"]), "grad_norm", "tokens"])
        for key in ("parameters", "trainable_parameters", "added_parameters", "steps", "tokens"):
            assert ours[key] == theirs[key], key
        assert weights.keys() == expected.keys() and not any("mtp" in key for key in weights)
        assert all(np.allclose(weights[key], expected[key], atol=1e-5) for key in weights)
        plain = AutoModelForCausalLM.from_pretrained(folder / "last")
        assert plain.config.architectures == [type(plain).__name__]
        assert ours["checkpoints"][-1]["metrics"]["loss"] == pytest.approx(theirs["checkpoints"][-1]["metrics"]["loss"])
        assert not (folder / "checkpoints").exists()


def work(folder, kind):
    """What each of the two processes does: all runs, one of them interrupted and taken up again."""
    from mutor.training.trainer import MethodTrainer

    gc.freeze()  # the Trainer collects garbage with every run
    if kind == "fsdp":
        shard_on_cpu()
    log = MethodTrainer.log

    def interrupted(self, *args):
        if self.state.global_step == 5:
            MethodTrainer.log = log
            raise InterruptedError
        log(self, *args)

    MethodTrainer.log = interrupted
    try:
        train(folder, "mutor", kind == "fsdp")
    except InterruptedError:
        checkpoint = next(folder.glob("mutor/*/*/*/*/*/seed7/checkpoints/checkpoint-3"))
        assert (checkpoint / "pytorch_model_fsdp_0").is_dir() == (kind == "fsdp")
    for name in RUNS:
        train(folder, name, kind == "fsdp")


def shard_on_cpu():
    """accelerate shards on GPUs only; here it takes the same paths on CPUs."""
    from accelerate import state
    from accelerate.utils import DistributedType

    start = state.AcceleratorState.__init__

    def sharding(self, *args, fsdp_plugin=None, **kwargs):
        start(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
            state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    state.AcceleratorState.__init__ = sharding


@pytest.fixture
def project(tmp_path):
    """A project whose smoke scale trains GPT-2s in two processes; longer, so that a run can be killed in its middle."""
    (tmp_path / "config/scales").mkdir(parents=True)
    (tmp_path / "config/tables").symlink_to(ROOT / "config/tables")
    (tmp_path / "config/config.yaml").write_text((ROOT / "config/config.yaml").read_text())
    scale = yaml.safe_load((ROOT / "config/scales/smoke.yaml").read_text())
    scale["processes"] = {"gpt2-2x32": 2}
    scale["recipes"]["star_graph"] |= {"accumulate": 2, "steps": 40, "log_every": 5}
    (tmp_path / "config/scales/smoke.yaml").write_text(yaml.safe_dump(scale))
    return tmp_path


@pytest.mark.long
def test_killed_command_of_two_processes_goes_on_to_the_result_of_one(project):
    """`mutor run` starts the processes that the scale asks for; base model, DDP, Muon."""
    command = [sys.executable, "-m", "mutor", "run", "--scale", "smoke", "--data", "g2x3", "--model", "gpt2-2x32"]
    command += ["--method", "parallel_mtp", "--set", "d_max=3", "a=0.5", "--seeds", "7"]
    launcher = subprocess.Popen(command, cwd=project, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    name = "runs/smoke/g2x3/gpt2-2x32/parallel_mtp/*/seed7"
    for _ in range(3000):
        if list(project.glob(f"{name}/checkpoints/checkpoint-*/manifest.json")) or launcher.poll() is not None:
            break
        time.sleep(0.02)
    for process in [*psutil.Process(launcher.pid).children(recursive=True), launcher]:
        process.kill()
    launcher.wait()
    assert not list(project.glob(f"{name}/metrics.json"))
    done = subprocess.run(command, cwd=project, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0 and "resumed from step" in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("step 40/40  solve_rate") == 1  # one process speaks
    scale = load_scale(project, "smoke")
    spec = make_spec(scale, "g2x3", "gpt2-2x32", "parallel_mtp", {"d_max": 3, "a": 0.5}, (7,))
    run(spec, spec.seeds, RunEnvironment(root=ROOT, runs=project / "alone"))
    (ours, weights, _), (theirs, expected, _) = read(project, "runs/smoke/g2x3"), read(project, "alone/smoke/g2x3")
    assert (ours["processes"], theirs["processes"], ours["resumed"]) == (2, 1, True)
    same(ours, theirs, ["loss", "next_token", "head_2", "head_3", "grad_norm", "tokens"])
    assert all(np.allclose(weights[key], expected[key], atol=1e-4) for key in expected)


SRUN = {
    "SLURM_STEP_NUM_TASKS": "5", "SLURM_PROCID": "4", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "123", "SLURM_STEP_ID": "0",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7",
}  # fmt: skip


def test_tasks_of_srun_join_each_other(monkeypatch, capsys, project):
    """The fifth of five on the second of two nodes; as many as the scale says, else it is no run of this scale."""
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k not in names} | SRUN)
    monkeypatch.chdir(project)
    words = ["run", "--scale", "smoke", "--data", "g2x3", "--model", "gpt2-2x32", "--method", "next_token"]
    assert main(words) == 2
    assert "5 processes were started, but gpt2-2x32 has 2 at this scale" in capsys.readouterr().err
    assert [os.environ[name] for name in names] == ["5", "4", "1", "10.0.0.7", "20123"]
    assert devices.processes() == 5 and not devices.is_main()
    monkeypatch.setattr(os, "environ", os.environ | {"LOCAL_RANK": "0"})  # by a launcher of torch's: it says all
    devices.join_step()
    assert os.environ["LOCAL_RANK"] == "0"


HOLD = """
import os, sys
from pathlib import Path
from mutor.training import devices
execv = os.execv
devices.choose_device = lambda wanted, processes: devices.claim(["cuda-0", "cuda-1"][:processes], Path(sys.argv[1]))
os.execv = lambda program, command: execv(program, [program, "-c", "print('launcher', flush=True); input()"])
devices.launch(["run"], 1, "cuda", 1)
"""


def test_launcher_holds_the_devices_of_its_processes(tmp_path):
    start = [sys.executable, "-c", HOLD, str(tmp_path)]
    launcher = subprocess.Popen(start, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert launcher.stdout.readline() == "launcher\n"
    assert claim(["cuda-0", "cuda-1"], tmp_path) == "cuda-1"
    launcher.communicate("\n")
    assert claim(["cuda-0"], tmp_path) == "cuda-0"


@pytest.mark.parametrize(
    ("change", "data", "method", "says"),
    [
        ({"processes": {"gpt3": 2}}, None, "", "processes: 'gpt3' is unknown, did you mean 'gpt2-2x32'?"),
        ({"processes": {"gpt2-2x32": 0}}, None, "", "processes: gpt2-2x32: 0 is not allowed; allowed: 1, 2, ..."),
        ({"processes": {"gpt2-2x32": True}}, None, "", "processes: gpt2-2x32: True is not allowed; allowed: 1, 2, ..."),
        ({"sharded": ["gpt3"]}, None, "", "sharded: 'gpt3' is unknown"),
        ({"processes": {}, "sharded": ["gpt2-2x32"]}, None, "", "sharded: 'gpt2-2x32' has 1 process; allowed: models"),
        ({"processes": {"llama-2x32": 3}}, "gsm8k", "mutor", "accumulate: 1; allowed: numbers that divide it"),
        (
            {"sharded": ["gpt2-2x32"]},
            "g2x3",
            "next_token",
            "sharded: gpt2-2x32: optimizer: 'muon' can't be; allowed: adamw",
        ),
    ],
)
def test_wrong_settings_are_refused_before_anything_runs(project, change, data, method, says):
    file = project / "config/scales/smoke.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | change))
    with pytest.raises(ValueError) as error:
        scale = load_scale(project, "smoke")
        make_spec(scale, data, "llama-2x32" if data == "gsm8k" else "gpt2-2x32", method, {})
    assert says in str(error.value) and "config/scales/smoke.yaml: " in str(error.value)


def test_published_processes():
    """5 GPUs x 2 parts x 1 sequence for Llama, sharded; 8 GPUs x 128 images for LlamaGen (protocol: hardware)."""
    scale = load_scale(ROOT, "paper")
    for data, model, method, processes, sharded, size in (
        ("1m-gsm", "llama-3-8b", "mutor", 5, True, 1),
        ("1m-gsm", "gemma-2b", "mutor", 1, False, 1),
        ("imagenet-256", "llamagen-b", "mutor_2d", 8, False, 128),
    ):
        spec = make_spec(scale, data, model, method, {})
        recipe = spec.recipe
        assert (spec.processes, spec.sharded, recipe.batch_size // recipe.accumulate) == (processes, sharded, size)
        alone = make_spec(replace(scale, processes={}, sharded=()), data, model, method, {})
        assert alone == spec and alone.config_hash == spec.config_hash  # the same run, computed otherwise
    with pytest.raises(ValueError, match="sharded: llama-3-8b: trunk: 'lora' can't be; allowed: trained, frozen"):
        make_spec(scale, "1m-gsm", "llama-3-8b", "lora_mutor", {})


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    work(Path(sys.argv[1]), sys.argv[2])
    leave()
