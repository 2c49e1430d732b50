"""Logging levels, from names, from numbers and from the environment."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

from ds_logging.errors import LogLevelError

LEVEL_VARIABLE = "DS_LOG_LEVEL"

LEVELS: dict[str, int] = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
}


def get_log_level_from_string(log_level_str: str) -> int:
    """Return the number of a level's name, whatever its case. ``"15"`` is level 15.

    Raises:
        LogLevelError: no such level.

    >>> get_log_level_from_string("Info")
    20
    """
    if isinstance(log_level_str, str):
        return parse_level(log_level_str, "log_level_str")
    raise LogLevelError(f"log_level_str={log_level_str!r} is no string; use one of {', '.join(LEVELS)}")


def parse_level(level: int | str, argument: str = "level") -> int:
    """Return the number of a level given as a name or a number; ``argument`` is named in the error."""
    if isinstance(level, str):
        text = level.strip().lower()
        if text in LEVELS:
            return LEVELS[text]
        if text.isdecimal():
            return int(text)
        known = _registered(text)
        if known is not None:
            return known
    elif isinstance(level, int) and not isinstance(level, bool) and level >= 0:
        return level
    raise LogLevelError(f"{argument}={level!r} is no logging level; use one of {', '.join(LEVELS)}, or a number")


def _registered(text: str) -> int | None:
    """Look a name up among those of logging: "warn", "fatal", "notset", and what `logging.addLevelName` added."""
    for name in (text.upper(), text):
        number = logging.getLevelName(name)
        if isinstance(number, int):
            return number
    added: dict[str, int] = getattr(logging, "_nameToLevel", {})  # in whatever case it was added
    return next((number for name, number in added.items() if name.lower() == text), None)


def level_from_environment(environ: Mapping[str, str] | None = None) -> int | None:
    """Return the level that DS_LOG_LEVEL asks for, or ``None`` where it is unset or empty.

    Raises:
        LogLevelError: DS_LOG_LEVEL is no level.
    """
    text = (os.environ if environ is None else environ).get(LEVEL_VARIABLE, "")
    return parse_level(text, LEVEL_VARIABLE) if text.strip() else None
