"""One matcher for each selector that a caller gives; all of them are checked before any is used."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

from torch import nn

from ds_z3leaf.errors import LeafTypeError, LeafValueError


@dataclass(frozen=True)
class Matcher:
    """One selector.

    Attributes:
        kind: ``class``, ``name``, ``suffix``, ``glob``, ``where`` or ``module``.
        value: what the caller gave.
        text: the selector in words.
        matches: whether a name and a module are chosen.
    """

    kind: str
    value: object
    text: str
    matches: Callable[[str, nn.Module], Any]


def matchers_of(
    classes: object, names: object, suffixes: object, globs: object, where: object, modules: object
) -> list[Matcher]:
    """The matchers of `select_modules`' arguments, duplicates dropped.

    Raises:
        LeafTypeError: an argument has the wrong type.
        LeafValueError: a selector is empty or would match everything.
    """
    matchers = [_by_class(entry) for entry in _listed(classes, (type, str), "classes", "classes or their names")]
    for argument, given, make in (
        ("names", names, _by_name),
        ("suffixes", suffixes, _by_suffix),
        ("globs", globs, _by_glob),
    ):
        matchers += [make(text) for text in _listed(given, (str,), argument, "strings")]
    if where is not None:
        if not callable(where):
            raise LeafTypeError(f"where is a {type(where).__name__}: pass a function of a name and a module")
        text = f"where {getattr(where, '__qualname__', type(where).__name__)}"
        matchers.append(Matcher("where", where, text, where))
    matchers += [_by_identity(module) for module in _listed(modules, (nn.Module,), "modules", "modules of the model")]
    if not matchers:
        raise LeafValueError("no selector is given: pass classes, names, suffixes, globs, where or modules")
    return list({(matcher.kind, _identity(matcher.value)): matcher for matcher in matchers}.values())


def split_classes(entries: object) -> tuple[list[object], list[nn.Module]]:
    """Classes and their names on one side, modules on the other: `deepspeed.utils` has one list for them."""
    mixed = _listed(entries, (type, str, nn.Module), "leaf_module_classes", "classes, their names, or modules")
    return [entry for entry in mixed if not isinstance(entry, nn.Module)], [
        entry for entry in mixed if isinstance(entry, nn.Module)
    ]


def class_names(module: nn.Module) -> set[str]:
    """The names of a module's class and of those it derives from, short and full, without `nn.Module` itself."""
    kind: Any = type(module)
    return _names_of_class(kind)


@lru_cache(maxsize=1024)
def _names_of_class(kind: Any) -> set[str]:
    own = [base for base in kind.__mro__ if base not in (nn.Module, object)]
    return {
        name for base in own for name in (base.__name__, base.__qualname__, f"{base.__module__}.{base.__qualname__}")
    }


def _listed(given: object, kinds: tuple[type, ...], argument: str, wanted: str) -> list[Any]:
    """A single entry or several as a list, checked."""
    # A ModuleList is a module, and a string an iterable: either is one entry.
    entries = [given] if isinstance(given, kinds) else given
    if isinstance(entries, str) or not isinstance(entries, Iterable):
        raise LeafTypeError(f"{argument} is a {type(given).__name__}: pass {wanted}")
    listed = list(entries)
    for entry in listed:
        if not isinstance(entry, kinds):
            raise LeafTypeError(f"{argument} holds a {type(entry).__name__}: pass {wanted}")
    return listed


def _identity(value: object) -> object:
    return value if isinstance(value, str) else id(value)


def _by_class(entry: type | str) -> Matcher:
    if isinstance(entry, type):
        if not issubclass(entry, nn.Module):
            raise LeafTypeError(f"classes holds {entry.__qualname__}, which is no torch.nn.Module: pass module classes")
        if entry is nn.Module:
            raise LeafValueError("classes holds torch.nn.Module, which every module is: name a class of its own")
        kind = entry
        return Matcher("class", entry, f"class {entry.__qualname__!r}", lambda name, module: isinstance(module, kind))
    text = _not_empty(entry, "classes")
    if text in ("Module", "torch.nn.Module", "torch.nn.modules.module.Module", "object"):
        raise LeafValueError(f"classes holds {text!r}, which every module is: name a class of its own")
    return Matcher("class", entry, f"class {text!r}", lambda name, module: text in class_names(module))


def _by_name(entry: str) -> Matcher:
    text = _not_empty(entry, "names")
    return Matcher("name", entry, f"name {text!r}", lambda name, module: name == text)


def _by_suffix(entry: str) -> Matcher:
    text = _not_empty(entry.lstrip("."), "suffixes", entry)
    return Matcher("suffix", entry, f"suffix {text!r}", lambda name, module: f".{name}".endswith(f".{text}"))


def _by_glob(entry: str) -> Matcher:
    parts = tuple(_not_empty(entry, "globs").split("."))
    if set(parts) == {"**"}:
        raise LeafValueError(f"globs holds {entry!r}, which every name matches: add a part such as **.mlp")
    return Matcher(
        "glob", entry, f"glob {entry!r}", lambda name, module: name != "" and _match(tuple(name.split(".")), parts)
    )


def _match(name: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    if not pattern:
        return not name
    if pattern[0] == "**":
        return any(_match(name[skip:], pattern[1:]) for skip in range(len(name) + 1))
    return bool(name) and fnmatchcase(name[0], pattern[0]) and _match(name[1:], pattern[1:])


def _by_identity(entry: nn.Module) -> Matcher:
    return Matcher("module", entry, f"module of class {type(entry).__name__!r}", lambda name, module: module is entry)


def _not_empty(text: str, argument: str, given: str | None = None) -> str:
    if not text.strip():
        shown = text if given is None else given
        raise LeafValueError(
            f"{argument} holds {shown!r}, which names nothing: name a module (the whole model: set_z3_leaf_module)"
        )
    return text
