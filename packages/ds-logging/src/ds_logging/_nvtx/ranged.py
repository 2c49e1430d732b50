"""Runs functions, coroutines and generators inside a range that is open only while their own code runs.

[Note: suspension] A range is kept on a stack of the thread. If it stayed open over an ``await`` or a ``yield``, what
runs in between would open and close ranges on the same stack, and the wrong one would be closed. So it is closed at
every suspension and opened again at every resumption.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import time
import types
from collections.abc import AsyncGenerator, Callable, Generator
from types import ModuleType, TracebackType
from typing import Any

from ds_logging import _timeline
from ds_logging._nvtx.backends import Span


def _ask_whether_torch_compiles() -> bool:
    """Stand in for torch's own function until torch is imported."""
    torch: Any = sys.modules.get("torch")
    compiler = getattr(torch, "compiler", None)
    asked = getattr(compiler, "is_dynamo_compiling", None) or getattr(compiler, "is_compiling", None)
    if asked is None:
        return False
    if asked():  # the compiler reads this code: a store here would be part of what it compiles
        return True
    set_compiling(asked)
    return False


is_compiling: Callable[[], bool] = _ask_whether_torch_compiles
"""Says whether torch.compile is tracing this call. It answers with a constant inside a trace, so no graph breaks."""


def set_compiling(function: Callable[[], bool]) -> None:
    """Replace `is_compiling` by what need not look for torch at every call."""
    global is_compiling
    is_compiling = function


class Range:
    """A context that holds a range open and reports it. It may be entered again, after it was left."""

    __slots__ = ("_listener", "_span", "_started")

    def __init__(self, span: Span, listener: _timeline.RangeListener | None) -> None:
        self._span = span
        self._listener = listener
        self._started = 0

    def __enter__(self) -> None:
        self._span.push()
        if self._listener is not None:
            self._started = time.time_ns()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        ended = time.time_ns() if self._listener is not None else 0
        self._span.pop()
        if self._listener is not None:
            self._listener(self._span.name, self._started, ended, threading.get_ident())


def wrap(func: Callable[..., Any], span: Span, switch: ModuleType) -> Callable[..., Any]:
    """Return a function of the same kind as ``func``, so that ``inspect`` answers the same for both.

    Args:
        func: a function.
        span: what is drawn around it.
        switch: a module whose ``enable_nvtx`` is read once a call.
    """
    if inspect.iscoroutinefunction(func):
        kind = _wrap_coroutine
    elif inspect.isasyncgenfunction(func):
        kind = _wrap_async_generator
    elif inspect.isgeneratorfunction(func):
        kind = _wrap_generator
    else:
        kind = _wrap_function
    return functools.wraps(func)(kind(func, span, switch))


def begin(span: Span, switch: ModuleType) -> Range | None:
    """Say, once a call, whether there is a range."""
    if is_compiling() or not switch.enable_nvtx:
        return None
    return Range(span, _timeline.listener)


def _wrap_function(func: Callable[..., Any], span: Span, switch: ModuleType) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        # `begin`, written out: this is the one kind whose calls are counted in nanoseconds.
        if is_compiling() or not switch.enable_nvtx:
            return func(*args, **kwargs) if kwargs else func(*args)
        if _timeline.listener is not None:
            with Range(span, _timeline.listener):
                return func(*args, **kwargs)
        pop = span.pop
        span.push()
        try:
            return func(*args, **kwargs) if kwargs else func(*args)
        finally:
            pop()

    return run


def _wrap_coroutine(func: Callable[..., Any], span: Span, switch: ModuleType) -> Callable[..., Any]:
    async def run_coroutine(*args: Any, **kwargs: Any) -> Any:
        held = begin(span, switch)
        steps = func(*args, **kwargs)
        return await (steps if held is None else _Driven(steps, held))

    return run_coroutine


def _wrap_generator(func: Callable[..., Any], span: Span, switch: ModuleType) -> Callable[..., Any]:
    def run_generator(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        held = begin(span, switch)
        steps = func(*args, **kwargs)
        return (yield from (steps if held is None else _drive(steps, held)))

    # Generators of types.coroutine may be awaited.
    flags = getattr(getattr(func, "__code__", None), "co_flags", 0)
    return types.coroutine(run_generator) if flags & inspect.CO_ITERABLE_COROUTINE else run_generator


def _wrap_async_generator(func: Callable[..., Any], span: Span, switch: ModuleType) -> Callable[..., Any]:
    async def run_async_generator(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        held = begin(span, switch)
        source = func(*args, **kwargs)
        step = _start(source)
        while True:
            try:
                item = await (step if held is None else _Driven(step, held))
            except StopAsyncIteration:
                return
            finally:
                step = None  # it may hold an exception, and that this frame
            try:
                sent = yield item
            except GeneratorExit:
                closing = source.aclose()
                await (closing if held is None else _Driven(closing, held))
                raise
            except BaseException as error:
                step = source.athrow(error)
            else:
                step = source.asend(sent)

    return run_async_generator


def _start(source: AsyncGenerator[Any, Any]) -> Any:
    """Take the first step of an async generator and keep it from the event loop, which would close it a second time."""
    hooks = sys.get_asyncgen_hooks()
    sys.set_asyncgen_hooks(None, None)
    try:
        return source.asend(None)
    finally:
        sys.set_asyncgen_hooks(*hooks)


class _Driven:
    """An awaitable that runs another one by `_drive`."""

    def __init__(self, steps: Any, held: Range) -> None:
        self._steps = steps
        self._held = held

    def __await__(self) -> Generator[Any, Any, Any]:
        return _drive(self._steps, self._held)


def _drive(steps: Any, held: Range) -> Generator[Any, Any, Any]:
    """Run a generator or a coroutine; send, throw, close and the return value pass through."""
    resume, argument = steps.send, None
    while True:
        try:
            with held:
                item = resume(argument)
        except StopIteration as stop:
            return stop.value
        finally:
            argument = None  # it may be an exception, which holds this frame
        try:
            argument = yield item
        except GeneratorExit:
            with held:
                steps.close()
            raise
        except BaseException as error:
            resume, argument = steps.throw, error
        else:
            resume = steps.send
