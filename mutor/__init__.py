"""Multi-token prediction with registers, and everything its benchmark shares."""

from pathlib import Path
from typing import Any

__version__ = "0.1.0"
__all__ = ["MuToR", "__version__"]
# mutor.baselines: inside an installed package, beside this one in a checkout
__path__ = [*__path__, *([] if Path(__path__[0], "baselines").is_dir() else [str(Path(__path__[0]).parent)])]


def __getattr__(name: str) -> Any:
    if name == "MuToR":  # imported when asked for, so that planning never imports torch
        from mutor.mtp.mutor import MuToR

        return MuToR
    raise AttributeError(f"module 'mutor' has no attribute {name!r}")
