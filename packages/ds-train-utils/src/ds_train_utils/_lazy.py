"""Names that arrive on first use (PEP 562), listed in the package's own stub file.

[Note: shadowing] Two exports share their name with a submodule: the class `tensor_fragment` lives in the module
`tensor_fragment`, the function `z3_leaf_module` in the module of that name, as in `deepspeed.utils`. Importing such a
module makes Python set it as an attribute of the package, over the export. `_Package` refuses exactly that assignment.
"""

from __future__ import annotations

import ast
import importlib
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple


class Export(NamedTuple):
    """Where an export comes from: a module, and the name in it, or None for the module itself."""

    module: str
    name: str | None


def read_stub(package: str, source: str | bytes) -> dict[str, Export]:
    """The exports that a stub file lists, by name.

    Args:
        package: the full name of the package that the stub describes.
        source: the stub's text, made of ``from .module import name as name`` and ``from . import module as module``.

    Raises:
        ValueError: the stub holds another statement, or lists a name twice.

    >>> read_stub("pkg", "from . import sub as sub\\nfrom .sub import f as g")
    {'sub': Export(module='pkg.sub', name=None), 'g': Export(module='pkg.sub', name='f')}
    """
    exports: dict[str, Export] = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ImportFrom) or node.level != 1:
            line = ast.unparse(node).splitlines()[0]
            raise ValueError(f"{package} stub, line {node.lineno}: {line!r} is not 'from .module import name as name'")
        for alias in node.names:
            name = alias.asname or alias.name
            if name in exports:
                raise ValueError(f"{package} stub, line {node.lineno}: {name!r} is listed twice, remove one")
            if node.module is None:
                exports[name] = Export(f"{package}.{alias.name}", None)
            else:
                exports[name] = Export(f"{package}.{node.module}", alias.name)
    return exports


def attach(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Make the exports of a package's ``__init__.pyi`` lazy.

    Args:
        package: the name of the package that is being imported; it has an ``__init__.pyi`` beside its ``__init__.py``.

    Returns:
        The package's ``__getattr__``, ``__dir__`` and ``__all__``.
    """
    module = sys.modules[package]
    spec = module.__spec__
    if spec is None or spec.origin is None:
        raise ImportError(f"{package} has no file to find its list of exports beside: install it from its wheel")
    # The loader reads it, not open(): a package in a zip file has a loader too.
    source = spec.loader.get_data(os.path.join(os.path.dirname(spec.origin), "__init__.pyi"))  # type: ignore[union-attr]
    exports = read_stub(package, source)
    module.__class__ = _Package

    def __getattr__(name: str) -> Any:
        export = exports.get(name)
        if export is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}", name=name, obj=module)
        value = importlib.import_module(export.module)
        if export.name is not None:
            value = getattr(value, export.name)
        setattr(module, name, value)
        return value

    def __dir__() -> list[str]:
        return sorted({*vars(module), *exports})

    module.__dict__["_exports"] = exports
    return __getattr__, __dir__, sorted(exports)


class _Package(ModuleType):
    """A package whose exports a submodule of the same name does not replace (see the note on shadowing)."""

    _exports: dict[str, Export]

    def __setattr__(self, name: str, value: object) -> None:
        export = self._exports.get(name)
        if export is None or export.name is None or not isinstance(value, ModuleType):
            super().__setattr__(name, value)
