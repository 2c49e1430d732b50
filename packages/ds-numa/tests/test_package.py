from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import ds_numa
import pytest

README = Path(__file__).parents[1] / "README.md"
MODULES = [name for _, name, _ in pkgutil.walk_packages(ds_numa.__path__, "ds_numa.") if not name.endswith("__main__")]


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_doctests() -> None:
    assert sum(doctest.testmod(importlib.import_module(name)).attempted for name in MODULES) >= 8


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL))
def test_readme_examples_run(block: str) -> None:
    done = subprocess.run([sys.executable, "-W", "error", "-c", block], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_import_is_silent_and_light() -> None:
    code = "import sys, ds_numa; print({'torch', 'pynvml', 'numpy', 'argparse', 'json'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("set()", "")


def test_every_exported_name_is_there() -> None:
    assert [name for name in ds_numa.__all__ if not hasattr(ds_numa, name)] == []


def test_the_module_for_ranks_ships_and_is_nobodys_sitecustomize() -> None:
    path = Path(ds_numa.__file__).parent / "_site" / "sitecustomize.py"
    assert path.is_file()
    code = "import importlib.util as u; print(getattr(u.find_spec('sitecustomize'), 'origin', None))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() != str(path), "it is found without ds-numa run"
