"""What else stands on a communication log's timeline: NVTX ranges and log records, kept while a log records."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from ds_logging._step import current_step

RangeListener = Callable[[str, int, int, int], None]
"""Called at the end of a range with its name, its start and its end (``time.time_ns``), and its thread's identifier."""

listener: RangeListener | None = None
"""Set while a communication log records, and read by ``nvtx`` at the start of each range."""

MOST_KEPT = 10_000


class Range(NamedTuple):
    """A range of code, such as an NVTX range. Times as ``time.time_ns`` gives them."""

    name: str
    start_ns: int
    end_ns: int
    thread: int


class LogRecord(NamedTuple):
    """A record of the log. The time is as ``time.time_ns`` gives it."""

    time_ns: int
    level: str
    message: str
    thread: int = 0
    step: int | None = None


ranges: deque[Range] = deque(maxlen=MOST_KEPT)
records: deque[LogRecord] = deque(maxlen=MOST_KEPT)
_logs = 0


class _RecordKeeper(logging.NullHandler):
    """Keeps records. It shows nothing to anybody, which is what a ``NullHandler`` says to those who look for one."""

    def handle(self, record: logging.LogRecord) -> bool:
        """Keep one record."""
        try:
            message = record.getMessage()
        except Exception as error:  # the handler that shows the record reports it
            message = f"{record.msg!r} ({type(error).__name__})"
        moment, step = int(record.created * 1e9), getattr(record, "step", None)
        step = current_step() if step is None else step
        records.append(LogRecord(moment, record.levelname, message, record.thread or 0, step))
        return True


_keeper = _RecordKeeper()


def begin() -> None:
    """Keep ranges and the records of "ds" and below it, until `end` was called as often."""
    global listener, _logs
    _logs += 1
    if _logs == 1:
        ranges.clear()
        records.clear()
        listener = _keep_range
        logging.getLogger("ds").addHandler(_keeper)


def end() -> None:
    """Keep no more, where this is the last end; what was kept stays until the next `begin`."""
    global listener, _logs
    _logs = max(0, _logs - 1)
    if _logs == 0:
        listener = None
        logging.getLogger("ds").removeHandler(_keeper)


def _keep_range(name: str, started_ns: int, ended_ns: int, thread: int) -> None:
    ranges.append(Range(name, started_ns, ended_ns, thread))
