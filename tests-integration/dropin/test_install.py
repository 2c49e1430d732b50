"""`ds_train_utils.install` itself: each case is a process of its own, because it changes what a process imports."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys

import pytest

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("needs DeepSpeed", allow_module_level=True)

from ds_train_utils._install import VERIFIED

ENV = {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "4", "OMP_NUM_THREADS": "1"}
FAKE = """
import importlib.metadata
real = importlib.metadata.version
def version(name):
    if name != "deepspeed":
        return real(name)
    {}
importlib.metadata.version = version
"""


def answers(program: str) -> list[str]:
    """The lines that a Python program prints."""
    command = [sys.executable, "-c", "import warnings\n" + program]
    done = subprocess.run(command, env={**os.environ, **ENV}, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


REFUSED = """
try:
    ds_train_utils.install()
except ds_train_utils.InstallError as error:
    print(error)
import sys
print(any("_install" in type(finder).__module__ for finder in sys.meta_path))
"""


def test_it_is_refused_after_deepspeed_was_imported() -> None:
    *_, text, installed = answers(f"import deepspeed, ds_train_utils\n{REFUSED}")
    assert "DeepSpeed was imported already" in text
    assert "before the first import of deepspeed" in text
    assert installed == "False"


def test_it_is_refused_where_deepspeed_is_not_installed() -> None:
    fake = FAKE.format("raise importlib.metadata.PackageNotFoundError(name)")
    *_, text, installed = answers(f"{fake}import ds_train_utils\n{REFUSED}")
    assert text == "DeepSpeed is not installed: there is nothing to put these modules under"
    assert installed == "False"


def test_a_second_call_does_nothing() -> None:
    program = """
import ds_train_utils, sys
ds_train_utils.install()
ds_train_utils.install()
import deepspeed
from deepspeed.utils import groups
ds_train_utils.install()
finders = [finder for finder in sys.meta_path if "_install" in type(finder).__module__]
print(len(finders) == 1, groups is ds_train_utils.groups, groups.__name__)
"""
    assert answers(program)[-1] == "True True ds_groups.parallel_state"


def test_it_imports_nothing_until_deepspeed_does() -> None:
    program = """
import ds_train_utils, sys
ds_train_utils.install()
print([name for name in sys.modules if name.partition(".")[0] in ("torch", "deepspeed", "ds_groups", "ds_fragment")])
"""
    assert answers(program) == ["[]"]


INSTALLED = importlib.metadata.version("deepspeed")


@pytest.mark.parametrize("version", [*VERIFIED, f"{VERIFIED[-1]}+cpu", "0.15.4", "99.0.0"])
def test_it_warns_of_a_version_that_was_not_verified(version: str) -> None:
    program = """
import ds_train_utils
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    ds_train_utils.install()
for warning in caught:
    print(warning.category.__name__, warning.filename, warning.message)
"""
    lines = answers(FAKE.format(f"return {version!r}") + program)
    if version.partition("+")[0] in VERIFIED:
        assert lines == []
    else:
        (line,) = lines
        assert line.startswith("UserWarning <string> ")
        assert line.endswith(f"not on the {version} that is installed here")


def test_the_installed_version_is_verified() -> None:
    assert INSTALLED.partition("+")[0] in VERIFIED
