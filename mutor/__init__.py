"""Multi-token prediction with registers, and everything its benchmark shares."""

from pathlib import Path
from typing import Any

from mutor.registry import METHODS, load, resolve

__version__ = "0.1.0"
__all__ = ["MuToR", "MultiTokenTrainer", "__version__", "method"]
# mutor.baselines: inside an installed package, beside this one in a checkout
__path__ = [*__path__, *([] if Path(__path__[0], "baselines").is_dir() else [str(Path(__path__[0]).parent)])]
LAZY = {"MuToR": METHODS["mutor"], "MultiTokenTrainer": "mutor.mtp.trainer:MultiTokenTrainer"}


def method(name: str, **settings: Any) -> Any:
    """A method of the suite by its name: `mutor.method("parallel_mtp", d_max=4)`.

    Raises ValueError for an unknown name or setting, with the nearest one.
    """
    return load(METHODS, name, "method").of(**settings)


def __getattr__(name: str) -> Any:
    if name in LAZY:  # imported when asked for, so that planning never imports torch
        return resolve(LAZY[name])
    raise AttributeError(f"module 'mutor' has no attribute {name!r}")
