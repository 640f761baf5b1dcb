"""Which device a run takes: runs at once on one machine get different GPUs."""

import fcntl
import os
import tempfile
from pathlib import Path
from typing import Any

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


def choose_device(wanted: str) -> str:
    """The device, "cpu" or "cuda", for a scale's `device`; with cuda, one free GPU is made the only visible one.

    Raises ValueError where a GPU is asked for and none is there, or none is free.
    """
    import torch

    # counted before CUDA is initialised, so that the choice below still takes effect
    count = 0 if wanted == "cpu" else torch.cuda.device_count()
    if count == 0:
        if wanted == "cuda":
            raise ValueError("device: 'cuda' is asked for, but torch sees no GPU; allowed here: cpu, auto")
        return "cpu"
    if "LOCAL_RANK" in os.environ:  # a launcher hands out the devices
        return "cuda"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(count)]
    mine = claim([f"cuda-{name}" for name in names])
    if mine is None:
        raise ValueError(f"device: all GPUs ({', '.join(names)}) are taken by other runs; start fewer at once")
    os.environ["CUDA_VISIBLE_DEVICES"] = mine.removeprefix("cuda-")
    return "cuda"
