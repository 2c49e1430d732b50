"""What an application calls to see its log."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, TextIO

from ds_logging._handlers import DEFAULT_FORMAT, RankFilter, StreamHandler
from ds_logging._levels import level_from_environment, parse_level
from ds_logging._logger import fallback, logger
from ds_logging.errors import ArgumentError, MissingExtraError

if TYPE_CHECKING:
    from rich.console import Console

RICH_FORMAT = "%(rank_tag)s%(message)s"  # rich adds the time, the level and the place itself
_MARK = "_ds_logging_configured"


def configure(
    level: int | str | None = None,
    *,
    stream: TextIO | None = None,
    rich: bool = False,
    console: Console | None = None,
    format: str | None = None,
    datefmt: str | None = None,
) -> logging.Handler:
    """Show the records of "ds" and of everything below it ("ds.groups", ...). Call it on every rank.

    Calling it again replaces what it did before. It leaves propagation on: records still reach pytest and handlers
    on the root logger, so configure the root logger or call this, not both, or each line is shown twice.

    Args:
        level: a name or a number. ``None`` keeps a level that was set before, by DS_LOG_LEVEL or in code; INFO if none.
        stream: where to write; standard error (whatever ``sys.stderr`` is when a record comes) unless given.
        rich: write through rich (``pip install ds-logging[rich]``).
        console: the rich console to write to; implies ``rich``. Give the one that a progress bar is shown on, and the
            lines appear above the bar.
        format: a ``logging.Formatter`` format; may use ``%(rank)s`` and ``%(rank_tag)s``, see `RankFilter`.
        datefmt: how to write ``%(asctime)s``, as for ``logging.Formatter``.

    Returns:
        The handler, attached to the logger "ds" already. It has no level of its own.

    Raises:
        LogLevelError: ``level``, or DS_LOG_LEVEL where it counts, is no level.
        ArgumentError: ``format`` cannot be used, or both ``stream`` and ``console`` are given.
        MissingExtraError: rich is asked for and not installed.
    """
    if stream is not None and console is not None:
        raise ArgumentError(f"stream={stream!r} and console={console!r}: give one of them")
    asked = level_from_environment() if level is None else parse_level(level)
    use_rich = rich or console is not None
    formatter = _formatter(format or (RICH_FORMAT if use_rich else DEFAULT_FORMAT), datefmt)
    handler = _rich_handler(stream, console, datefmt) if use_rich else StreamHandler(stream)
    handler.setFormatter(formatter)
    setattr(handler, _MARK, True)

    fallback.step_back()
    for old in [known for known in logger.handlers if getattr(known, _MARK, False)]:
        logger.removeHandler(old)
    logger.addHandler(handler)
    if level is not None or logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO if asked is None else asked)
    return handler


def _formatter(format: str, datefmt: str | None) -> logging.Formatter:
    record = logging.makeLogRecord({"msg": "", "levelname": "INFO"})
    RankFilter().filter(record)
    try:
        formatter = logging.Formatter(format, datefmt)
        formatter.format(record)
    except (TypeError, ValueError, KeyError) as error:
        raise ArgumentError(f"format={format!r}, datefmt={datefmt!r}: {error}; see logging.Formatter") from None
    return formatter


def _rich_handler(stream: TextIO | None, console: Console | None, datefmt: str | None) -> logging.Handler:
    try:
        from rich.console import Console
        from rich.logging import RichHandler
    except ImportError as error:
        raise MissingExtraError(f"rich=True: {error}; pip install 'ds-logging[rich]'") from None
    if console is None:
        console = Console(file=stream, stderr=stream is None)
    times: dict[str, Any] = {} if datefmt is None else {"log_time_format": datefmt}
    handler = RichHandler(console=console, **times)
    handler.addFilter(RankFilter())
    return handler
