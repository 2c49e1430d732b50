"""NVTX ranges around functions, for Nsight Systems. The names of ``deepspeed.utils.nvtx``.

Assign ``ds_logging.nvtx.enable_nvtx = False`` to switch all of them off while the program runs.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar, overload

from ds_logging import _timeline
from ds_logging._nvtx import ranged as _ranged
from ds_logging._nvtx.backends import NvtxBackend, Span, make_span
from ds_logging._nvtx.instrument import instrument
from ds_logging._nvtx.range_style import RangeStyle, check_style
from ds_logging.errors import ArgumentError

__all__ = ["DEEPSPEED_NVTX_DOMAIN", "NvtxBackend", "enable_nvtx", "instrument_w_nvtx"]

enable_nvtx: bool = True
"""Read once at the start of every instrumented call."""

DEEPSPEED_NVTX_DOMAIN = "DeepSpeed"
"""The domain of the ranges that DeepSpeed draws itself; give it as ``domain`` to see yours among them."""

F = TypeVar("F", bound="Callable[..., Any] | property | staticmethod[..., Any] | classmethod[Any, ..., Any]")


class _Ranges:
    """What ``instrument_w_nvtx`` is without a function: a decorator and a context manager. Threads may share it.

    The compiler never enters it, because `instrument_w_nvtx` gives it `_NoRanges`.
    """

    __slots__ = ("_asked", "_backend", "_open", "_span", "_style")

    def __init__(self, style: RangeStyle, backend: NvtxBackend | None) -> None:
        self._style = style
        self._backend = backend
        self._asked = False
        self._span: Span | None = None
        self._open: dict[int, tuple[_ranged.Range | None, Any]] = {}  # by thread: the last entered, and those before

    def __call__(self, func: F) -> F:
        if _ranged.is_compiling():
            return func
        decorated: F = instrument(func, self._span_for, sys.modules[__name__])
        return decorated

    def _span_for(self, name: str) -> Span | None:
        named = self._style if self._style.message is not None else self._style._replace(message=name)
        return make_span(named, self._backend)

    def __enter__(self) -> _Ranges:
        if not self._asked:
            if self._style.message is None:
                raise ArgumentError(
                    "message=None: a block has no function that the range could be named after; give one"
                )
            self._span = make_span(self._style, self._backend)
            self._asked = True
        listener = _timeline.listener
        span = self._span if enable_nvtx else None
        if span is None and listener is not None and enable_nvtx:
            span = make_span(self._style, self._backend)
        if span is None and not self._open:
            return self  # the common case without a tool: nothing to end, and nothing entered before
        thread = threading.get_ident()
        before = self._open.get(thread)
        if span is not None or before is not None:
            held = None if span is None else _ranged.Range(span, listener)
            if held is not None:
                held.__enter__()
            self._open[thread] = (held, before)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if not self._open:
            return
        thread = threading.get_ident()
        held, before = self._open.pop(thread, (None, None))
        if before is not None:
            self._open[thread] = before
        if held is not None:
            held.__exit__(kind, error, at)


class _NoRanges:
    """What ``instrument_w_nvtx`` is inside a function that torch.compile traces."""

    def __call__(self, func: F) -> F:
        return func

    def __enter__(self) -> _NoRanges:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        return None


@overload
def instrument_w_nvtx(
    func: str | None = None,
    *,
    message: str | None = None,
    domain: str | None = "ds",
    color: str | int | None = None,
    category: str | int | None = None,
    payload: int | float | None = None,
    backend: NvtxBackend | None = None,
) -> _Ranges: ...
@overload
def instrument_w_nvtx(
    func: F,
    *,
    message: str | None = None,
    domain: str | None = "ds",
    color: str | int | None = None,
    category: str | int | None = None,
    payload: int | float | None = None,
    backend: NvtxBackend | None = None,
) -> F: ...
def instrument_w_nvtx(
    func: Any = None,
    *,
    message: str | None = None,
    domain: str | None = "ds",
    color: str | int | None = None,
    category: str | int | None = None,
    payload: int | float | None = None,
    backend: NvtxBackend | None = None,
) -> Any:
    """Show an NVTX range while a function or a block runs: a decorator, with or without arguments; a context manager.

    Where no tool is attached, the decorator returns the function itself, which so costs nothing. A tool is attached if
    the environment variable NVTX_INJECTION64_PATH is set when the first function is decorated, as Nsight Systems does
    it. The environment variable DS_NVTX decides otherwise: ``on`` always wraps, ``off`` never does. While a
    communication log records its timeline, functions are wrapped too, and it gets their ranges.

    A range ends when the function raises, too. For async functions and generators it is open while their own body runs,
    and closed while they are suspended. A class stays the same class with a ranged ``__init__``, an ``nn.Module`` the
    same module with a ranged ``forward``, a property a property whose functions are ranged. Under ``torch.compile``
    nothing is drawn and no graph breaks; as a context manager, write the call in the ``with`` statement, because the
    compiler enters nothing that was made outside what it compiles.

    As a context manager in an async function or a generator, it is open over an ``await`` or a ``yield`` in the block:
    ranges of what runs in between are then closed in the wrong order. Decorate the function.

    Args:
        func: a function of any kind, a method, a class, a property, any other callable, or a message.
        message: the range's name; the function's qualified name unless given. A block needs one. The nvtx package keeps
            every message of the process: put what changes into ``payload``.
        domain: the NVTX domain; None for the one without a name. torch.cuda.nvtx knows only that one.
        color: a name, ``"#rrggbb"`` or an ARGB integer. This, ``category`` and ``payload`` are drawn by the package
            nvtx alone.
        category: a name, or a number from 1, that a tool can filter by.
        payload: a number, shown with the range.
        backend: who draws. Unless given it is the package ``nvtx`` if installed, else ``torch.cuda.nvtx`` if torch is
            imported and has it, else nobody. With one of your own a function is always wrapped.

    Raises:
        ArgumentError: an argument cannot be used, or DS_NVTX is set to something unknown.

    >>> @instrument_w_nvtx
    ... def step():
    ...     return "done"
    >>> step(), step.__name__
    ('done', 'step')
    >>> with instrument_w_nvtx("optimizer", color="green"):
    ...     pass
    """
    if _ranged.is_compiling():
        # The compiler enters only what it has seen being made.
        return _NoRanges() if func is None or isinstance(func, str) else func
    if isinstance(func, str):
        if message is not None:
            raise ArgumentError(f"func={func!r} and message={message!r} both name the range; give one of them")
        func, message = None, func
    if backend is None:
        try:
            if color is category is payload is None:
                ranges = _shared_ranges(message, domain)
            else:
                ranges = _shared_ranges(message, domain, color, category, payload)
        except TypeError:  # something that cannot be hashed, and so cannot be used
            check_style(message, domain, color, category, payload)
            raise
    else:
        ranges = _make_ranges(message, domain, color, category, payload, backend)
    return ranges if func is None else ranges(func)


def _make_ranges(
    message: Any,
    domain: Any,
    color: Any = None,
    category: Any = None,
    payload: Any = None,
    backend: NvtxBackend | None = None,
) -> _Ranges:
    argb = check_style(message, domain, color, category, payload)
    return _Ranges(RangeStyle(message, domain, argb, category, payload), backend)


# A block in a loop is the same every time. 1 and True, or 1.0, are not.
_shared_ranges = functools.lru_cache(maxsize=4096, typed=True)(_make_ranges)
