"""NVTX ranges around functions, for Nsight Systems. The names of ``deepspeed.utils.nvtx``.

Assign ``ds_logging.nvtx.enable_nvtx = False`` to switch all of them off while the program runs.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar, overload

from ds_logging._nvtx_backends import NvtxBackend, find_backend
from ds_logging._ranged import Range, wrap
from ds_logging.errors import ArgumentError

__all__ = ["DEEPSPEED_NVTX_DOMAIN", "NvtxBackend", "enable_nvtx", "instrument_w_nvtx"]

enable_nvtx: bool = True
"""Read once at the start of every instrumented call."""

DEEPSPEED_NVTX_DOMAIN = "DeepSpeed"
"""The domain of the ranges that DeepSpeed draws itself; give it as ``domain`` to see yours among them."""

F = TypeVar("F", bound=Callable[..., Any])


@overload
def instrument_w_nvtx(
    func: F, *, message: str | None = None, domain: str | None = None, backend: NvtxBackend | None = None
) -> F: ...
@overload
def instrument_w_nvtx(
    func: None = None, *, message: str | None = None, domain: str | None = None, backend: NvtxBackend | None = None
) -> Callable[[F], F]: ...
def instrument_w_nvtx(
    func: Any = None, *, message: str | None = None, domain: str | None = None, backend: NvtxBackend | None = None
) -> Any:
    """Show an NVTX range while a function runs. Use it with or without arguments.

    The range ends when the function raises, too. For async functions and generators it is open while their own body
    runs, and closed while they are suspended. Under ``torch.compile`` it does nothing and breaks no graph.

    Args:
        func: a function of any kind, a method, or any other callable.
        message: the range's name; the function's qualified name unless given.
        domain: the NVTX domain; the default one unless given. torch.cuda.nvtx knows only that one.
        backend: who draws; unless given the package ``nvtx`` if installed, else ``torch.cuda.nvtx`` if torch is
            imported and has it, else nobody.

    Raises:
        ArgumentError: ``func`` cannot be called.

    >>> @instrument_w_nvtx
    ... def step():
    ...     return "done"
    >>> step(), step.__name__
    ('done', 'step')
    """
    if func is None:
        return functools.partial(instrument_w_nvtx, message=message, domain=domain, backend=backend)
    if isinstance(func, (staticmethod, classmethod)):
        inner = instrument_w_nvtx(func.__func__, message=message, domain=domain, backend=backend)
        return type(func)(inner)
    if not callable(func):
        raise ArgumentError(f"func={func!r} cannot be called; decorate a function")
    name = message if message is not None else _name_of(func)

    def begin() -> Range | None:
        if _is_compiling() or not enable_nvtx:
            return None
        drawer = find_backend() if backend is None else backend
        return None if drawer is None else Range(drawer, name, domain)

    return functools.wraps(func)(wrap(func, begin))


def _is_compiling() -> bool:
    torch: Any = sys.modules.get("torch")
    return torch is not None and hasattr(torch, "compiler") and bool(torch.compiler.is_compiling())


def _name_of(func: Any) -> str:
    while isinstance(func, functools.partial):
        func = func.func
    return getattr(func, "__qualname__", None) or type(func).__qualname__
