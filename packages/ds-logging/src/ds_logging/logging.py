"""Log and print on chosen ranks. The names of ``deepspeed.utils.logging``.

In every function here ``ranks`` means the same: ``None`` the ranks of `configure` (rank 0 unless it says others),
``[-1]`` every rank, ``[]`` no rank, else ranks; one that the job does not have is simply not there. Only `log_dist`
with ``in_order=True`` communicates; all others may be called by any subset of the ranks. All check ``ranks`` first.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from ds_logging._files import write_atomically
from ds_logging._log import compiled as _compiled
from ds_logging._log.in_order import in_rank_order
from ds_logging._log.levels import LEVELS as log_levels, get_log_level_from_string, parse_level
from ds_logging._log.logger import INTERNAL_FILES, LoggerFactory, logger
from ds_logging._log.message import RankedMessage, TaggedText
from ds_logging._log.once import Once
from ds_logging._rank import checked_ranks, current_rank, group_rank, is_selected, rank_tag
from ds_logging.errors import ArgumentError, LogLevelError, RanksError

__all__ = [
    "LoggerFactory",
    "get_current_level",
    "get_dist_msg",
    "get_log_level_from_string",
    "log_dist",
    "log_dist_once",
    "log_levels",
    "logger",
    "print_configuration",
    "print_dist",
    "print_json_dist",
    "set_log_level_from_string",
    "should_log_le",
    "warning_once",
]

INTERNAL_FILES.add(__file__)
_once = Once()
# What logging remembers of the logger's level: no entry, True or False. It is emptied where a level changes.
_cached_level = logger._cache.get  # type: ignore[attr-defined]
# A conversion of %-formatting. The flag " " is left out: "50% done" is no placeholder.
_PLACEHOLDER = re.compile(r"(?<!%)(?:%%)*%(?:\(\w+\))?[#0+-]*(?:\*|\d+)?(?:\.(?:\*|\d+))?[hlL]?[diouxXeEfFgGcrsa]")


def _selected(ranks: Iterable[int] | None) -> bool:
    rank = current_rank()
    if ranks is None:
        shown = logger.shown_ranks
        return shown is None or rank in shown
    return is_selected(ranks, rank)


@_compiled.constant
def _traced_selected(ranks: Iterable[int] | None) -> bool:
    return _selected(ranks)


@_compiled.constant
def _traced_tag() -> str:
    return rank_tag(current_rank())


def _traced_dist_msg(message: object, ranks: Iterable[int] | None = None) -> str | None:
    return f"{_traced_tag()}{message}" if _traced_selected(ranks) else None


@_compiled.traced_as(_traced_dist_msg)
def get_dist_msg(message: object, ranks: Iterable[int] | None = None) -> str | None:
    """Return the message with its rank in front, or ``None`` on a rank that ``ranks`` does not name.

    Raises:
        RanksError: ``ranks`` is no list of ranks; on every rank.

    >>> get_dist_msg("hello")
    '[Rank 0] hello'
    >>> get_dist_msg("hello", ranks=[1]) is None
    True
    """
    return TaggedText(f"{rank_tag(current_rank())}{message}") if _selected(ranks) else None


def _traced_log_dist(
    message: object,
    *args: Any,
    ranks: Iterable[int] | None = None,
    level: int | str = logging.INFO,
    once: bool = False,
    in_order: bool = False,
    group: object = None,
    exc_info: Any = None,
    extra: Mapping[str, object] | None = None,
    stacklevel: int = 1,
) -> None:
    from torch._dynamo.comptime import comptime

    comptime(_show_log_dist)


def _show_log_dist(context: Any) -> None:
    message, args = _compiled.local(context, "message"), _compiled.local_args(context)
    ranks, level = _compiled.local(context, "ranks"), _compiled.local(context, "level")
    if args:
        args, ranks, level = _positional(message, args, ranks, level)
    number = parse_level(level)
    if logger.level_is_on(number) and _selected(ranks):
        _compiled.show_traced(logger, number, message, args, INTERNAL_FILES, rank_tag(current_rank()))


@_compiled.traced_as(_traced_log_dist)
def log_dist(
    message: object,
    *args: Any,
    ranks: Iterable[int] | None = None,
    level: int | str = logging.INFO,
    once: bool = False,
    in_order: bool = False,
    group: Any = None,
    exc_info: Any = None,
    extra: Mapping[str, object] | None = None,
    stacklevel: int = 1,
) -> None:
    """Log a message on the chosen ranks, as coming from the caller's own file, line and function.

    The record has the attribute ``rank``. Where no logging was configured at all, it is shown on standard error.
    Nothing is formatted unless the line is shown. A line of a function that torch.compile compiles is shown while it is
    traced, with a remark, and not when the compiled code runs.

    Args:
        message: what to log; its text is put behind ``[Rank n]``.
        args: the ``%`` arguments of a message that has placeholders, as for ``logger.info``. DeepSpeed's order
            ``log_dist(message, ranks, level)`` works, too: a list, tuple or ``None`` is ``ranks`` where the message has
            no placeholder, or where the number of its placeholders is another one. ``"% d"`` is no placeholder here.
        ranks: ``None`` the ranks of `configure`, ``[-1]`` every rank, ``[]`` no rank, else ranks.
        level: a number or a name.
        once: the same message, ranks and level are logged once in a process; see `log_dist_once`.
        in_order: the lines come in the order of the ranks. All ranks of ``group`` must call it, whether they log or
            not. A rank that does not come is waited for a minute; then a warning names it.
        group: ranks are those within this process group, the default one unless given; a rank outside logs nothing.
        exc_info: an exception, or true for the one being handled, as for ``logger.info``.
        extra: attributes for the record, as for ``logger.info``; those that are JSON stand in a JSON line.
        stacklevel: 1 reports the caller, 2 the caller's caller, as in ``logging``.

    Raises:
        RanksError: ``ranks`` is no list of ranks; on every rank.
        LogLevelError: there is no such level; on every rank.
        ArgumentError: there are more positional arguments than the message can take.
    """
    if args:
        args, ranks, level = _positional(message, args, ranks, level)
    if type(level) is int and level >= 0:  # the usual case
        number = level
    else:
        known = log_levels.get(level) if type(level) is str else None
        number = parse_level(level) if known is None else known
    if in_order:
        with in_rank_order(group):
            log_dist(
                message, *args, ranks=ranks, level=level, once=once, group=group,
                exc_info=exc_info, extra=extra, stacklevel=stacklevel,
            )  # fmt: skip
        return
    rank = current_rank()
    if group is None and ranks is None:
        shown = logger.shown_ranks
        if shown is not None and rank not in shown:
            return
    else:
        if group is None and type(ranks) is list and len(ranks) == 1:  # DeepSpeed's ranks=[0]
            only = ranks[0]
            if only != rank and type(only) is int and only >= 0:
                return
        elif ranks is not None and not isinstance(ranks, (list, tuple)):
            ranks = _listed(ranks)
        member = rank if group is None else group_rank(group)
        if not is_selected(ranks, member) or member < 0:
            return
    if _cached_level(number) is False or not logger.level_is_on(number):
        return
    if once and not _once.first(("log_dist", _key(message, args), repr(ranks), number)):
        return
    text = RankedMessage(rank_tag(rank), message, args)
    logger._log(number, text, (), exc_info=exc_info, extra=extra, stacklevel=stacklevel)


def _listed(ranks: object) -> list[int]:
    chosen = checked_ranks(ranks)
    return [-1] if chosen is None else list(chosen)


def _positional(
    message: object, args: tuple[Any, ...], ranks: Any, level: int | str
) -> tuple[tuple[Any, ...], Iterable[int] | None, int | str]:
    """Tell ``%`` arguments from DeepSpeed's ``ranks, level``. Returns the ``%`` arguments, the ranks and the level."""
    first = args[0]
    count = len(_PLACEHOLDER.findall(message)) if isinstance(message, str) and "%" in message else 0
    named = count > 0 and isinstance(first, Mapping)
    could_be_ranks = first is None or isinstance(first, (list, tuple, set, frozenset, range))
    if count and (named or count == len(args) or not could_be_ranks):
        if count == len(args) == 1 and (first == [0] or first == [-1]) and ranks is None:
            warning_once(
                "log_dist(%r, %r): the list is taken for the argument of the placeholder; write ranks=%r if it names "
                "ranks",
                message,
                first,
                first,
                stacklevel=1,
            )
        return args, ranks, level
    if ranks is not None:
        raise ArgumentError(f"ranks={ranks!r} and the positional {first!r}: give the ranks once, as ranks=")
    if len(args) > 2 or (len(args) == 2 and level != logging.INFO):
        raise ArgumentError(
            f"args={args!r} for message={message!r}, which has {count} placeholders; after the message come its % "
            "arguments, or ranks and level"
        )
    if not could_be_ranks:
        raise RanksError(
            f"ranks={first!r} ({type(first).__name__}) is no list of ranks; write ranks=[0], or a placeholder in the "
            f"message {message!r} for it"
        )
    return (), first, args[1] if len(args) == 2 else level


