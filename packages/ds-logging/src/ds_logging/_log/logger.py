"""The logger "ds", and what happens where nobody configured logging.

[Note: nothing configured] Under Python's defaults (level WARNING, no handler) an INFO line is shown nowhere. In a
script whose author configured nothing that is a surprise. So the level of the logger "ds" is INFO while nobody chose
one: no level of its own, none on the root logger, no handler that takes INFO. And the first record that no handler
takes adds a `LogHandler`, configured by the environment. Importing adds one only if the environment asks for it.

[Note: hidden lines] ``isEnabledFor`` says no on a rank that does not show a line, too. So a hidden line is neither made
nor formatted, whichever call it was: level and rank are all that is looked at.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Mapping
from types import FrameType
from typing import Any, cast

from ds_logging._log import compiled as _compiled
from ds_logging._log.formatters import fill_rank
from ds_logging._log.handlers import LogHandler, handlers_above, our_handler, takes
from ds_logging._log.levels import parse_level
from ds_logging._log.settings import any_set, from_environment, make_handler
from ds_logging._rank import current_rank
from ds_logging.errors import ArgumentError

_STDLIB_CALL_HANDLERS = logging.Logger.callHandlers
# Frames of these files are not the place that logged; ``logging.py`` adds itself.
INTERNAL_FILES = {logging.Logger.info.__code__.co_filename, logging.LoggerAdapter.log.__code__.co_filename}


class DsLogger(logging.Logger):
    """The logger "ds": `logging.getLogger` returns it. See [Note: nothing configured] and [Note: hidden lines]."""

    shown_ranks: frozenset[int] | None = frozenset({0})  # who shows what is below WARNING; None is everybody
    problems: tuple[str, ...] = ()  # of the environment, not yet reported
    _disabled = False

    @property
    def disabled(self) -> bool:
        """Whether everything is off. ``dictConfig`` and ``fileConfig`` do not set it.

        Their ``disable_existing_loggers`` is on by default, and meant for nobody's lines to be lost.
        """
        return self._disabled

    @disabled.setter
    def disabled(self, value: bool) -> None:
        if sys._getframe(1).f_globals.get("__name__") != "logging.config":
            self._disabled = bool(value)

    def getEffectiveLevel(self) -> int:
        """Return the level that counts."""
        if self.level:
            return self.level
        inherited = super().getEffectiveLevel()
        if inherited != logging.WARNING:  # other than Python's default: somebody chose it
            return inherited
        for handler in handlers_above(self):
            if handler.level <= logging.INFO and not isinstance(handler, (LogHandler, logging.NullHandler)):
                return inherited
        return logging.INFO

    def level_is_on(self, level: int) -> bool:
        """Say whether a level is on, whatever the rank."""
        if self._disabled:
            return False
        if self.level:
            return super().isEnabledFor(level)
        # Depends on handlers, which come and go without a word: not cached.
        if level < logging.INFO and logging.root.level == logging.WARNING and self.parent is logging.root:
            return False
        return self.manager.disable < level and level >= self.getEffectiveLevel()

    def isEnabledFor(self, level: int) -> bool:
        """Say whether a record of this level is shown by this rank."""
        if self._cache.get(level) is False:  # type: ignore[attr-defined]
            return False
        if level < logging.WARNING:
            shown = self.shown_ranks
            if shown is not None and current_rank() not in shown:
                return False
        return self.level_is_on(level)

    def findCaller(self, stack_info: bool = False, stacklevel: int = 1) -> tuple[str, int, str, str | None]:
        """Return the place that logged: the nearest frame outside of logging and of this package's log functions."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code.co_filename in INTERNAL_FILES:
            frame = frame.f_back
        for _ in range(stacklevel - 1):
            if frame is None or frame.f_back is None:
                break
            frame = frame.f_back
        if frame is None:
            return "(unknown file)", 0, "(unknown function)", None
        code = frame.f_code
        return code.co_filename, frame.f_lineno, code.co_name, _stack(frame) if stack_info else None

    def makeRecord(  # as in logging, which passes them by position
        self,
        name: str,
        level: int,
        fn: str,
        lno: int,
        msg: object,
        args: Any,
        exc_info: Any,
        func: str | None = None,
        extra: Mapping[str, object] | None = None,
        sinfo: str | None = None,
    ) -> logging.LogRecord:
        """Make a record that knows its rank."""
        try:
            record = super().makeRecord(name, level, fn, lno, msg, args, exc_info, func, extra, sinfo)
        except KeyError:  # logging refuses an extra that is called as one of its own fields
            extra = {f"extra_{field}": value for field, value in (extra or {}).items()}
            record = super().makeRecord(name, level, fn, lno, msg, args, exc_info, func, extra, sinfo)
        fill_rank(record)
        return record

    def callHandlers(self, record: logging.LogRecord) -> None:
        """Hand a record to the application's handlers, then to ours, which knows who took it."""
        if self.problems:
            self.report_problems()
        first = self.handlers[0] if len(self.handlers) == 1 else None
        if (  # the usual case: there is nobody else
            type(first) is LogHandler
            and self.parent is logging.root
            and not logging.root.handlers
            and record.levelno >= first.level
            and logging.Logger.callHandlers is _STDLIB_CALL_HANDLERS
        ):
            first.deliver(record)
            return
        chain = list(handlers_above(self))
        if logging.Logger.callHandlers is not _STDLIB_CALL_HANDLERS:
            # Somebody (Sentry does) listens there: go through it, and ask who takes the record.
            if our_handler(chain) is None and not any(takes(handler, record) for handler in chain):
                self.install_default()
            super().callHandlers(record)
            return
        takers = []
        for handler in chain:
            if isinstance(handler, LogHandler) or record.levelno < handler.level:
                continue
            taken: bool | None = handler.handle(record)  # None: a handle() of its own that says nothing
            if taken is not False and not isinstance(handler, logging.NullHandler):
                takers.append(handler)
        ours = our_handler(chain)
        if ours is None and not takers:
            ours = self.install_default()
        if ours is not None and record.levelno >= ours.level:
            ours.deliver(record, takers)

    def install_default(self) -> LogHandler:
        """Add the handler that the environment asks for, or the plain one."""
        settings, problems = from_environment()
        self.problems = problems
        self.shown_ranks = settings.ranks
        if settings.level is not None and self.level == logging.NOTSET:
            self.setLevel(settings.level)
        handler = make_handler(settings, explicit=False)
        if problems:
            handler.before_first = self.report_problems
        self.addHandler(handler)
        return handler

    def report_problems(self) -> None:
        """Warn of every variable of the environment that is wrong, once."""
        problems, self.problems = self.problems, ()
        for problem in problems:
            self.warning("%s; it is ignored", problem)

    def warning_once(self, *args: Any, **kwargs: Any) -> None:
        """See `ds_logging.warning_once`."""

    def log_dist_once(
        self, message: object, *args: Any, ranks: Iterable[int] | None = None, level: int | str = 20, **kwargs: Any
    ) -> None:
        """See `ds_logging.log_dist_once`."""


INTERNAL_FILES.add(DsLogger.findCaller.__code__.co_filename)


def _stack(frame: FrameType) -> str:
    import traceback

    return "Stack (most recent call last):\n" + "".join(traceback.format_stack(frame)).rstrip("\n")


def _make_logger() -> DsLogger:
    made = logging.getLogger("ds")
    if not isinstance(made, DsLogger):
        kind = type(made)
        if any(base.__module__ == __name__ for base in kind.__mro__):  # this package was imported anew: start anew
            kind = logging.Logger
            for known in [known for known in made.handlers if type(known).__module__ == LogHandler.__module__]:
                made.removeHandler(known)
        made.__dict__.pop("disabled", None)
        # An application may have a class of loggers of its own.
        made.__class__ = DsLogger if kind is logging.Logger else type("DsLogger", (DsLogger, kind), {})
    found = cast("DsLogger", made)
    _compiled.install_methods(found, INTERNAL_FILES)
    if any_set() and our_handler(found.handlers) is None:
        found.install_default()
    return found


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
        if not any(isinstance(handler, LogHandler) for handler in made.handlers):
            made.addHandler(LogHandler())
        return made


logger = _make_logger()
