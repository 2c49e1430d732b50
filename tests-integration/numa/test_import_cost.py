"""Importing ds-numa costs little: a ratio to the standard library's own modules, not a time."""

from __future__ import annotations

import os
import subprocess
import sys

MOST = 5.0  # times what `import logging` costs; measured 3.2


def cpu_seconds(code: str) -> float:
    process = subprocess.Popen([sys.executable, "-c", code])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_utime + usage.ru_stime


def test_the_import_is_a_few_times_that_of_logging() -> None:
    codes = ("pass", "import logging", "import ds_numa")
    least = dict.fromkeys(codes, float("inf"))  # by turns, and the least of many: other programs only add
    for _ in range(12):
        for code in codes:
            least[code] = min(least[code], cpu_seconds(code))
    bare, logging, ours = (least[code] for code in codes)
    assert ours - bare < MOST * (logging - bare)


def test_only_what_is_needed_is_imported() -> None:
    code = (
        "import sys, ds_numa; "
        "print({'torch', 'psutil', 'pynvml', 'numpy', 'argparse', 'json', 'subprocess', 'ctypes'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()", done.stderr
