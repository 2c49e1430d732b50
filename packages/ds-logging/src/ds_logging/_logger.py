"""The logger object, and its output in a program that configured no logging.

[Note: nothing configured] ``log_dist("x")`` at INFO shows nothing under Python's defaults (level WARNING, no handler).
In a script whose author configured nothing that is a surprise. So the first `log_dist` that finds no handler at all
on "ds" or above it adds a `FallbackHandler` and, if nobody chose a level, sets INFO. Both are taken back by the next
`log_dist` that finds another handler. Nothing happens at import.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

from ds_logging._handlers import FallbackHandler, RankFilter, is_configured
from ds_logging._levels import level_from_environment, parse_level
from ds_logging.errors import ArgumentError, LogLevelError

if TYPE_CHECKING:

    class DsLogger(logging.Logger):
        """The logger "ds": a plain one with two functions more."""

        def warning_once(self, *args: Any, **kwargs: Any) -> None:
            """See `ds_logging.warning_once`."""

        def log_dist_once(self, message: object, ranks: Iterable[int] | None = None, level: int | str = 20) -> None:
            """See `ds_logging.log_dist_once`."""


def _make_logger() -> DsLogger:
    made = logging.getLogger("ds")
    if not any(isinstance(known, RankFilter) for known in made.filters):
        made.addFilter(RankFilter())
    if made.level == logging.NOTSET:
        with contextlib.suppress(LogLevelError):  # importing stays silent; `Fallback.settle` and `configure` report it
            made.setLevel(level_from_environment() or logging.NOTSET)
    return cast("DsLogger", made)


class Fallback:
    """Shows a logger's records while nobody else does. See [Note: nothing configured]."""

    def __init__(self, target: logging.Logger) -> None:
        self._target = target
        self._handler = FallbackHandler()
        self._raised_level = False
        self._checked_environment = False
        self._lock = threading.Lock()

    def settle(self) -> None:
        """Step in where there is no handler, step back where there is one."""
        installed = self._handler in self._target.handlers
        if installed == is_configured(self._target):
            with self._lock:
                if installed:
                    self._step_back()
                else:
                    self._step_in()
        if not self._checked_environment:
            self._checked_environment = True
            try:
                level_from_environment()
            except LogLevelError as error:
                self._target.warning("%s; it is ignored", error)

    def step_back(self) -> None:
        """Take back the handler and the level, whatever else there is."""
        with self._lock:
            self._step_back()

    def effective_level(self) -> int:
        """Return the level from which on `log_dist` logs, settled or not. Changes nothing."""
        raises = not is_configured(self._target) and self._wants_level()
        return logging.INFO if raises else self._target.getEffectiveLevel()

    def _wants_level(self) -> bool:
        # A root level other than Python's default was chosen by somebody: leave it in force.
        target = self._target
        return target.level == logging.NOTSET and target.getEffectiveLevel() == logging.WARNING

    def _step_in(self) -> None:
        if self._wants_level():
            self._target.setLevel(logging.INFO)
            self._raised_level = True
        self._target.addHandler(self._handler)

    def _step_back(self) -> None:
        self._target.removeHandler(self._handler)
        if self._raised_level and self._target.level == logging.INFO:
            self._target.setLevel(logging.NOTSET)
        self._raised_level = False


class LoggerFactory:
    """Makes loggers as DeepSpeed's class of that name does."""

    @staticmethod
    def create_logger(name: str | None = None, level: int | str = logging.WARNING) -> logging.Logger:
        """Return the logger ``name`` with a level, shown on standard error while nothing else shows it.

        Records propagate, so pytest and the application see them; calling it twice does not log twice.

        Args:
            name: of the logger, as for ``logging.getLogger``.
            level: its level, a number or a name.

        Raises:
            ArgumentError: there is no name.
            LogLevelError: there is no such level.
        """
        if not name or not isinstance(name, str):
            raise ArgumentError(f"name={name!r}: a logger needs a name, for example __name__")
        number = parse_level(level)
        made = logging.getLogger(name)
        made.setLevel(number)
        if not any(isinstance(handler, FallbackHandler) for handler in made.handlers):
            made.addHandler(FallbackHandler())
        return made


logger = _make_logger()
fallback = Fallback(logger)
