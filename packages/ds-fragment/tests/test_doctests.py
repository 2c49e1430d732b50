"""The examples in the docstrings."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import ds_fragment
import pytest

NAMES = [
    module.name
    for module in pkgutil.walk_packages(ds_fragment.__path__, "ds_fragment.")
    if not module.name.endswith(("__main__", ".libds_fragment"))  # the latter is no module of Python's
]


@pytest.mark.parametrize("name", NAMES)
def test_examples(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_examples() -> None:
    layout = importlib.import_module("ds_fragment.layout")
    assert doctest.testmod(layout).attempted >= 4
