"""Checks of arguments."""

from __future__ import annotations

from typing import Any


def check_choice(name: str, value: Any, choices: tuple[str, ...], *, or_function: bool = False) -> None:
    """Raise a ValueError unless the value is one of the choices, or a function where that is allowed."""
    if or_function and callable(value):
        return
    if value not in choices:
        more = " or a function" if or_function else ""
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}{more}, not {value!r}")


def check_number(name: str, value: int | None, *, optional: bool = True) -> None:
    """Raise a TypeError or ValueError unless the value is an integer of at least 0, or None where that is allowed."""
    if value is None and optional:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, not {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{name} must be at least 0, not {value}")
