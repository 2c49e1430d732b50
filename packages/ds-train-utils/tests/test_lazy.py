"""Importing is cheap, and each name brings only its own package."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import ds_train_utils
import pytest

PARTS = ["ds_logging", "ds_groups", "ds_ondevice", "ds_fragment", "ds_z3leaf", "ds_loader", "ds_numa"]


def loaded_after(program: str, *, path: str | None = None) -> set[str]:
    """Which of torch and the seven a fresh interpreter holds after running a program."""
    report = f"import sys, json; print(json.dumps([m for m in {['torch', *PARTS]} if m in sys.modules]))"
    start = f"import sys; sys.path.insert(0, {path!r})\n" if path else ""
    # Torch itself warns at import where numpy is missing.
    command = [sys.executable, "-W", "ignore:Failed to initialize NumPy", "-c", f"{start}{program}\n{report}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_import_loads_nothing() -> None:
    assert loaded_after("import ds_train_utils; dir(ds_train_utils); ds_train_utils.__all__") == set()


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("from ds_train_utils import log_dist", {"ds_logging"}),
        ("import ds_train_utils.nvtx", {"ds_logging"}),
        ("from ds_train_utils import get_numactl_cmd", {"ds_numa"}),
        ("from ds_train_utils import numa", {"ds_numa"}),
        ("from ds_train_utils import groups", {"ds_groups", "torch"}),
        ("from ds_train_utils.groups import initialize", {"ds_groups", "torch"}),
        ("import ds_train_utils; ds_train_utils.OnDevice", {"ds_ondevice", "torch"}),
        ("from ds_train_utils import tensor_fragment", {"ds_fragment", "torch"}),
        ("from ds_train_utils import set_z3_leaf_modules", {"ds_z3leaf", "torch"}),
        ("from ds_train_utils import RepeatingLoader", {"ds_loader", "torch"}),
        ("from ds_train_utils import attach, iter_full", {"ds_fragment", "torch"}),
        ("from ds_train_utils import materialize", {"ds_ondevice", "torch"}),
        ("from ds_train_utils import configure", {"ds_logging"}),
        ("from ds_train_utils import bind", {"ds_numa"}),
        ("from ds_train_utils import install", set()),
    ],
)
def test_a_name_brings_only_its_package(program: str, expected: set[str]) -> None:
    found = loaded_after(program)
    assert found - {"torch"} == expected - {"torch"}
    assert "torch" not in found - expected


def test_star_import_brings_every_export() -> None:
    namespace: dict[str, object] = {}
    exec("from ds_train_utils import *", namespace)
    assert set(ds_train_utils.__all__) <= set(namespace)


def test_unknown_name_is_an_attribute_error_that_names_it() -> None:
    with pytest.raises(AttributeError, match="'ds_train_utils' has no attribute 'safe_get_everything'"):
        _ = ds_train_utils.safe_get_everything
    with pytest.raises(ImportError, match="safe_get_everything"):
        exec("from ds_train_utils import safe_get_everything")


def test_a_name_is_looked_up_once() -> None:
    first = ds_train_utils.log_dist
    assert vars(ds_train_utils)["log_dist"] is first is ds_train_utils.log_dist


def test_works_from_a_zip_file(tmp_path: Path) -> None:
    package = Path(ds_train_utils.__file__).parent
    archive = tmp_path / "site.zip"
    with zipfile.ZipFile(archive, "w") as target:
        for path in package.iterdir():
            if path.suffix == ".py":
                target.write(path, f"ds_train_utils/{path.name}")
    program = "import ds_train_utils; assert '.zip' in ds_train_utils.__file__; from ds_train_utils import log_dist"
    assert loaded_after(program, path=str(archive)) == {"ds_logging"}
