"""Say which selectors matched nothing, and what comes near to them."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from torch import nn

from ds_z3leaf._matchers import Matcher, class_names

_SHOWN = 3  # near misses for a selector
_LISTED = 8  # selectors in a message


def explain_missing(model: nn.Module, missing: list[Matcher], total: int) -> str:
    """One line, however large the model is."""
    parts = [matcher.text + _near(model, matcher) for matcher in missing[:_LISTED]]
    if len(missing) > _LISTED:
        parts.append(f"and {len(missing) - _LISTED} more")
    verb = "matches" if len(missing) == 1 else "match"
    return f"{len(missing)} of {total} selectors {verb} nothing in {type(model).__name__}: {', '.join(parts)}"


def _near(model: nn.Module, matcher: Matcher) -> str:
    wanted = str(matcher.value)
    candidates: Iterable[str]
    if matcher.kind == "class":
        names = {name for module in model.modules() for name in class_names(module)}
        full = isinstance(matcher.value, str) and "." in wanted
        wanted = wanted if isinstance(matcher.value, str) else getattr(matcher.value, "__name__", wanted)
        candidates = {name for name in names if ("." in name) == full}
    elif matcher.kind == "name":
        candidates = {name for name, _ in model.named_modules() if name}
    elif matcher.kind == "suffix":
        length = wanted.strip(".").count(".") + 1
        candidates = {".".join(name.split(".")[-length:]) for name, _ in model.named_modules() if name}
    else:
        return ""
    lowered: dict[str, str] = {}
    for candidate in sorted(candidates):
        lowered.setdefault(candidate.lower(), candidate)
    near = [lowered[text] for text in get_close_matches(wanted.lower(), lowered, n=_SHOWN)]
    return f" (near: {', '.join(repr(text) for text in near)})" if near else ""
