"""The table of launchers is one, however many distributions hold a copy."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import copy_launchers  # noqa: E402


def test_the_copies_are_equal() -> None:
    assert copy_launchers.stale() == []


def test_a_copy_that_differs_or_lacks_is_stale(tmp_path: Path) -> None:
    source = tmp_path / copy_launchers.SOURCE
    source.parent.mkdir(parents=True)
    source.write_text("table = 1\n")
    copies = tuple(Path(name) for name in ("equal.py", "other.py", "missing.py"))
    (tmp_path / "equal.py").write_text("table = 1\n")
    (tmp_path / "other.py").write_text("table = 2\n")
    assert copy_launchers.stale(tmp_path, copies) == [Path("other.py"), Path("missing.py")]


def test_the_table_can_be_copied_anywhere() -> None:
    tree = ast.parse((ROOT / copy_launchers.SOURCE).read_text())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert modules == {"__future__", "typing"}
