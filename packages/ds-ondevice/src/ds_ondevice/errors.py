"""Errors that ds_ondevice raises."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_FIRST = 20  # so many names, or lines, are printed


def listed(names: Sequence[str]) -> str:
    """The first of some names, and how many there are besides."""
    return ", ".join(names[:_FIRST]) + (f", and {len(names) - _FIRST} more" if len(names) > _FIRST else "")


class MaterializeError(RuntimeError):
    """``materialize`` could not do its work; the module is unchanged."""


class UnrestorableError(MaterializeError):
    """Some tensors on meta have no value that could be computed again.

    Attributes:
        reasons: why, by the tensor's dotted name in the module.
    """

    def __init__(self, reasons: Mapping[str, str], advice: str = "") -> None:
        self.reasons = dict(reasons)
        self._advice = advice
        lines = "".join(f"  {name}: {reason}\n" for name, reason in list(self.reasons.items())[:_FIRST])
        others = Counter(list(self.reasons.values())[_FIRST:])
        lines += "".join(f"  and {count} more: {reason}\n" for reason, count in others.most_common(_FIRST))
        super().__init__(
            f"materialize cannot restore {len(self.reasons)} tensor(s) of the module; nothing was changed:\n"
            f"{lines}{advice}"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reasons, self._advice)  # a launcher may send it to another process


class RecordingMismatchError(MaterializeError):
    """The ranks that share a sharded module did not record the same model, or have other seeds.

    Attributes:
        first: the rank that the others are compared with.
        others: for every other rank that differs, in what: "tensors", "recording" or "seed".
    """

    def __init__(self, first: int, others: Mapping[int, Sequence[str]]) -> None:
        self.first = first
        self.others = {rank: tuple(what) for rank, what in others.items()}
        lines = "".join(f"  rank {rank}: {', '.join(what)}\n" for rank, what in list(self.others.items())[:_FIRST])
        super().__init__(
            f"{len(self.others)} rank(s) differ from rank {first}, so that their shards would be of different models; "
            f"nothing was changed:\n{lines}"
            "Build the model from the same configuration, and call torch.manual_seed with the same number, everywhere."
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.first, self.others)


class LoadError(MaterializeError):
    """The files do not fit the module; nothing was read or changed.

    Attributes:
        missing: names that the module has and no file.
        unexpected: names that a file has and not the module.
        mismatched: what differs, shape or dtype, by name.
        unsupported: why a tensor of the module cannot be loaded, by name.
    """

    def __init__(
        self,
        missing: Iterable[str] = (),
        unexpected: Iterable[str] = (),
        mismatched: Mapping[str, str] | None = None,
        unsupported: Mapping[str, str] | None = None,
    ) -> None:
        self.missing = tuple(missing)
        self.unexpected = tuple(unexpected)
        self.mismatched = dict(mismatched or {})
        self.unsupported = dict(unsupported or {})
        lines = [
            f"  {len(some)} {what}: {listed(some)}"
            for what, some in (("missing in the files", self.missing), ("unexpected in the files", self.unexpected))
            if some
        ]
        for what, reasons in (("do not match", self.mismatched), ("cannot be loaded", self.unsupported)):
            if reasons:
                lines.append(f"  {len(reasons)} {what}:")
                lines += [f"    {name}: {reason}" for name, reason in list(reasons.items())[:_FIRST]]
                lines += [f"    and {len(reasons) - _FIRST} more"] if len(reasons) > _FIRST else []
        super().__init__("\n".join(["the files do not fit the module; nothing was read or changed:", *lines]))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.missing, self.unexpected, self.mismatched, self.unsupported)


class ReplayError(MaterializeError):
    """An operation recorded on meta failed when it was run on the real device."""


class MetaValueError(RuntimeError):
    """Code inside ``OnDevice(device="meta")`` asked for a value that is not known before ``materialize``."""
