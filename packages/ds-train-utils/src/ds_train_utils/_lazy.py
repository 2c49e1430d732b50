"""Names that arrive on first use (PEP 562).

[Note: shadowing] Two exports share their name with a submodule: the class `tensor_fragment` lives in the module
`tensor_fragment`, the function `z3_leaf_module` in the module of that name, as in `deepspeed.utils`. Importing such a
module makes Python set it as an attribute of the package, over the export. `_Package` refuses exactly that assignment.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any


def lazy(
    package: str, exports: Mapping[str, tuple[str, str | None]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make the exports of the package that is being imported arrive on first use.

    Args:
        package: its name.
        exports: by name, the module that the name comes from and its name there, or None for the module itself.

    Returns:
        The package's ``__getattr__`` and ``__dir__``.
    """
    module = sys.modules[package]
    module.__class__ = _Package
    module.__dict__["_exported_objects"] = {name for name, (_, inner) in exports.items() if inner is not None}

    def __getattr__(name: str) -> Any:
        if name not in exports:
            raise AttributeError(f"module {package!r} has no attribute {name!r}", name=name, obj=module)
        home, inner = exports[name]
        value = importlib.import_module(home)
        if inner is not None:
            value = getattr(value, inner)
        setattr(module, name, value)
        return value

    def __dir__() -> list[str]:
        return sorted({*exports, *(name for name in vars(module) if name.startswith("_"))})

    return __getattr__, __dir__


class _Package(ModuleType):
    """A package whose exports a submodule of the same name does not replace (see the note on shadowing)."""

    _exported_objects: set[str]

    def __setattr__(self, name: str, value: object) -> None:
        if name not in self._exported_objects or not isinstance(value, ModuleType):
            super().__setattr__(name, value)
