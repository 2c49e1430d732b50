"""What stands between a record and a terminal: a filter that knows the rank, and two handlers on standard error."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from typing import TextIO

from ds_logging._rank import current_position

DEFAULT_FORMAT = "[%(asctime)s] %(levelname)s %(filename)s:%(lineno)d:%(funcName)s %(rank_tag)s%(message)s"


class TaggedText(str):
    """A message that says its rank already."""

    __slots__ = ()


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
        rank = getattr(record, "rank", None)  # an application's record factory may have set one
        if rank is None:
            rank = record.rank = current_position().rank
        if not hasattr(record, "rank_tag"):
            record.rank_tag = "" if isinstance(record.msg, TaggedText) else f"[Rank {rank}] "
        return True


class StreamHandler(logging.Handler):
    """Write to a stream, or to whatever ``sys.stderr`` is at that moment. It has no level of its own."""

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__()
        self._stream = stream
        self.addFilter(RankFilter())
        self.setFormatter(logging.Formatter(DEFAULT_FORMAT))

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record and flush."""
        try:
            stream = sys.stderr if self._stream is None else self._stream
            if stream is not None:  # a process without a console has no stderr
                stream.write(self.format(record) + "\n")
                stream.flush()
        except RecursionError:
            raise
        except Exception:
            self.handleError(record)


class FallbackHandler(StreamHandler):
    """The handler of somebody who configured nothing: silent as soon as the record finds any other handler.

    So a record is never shown twice, whenever pytest or the application adds its own. Of several fallback handlers
    on the way up, the first one writes.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record unless another handler gets it."""
        chain = list(handlers_above(logging.getLogger(record.name)))
        if not any(not isinstance(handler, FallbackHandler) for handler in chain) and (
            self not in chain or chain[0] is self
        ):
            super().emit(record)


def handlers_above(logger: logging.Logger) -> Iterator[logging.Handler]:
    """Yield the handlers that a record of ``logger`` reaches, nearest first."""
    current: logging.Logger | None = logger
    while current is not None:
        yield from current.handlers
        current = current.parent if current.propagate else None


def is_configured(logger: logging.Logger) -> bool:
    """Say whether a record of ``logger`` reaches a handler that somebody asked for."""
    return any(not isinstance(handler, FallbackHandler) for handler in handlers_above(logger))
