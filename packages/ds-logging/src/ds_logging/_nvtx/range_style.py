"""How a range looks: its name, domain, colour, category and payload, checked whether or not anybody draws it."""

from __future__ import annotations

from typing import Any, NamedTuple

from ds_logging.errors import ArgumentError

# The names that the nvtx package knows by itself, as ARGB. Other names are matplotlib's.
COLORS = {
    "blue": 0xFF0000FF,
    "cyan": 0xFF00FFFF,
    "darkgreen": 0xFF006400,
    "green": 0xFF008000,
    "orange": 0xFFFFA500,
    "purple": 0xFF800080,
    "rapids": 0xFF7400FF,
    "red": 0xFFFF0000,
    "white": 0xFFFFFFFF,
    "yellow": 0xFFFFFF00,
}


class RangeStyle(NamedTuple):
    """A range, before any backend sees it. ``message`` is None until a function gives its name; ``color`` is ARGB."""

    message: str | None
    domain: str | None
    color: int | None = None
    category: str | int | None = None
    payload: int | float | None = None


def parse_color(color: object) -> int | None:
    """Return a colour as ARGB.

    Raises:
        ArgumentError: it is none.

    >>> hex(parse_color("red")), hex(parse_color("#00ff00")), parse_color(None)
    ('0xffff0000', '0xff00ff00', None)
    """
    if color is None:
        return None
    if isinstance(color, int) and not isinstance(color, bool) and 0 <= color <= 0xFFFFFFFF:
        return color
    if isinstance(color, str):
        if color in COLORS:
            return COLORS[color]
        digits = color.removeprefix("#")
        if color.startswith("#") and len(digits) == 6 and all(digit in "0123456789abcdefABCDEF" for digit in digits):
            return 0xFF000000 | int(digits, 16)
        named = _matplotlib_color(color)
        if named is not None:
            return named
    raise ArgumentError(
        f"color={color!r}: give one of {', '.join(COLORS)}, '#rrggbb', an ARGB integer from 0 to 0xffffffff, or a name "
        "that matplotlib knows where it is installed"
    )


def _matplotlib_color(name: str) -> int | None:
    try:
        from matplotlib.colors import to_rgba
    except ImportError:
        return None
    try:
        red, green, blue, alpha = (round(255 * part) for part in to_rgba(name))
    except ValueError:
        return None
    color: int = alpha << 24 | red << 16 | green << 8 | blue
    return color


def check_text(value: Any, name: str) -> None:
    """Raise ArgumentError unless ``value`` is a string that NVTX can take."""
    if not isinstance(value, str) or "\0" in value:
        raise ArgumentError(f"{name}={value!r}: give a string without null characters")


def check_style(message: Any, domain: Any, color: Any, category: Any, payload: Any) -> int | None:
    """Check the arguments of a range and return its colour as ARGB.

    Raises:
        ArgumentError: one of them is of the wrong type, or out of range.
    """
    if message is not None:
        check_text(message, "message")
    if domain is not None:
        check_text(domain, "domain")
    if isinstance(category, str):
        check_text(category, "category")
    elif category is not None and (
        isinstance(category, bool) or not isinstance(category, int) or not 1 <= category <= 0xFFFFFFFF
    ):
        raise ArgumentError(f"category={category!r}: give a name, or a number from 1 to 0xffffffff")
    if payload is not None:
        if isinstance(payload, bool) or type(payload) not in (int, float):
            raise ArgumentError(f"payload={payload!r} ({type(payload).__name__}): give an int or a float")
        if isinstance(payload, int) and not -(2**63) <= payload < 2**63:
            raise ArgumentError(f"payload={payload!r}: an integer must fit in 64 bits")
    return parse_color(color)
