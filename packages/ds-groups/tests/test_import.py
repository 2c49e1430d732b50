"""Importing is silent, and rank arithmetic needs no torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import ds_groups
import pytest

ROOT = str(Path(ds_groups.__file__).parents[1])


def python(code):
    setup = f"import sys; sys.path.insert(0, {ROOT!r})\n"
    # Torch itself warns at import where numpy is missing.
    quiet = ["-W", "error", "-W", "ignore:Failed to initialize NumPy"]
    command = [sys.executable, *quiet, "-c", setup + code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


def test_arithmetic_without_torch():
    code = (
        "sys.modules['torch'] = None\n"
        "import ds_groups\n"
        "assert 'parallel_state' in dir(ds_groups)\n"
        "from ds_groups import ParallelTopology, TopologyError\n"
        "print(ParallelTopology(8, tp=2).ranks('tp', 5))"
    )
    assert python(code) == "(4, 5)\n"


def test_parallel_state_without_a_process_group():
    code = (
        "from ds_groups import parallel_state as groups\n"
        "import torch, torch.distributed as dist\n"
        "assert not dist.is_initialized() and not torch.cuda.is_initialized()\n"
        "print(groups._get_data_parallel_world_size())"
    )
    assert python(code) == "1\n"


def test_torch_is_not_imported():
    assert python("import ds_groups\nprint('torch' in sys.modules)") == "False\n"


def test_exports():
    assert all(hasattr(ds_groups, name) for name in ds_groups.__all__)
    assert ds_groups.BoundTopology.__name__ == "BoundTopology"
    assert ds_groups.parallel_state.__name__ == "ds_groups.parallel_state"
    assert {name for name in dir(ds_groups) if not name.startswith("_")} == {*ds_groups.__all__} - {"__version__"}
    assert {"__version__", "__file__"} <= set(dir(ds_groups))
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = ds_groups.nothing_here
