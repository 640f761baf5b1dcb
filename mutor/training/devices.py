"""Which devices a run takes, and how several processes work on one: runs at once on one machine get different GPUs.

launch(["run", "--data", ...], 5, "cuda")   # this program again, in 5 processes with a GPU each
choose_device("cuda")                       # in each of them: join the others
join_step()                                 # or: join those that srun has started, on one machine or several
agreed(value)                               # the main process's value, in all of them
"""

import contextlib
import fcntl
import os
import platform
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

_held: dict[Path, Any] = {}  # open lock files, released when the process ends, however it ends


def claim(wanted: list[str], folder: Path | None = None) -> str | None:
    """Take the first of the devices `wanted` that no other process of this machine holds; None if all are held.

    One that this process already holds stays its own. Held by an advisory lock on a file, so a killed process gives
    its device back.
    """
    folder = folder or Path(tempfile.gettempdir()) / f"mutor-devices-{os.getuid()}"
    folder.mkdir(parents=True, exist_ok=True)
    for name in wanted:
        file = folder / f"{name.replace('/', '_')}.lock"
        if file in _held:
            return name
        handle = open(file, "w")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.close()
            continue
        _held[file] = handle
        return name
    return None


def choose_device(wanted: str, processes: int = 1) -> str:
    """The device, "cpu" or "cuda", for a scale's `device`; with cuda, as many free GPUs are made the only visible ones.

    A process that a launcher started joins the others of its run instead: their launcher has handed out the devices.
    Raises ValueError where a GPU is asked for and none is there, or too few are free.
    """
    import torch

    # counted before CUDA is initialised, so that the choice below still takes effect
    count = 0 if wanted == "cpu" else torch.cuda.device_count()
    if count == 0 and wanted == "cuda":
        raise ValueError("device: 'cuda' is asked for, but torch sees no GPU; allowed here: cpu, auto")
    if "LOCAL_RANK" in os.environ:
        from accelerate import PartialState

        if count == 0:  # not cpu:1, on which some versions of transformers can't load a checkpoint
            os.environ.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")
        # one process may score for hours while the others wait; what hangs is ended by who scheduled it
        PartialState(cpu=count == 0, timeout=timedelta(days=7))
        return "cuda" if count else "cpu"
    if count == 0:
        return "cpu"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(count)]
    mine: list[str] = []
    for name in names:
        if len(mine) < processes and claim([f"cuda-{name}"]):
            mine.append(name)
    if len(mine) < processes:
        raise ValueError(
            f"device: {processes} free GPUs are needed; of {', '.join(names)}, {len(names) - len(mine)} are taken by "
            "other runs; start fewer at once"
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
    return "cuda"


def launch(arguments: list[str], processes: int, wanted: str, threads: int) -> None:
    """Become `accelerate launch` of `python -m mutor` with these arguments, in several processes of this machine.

    threads: CPU threads a process. The launcher keeps this process's id and its hold on the devices.
    """
    choose_device(wanted, processes)
    for handle in _held.values():
        os.set_inheritable(handle.fileno(), True)
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",  # its name for several processes on one machine, on CPUs too
        "--num_processes",
        str(processes),
        "--num_machines",
        "1",
        "--gpu_ids",
        "all",
        "--main_process_port",
        "0",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--num_cpu_threads_per_process",
        str(threads),
        "-m",
        "mutor",
        *arguments,
    ]
    sys.stdout.flush()
    os.execv(sys.executable, command)


def join_step() -> None:
    """Where srun has started this program several times: name rank and main process as torch's launchers do."""
    count = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
    if count > 1 and "LOCAL_RANK" not in os.environ:
        place = int(os.environ["SLURM_JOB_ID"]) + 7919 * int(os.environ["SLURM_STEP_ID"])
        os.environ |= {
            "WORLD_SIZE": str(count),
            "RANK": os.environ["SLURM_PROCID"],
            "LOCAL_RANK": os.environ["SLURM_LOCALID"],
            "MASTER_ADDR": os.environ["SLURM_LAUNCH_NODE_IPADDR"],  # where the batch runs, and task 0
            "MASTER_PORT": str(20000 + place % 10000),  # another one for each job on a node
        }


def processes() -> int:
    """How many processes work on this run: 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1


def is_main() -> bool:
    """Whether this process writes files and says progress."""
    return processes() == 1 or os.environ["RANK"] == "0"


def leave() -> None:
    """End one of several processes of a run, its work done, once all others are here.

    At once, without the interpreter's own end, in which threads of the communication library now and then abort.
    """
    if processes() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()
        PartialState().destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def agreed(value: T) -> T:
    """The main process's value, in all processes of the run, which wait for it here."""
    if processes() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def device_name(device: str) -> str:
    """What a person calls the device."""
    if device == "cuda":
        import torch

        return str(torch.cuda.get_device_name())
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"cpu ({line.partition(':')[2].strip()})"
    return f"cpu ({platform.processor() or platform.machine()})"
