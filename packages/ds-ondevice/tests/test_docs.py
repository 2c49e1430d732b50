import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import ds_ondevice
import pytest

README = Path(__file__).parents[1] / "README.md"
MODULES = [f"ds_ondevice.{module.name}" for module in pkgutil.iter_modules(ds_ondevice.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_doctests():
    found = doctest.DocTestFinder().find(ds_ondevice.materialize, "materialize")
    assert sum(len(test.examples) for test in found) > 3


def test_the_code_of_the_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


def test_importing_starts_nothing():
    code = (
        "import torch, sys, ds_ondevice; "
        "assert not torch.cuda.is_initialized(); "
        "assert 'torch.distributed.tensor' not in sys.modules; "
        "assert not [m for m in sys.modules if m.split('.')[0].startswith('ds_') and not m.startswith('ds_ondevice')]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_all_is_what_there_is():
    assert set(ds_ondevice.__all__) <= set(dir(ds_ondevice))
    assert ds_ondevice.__version__.count(".") == 2
