"""Each package exports at the top what its README and its errors name."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = sorted(path.name for path in (ROOT / "packages").iterdir() if path.name != "ds-train-utils")


def public_names(package: str) -> set[str]:
    """The functions and classes at the top of the package's files, but for methods and private ones."""
    found = set()
    for path in (ROOT / "packages" / package / "src").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                found.add(node.name)
    return found


def named_in_errors(package: str) -> set[str]:
    """The functions that texts of raised errors call, and the classes that they name."""
    words = set()
    for path in (ROOT / "packages" / package / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise):
                texts = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
                text = " ".join(part for part in texts if isinstance(part, str))
                words |= set(re.findall(r"\b([a-z_]+)\(", text)) | set(re.findall(r"\b([A-Z][a-z]+[A-Z]\w+)\b", text))
    return words


def named_in_readme(package: str) -> set[str]:
    text = (ROOT / "packages" / package / "README.md").read_text(encoding="utf-8")
    name = package.replace("-", "_")
    words = set(re.findall(rf"\b{name}\.(\w+)", text))
    for line in re.findall(rf"^from {name} import (.+)$", text, re.MULTILINE):
        words |= set(re.findall(r"\w+", line))
    return words


@pytest.mark.parametrize("package", PACKAGES)
def test_the_top_exports_what_is_named(package: str) -> None:
    module = importlib.import_module(package.replace("-", "_"))
    named = (named_in_errors(package) & public_names(package)) | named_in_readme(package)
    missing = {name for name in named if not hasattr(module, name)}
    missing = {name for name in missing if importlib.util.find_spec(f"{module.__name__}.{name}") is None}
    assert not missing, f"{package} names {sorted(missing)} and does not export them"
    assert named & set(module.__all__)
