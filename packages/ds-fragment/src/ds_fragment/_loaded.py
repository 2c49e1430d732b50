"""Engines' classes, without importing the engines: who has an object of one has imported it already."""

from __future__ import annotations

import sys


def is_a(thing: object, module: str, name: str) -> bool:
    """Whether ``thing`` is an instance of a class of a module, which may not have been imported.

    >>> import collections
    >>> is_a(collections.Counter(), "collections", "Counter"), is_a(1, "deepspeed", "DeepSpeedEngine")
    (True, False)
    """
    kind = getattr(sys.modules.get(module), name, None)
    return isinstance(kind, type) and isinstance(thing, kind)
