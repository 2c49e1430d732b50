"""What an application calls to see its log."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TextIO

from ds_logging._log.handlers import LogHandler
from ds_logging._log.levels import parse_level
from ds_logging._log.logger import logger
from ds_logging._log.settings import from_environment, make_handler
from ds_logging._log.writer import FileWriter
from ds_logging._rank import parse_ranks
from ds_logging.errors import ArgumentError

if TYPE_CHECKING:
    from rich.console import Console


def configure(
    level: int | str | None = None,
    *,
    ranks: str | Iterable[int] | None = None,
    stream: TextIO | None = None,
    file: str | os.PathLike[str] | None = None,
    format: str | None = None,
    datefmt: str | None = None,
    json: bool | None = None,
    color: bool | None = None,
    rich: bool = False,
    console: Console | None = None,
    collapse: bool | None = None,
) -> logging.Handler:
    """Show the records of "ds" and of everything below it ("ds.groups", ...). Call it on every rank.

    It does not communicate. Calling it again replaces what it did before. What is ``None`` follows the environment:
    ``DS_LOG_LEVEL``, ``DS_LOG_RANKS``, ``DS_LOG_STREAM`` (``stderr`` or ``stdout``), ``DS_LOG_FILE``, ``DS_LOG_FORMAT``
    (a format, or ``json``), ``DS_LOG_COLOR`` and ``DS_LOG_COLLAPSE``. A variable that is wrong is named in a warning.

    Records propagate, so pytest and handlers on the root logger get them, too. None is shown twice: a record that
    another handler writes to the same stream, or to the terminal, is not written there again.

    Args:
        level: a name or a number. ``None`` keeps a level that was set before, by DS_LOG_LEVEL or in code; INFO if none.
        ranks: who shows what is below WARNING, of `log_dist` without ``ranks`` and of ``logger.info`` alike: ``"0"``
            (as if nothing is given), ``"all"``, ``"0,8,16-23"``, or ranks. Warnings and errors of ``logger`` come from
            every rank.
        stream: where to write; standard error (whatever ``sys.stderr`` is when a record comes) unless given.
        file: a file to append to as well, always. ``{rank}``, ``{local_rank}``, ``{host}`` and ``{pid}`` are filled
            in and folders are made. Ranks that share a file append whole lines.
        format: a ``logging.Formatter`` format; may use ``%(rank)s`` and ``%(rank_tag)s``, see `RankFilter`.
        datefmt: how to write ``%(asctime)s``, as for ``logging.Formatter``.
        json: write one JSON object a line, with rank, step (see `set_step`), place, host and the record's extras.
        color: colour the level's name; ``None``: on a terminal, unless ``NO_COLOR`` is set.
        rich: write through rich (``pip install ds-logging[rich]``); plain lines where the stream is no terminal.
        console: the rich console to write to; implies ``rich``. Give the one that a progress bar is shown on, and the
            lines appear above the bar.
        collapse: with ``ranks="all"``, show a line that several ranks say alike once, and one line that names the
            others. Needs torch.distributed; without it every rank shows its own.

    Returns:
        The handler, attached to the logger "ds" already. It has no level of its own.

    Raises:
        LogLevelError: ``level`` is no level.
        RanksError: ``ranks`` names no ranks.
        ArgumentError: ``format`` or ``file`` cannot be used, or two arguments contradict each other.
        MissingExtraError: rich is asked for and not installed.
    """
    _exclude(stream=stream, console=console)
    _exclude(json=json or None, format=format)
    _exclude(json=json or None, rich=rich or None)
    _exclude(json=json or None, console=console)
    if stream is not None and not callable(getattr(stream, "write", None)):
        raise ArgumentError(f"stream={stream!r} has no write(); give an open text file, or file='run-{{rank}}.log'")
    settings, problems = from_environment()
    given: dict[str, Any] = {"datefmt": datefmt, "rich": rich, "console": console}
    if level is not None:
        given["level"] = parse_level(level)
    if ranks is not None:
        given["ranks"] = parse_ranks(ranks)
    if stream is not None:
        given["stream"] = stream
    if file is not None:
        given["file"] = FileWriter(file)
    if format is not None:
        given |= {"format": format, "json": False}
    if json is not None:
        given["json"] = bool(json)
    if color is not None:
        given["color"] = bool(color)
    if collapse is not None:
        given["collapse"] = bool(collapse)
    settings = replace(settings, **given)
    handler = make_handler(settings, explicit=True)

    for old in [known for known in logger.handlers if isinstance(known, LogHandler)]:
        logger.removeHandler(old)
        old.close()
    logger.shown_ranks = settings.ranks
    logger.problems = problems
    logger.addHandler(handler)
    if level is not None or logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO if settings.level is None else settings.level)
    return handler


def _exclude(**arguments: object) -> None:
    (first, one), (second, other) = arguments.items()
    if one is not None and other is not None:
        raise ArgumentError(f"{first}={one!r} and {second}={other!r}: give one of them")
