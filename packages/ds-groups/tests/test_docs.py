"""Examples in docstrings and in the README run."""

from __future__ import annotations

import doctest
import importlib
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import ds_groups
import pytest

README = Path(__file__).parents[1] / "README.md"
MODULES = [info.name for info in pkgutil.walk_packages(ds_groups.__path__, "ds_groups.")]


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_doctests():
    assert sum(doctest.testmod(importlib.import_module(name)).attempted for name in MODULES) >= 20


def test_readme(tmp_path):
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "GLOO_SOCKET_IFNAME": "lo"}
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 2
    for number, block in enumerate(blocks):
        script = tmp_path / f"block{number}.py"
        script.write_text(f"import sys; sys.path.insert(0, {str(Path(ds_groups.__file__).parents[1])!r})\n{block}")
        command, env = [sys.executable, str(script)], {**os.environ, **alone}
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=env)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() in README.read_text()  # what it prints stands below it
