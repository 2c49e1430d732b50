"""What stands between a record and a terminal or a file.

[Note: once] A record is shown exactly once, in whatever order the application and this package are configured.
There is one handler of ours, `LogHandler`. It looks at the other handlers that the record reaches, with their levels
and filters:

* Nobody called `configure`: it is silent for a record that any other handler takes.
* Somebody did: it writes to its stream unless another handler writes the record to the same stream; for a standard
  stream, to a terminal or standard stream. Its file it writes always.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ds_logging._log.formatters import DEFAULT_FORMAT, fill_rank
from ds_logging._log.writer import FileWriter, StreamWriter
from ds_logging._rank import current_rank

if TYPE_CHECKING:
    from ds_logging._log.collapse import Collapser


class RankFilter(logging.Filter):
    """Give every record ``rank`` (an integer) and ``rank_tag``, for use in a format string.

    ``rank_tag`` is ``"[Rank 3] "``, or empty where the message says the rank already, as those of `log_dist` do. Add
    it to a handler of your own to write ``%(rank)s`` in its format. It never drops a record.

    >>> record = logging.makeLogRecord({"msg": "hello"})
    >>> RankFilter().filter(record), record.rank, record.rank_tag
    (True, 0, '[Rank 0] ')
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Fill in what is missing and keep the record."""
        fill_rank(record)
        return True


class LogHandler(logging.Handler):
    """Writes records to a stream and to a file, each line whole. See [Note: once].

    It has no lock: a signal handler may log in the middle of a line, and a forked child never waits. See
    [Note: one write] in ``_log.writer``.
    """

    def __init__(
        self,
        writer: StreamWriter | None = None,
        *,
        file: FileWriter | None = None,
        rich: logging.Handler | None = None,
        explicit: bool = False,
        ranks: frozenset[int] | None = None,
    ) -> None:
        super().__init__()
        self.writer = StreamWriter(None) if writer is None else writer
        self.file = file
        self.rich = rich
        self.explicit = explicit
        self.ranks = ranks  # who shows what is below WARNING; None is everybody
        self.collapser: Collapser | None = None
        self.console_formatter: Callable[[], logging.Formatter | None] = lambda: None
        self.before_first: Callable[[], None] | None = None
        self.setFormatter(logging.Formatter(DEFAULT_FORMAT))

    def createLock(self) -> None:
        """Have no lock."""
        self.lock = None

    def handle(self, record: logging.LogRecord) -> bool:
        """Write a record that came down from a logger, as `logging.Logger.callHandlers` hands it on."""
        if self.ranks is not None and record.levelno < logging.WARNING and current_rank() not in self.ranks:
            return False
        others = list(handlers_above(logging.getLogger(record.name)))
        if self not in others:
            return self.deliver(record)
        if our_handler(others) is not self:
            return False
        takers = [handler for handler in others if takes(handler, record)]
        return self.deliver(record, takers)

    def deliver(self, record: logging.LogRecord, takers: list[logging.Handler] | None = None) -> bool:
        """Write a record that the handlers ``takers`` of the application took."""
        before, self.before_first = self.before_first, None
        if before is not None:
            before()
        if self.filters and not self.filter(record):
            return False
        shown = bool(takers) and self._is_shown_by(takers or [])
        if shown and self.file is None:
            return True
        if "rank_tag" not in record.__dict__:
            fill_rank(record)
        if self.file is not None:
            try:
                self.file.write(self.format(record))
            except Exception:
                self.handleError(record)
        if not shown and (self.collapser is None or not self.collapser.keep(record, self)):
            self.show(record)
        return True

    def show(self, record: logging.LogRecord) -> None:
        """Write a record to the stream."""
        try:
            if self.rich is not None:
                self.rich.emit(record)
                return
            formatter = self.console_formatter() or self.formatter
            self.writer.write(self.format(record) if formatter is None else formatter.format(record))
        except Exception:
            self.handleError(record)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, whoever else does."""
        self.deliver(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Say in one line on standard error that a record could not be written; nothing if logging is told so."""
        if not logging.raiseExceptions or sys.stderr is None:
            return
        error = sys.exc_info()[1]
        with contextlib.suppress(Exception):  # a closed standard error hears nothing
            place = f"{record.pathname}:{record.lineno}"
            sys.stderr.write(f"ds_logging: the line of {place} was not written: {type(error).__name__}: {error}\n")

    def close(self) -> None:
        """Show what is held back and close the file; a later line opens it again."""
        if self.collapser is not None:
            self.collapser.finish()
        if self.file is not None:
            self.file.close()
        super().close()

    def _is_shown_by(self, takers: list[logging.Handler]) -> bool:
        if not self.explicit:
            return bool(takers)
        target = self.writer.current()
        ours_is_console = is_console(target)
        for handler in takers:
            stream = _stream_of(handler)
            if stream is not None and stream is target:
                return True
            if ours_is_console and (is_console(stream) if stream is not None else _may_print(handler)):
                return True
        return False


def _stream_of(handler: logging.Handler) -> Any:
    console = getattr(handler, "console", None)  # rich
    return getattr(handler, "stream", None) if console is None else getattr(console, "file", None)


def _may_print(handler: logging.Handler) -> bool:
    """Say whether a handler without a stream may write to the terminal. Those of `logging.handlers` do not."""
    return not type(handler).__module__.startswith(("logging", "_pytest"))


def is_console(stream: Any) -> bool:
    """Say whether a stream is one of the two standard streams or a terminal."""
    if stream is None:
        return False
    if any(stream is known for known in (sys.stderr, sys.stdout, sys.__stderr__, sys.__stdout__)):
        return True
    try:
        return bool(stream.isatty()) or stream.fileno() in (1, 2)
    except (AttributeError, ValueError, OSError):
        return False


def takes(handler: logging.Handler, record: logging.LogRecord) -> bool:
    """Say whether a handler of the application would take a record: not what it does with it.

    Its filters are asked with a copy.
    """
    if isinstance(handler, (LogHandler, logging.NullHandler)) or record.levelno < handler.level:
        return False
    return not handler.filters or bool(handler.filter(copy.copy(record)))


def our_handler(handlers: list[logging.Handler]) -> LogHandler | None:
    """Return the one of ours that writes: the configured one, else the nearest."""
    ours = [handler for handler in handlers if isinstance(handler, LogHandler)]
    return next((handler for handler in ours if handler.explicit), ours[0] if ours else None)


def handlers_above(logger: logging.Logger) -> Iterator[logging.Handler]:
    """Yield the handlers that a record of ``logger`` reaches, nearest first."""
    current: logging.Logger | None = logger
    while current is not None:
        yield from current.handlers
        current = current.parent if current.propagate else None
