"""The memory of the CUDA device that this process uses."""

from __future__ import annotations

import sys
from typing import Any

from ds_logging._timers.device_timer import choose_device

_GIB = 1024**3


def device_memory() -> tuple[float, float, float, float]:
    """Return what is allocated, was at most, is reserved and was at most, in units of 2**30 bytes; 0 without CUDA."""
    if choose_device(None) == "cpu":
        return (0.0, 0.0, 0.0, 0.0)
    cuda: Any = sys.modules["torch"].cuda
    return (
        cuda.memory_allocated() / _GIB,
        cuda.max_memory_allocated() / _GIB,
        cuda.memory_reserved() / _GIB,
        cuda.max_memory_reserved() / _GIB,
    )
