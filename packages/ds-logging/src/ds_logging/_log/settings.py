"""What can be configured, by code or by the environment, and the handler that follows from it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO, cast

from ds_logging._log.formatters import DEFAULT_FORMAT, RICH_FORMAT, ColorFormatter, JsonFormatter, fill_rank
from ds_logging._log.handlers import LogHandler
from ds_logging._log.levels import parse_level
from ds_logging._log.writer import FileWriter, StreamWriter
from ds_logging._rank import parse_ranks
from ds_logging.errors import ArgumentError, MissingExtraError

if TYPE_CHECKING:
    from rich.console import Console

VARIABLES = (
    "DS_LOG_LEVEL",
    "DS_LOG_RANKS",
    "DS_LOG_FILE",
    "DS_LOG_FORMAT",
    "DS_LOG_COLOR",
    "DS_LOG_STREAM",
    "DS_LOG_COLLAPSE",
)
_SWITCH = {"1": True, "true": True, "yes": True, "on": True, "always": True}
_SWITCH |= {"0": False, "false": False, "no": False, "off": False, "never": False}


@dataclass(frozen=True)
class Settings:
    """How the log is shown. Checked."""

    level: int | None = None
    ranks: frozenset[int] | None = frozenset({0})  # None is every rank
    stream: TextIO | None = None  # None is the standard stream of the next field, as it is when a line comes
    stream_name: str = "stderr"
    file: FileWriter | None = None
    format: str | None = None
    datefmt: str | None = None
    json: bool = False
    color: bool | None = None  # None is: on a terminal, unless NO_COLOR is set
    rich: bool = False
    console: Console | None = None
    collapse: bool = False


def any_set(environ: Mapping[str, str] | None = None) -> bool:
    """Say whether the environment configures the log."""
    environ = os.environ if environ is None else environ
    return any(environ.get(name, "").strip() for name in VARIABLES)


def from_environment(environ: Mapping[str, str] | None = None) -> tuple[Settings, tuple[str, ...]]:
    """Return what the environment asks for, and what is wrong with it, a sentence for each wrong variable."""
    environ = os.environ if environ is None else environ
    found: dict[str, Any] = {}
    problems = []
    for name in VARIABLES:
        text = environ.get(name, "").strip()
        if not text:
            continue
        try:
            found.update(_READERS[name](text, name))
        except ArgumentError as error:
            problems.append(str(error))
    return Settings(**found), tuple(problems)


def _read_switch(text: str, name: str) -> bool:
    if text.lower() not in _SWITCH:
        raise ArgumentError(f"{name}={text!r} is neither yes nor no; write 1 or 0")
    return _SWITCH[text.lower()]


def _read_format(text: str, name: str) -> dict[str, Any]:
    if text.lower() == "json":
        return {"json": True}
    make_formatter(text, None, name)
    return {"format": text}


def _read_stream(text: str, name: str) -> dict[str, Any]:
    if text.lower() not in ("stderr", "stdout"):
        raise ArgumentError(f"{name}={text!r} is no standard stream; write stderr or stdout")
    return {"stream_name": text.lower()}


def _read_file(text: str, name: str) -> dict[str, Any]:
    try:
        return {"file": FileWriter(text)}
    except ArgumentError as error:
        raise ArgumentError(f"{name}: {error}") from None


_READERS: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "DS_LOG_LEVEL": lambda text, name: {"level": parse_level(text, name)},
    "DS_LOG_RANKS": lambda text, name: {"ranks": parse_ranks(text, name)},
    "DS_LOG_FILE": _read_file,
    "DS_LOG_FORMAT": _read_format,
    "DS_LOG_COLOR": lambda text, name: {} if text.lower() == "auto" else {"color": _read_switch(text, name)},
    "DS_LOG_STREAM": _read_stream,
    "DS_LOG_COLLAPSE": lambda text, name: {"collapse": _read_switch(text, name)},
}


def make_formatter(
    format: str, datefmt: str | None, argument: str = "format", kind: type[logging.Formatter] = logging.Formatter
) -> logging.Formatter:
    """Return a formatter that was tried; ``argument`` is named in the error."""
    record = logging.makeLogRecord({"msg": "", "levelname": "INFO", "levelno": logging.INFO})
    fill_rank(record)
    try:
        formatter = kind(format, datefmt)
        formatter.format(record)
    except (TypeError, ValueError, KeyError) as error:
        raise ArgumentError(f"{argument}={format!r}, datefmt={datefmt!r}: {error}; see logging.Formatter") from None
    return formatter


def make_handler(settings: Settings, *, explicit: bool) -> LogHandler:
    """Return the handler that does what the settings say."""
    writer = StreamWriter(settings.stream, settings.stream_name)
    rich = None
    if settings.rich or settings.console is not None:
        console = _rich_console(settings, writer)
        if console.is_terminal and not settings.json:
            rich = _rich_handler(console, settings.datefmt)
            rich.setFormatter(make_formatter(settings.format or RICH_FORMAT, settings.datefmt))
        elif settings.console is not None:
            # Off a terminal rich cuts lines at 80 columns: write plain ones, to where it writes.
            writer = StreamWriter(cast("TextIO", console.file))
    handler = LogHandler(writer, file=settings.file, rich=rich, explicit=explicit, ranks=settings.ranks)
    if settings.json:
        handler.setFormatter(JsonFormatter())
    else:
        form = settings.format or DEFAULT_FORMAT
        handler.setFormatter(make_formatter(form, settings.datefmt))
        colored = make_formatter(form, settings.datefmt, kind=ColorFormatter)
        if settings.color is None:
            wants = _ColorChoice(writer)
            handler.console_formatter = lambda: colored if wants() else None
        elif settings.color:
            handler.console_formatter = lambda: colored
    if settings.collapse:
        from ds_logging._log.collapse import Collapser

        handler.collapser = Collapser()
    return handler


class _ColorChoice:
    """Says whether the stream of a writer gets colour. It asks once for each stream."""

    def __init__(self, writer: StreamWriter) -> None:
        self._writer = writer
        self._known: tuple[Any, bool] = (None, False)

    def __call__(self) -> bool:
        stream = self._writer.current()
        known, answer = self._known
        if known is not stream:
            answer = _wants_color(stream)
            self._known = (stream, answer)
        return answer


def _wants_color(stream: Any) -> bool:
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):
        return False


def _rich_console(settings: Settings, writer: StreamWriter) -> Console:
    try:
        from rich.console import Console
    except ImportError as error:
        raise MissingExtraError(f"rich=True: {error}; pip install 'ds-logging[rich]'") from None
    if settings.console is not None:
        if not isinstance(settings.console, Console):
            raise ArgumentError(f"console={settings.console!r} is no rich.console.Console")
        return settings.console
    return Console(file=settings.stream, stderr=settings.stream is None and settings.stream_name == "stderr")


def _rich_handler(console: Console, datefmt: str | None) -> logging.Handler:
    from rich.logging import RichHandler

    times: dict[str, Any] = {} if datefmt is None else {"log_time_format": datefmt}
    return RichHandler(console=console, **times)
