"""The pages of figures: what a program writes into them is what it writes now."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[1] / "docs" / "benchmarks"
PROGRAM = FOLDER / "make_page.py"


@pytest.fixture(scope="module")
def make_page() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_page", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def test_exchange_is_up_to_date() -> None:
    done = subprocess.run([sys.executable, str(PROGRAM), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_new_file_makes_a_section(make_page: ModuleType, tmp_path: Path) -> None:
    rows = [
        {"case": "other", "quantity": "max_avg", "contestant": "a loop", "median_ms": 2.04, "to_bare": None},
        {"case": "other", "quantity": "max_avg", "contestant": "ds-fragment, DDP", "median_ms": 1.0, "peak_mib": 1200},
    ]
    about = {"command": "python bench.py", "machine": "3x Some GPU", "torch": "2.99"}
    path = tmp_path / "exchange_3x.json"
    path.write_text(json.dumps({"about": about, "rows": rows}))
    text = make_page.tables([make_page.read(path)])
    section = text.partition("### 3x Some GPU, other: `max_avg`\n")[2].partition("\n#")[0]
    table = [line for line in section.splitlines() if line.startswith("|")][2:]
    assert table == ["| **ds-fragment, DDP** | 1.0 |  |  | 1,200 | 3x |", "| a loop | 2.0 |  |  |  | 3x |"]
    assert "python bench.py" in text


def test_a_page_without_markers_is_refused(make_page: ModuleType) -> None:
    with pytest.raises(ValueError, match="has not both of the markers"):
        make_page.page(f"# Page\n{make_page.BEGIN}\n", [])


def test_every_section_of_the_page_has_one_table_at_most() -> None:
    heading, tables = "", 0
    for line in (FOLDER / "exchange.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            heading, tables = line, 0
        elif line.startswith("|---"):
            tables += 1
            assert tables == 1, heading
