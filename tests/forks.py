"""A Python that starts within a tenth of a second, for programs that import torch, transformers, pandas or snakemake.

with forks.python(folder) as executable:
    subprocess.run([executable, "-m", "mutor", "plan"])

Each program is a process of its own, forked from one that has imported other people's packages and nothing of this
project. `executable` takes what Python takes; all but `-m MODULE` and `FILE.py` is Python as ever. Programs share the
seed of hash() and the state of random generators, so what has to be the same in any process is not tested by it.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGES = (
    "torch", "transformers", "transformers.trainer", "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama", "peft", "accelerate", "datasets", "pandas", "scipy.stats",
    "matplotlib.figure", "matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg", "sklearn.datasets",
    "diffusers.models.autoencoders.vq_model", "torchmetrics.image.fid", "lm_eval.models.huggingface",
    "lm_eval.evaluator", "snakemake.cli",
)  # fmt: skip
SOCKET = "socket"  # relative: a path of more than 107 bytes is none


@contextlib.contextmanager
def python(folder: Path) -> Iterator[str]:
    """The executable, in a new folder, for as long as it is needed."""
    folder.mkdir()
    server = [sys.executable, __file__, "serve", str(folder)]
    ask = [sys.executable, "-IS", __file__, "ask", str(folder)]
    file = folder / "python"
    file.write_text(
        '#!/bin/sh\ncase "$1" in\n'
        f'-m|*.py) exec {shlex.join(ask)} "$0" "$@";;\n'
        f'*) exec {shlex.quote(sys.executable)} "$@";;\nesac\n'
    )
    file.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with subprocess.Popen(server, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        assert b"ready\n" in process.stdout  # its lines, until one is this
        try:
            yield str(file)
        finally:
            process.stdin.close()


def serve(folder: str) -> list[str]:
    """Fork for each program, until stdin ends. Returns in the programs: the executable and its arguments."""
    os.chdir(folder)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(SOCKET)
    listener.listen(64)
    for name in PACKAGES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.freeze()  # no program looks for garbage there
    print("ready", flush=True)
    while listener in select.select([listener, sys.stdin], [], [])[0]:
        connection = listener.accept()[0]
        if os.fork() == 0:
            listener.close()
            return keep(connection)
        connection.close()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()
    os._exit(0)


def keep(connection: socket.socket) -> list[str]:
    """Fork the program, tell who asked how it ended, and end it with who asked. Returns in the program."""
    files = socket.recv_fds(connection, 1, 3)[1]
    asked = json.loads(connection.makefile().readline())
    program = os.fork()
    if program == 0:
        connection.close()
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        os.chdir(asked["cwd"])
        os.environ.clear()
        os.environ.update(asked["environment"])
        return asked["arguments"]
    for file in files:
        os.close(file)
    while not (ended := os.waitpid(program, os.WNOHANG))[0]:
        if select.select([connection], [], [], 0.02)[0]:  # its end alone: nothing more is asked
            os.kill(program, signal.SIGKILL)
    with contextlib.suppress(OSError):
        connection.sendall(str(os.waitstatus_to_exitcode(ended[1])).encode())
    os._exit(0)


def ask(folder: str, arguments: list[str]) -> None:
    """Have a program run as if it were this process, and end as it ended."""
    asked = {"arguments": arguments, "cwd": os.getcwd(), "environment": dict(os.environ)}
    os.chdir(folder)
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(SOCKET)
    socket.send_fds(connection, [b"x"], [0, 1, 2])
    connection.sendall(json.dumps(asked).encode() + b"\n")
    code = int(connection.recv(16) or 1)
    if code < 0:
        with contextlib.suppress(OSError):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def run(executable: str, *arguments: str) -> None:
    """What Python does with its arguments."""
    sys.executable, sys.argv = executable, list(arguments)
    module = arguments[0] == "-m"
    home = os.getcwd() if module else str(Path(arguments[0]).resolve().parent)
    sys.path[0:1] = [home, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    if module:
        del sys.argv[0]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1] == "ask":
        ask(sys.argv[2], sys.argv[3:])
    run(*serve(sys.argv[2]))
