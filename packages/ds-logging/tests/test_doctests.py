import doctest
import importlib
import pkgutil

import ds_logging


def test_every_docstring_example_runs():
    attempted = 0
    for found in pkgutil.iter_modules(ds_logging.__path__):
        result = doctest.testmod(importlib.import_module(f"ds_logging.{found.name}"))
        assert result.failed == 0
        attempted += result.attempted
    assert attempted >= 10
