"""Who draws a range: the nvtx package, torch.cuda.nvtx, a backend of the caller's own, or nobody.

[Note: attached] A tool such as Nsight Systems attaches to a process by the environment variable NVTX_INJECTION64_PATH,
which names a library. NVTX reads it at its first call and never again. So whether anything is to be drawn is known
from the start, and where nothing is, a function need not be wrapped at all.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import threading
from collections.abc import Callable
from typing import Any, Protocol

from ds_logging import _timeline
from ds_logging._nvtx.range_style import RangeStyle
from ds_logging.errors import ArgumentError

MODE_VARIABLE = "DS_NVTX"
INJECTION_VARIABLES = ("NVTX_INJECTION64_PATH", "NVTX_INJECTION32_PATH")


class NvtxBackend(Protocol):
    """Opens and closes ranges on the calling thread; the last opened is closed first."""

    def push(self, message: str, domain: str | None) -> None:
        """Open a range."""

    def pop(self, domain: str | None) -> None:
        """Close the last range that was opened in this domain."""


class TorchNvtx:
    """``torch.cuda.nvtx``, once somebody has imported a torch that has it. It knows no domains."""

    def __init__(self) -> None:
        self._thread = threading.local()

    def push(self, message: str, domain: str | None) -> None:
        """Open a range."""
        module = torch_nvtx()
        if not hasattr(self._thread, "drawn"):
            self._thread.drawn = []
        self._thread.drawn.append(module is not None)  # torch may be imported before the range ends
        if module is not None:
            module.range_push(message)

    def pop(self, domain: str | None) -> None:
        """Close a range."""
        module = torch_nvtx()
        if self._thread.drawn.pop() and module is not None:
            module.range_pop()


Calls = tuple[Callable[[], object], Callable[[], object]]  # what opens a range, and what closes it


def nothing() -> None:
    """Draw nothing."""


class Span:
    """What is to be drawn and reported around a call. It is made once, at decoration, and used by every call."""

    __slots__ = ("backend", "name", "pop", "push", "style")

    def __init__(self, style: RangeStyle, backend: NvtxBackend | None) -> None:
        self.style = style
        self.name = style.message or ""
        self.backend = backend
        self.push, self.pop = _find_calls(style) if backend is None else _calls_of(backend, style)

    def __reduce__(self) -> tuple[type[Span], tuple[RangeStyle, NvtxBackend | None]]:
        """Handles of NVTX mean nothing in another process: there they are made anew."""
        return Span, (self.style, self.backend)


def make_span(style: RangeStyle, backend: NvtxBackend | None = None) -> Span | None:
    """Return what to draw around calls of a function, or None where it may stay as it is.

    Raises:
        ArgumentError: the environment variable DS_NVTX has an unknown value.
    """
    if backend is not None:
        return Span(style, backend)
    mode = _mode()
    if mode == "off":
        return None
    if mode == "auto" and _timeline.listener is None and not _can_draw(style.domain):
        return None
    return _cached_span(style)


_cached_span = functools.lru_cache(maxsize=4096)(functools.partial(Span, backend=None))
"""``with instrument_w_nvtx("name")`` in a loop asks for the same span again and again."""


@functools.cache
def _mode() -> str:
    text = os.environ.get(MODE_VARIABLE, "").strip().lower() or "auto"
    if text not in ("on", "off", "auto"):
        raise ArgumentError(f"{MODE_VARIABLE}={os.environ[MODE_VARIABLE]!r}: give on, off or auto, or leave it unset")
    return text


@functools.cache
def _tool_is_named() -> bool:
    return any(os.environ.get(name) for name in INJECTION_VARIABLES)


def _can_draw(domain: str | None) -> bool:
    """Say whether a tool is attached and something is there that draws for it, now or once torch is imported."""
    if not _tool_is_named():
        return False
    if nvtx_package() is not None:
        return _nvtx_domain(domain) is not None
    return torch_nvtx() is not None or ("torch" not in sys.modules and importlib.util.find_spec("torch") is not None)


def _calls_of(backend: NvtxBackend, style: RangeStyle) -> Calls:
    push = functools.partial(backend.push, style.message or "", style.domain)
    return push, functools.partial(backend.pop, style.domain)


def _find_calls(style: RangeStyle) -> Calls:
    """Return what opens and what closes a range, with everything prepared that NVTX lets prepare."""
    package: Any = nvtx_package()
    if package is None:
        return _calls_of(TorchNvtx(), style)
    domain = _nvtx_domain(style.domain)
    if domain is None:
        return nothing, nothing
    attributes = domain.get_event_attributes(style.message, style.color, style.category, style.payload)
    # What nvtx.annotate calls. The methods of Domain build a dictionary at each call, for keywords that nobody gave.
    library: Any = getattr(package, "_lib", None)
    if hasattr(library, "push_range") and hasattr(library, "pop_range") and hasattr(domain, "handle"):
        push = functools.partial(library.push_range, attributes, domain.handle)
        return push, functools.partial(library.pop_range, domain.handle)
    return functools.partial(domain.push_range, attributes), domain.pop_range


def _nvtx_domain(name: str | None) -> Any:
    """Return the nvtx package's domain, or None where no tool looks at it."""
    domain = nvtx_package().get_domain(name)
    return None if type(domain).__name__ == "DummyDomain" else domain


@functools.cache
def nvtx_package() -> Any:
    """Return the package ``nvtx``, or None where it is missing, switched off by NVTX_DISABLE, or without domains."""
    try:
        import nvtx
    except ImportError:
        return None
    enabled = getattr(nvtx, "enabled", bool)
    return nvtx if hasattr(nvtx, "get_domain") and (enabled is bool or enabled()) else None


def torch_nvtx() -> Any:
    """Return ``torch.cuda.nvtx`` if torch is imported and was built with it, else None."""
    torch: Any = sys.modules.get("torch")
    if hasattr(getattr(torch, "_C", None), "_nvtx") and hasattr(getattr(torch, "cuda", None), "nvtx"):
        return torch.cuda.nvtx
    return None
