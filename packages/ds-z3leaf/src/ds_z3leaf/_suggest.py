r"""Say which selectors matched nothing, and what comes near to them.

[Note: patterns] A large model has few kinds of names: ``layers.7.mlp.experts.3`` differs from its neighbours by numbers
only. Names are compared by their *pattern*, ``layers.#.mlp.experts.#``, of which there are some dozens; the numbers
that the caller wrote are put back afterwards where the model has such a name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from torch import nn

from ds_z3leaf._matchers import Matcher, glob_pattern, names_of_class
from ds_z3leaf._walk import Entry, is_wrapped

_SHOWN = 3  # near misses for a selector
_LISTED = 8  # selectors in a message
_PATTERNS = 2000  # patterns that a selector is compared with
_NUMBER = re.compile(r"\d+")


def explain_missing(model: nn.Module, entries: list[Entry], missing: list[Matcher], total: int) -> str:
    """One line, however large the model is."""
    names = NameIndex([name if is_wrapped(name) else short for name, short, _ in entries if name])
    parts = [matcher.text + quoted(_near(entries, names, matcher)) for matcher in missing[:_LISTED]]
    if len(missing) > _LISTED:
        parts.append(f"and {len(missing) - _LISTED} more")
    verb = "matches" if len(missing) == 1 else "match"
    return f"{len(missing)} of {total} selectors {verb} nothing in {type(model).__name__}: {', '.join(parts)}"


def quoted(near: Iterable[str]) -> str:
    """The tail of a message: the near misses in brackets, or nothing."""
    shown = ", ".join(repr(text) for text in near)
    return f" (near: {shown})" if shown else ""


@dataclass
class NameIndex:
    """Names, and their ends of a given number of parts, by pattern; made when first asked for."""

    names: list[str]
    _ends: dict[int, dict[str, dict[str, None]]] = field(default_factory=dict)

    def by_pattern(self, parts: int) -> dict[str, dict[str, None]]:
        """The ends of `parts` parts, by pattern; whole names for 0."""
        if parts not in self._ends:
            found: dict[str, dict[str, None]] = {}
            patterns: dict[str, str] = {}  # by part: a few hundred, though there are many names
            for name in self.names:
                pieces = name.split(".")
                if parts and len(pieces) < parts:
                    continue
                pieces = pieces[-parts:] if parts else pieces
                for piece in pieces:
                    if piece not in patterns:
                        patterns[piece] = _NUMBER.sub("#", piece)
                pattern = ".".join([patterns[piece] for piece in pieces])
                found.setdefault(pattern, {})[".".join(pieces) if parts else name] = None
            self._ends[parts] = found
        return self._ends[parts]

    def near(self, wanted: str, parts: int = 0) -> list[str]:
        """Names, or ends of names, that come near to one."""
        known = self.by_pattern(parts)
        numbers = _NUMBER.findall(wanted)
        return [_put_back(numbers, pattern, known[pattern]) for pattern in _close(_NUMBER.sub("#", wanted), known)]


def _put_back(numbers: list[str], pattern: str, names: dict[str, None]) -> str:
    """The name of a pattern that has these numbers, as far as there is one; else the last or the first of them."""
    filled = pattern
    for number in numbers:
        filled = filled.replace("#", number, 1)
    if filled in names:
        return filled
    # With too few numbers, or one that is too large: the first name that agrees with most of the numbers.
    head = filled.partition("#")[0]
    fitting = next((name for name in names if name.startswith(head)), None) if "#" in filled else None
    return fitting or (next(reversed(names)) if numbers and "#" not in filled else next(iter(names)))


def _close(wanted: str, candidates: Iterable[str]) -> list[str]:
    """The nearest candidates, whatever their case."""
    lowered: dict[str, str] = {}
    for candidate in sorted(candidates):
        lowered.setdefault(candidate.lower(), candidate)
    texts = list(lowered)
    if len(texts) > _PATTERNS:
        texts = sorted(texts, key=lambda text: abs(len(text) - len(wanted)))[:_PATTERNS]
    return [lowered[text] for text in get_close_matches(wanted.lower(), texts, n=_SHOWN)]


def _near(entries: list[Entry], names: NameIndex, matcher: Matcher) -> list[str]:
    text = str(getattr(matcher.value, "pattern", matcher.value))
    if matcher.kind == "class":
        kinds: set[Any] = {type(module) for _, _, module in entries}
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
    """Globs that match something: the last parts without ``**`` are replaced by a near end of a name."""
    head, star, tail = glob.rpartition("**.")
    if tail in ("", "**"):
        return []
    wanted = re.sub(r"\[[^]]*\]|[*?]+|\d+", "#", tail)
    known = names.by_pattern(tail.count(".") + 1 if star else 0)
    found = []
    for pattern in _close(wanted, known):
        parts, given = pattern.split("."), tail.split(".")
        # Keep what the caller wrote where it has the same pattern; a number elsewhere becomes a star.
        kept = [
            given[at] if len(given) == len(parts) and re.sub(r"\[[^]]*\]|[*?]+|\d+", "#", given[at]) == part else part
            for at, part in enumerate(parts)
        ]
        near = head + star + ".".join(kept).replace("#", "*")
        matches = glob_pattern(near).fullmatch
        if any(matches(f"{name}.") for name in names.names):
            found.append(near)
    return found


def _near_regexes(names: NameIndex, text: str, pattern: re.Pattern[str]) -> list[str]:
    """Names in which the expression is found but that it does not match from end to end; else names like its text."""
    partly = [name for ends in names.by_pattern(0).values() if pattern.search(name := next(iter(ends)))]
    if partly:
        return [f".*{text}"] if any(re.fullmatch(f".*(?:{text})", name) for name in partly) else partly[:_SHOWN]
    plain = re.sub(r"\\d[+*]?|\[0-9\][+*]?|\\w[+*]?|\[\^\.\][+*]?|\d+", "#", text.lstrip("^").rstrip("$"))
    _, star, tail = plain.rpartition(".*")
    tail = (tail if star else plain).replace("\\.", ".").lstrip(".")
    known = names.by_pattern(tail.count(".") + 1 if star else 0)
    return [next(iter(known[near])) for near in _close(tail, known)]
