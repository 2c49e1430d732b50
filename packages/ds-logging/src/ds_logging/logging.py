"""Log and print on chosen ranks. The names of ``deepspeed.utils.logging``.

In every function here ``ranks`` means the same: ``None`` rank 0, ``[-1]`` every rank, ``[]`` no rank, else ranks of the
job. No function communicates, so any subset of the ranks may call; all check ``ranks`` before anything else.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ds_logging._handlers import TaggedText
from ds_logging._levels import LEVELS as log_levels, get_log_level_from_string, parse_level
from ds_logging._logger import LoggerFactory, fallback, logger
from ds_logging._once import Once
from ds_logging._rank import current_position, is_selected
from ds_logging.errors import ArgumentError, LogLevelError

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

_once = Once()


def get_dist_msg(message: object, ranks: Iterable[int] | None = None) -> str | None:
    """Return the message with its rank in front, or ``None`` on a rank that ``ranks`` does not name.

    Raises:
        RanksError: ``ranks`` is no list of ranks of this job; on every rank.

    >>> get_dist_msg("hello")
    '[Rank 0] hello'
    >>> get_dist_msg("hello", ranks=[1]) is None
    True
    """
    position = current_position()
    return TaggedText(f"[Rank {position.rank}] {message}") if is_selected(ranks, position) else None


def log_dist(
    message: object, ranks: Iterable[int] | None = None, level: int | str = logging.INFO, *, stacklevel: int = 1
) -> None:
    """Log a message on the chosen ranks, as coming from the caller's own file, line and function.

    The record has the attribute ``rank``. Where no logging was configured at all, it is shown on standard error.

    Args:
        message: what to log; its text is put behind ``[Rank n]``.
        ranks: ``None`` rank 0, ``[-1]`` every rank, ``[]`` no rank, else ranks.
        level: a number or a name.
        stacklevel: 1 reports the caller, 2 the caller's caller, as in ``logging``.

    Raises:
        RanksError: ``ranks`` is no list of ranks of this job; on every rank.
        LogLevelError: there is no such level; on every rank.
    """
    _log_dist(message, ranks, level, stacklevel=stacklevel + 1)


def log_dist_once(
    message: object, ranks: Iterable[int] | None = None, level: int | str = logging.INFO, *, stacklevel: int = 1
) -> None:
    """Like `log_dist`, but the same message, ranks and level are logged once in a process.

    A message counts as logged only when it was: not while its level is off.
    """
    ranks = list(ranks) if isinstance(ranks, Iterable) else ranks
    _log_dist(message, ranks, level, stacklevel=stacklevel + 1, once=("log_dist", str(message), repr(ranks), level))


def _log_dist(
    message: object, ranks: Iterable[int] | None, level: int | str, *, stacklevel: int, once: tuple[object, ...] = ()
) -> None:
    number = parse_level(level)
    text = get_dist_msg(message, ranks)
    if text is None:
        return
    fallback.settle()
    if logger.isEnabledFor(number) and (not once or _once.first(once)):
        logger.log(number, text, stacklevel=stacklevel + 1)


def warning_once(*args: Any, **kwargs: Any) -> None:
    """Like ``logger.warning``, but the same message with the same arguments is logged once in a process.

    Args:
        args: the message and its ``%`` arguments; they need not be hashable.
        kwargs: as for ``logger.warning``.
    """
    if logger.isEnabledFor(logging.WARNING) and _once.first(("warning", repr(args))):
        kwargs["stacklevel"] = kwargs.get("stacklevel", 1) + 1
        logger.warning(*args, **kwargs)


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
        RanksError: ``ranks`` is no list of ranks of this job; on every rank.
        ArgumentError: ``message`` is no mapping, or cannot be written as JSON.
    """
    position = current_position()
    selected = is_selected(ranks, position)
    if not isinstance(message, Mapping):
        raise ArgumentError(f"message={message!r} is no mapping; give a dict")
    if not selected:
        return
    try:
        text = json.dumps({**message, "rank": position.rank})
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"message={message!r} cannot be written as JSON: {error}") from None
    if path is None:
        print(text, file=sys.stdout, flush=True)
        return
    target = Path(path)
    unfinished = target.with_name(f".{target.name}.{position.rank}.{os.getpid()}.tmp")
    try:
        with open(unfinished, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)


def print_configuration(args: object, name: str) -> None:
    """Log the attributes of an object, or the items of a mapping, one a line and sorted; on rank 0, at INFO.

    Raises:
        ArgumentError: ``args`` has no attributes.
    """
    try:
        items = dict(args) if isinstance(args, Mapping) else vars(args)
    except TypeError:
        raise ArgumentError(f"args={args!r} has no attributes; give a namespace, a dataclass or a mapping") from None
    log_dist(f"{name}:", stacklevel=2)
    for key in sorted(items, key=str):
        log_dist(f"  {key} {'.' * (29 - len(str(key)))} {items[key]}", stacklevel=2)


def set_log_level_from_string(log_level_str: str, custom_logger: logging.Logger | None = None) -> None:
    """Set the level of a logger, "ds" unless given, from a name. The levels of handlers are left alone.

    Raises:
        LogLevelError: there is no such level.
    """
    (logger if custom_logger is None else custom_logger).setLevel(get_log_level_from_string(log_level_str))


def get_current_level() -> int:
    """Return the level from which on `log_dist` logs."""
    return fallback.effective_level()


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
logger.log_dist_once = log_dist_once  # type: ignore[method-assign]
