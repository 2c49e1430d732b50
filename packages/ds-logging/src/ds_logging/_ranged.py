"""Runs functions, coroutines and generators inside a range that is open only while their own code runs.

[Note: suspension] A range is kept on a stack of the thread. If it stayed open over an ``await`` or a ``yield``, what
runs in between would open and close ranges on the same stack, and the wrong one would be closed. So it is closed at
every suspension and opened again at every resumption.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, Callable, Generator
from types import TracebackType
from typing import Any

from ds_logging._nvtx_backends import NvtxBackend


class Range:
    """A context that holds a range open. It may be entered again and again."""

    __slots__ = ("_backend", "_domain", "_message")

    def __init__(self, backend: NvtxBackend, message: str, domain: str | None) -> None:
        self._backend = backend
        self._message = message
        self._domain = domain

    def __enter__(self) -> None:
        self._backend.push(self._message, self._domain)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._backend.pop(self._domain)


Begin = Callable[[], Range | None]  # asked once a call: is there a range, and which


def wrap(func: Callable[..., Any], begin: Begin) -> Callable[..., Any]:
    """Return a function of the same kind as ``func``, so that ``inspect`` answers the same for both."""
    # An instance is of the kind of its __call__.
    code = func if inspect.isroutine(func) or isinstance(func, type) else type(func).__call__
    for candidate in (func, code):
        if inspect.iscoroutinefunction(candidate):
            return _wrap_coroutine(func, begin)
        if inspect.isasyncgenfunction(candidate):
            return _wrap_async_generator(func, begin)
        if inspect.isgeneratorfunction(candidate):
            return _wrap_generator(func, begin)

    def run(*args: Any, **kwargs: Any) -> Any:
        span = begin()
        if span is None:
            return func(*args, **kwargs)
        with span:
            return func(*args, **kwargs)

    return run


def _wrap_coroutine(func: Callable[..., Any], begin: Begin) -> Callable[..., Any]:
    async def run_coroutine(*args: Any, **kwargs: Any) -> Any:
        span = begin()
        steps = func(*args, **kwargs)
        return await (steps if span is None else _Driven(steps, span))

    return run_coroutine


def _wrap_generator(func: Callable[..., Any], begin: Begin) -> Callable[..., Any]:
    def run_generator(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        span = begin()
        steps = func(*args, **kwargs)
        return (yield from (steps if span is None else _drive(steps, span)))

    return run_generator


def _wrap_async_generator(func: Callable[..., Any], begin: Begin) -> Callable[..., Any]:
    async def run_async_generator(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        span = begin()
        source = func(*args, **kwargs)
        step = source.asend(None)
        while True:
            try:
                item = await (step if span is None else _Driven(step, span))
            except StopAsyncIteration:
                return
            finally:
                step = None  # it may hold an exception, and that this frame
            try:
                sent = yield item
            except GeneratorExit:
                closing = source.aclose()
                await (closing if span is None else _Driven(closing, span))
                raise
            except BaseException as error:
                step = source.athrow(error)
            else:
                step = source.asend(sent)

    return run_async_generator


class _Driven:
    """An awaitable that runs another one by `_drive`."""

    def __init__(self, steps: Any, span: Range) -> None:
        self._steps = steps
        self._span = span

    def __await__(self) -> Generator[Any, Any, Any]:
        return _drive(self._steps, self._span)


def _drive(steps: Any, span: Range) -> Generator[Any, Any, Any]:
    """Run a generator or a coroutine; send, throw, close and the return value pass through."""
    resume, argument = steps.send, None
    while True:
        try:
            with span:
                item = resume(argument)
        except StopIteration as stop:
            return stop.value
        finally:
            argument = None  # it may be an exception, which holds this frame
        try:
            argument = yield item
        except GeneratorExit:
            with span:
                steps.close()
            raise
        except BaseException as error:
            resume, argument = steps.throw, error
        else:
            resume = steps.send
