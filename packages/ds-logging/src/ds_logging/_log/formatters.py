"""How a record becomes a line: text, coloured text, or JSON."""

from __future__ import annotations

import copy
import datetime as dt
import json
import logging
import os
import socket
from typing import Any

from ds_logging._log.message import RankedMessage
from ds_logging._rank import current_position, current_rank, local_rank, rank_tag, worker_id
from ds_logging._step import current_step

DEFAULT_FORMAT = "[%(asctime)s] %(levelname)s %(filename)s:%(lineno)d:%(funcName)s %(rank_tag)s%(message)s"
RICH_FORMAT = "%(rank_tag)s%(message)s"  # rich adds the time, the level and the place itself

_COLORS = ((logging.ERROR, "31"), (logging.WARNING, "33"), (logging.INFO, "32"), (logging.NOTSET, "36"))
STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {
    "asctime",
    "message",
    "rank",
    "rank_tag",
    "step",
    "taskName",
    "traced",
}


def fill_rank(record: logging.LogRecord) -> None:
    """Give a record ``rank`` and ``rank_tag`` where they are missing."""
    fields = record.__dict__
    rank = fields.get("rank")  # an application's record factory may have set one
    if rank is None:
        rank = record.rank = current_rank()
    if "rank_tag" not in fields:
        record.rank_tag = "" if getattr(record.msg, "tagged", False) else rank_tag(rank)


class ColorFormatter(logging.Formatter):
    """A formatter that colours the name of the level."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Format a copy of the record, whose level has the colour."""
        colored = copy.copy(record)
        code = next(code for level, code in _COLORS if record.levelno >= level)
        colored.levelname = f"\x1b[{code}m{record.levelname}\x1b[0m"
        return super().formatMessage(colored)


class JsonFormatter(logging.Formatter):
    """One JSON object a line. It raises nothing that a record could cause."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as a line."""
        fields = record.__dict__
        message: Any = record.msg
        try:
            text = message.text() if isinstance(message, RankedMessage) else record.getMessage()
        except Exception as error:
            text = f"<message cannot be formatted: {type(error).__name__}>"
        size = current_position().world_size
        line: dict[str, Any] = {
            "time": dt.datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="microseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": text,
            "rank": fields.get("rank", 0),
            "local_rank": local_rank(),
            "world_size": size,
            "host": socket.gethostname(),
            "pid": record.process or os.getpid(),
            "file": record.pathname,
            "line": record.lineno,
            "func": record.funcName,
        }
        step = fields.get("step", current_step())
        optional = {
            "step": step,
            "restart": _integer(os.environ.get("TORCHELASTIC_RESTART_COUNT")),
            "worker": worker_id(),
            "exception": self._exception(record),
            "stack": record.stack_info,
        }
        line.update((name, value) for name, value in optional.items() if value is not None)
        for name, value in fields.items():
            if name not in STANDARD and name not in line:
                line[name] = value
        try:
            return json.dumps(line, allow_nan=False)
        except Exception:
            return json.dumps({str(name): _plain(value) for name, value in line.items()})

    def _exception(self, record: logging.LogRecord) -> str | None:
        try:
            if record.exc_info and record.exc_info[0] is not None:
                return self.formatException(record.exc_info)
        except Exception as error:
            return f"<traceback cannot be formatted: {type(error).__name__}>"
        return record.exc_text


def _plain(value: Any) -> Any:
    """Return the value if it is JSON, else its text."""
    try:
        json.dumps(value, allow_nan=False)
    except Exception:
        try:
            return repr(value)
        except Exception as error:
            return f"<{type(value).__name__}: its repr raises {type(error).__name__}>"
    return value


def _integer(text: str | None) -> int | None:
    return int(text) if text is not None and text.strip().isdecimal() else None
