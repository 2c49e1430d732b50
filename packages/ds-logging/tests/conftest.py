import logging
import os
import subprocess
import sys

import pytest
from ds_logging import _settings
from ds_logging._launchers import LAUNCHERS
from ds_logging._logger import DsLogger, logger

VARIABLES = [
    *_settings.VARIABLES,
    "NO_COLOR",
    *(name for launcher in LAUNCHERS for name in launcher[1:] if name is not None),
]


@pytest.fixture(autouse=True)
def untouched(monkeypatch):
    """No launcher, no process group, no handler and no level: what a test changes is undone after it."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delitem(sys.modules, "torch.distributed", raising=False)
    handlers, level = list(logger.handlers), logger.level
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)
    logger.shown_ranks, logger.problems = DsLogger.shown_ranks, ()
    yield
    logger.shown_ranks, logger.problems = DsLogger.shown_ranks, ()
    logger.handlers[:] = handlers
    logger.setLevel(level)


@pytest.fixture
def run_script(tmp_path):
    """Run a program of its own, where neither pytest nor anybody else has configured logging."""

    def run(code, **environ):
        script = tmp_path / "script.py"
        script.write_text(code)
        clean = {name: value for name, value in os.environ.items() if name not in VARIABLES}
        return subprocess.run(
            [sys.executable, "-W", "error", str(script)],
            env={**clean, **environ},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )

    return run
