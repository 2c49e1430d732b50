"""Log lines in code that torch.compile compiles: no graph break, and no silence.

[Note: traced lines] A log call cannot run inside a compiled graph. While Dynamo traces it, the line is shown once, with
a remark, if it would be shown at all; when the compiled code runs, it is not. Two ways lead here, and neither switches
anything off for anybody else:

* A function of ours has the attribute ``_torchdynamo_inline``: Dynamo traces the function that it names instead. That
  one calls Dynamo's ``comptime``, which runs Python at tracing time. Uncompiled code pays nothing for it.
* A method of a `logging.Logger` breaks the graph unless it is a member of Dynamo's set of logging functions to ignore.
  Dynamo asks for the membership of the method's ``__func__``. Ours is a `_Ignored`, which joins the set when it is
  asked: not before, because this package does not import torch.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from ds_logging._log.logger import DsLogger

_REMARK = " (while torch.compile traces; not when the compiled code runs)"
_UNKNOWN = object()
_F = TypeVar("_F", bound=Callable[..., Any])


def traced_as(stand_in: Callable[..., Any]) -> Callable[[_F], _F]:
    """Have Dynamo trace ``stand_in``, of the same parameters, in the place of the decorated function."""

    def decorate(function: _F) -> _F:
        function._torchdynamo_inline = stand_in  # type: ignore[attr-defined]
        return function

    return decorate


def constant(function: _F) -> _F:
    """Have Dynamo call the function while it traces, and take its result for a constant."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def show_traced(
    logger: DsLogger, level: int, message: object, args: tuple[Any, ...], internal: set[str], tag: str = ""
) -> None:
    """Log a line that is being traced, as coming from the user's code."""
    text = traced_text(message, args)
    file, line, function = _place(internal)
    record = logger.makeRecord("ds", level, file, line, tag + text, (), None, function, None)
    if tag:
        record.rank_tag = ""
    logger.handle(record)


def traced_text(message: object, args: tuple[Any, ...] = ()) -> str:
    """Return the text of a line that is being traced, as far as it is known, and the remark."""
    if message is _UNKNOWN:
        text = "a message that only run time knows"
    elif any(arg is _UNKNOWN for arg in args):
        text = f"{message!r} with arguments that only run time knows"
    else:
        try:
            text = str(message) % args if args else str(message)
        except Exception:
            text = str(message)
    return text + _REMARK


def _place(internal: set[str]) -> tuple[str, int, str]:
    """Return file, line and function of the code that is being traced."""
    try:
        from torch._guards import TracingContext

        for frame in reversed(TracingContext.extract_stack()):
            if frame.filename not in internal and "_dynamo" not in frame.filename:
                return frame.filename, frame.lineno or 0, frame.name
    except Exception:  # an other version of torch: the line is worth more than its place
        pass
    return "(compiled code)", 0, "(unknown function)"


def local(context: Any, name: str) -> Any:
    """Return a local variable of the function that is being traced; `_UNKNOWN` where only run time knows it."""
    try:
        return context.get_local(name).as_python_constant()
    except Exception:
        return _UNKNOWN


def local_args(context: Any) -> tuple[Any, ...]:
    """Return the ``*args`` of the function that is being traced."""
    args = local(context, "args")
    return args if isinstance(args, tuple) else (_UNKNOWN,)


class _Ignored:
    """Joins Dynamo's set of ignored logging functions as soon as it is asked for its hash. See [Note: traced lines]."""

    def __init__(self, show: Callable[[tuple[Any, ...]], None]) -> None:
        self._show = show
        self._joining = False

    def __hash__(self) -> int:
        config, arguments = sys.modules.get("torch._dynamo.config"), None
        if config is not None and not self._joining:
            arguments = _traced_arguments()
        if arguments is not None:  # else somebody copies the set
            self._joining = True
            try:
                ignored = getattr(config, "ignore_logging_functions", None)
                if ignored is None:  # its name before torch 2.11
                    ignored = getattr(config, "ignore_logger_methods", None)
                if ignored is not None:
                    ignored.add(self)
                self._show(arguments)
            finally:
                self._joining = False
        return id(self) >> 4

    def __eq__(self, other: object) -> bool:
        return self is other

    def __deepcopy__(self, memo: dict[int, Any]) -> _Ignored:
        return self


def _traced_arguments() -> tuple[Any, ...] | None:
    """Return the positional arguments of the call that Dynamo traces, from its frame above; ``None`` without one."""
    frame: FrameType | None = sys._getframe(1)
    for _ in range(6):
        if frame is None:
            break
        if frame.f_code.co_name == "call_method" and "args" in frame.f_locals:
            return tuple(_as_constant(variable) for variable in frame.f_locals["args"])
        frame = frame.f_back
    return None


def _as_constant(variable: Any) -> Any:
    try:
        return variable.as_python_constant()
    except Exception:
        return _UNKNOWN


def ignore(function: Any, show: Callable[[tuple[Any, ...]], None]) -> None:
    """Give a function, which is called as a logger's method, the ``__func__`` that Dynamo asks for."""
    function.__func__ = _Ignored(show)


_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "warn": logging.WARNING,
    "error": logging.ERROR,
    "exception": logging.ERROR,
    "critical": logging.CRITICAL,
    "fatal": logging.CRITICAL,
    "log": 0,
}


def install_methods(logger: DsLogger, internal: set[str]) -> None:
    """Give a logger methods of its own, which do what the class's do and have a ``__func__`` for Dynamo."""
    internal.add(__file__)
    for name, level in _LEVELS.items():
        method = _make_log(logger) if name == "log" else _make_method(logger, level, name == "exception")
        method.__name__ = name
        method.__doc__ = getattr(logging.Logger, name, logging.Logger.log).__doc__
        ignore(method, _shower(logger, level, internal))
        setattr(logger, name, method)


def _shower(logger: DsLogger, level: int, internal: set[str]) -> Callable[[tuple[Any, ...]], None]:
    def show(args: tuple[Any, ...]) -> None:
        number, rest = (level, args) if level else (args[0] if args else _UNKNOWN, args[1:])
        if isinstance(number, int) and logger.isEnabledFor(number):
            show_traced(logger, number, rest[0] if rest else _UNKNOWN, rest[1:], internal)

    return show


def _make_method(logger: DsLogger, level: int, exception: bool) -> Any:
    enabled, write = logger.isEnabledFor, logger._log
    cached = logger._cache.get  # type: ignore[attr-defined]

    def method(msg: object, *args: Any, **kwargs: Any) -> None:
        if cached(level) is not False and enabled(level):
            write(level, msg, args, **kwargs)

    def with_exception(msg: object, *args: Any, exc_info: Any = True, **kwargs: Any) -> None:
        if enabled(level):
            write(level, msg, args, exc_info=exc_info, **kwargs)

    return with_exception if exception else method


def _make_log(logger: DsLogger) -> Any:
    def method(level: int, msg: object, *args: Any, **kwargs: Any) -> None:
        if not isinstance(level, int):
            raise TypeError(f"level={level!r} is no integer")  # as logging raises
        if logger.isEnabledFor(level):
            logger._log(level, msg, args, **kwargs)

    return method
