"""Who draws a range: the nvtx package, torch.cuda.nvtx, or nobody."""

from __future__ import annotations

import functools
import sys
from typing import Any, Protocol


class NvtxBackend(Protocol):
    """Opens and closes ranges on the calling thread; the last opened is closed first."""

    def push(self, message: str, domain: str | None) -> None:
        """Open a range."""

    def pop(self, domain: str | None) -> None:
        """Close the last range that was opened in this domain."""


class NvtxPackage:
    """The package ``nvtx``. It draws whatever the device is, and knows domains."""

    def __init__(self, package: Any) -> None:
        self._package = package

    def push(self, message: str, domain: str | None) -> None:
        """Open a range."""
        self._package.push_range(message, domain=domain)

    def pop(self, domain: str | None) -> None:
        """Close a range."""
        self._package.pop_range(domain=domain)


class TorchNvtx:
    """``torch.cuda.nvtx``. It has one domain."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def push(self, message: str, domain: str | None) -> None:
        """Open a range."""
        self._module.range_push(message)

    def pop(self, domain: str | None) -> None:
        """Close a range."""
        self._module.range_pop()


def find_backend() -> NvtxBackend | None:
    """Return the first that is there. torch counts once somebody has imported a build that has NVTX."""
    package = _nvtx_package()
    if package is not None:
        return package
    torch: Any = sys.modules.get("torch")
    if hasattr(getattr(torch, "_C", None), "_nvtx") and hasattr(getattr(torch, "cuda", None), "nvtx"):
        return TorchNvtx(torch.cuda.nvtx)
    return None


@functools.cache
def _nvtx_package() -> NvtxPackage | None:
    try:
        import nvtx
    except ImportError:
        return None
    return NvtxPackage(nvtx)
