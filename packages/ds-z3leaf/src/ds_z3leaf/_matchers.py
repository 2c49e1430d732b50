"""One matcher for each selector that a caller gives; all of them are checked before any is used."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import nn

from ds_z3leaf.errors import LeafTypeError, LeafValueError


@dataclass(frozen=True)
class Matcher:
    """One selector.

    Attributes:
        kind: ``class``, ``name``, ``suffix``, ``glob``, ``regex``, ``where`` or ``module``.
        value: what the caller gave.
        text: the selector in words.
        matches: whether a name and a module are chosen. A ``class`` matcher reads the module's type only, a ``name``,
            ``suffix``, ``glob`` or ``regex`` matcher the name only.
    """

    kind: str
    value: object
    text: str
    matches: Callable[[str, nn.Module], Any]


def matchers_of(
    classes: object = (),
    names: object = (),
    suffixes: object = (),
    globs: object = (),
    regexes: object = (),
    where: object = None,
    modules: object = (),
) -> list[Matcher]:
    """The matchers of `select_modules`' arguments, duplicates dropped.

    Raises:
        LeafTypeError: an argument has the wrong type.
        LeafValueError: a selector is empty, would match everything or is no pattern.
    """
    matchers = [_by_class(entry) for entry in _listed(classes, (type, str), "classes", "classes or their names")]
    for argument, given, make in (
        ("names", names, _by_name),
        ("suffixes", suffixes, _by_suffix),
        ("globs", globs, _by_glob),
    ):
        matchers += [make(text) for text in _listed(given, (str,), argument, "strings")]
    wanted = "strings or compiled patterns"
    matchers += [_by_regex(entry) for entry in _listed(regexes, (str, re.Pattern), "regexes", wanted)]
    if where is not None:
        if not callable(where):
            raise LeafTypeError(f"where is a {type(where).__name__}: pass a function of a name and a module")
        text = f"where {getattr(where, '__qualname__', type(where).__name__)}"
        matchers.append(Matcher("where", where, text, where))
    matchers += [_by_identity(module) for module in _listed(modules, (nn.Module,), "modules", "modules of the model")]
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
    return names_of_class(kind)


@lru_cache(maxsize=1024)
def names_of_class(kind: Any) -> set[str]:
    """`class_names` of the instances of a class."""
    own = [base for base in kind.__mro__ if base not in (nn.Module, object)]
    return {
        name for base in own for name in (base.__name__, base.__qualname__, f"{base.__module__}.{base.__qualname__}")
    }


def _listed(given: object, kinds: tuple[type, ...], argument: str, wanted: str) -> list[Any]:
    """A single entry or several as a list, checked."""
    # A ModuleList is a module, and a string an iterable: either is one entry.
    entries = [given] if isinstance(given, kinds) else given
    if isinstance(entries, (str, bytes)) or not isinstance(entries, Iterable):
        raise LeafTypeError(f"{argument} is a {type(given).__name__}: pass {wanted}")
    listed = list(entries)
    for entry in listed:
        if not isinstance(entry, kinds):
            raise LeafTypeError(f"{argument} holds a {type(entry).__name__}: pass {wanted}")
    return listed


def _identity(value: object) -> object:
    return value if isinstance(value, (str, re.Pattern)) else id(value)


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
    pattern = glob_pattern(_not_empty(entry, "globs"))
    if set(entry.split(".")) == {"**"}:
        raise LeafValueError(f"globs holds {entry!r}, which every name matches: add a part such as **.mlp")
    return Matcher("glob", entry, f"glob {entry!r}", lambda name, module: name != "" and pattern.fullmatch(f"{name}."))


def glob_pattern(glob: str) -> re.Pattern[str]:
    """The regular expression of a glob. It matches a name with a dot at its end, so that every part ends in one."""
    return re.compile("".join(r"(?:[^.]+\.)*" if part == "**" else _part_pattern(part) for part in glob.split(".")))


def _part_pattern(part: str) -> str:
    """One dotted part: ``*`` and ``?`` stand for any characters but dots, ``[ab]`` and ``[!ab]`` for one of a set."""
    pattern, at = "", 0
    while at < len(part):
        char = part[at]
        closing = part.find("]", at + 2) if char == "[" else -1
        if closing > 0:
            body = part[at + 1 : closing].replace("\\", r"\\").replace("[", r"\[")
            body = f"^{body[1:]}" if body.startswith("!") else body.replace("^", r"\^")
            pattern += rf"(?!\.)[{body}]"
            at = closing
        else:
            pattern += {"*": "[^.]*", "?": "[^.]"}.get(char) or re.escape(char)
        at += 1
    return pattern + r"\."


def _by_regex(entry: str | re.Pattern[Any]) -> Matcher:
    try:
        pattern = re.compile(entry)
    except re.error as error:
        raise LeafValueError(f"regexes holds {entry!r}, which is no regular expression: {error}") from None
    if not isinstance(pattern.pattern, str):
        raise LeafTypeError(f"regexes holds a pattern of bytes, {pattern.pattern!r}: names are strings")
    _not_empty(pattern.pattern, "regexes")
    if pattern.fullmatch(""):
        raise LeafValueError(f"regexes holds {pattern.pattern!r}, which matches the empty name: name a part, as .*mlp")
    return Matcher("regex", entry, f"regex {pattern.pattern!r}", lambda name, module: pattern.fullmatch(name))


def _by_identity(entry: nn.Module) -> Matcher:
    return Matcher("module", entry, f"module of class {type(entry).__name__!r}", lambda name, module: module is entry)


def _not_empty(text: str, argument: str, given: str | None = None) -> str:
    if not text.strip():
        shown = text if given is None else given
        raise LeafValueError(
            f"{argument} holds {shown!r}, which names nothing: name a module (the whole model: set_z3_leaf_module)"
        )
    return text
