"""Importing ds-numa costs little: ratios to the standard library's own modules, not times."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Times what `import logging` costs, by what is imported; measured 0.1 and 2.9.
MOST = {"import ds_numa": 0.5, "from ds_numa import bind": 5.0}


def cpu_seconds(code: str, environment: dict[str, str]) -> float:
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_utime + usage.ru_stime


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """With compiled modules, as an installed package has them."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return kept | {"PYTHONPYCACHEPREFIX": str(tmp_path)}


def test_an_import_is_a_small_multiple_of_that_of_logging(environment: dict[str, str]) -> None:
    codes = ("pass", "import logging", *MOST)
    least = dict.fromkeys(codes, float("inf"))  # by turns, and the least of many: other programs only add
    for turn in range(13):
        for code in codes:
            seconds = cpu_seconds(code, environment)
            if turn:  # the first one compiles
                least[code] = min(least[code], seconds)
    bare, logging = least["pass"], least["import logging"]
    ratios = {code: (least[code] - bare) / (logging - bare) for code in MOST}
    assert all(ratios[code] < most for code, most in MOST.items()), ratios


def test_only_what_is_needed_is_imported() -> None:
    heavy = {"torch", "psutil", "pynvml", "numpy", "argparse", "json", "subprocess", "ctypes"}
    code = f"import sys; from ds_numa import bind, plan_binding, Topology; print({heavy!r} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()", done.stderr
    code = "import sys, ds_numa; print([name for name in sys.modules if name.startswith('ds_numa')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "['ds_numa.__about__', 'ds_numa']", done.stderr
