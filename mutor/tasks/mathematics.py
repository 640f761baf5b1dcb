r"""Whether two LaTeX answers are equal, by the package math-verify, in limited time.

>>> equal(r"\frac{1}{2}", "0.5")
True

To simplify `9^{9^{9^{9}}}` or `100000000!` takes for ever. math-verify's own limits are exceptions raised by an alarm.
They need a main thread, and wait until a single operation ends, of which gmpy2, where it is installed, makes long ones.
So answers are compared in a process of its own, which the system ends. It is started for the first comparison, and
again after each that it did not survive.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from functools import lru_cache
from multiprocessing.connection import Connection

SECONDS = 10  # of CPU time, so that a busy machine changes no score; math-verify's own limit is 5 for each of 3 steps
_one_at_a_time = threading.Lock()


def equal(answer: str, gold: str) -> bool:
    """Normalised or symbolic equality of two LaTeX texts without `$` around them; from any thread.

    Raises TimeoutError where SECONDS do not suffice, or memory, and RuntimeError where math-verify can't be loaded.
    """
    with _one_at_a_time:
        if _worker()[0].poll() is not None:
            _worker.cache_clear()
        process, connection = _worker()
        with contextlib.suppress(EOFError, ConnectionError):
            connection.send((answer, gold))
            return bool(connection.recv())
        code = process.wait()
    if code > 0:
        raise RuntimeError("the process that compares answers failed; its error stands above")
    raise TimeoutError(f"no result in {SECONDS} s: {answer!r}")


@lru_cache(maxsize=1)
def _worker() -> tuple[subprocess.Popen[bytes], Connection]:
    """The process, and where to ask it. Not one of multiprocessing, which would run the main script once more."""
    ours, theirs = multiprocessing.Pipe()
    program = f"from {_compare.__module__} import {_compare.__name__} as run; run({theirs.fileno()}, {SECONDS})"
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", program],
        pass_fds=[theirs.fileno()],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    theirs.close()  # so that the end of the process is seen
    return process, ours


def _compare(file: int, seconds: float) -> None:
    """Answer pairs of texts that come through a file descriptor with their equality, until there are no more."""
    from math_verify import parse, verify

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, whose end this process notices
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that it has no limit of its own
    connection = Connection(file)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            answer, gold = connection.recv()
            signal.setitimer(signal.ITIMER_PROF, seconds)  # nothing handles its signal, so it ends the process
            ours, theirs = (parse(f"${text}$", parsing_timeout=None) for text in (answer, gold))
            same = bool(verify(theirs, ours, timeout_seconds=None))
            signal.setitimer(signal.ITIMER_PROF, 0)
            connection.send(same)