def _key(message: object, args: tuple[Any, ...]) -> str:
    """Return what makes a message the same; a ``__str__`` that raises is the handler's problem, not the caller's."""
    try:
        return f"{message}{args!r}" if args else str(message)
    except Exception:
        return f"{type(message).__qualname__} at {id(message)}"


def _traced_log_dist_once(
    message: object,
    *args: Any,
    ranks: Iterable[int] | None = None,
    level: int | str = logging.INFO,
    group: object = None,
    exc_info: Any = None,
    extra: Mapping[str, object] | None = None,
    stacklevel: int = 1,
) -> None:
    from torch._dynamo.comptime import comptime

    comptime(_show_log_dist)


@_compiled.traced_as(_traced_log_dist_once)
def log_dist_once(
    message: object,
    *args: Any,
    ranks: Iterable[int] | None = None,
    level: int | str = logging.INFO,
    group: Any = None,
    exc_info: Any = None,
    extra: Mapping[str, object] | None = None,
    stacklevel: int = 1,
) -> None:
    """Like `log_dist`, but the same message, ranks and level are logged once in a process.

    A message counts as logged only when it was: not while its level is off.
    """
    if ranks is None and group is None and not args and type(level) is int and level >= 0:  # as in log_dist
        if _cached_level(level) is False:
            return
        shown = logger.shown_ranks
        if shown is not None and current_rank() not in shown:
            return
    log_dist(
        message, *args, ranks=ranks, level=level, once=True, group=group,
        exc_info=exc_info, extra=extra, stacklevel=stacklevel,
    )  # fmt: skip


