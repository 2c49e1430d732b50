"""The examples in docstrings and in the README."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.parametrize("module", ["ds_train_utils", "ds_train_utils._lazy"])
def test_docstrings(module: str) -> None:
    # A copy, because doctest looks at every attribute of a module and its names would all arrive.
    found = importlib.import_module(module)
    examples = doctest.DocTestParser().get_doctest(found.__doc__ or "", {}, module, None, 0)
    tests = [examples, *doctest.DocTestFinder().find(found.read_stub)] if hasattr(found, "read_stub") else [examples]
    runner = doctest.DocTestRunner()
    for test in tests:
        test.globs.update(vars(found))
        runner.run(test)
    assert runner.summarize().attempted > 0
    assert runner.summarize().failed == 0


def test_readme() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    namespace: dict[str, object] = {"__name__": "readme"}
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)
