r"""Say which selectors matched nothing, and what comes near to them.

[Note: patterns] A large model has few kinds of names: ``layers.7.mlp.experts.3`` differs from its neighbours by numbers
only. Names are compared by their *pattern*, ``layers.#.mlp.experts.#``, of which there are some dozens; the numbers
that the caller wrote are put back afterwards where the model has such a name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from ds_z3leaf._matchers import Matcher, glob_pattern, names_of_class
from ds_z3leaf._walk import Tree, is_wrapped, short_name

_SHOWN = 3  # near misses for a selector
_LISTED = 8  # selectors in a message
_PATTERNS = 2000  # patterns that a selector is compared with
_NUMBER = re.compile(r"[0-9]+")
_TO_HASH = {ord(digit): "#" for digit in "0123456789"}
_WILD_REGEX = re.compile(r"\\d[+*]?|\[0-9\][+*]?|\\w[+*]?|\[\^\.\][+*]?|[0-9]+")  # what stands for a number


def explain_missing(tree: Tree, missing: list[Matcher], total: int) -> str:
    """One line, however large the model is."""
    names = NameIndex(
        [name if is_wrapped(name) else short_name(name) for name in tree.names] if tree.wrapped else tree.names
    )
    parts = [matcher.text + quoted(_near(tree, names, matcher)) for matcher in missing[:_LISTED]]
    if len(missing) > _LISTED:
        parts.append(f"and {len(missing) - _LISTED} more")
    verb = "matches" if len(missing) == 1 else "match"
    return f"{len(missing)} of {total} selectors {verb} nothing in {type(tree.modules[0]).__name__}: {', '.join(parts)}"


def quoted(near: Iterable[str]) -> str:
    """The tail of a message: the near misses in brackets, or nothing."""
    shown = ", ".join(repr(text) for text in near)
    return f" (near: {shown})" if shown else ""


class NameIndex:
    """Names by pattern, made once for all the selectors of a message.

    Attributes:
        first: the first name of each pattern.
        last: the last name of each pattern.
    """

    def __init__(self, names: Iterable[str]) -> None:
        listed = [name for name in names if name]
        self._text = "\n".join(["", *listed, ""])
        patterns = _patterns(self._text).split("\n")[1:-1]
        self.last = dict(zip(patterns, listed, strict=True))
        self.first = dict(zip(reversed(patterns), reversed(listed), strict=True))

    def ends(self, parts: int) -> dict[str, str]:
        """The patterns of the ends of `parts` parts, each with a whole pattern that ends so; whole patterns for 0."""
        return {_end(pattern, parts): pattern for pattern in self.first if not parts or pattern.count(".") + 1 >= parts}

    def near(self, wanted: str, parts: int = 0) -> list[str]:
        """Names, or ends of names of `parts` parts, that come near to one."""
        known, numbers = self.ends(parts), _NUMBER.findall(wanted)
        return [self._put_back(numbers, near, known[near], parts) for near in _close(_patterns(wanted), known)]

    def _put_back(self, numbers: list[str], near: str, pattern: str, parts: int) -> str:
        """The name of a pattern that has these numbers, if there is one; else its last name, or its first."""
        filled = near
        for number in numbers:
            filled = filled.replace("#", number, 1)
        whole = f"\n{filled}\n" in self._text or (parts > 0 and f".{filled}\n" in self._text)
        if "#" not in filled and whole:
            return filled
        # A name of the first module with the first number, if the others are too large.
        head = filled.partition("#")[0]
        start = self._text.find(f"\n{head}") if "#" in filled and not parts else -1
        if start >= 0:
            found = self._text[start + 1 : self._text.index("\n", start + 1)]
            if _patterns(found) == near:
                return found
        named = self.last if numbers and "#" not in filled else self.first
        return _end(named[pattern], parts)


def _patterns(text: str) -> str:
    """Text with every number replaced by one ``#``."""
    text = text.translate(_TO_HASH)
    while "##" in text:
        text = text.replace("##", "#")
    return text


def _end(name: str, parts: int) -> str:
    return ".".join(name.split(".")[-parts:]) if parts else name


def _close(wanted: str, candidates: Iterable[str]) -> list[str]:
    """The nearest candidates, whatever their case."""
    lowered: dict[str, str] = {}
    for candidate in sorted(candidates):
        lowered.setdefault(candidate.lower(), candidate)
    texts = list(lowered)
    if len(texts) > _PATTERNS:
        texts = sorted(texts, key=lambda text: abs(len(text) - len(wanted)))[:_PATTERNS]
    return [lowered[text] for text in get_close_matches(wanted.lower(), texts, n=_SHOWN)]


def _near(tree: Tree, names: NameIndex, matcher: Matcher) -> list[str]:
    text = str(getattr(matcher.value, "pattern", matcher.value))
    if matcher.kind == "class":
        kinds: set[Any] = set(map(type, tree.modules))
        known = {name for kind in kinds for name in names_of_class(kind)}
        full = isinstance(matcher.value, str) and "." in text
        wanted = text if isinstance(matcher.value, str) else getattr(matcher.value, "__name__", text)
        return _close(wanted, (name for name in known if ("." in name) == full))
    if matcher.kind == "name":
        return names.near(text)
    if matcher.kind == "suffix":
        return names.near(text.strip("."), text.strip(".").count(".") + 1)
    if matcher.kind == "glob":
        return _near_globs(names, text)
    if matcher.kind == "regex":
        return _near_regexes(names, text, re.compile(matcher.value))  # type: ignore[call-overload]
    return []


def _near_globs(names: NameIndex, glob: str) -> list[str]:
    """Globs that match something: the parts behind the last ``**`` are replaced by the near end of a name."""
    head, star, tail = glob.rpartition("**.")
    if tail in ("", "**"):
        return []
    given = tail.split(".")
    found = []
    for near in _close(_wild(tail), names.ends(len(given) if star else 0)):
        parts = near.split(".")
        # What the caller wrote stays where it has the same pattern; elsewhere a number becomes a star.
        same = len(parts) == len(given)
        kept = [given[at] if same and _wild(given[at]) == part else part for at, part in enumerate(parts)]
        text = head + star + ".".join(kept).replace("#", "*")
        matches = glob_pattern(re.sub(r"\[[^]]*\]|\d+", "*", text)).fullmatch
        if any(matches(f"{name}.") for name in names.first.values()):
            found.append(text)
    return found


def _wild(glob: str) -> str:
    """The pattern of names that a glob without ``**`` matches."""
    return re.sub(r"\[[^]]*\]|[*?]+|\d+", "#", glob)


def _near_regexes(names: NameIndex, text: str, pattern: re.Pattern[str]) -> list[str]:
    """A longer expression, if this one is found inside names; else names that look like its text."""
    partly = [name for name in names.first.values() if pattern.search(name)]
    if partly:
        return [f".*{text}"] if _matches_any(f".*{text}", partly) else partly[:_SHOWN]
    plain = _WILD_REGEX.sub("#", text.lstrip("^").rstrip("$"))
    _, star, tail = plain.rpartition(".*")
    tail = (tail if star else plain).replace("\\.", ".").lstrip(".")
    known = names.ends(tail.count(".") + 1 if star else 0)
    return [names.first[known[near]] for near in _close(tail, known)]


def _matches_any(text: str, names: list[str]) -> bool:
    try:
        return any(re.fullmatch(text, name) for name in names)
    except re.error:
        return False
