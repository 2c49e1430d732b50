"""The examples in docstrings and in the README."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import ds_train_utils

README = Path(__file__).parents[1] / "README.md"


def test_docstring() -> None:
    # A copy of it, because doctest looks at every attribute of a module and its names would all arrive.
    examples = doctest.DocTestParser().get_doctest(ds_train_utils.__doc__ or "", {}, "ds_train_utils", None, 0)
    runner = doctest.DocTestRunner()
    runner.run(examples)
    assert runner.summarize().attempted > 0
    assert runner.summarize().failed == 0


def test_readme() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    namespace: dict[str, object] = {"__name__": "readme"}
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)
