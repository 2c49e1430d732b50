"""The name of a function further up the call stack."""

from __future__ import annotations

import sys

from ds_logging.errors import ArgumentError


def get_caller_func(frame: int = 3) -> str:
    """Return the name of the function ``frame`` steps up from here, at the moment of this call.

    Do not write it as a default argument (``def f(caller=get_caller_func())``): Python evaluates that once, at import.

    Args:
        frame: 0 is this function itself, 1 the one that calls it, 2 the caller of that one, and so on. Past the
            outermost one it is the outermost one.

    Raises:
        ArgumentError: ``frame`` is negative or no integer.

    >>> def who():
    ...     return get_caller_func(1)
    >>> who()
    'who'
    """
    if not isinstance(frame, int) or frame < 0:
        raise ArgumentError(f"frame={frame!r}: count steps up the stack from 0")
    current = sys._getframe()
    for _ in range(frame):
        if current.f_back is None:
            break
        current = current.f_back
    return current.f_code.co_name