def _traced_warning_once(*args: Any, **kwargs: Any) -> None:
    from torch._dynamo.comptime import comptime

    comptime(_show_warning_once)


def _show_warning_once(context: Any) -> None:
    _show_warning(_compiled.local_args(context))


def _show_warning(args: tuple[Any, ...]) -> None:
    if args and logger.isEnabledFor(logging.WARNING) and _once.first(_warning_key(args)):
        _compiled.show_traced(logger, logging.WARNING, args[0], args[1:], INTERNAL_FILES)


@_compiled.traced_as(_traced_warning_once)
def warning_once(*args: Any, **kwargs: Any) -> None:
    """Like ``logger.warning``, but the same message with the same arguments is logged once in a process.

    Args:
        args: the message and its ``%`` arguments; they need not be hashable.
        kwargs: as for ``logger.warning``.
    """
    if len(args) == 1 and type(args[0]) is str and args[0] in _once:
        return
    if logger.isEnabledFor(logging.WARNING) and _once.first(_warning_key(args)):
        logger.warning(*args, **kwargs)


def _warning_key(args: tuple[Any, ...]) -> str | tuple[str, str]:
    if len(args) == 1 and type(args[0]) is str:
        return args[0]
    try:
        return "warning", repr(args)
    except Exception:
        return "warning", _key(args[0], ())


