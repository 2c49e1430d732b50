import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import ds_loader
import pytest

README = Path(__file__).parents[1] / "README.md"
MODULES = [f"ds_loader.{module.name}" for module in pkgutil.iter_modules(ds_loader.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_doctests():
    found = doctest.DocTestFinder().find(ds_loader.RepeatingLoader, "RepeatingLoader")
    assert sum(len(test.examples) for test in found) >= 3


def test_the_code_of_the_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


def test_importing_starts_nothing():
    code = (
        "import sys, ds_loader; "
        "assert 'torchdata' not in sys.modules; "
        "assert not [m for m in sys.modules if m.split('.')[0].startswith('ds_') and not m.startswith('ds_loader')]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_all_is_what_there_is():
    assert set(ds_loader.__all__) <= set(dir(ds_loader))
    assert ds_loader.__version__.count(".") == 2