def _traced_print_dist(message: object, ranks: Iterable[int] | None = None) -> None:
    from torch._dynamo.comptime import comptime

    comptime(_show_print_dist)


def _show_print_dist(context: Any) -> None:
    message, ranks = _compiled.local(context, "message"), _compiled.local(context, "ranks")
    if _selected(ranks):
        print_dist(_compiled.traced_text(message), [-1])


@_compiled.traced_as(_traced_print_dist)
def print_dist(message: object, ranks: Iterable[int] | None = None) -> None:
    """Print a message to standard output on the chosen ranks, whatever the logging level."""
    text = get_dist_msg(message, ranks)
    if text is not None:
        print(text, file=sys.stdout, flush=True)


def print_json_dist(
    message: Mapping[str, Any], ranks: Iterable[int] | None = None, path: str | os.PathLike[str] | None = None
) -> None:
    """Write a mapping and the rank as JSON, on the chosen ranks.

    The file appears whole or not at all, and is on the disk when the call returns. Of several ranks that write the same
    path the last one wins.

    Args:
        message: what to write; not changed. The key ``"rank"`` is added to what is written.
        ranks: which ranks write.
        path: the file; ``None`` prints one line to standard output.

    Raises:
        RanksError: ``ranks`` is no list of ranks; on every rank.
        ArgumentError: ``message`` is no mapping, or cannot be written as JSON.
    """
    selected = _selected(ranks)
    if not isinstance(message, Mapping):
        raise ArgumentError(f"message={message!r} is no mapping; give a dict")
    if not selected:
        return
    rank = current_rank()
    try:
        text = json.dumps({**message, "rank": rank})
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"message={message!r} cannot be written as JSON: {error}") from None
    if path is None:
        print(text, file=sys.stdout, flush=True)
        return
    write_atomically(path, [text])


def print_configuration(args: object, name: str) -> None:
    """Log the attributes of an object, or the items of a mapping, one a line and sorted; on rank 0, at INFO.

    Raises:
        ArgumentError: ``args`` has no attributes.
    """
    try:
        items = dict(args) if isinstance(args, Mapping) else vars(args)
    except TypeError:
        raise ArgumentError(f"args={args!r} has no attributes; give a namespace, a dataclass or a mapping") from None
    log_dist(f"{name}:")
    for key in sorted(items, key=str):
        log_dist(f"  {key} {'.' * (29 - len(str(key)))} {items[key]}")


def set_log_level_from_string(log_level_str: str, custom_logger: logging.Logger | None = None) -> None:
    """Set the level of a logger, "ds" unless given, from a name. The levels of handlers are left alone.

    Raises:
        LogLevelError: there is no such level.
    """
    (logger if custom_logger is None else custom_logger).setLevel(get_log_level_from_string(log_level_str))


@_compiled.constant
def get_current_level() -> int:
    """Return the level from which on `log_dist` logs."""
    return logger.getEffectiveLevel()


@_compiled.constant
def should_log_le(max_log_level_str: str) -> bool:
    """Say whether records of this level are logged: the current level is at most this one.

    Raises:
        LogLevelError: there is no such level.
    """
    if not isinstance(max_log_level_str, str):
        raise LogLevelError(f"max_log_level_str={max_log_level_str!r} is no string; use for example 'info'")
    return get_current_level() <= parse_level(max_log_level_str, "max_log_level_str")


# Callers of DeepSpeed find these two on the logger itself.
logger.warning_once = warning_once  # type: ignore[method-assign]
logger.log_dist_once = log_dist_once  # type: ignore[method-assign, assignment]
_compiled.ignore(warning_once, _show_warning)
_compiled.ignore(log_dist_once, lambda args: _show_traced_once(*args))


def _show_traced_once(message: object = "", *args: Any) -> None:
    if logger.level_is_on(logging.INFO) and _selected(None):
        _compiled.show_traced(logger, logging.INFO, message, args, INTERNAL_FILES, rank_tag(current_rank()))
