"""Errors that ds_ondevice raises."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


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
        lines = "".join(f"  {name}: {reason}\n" for name, reason in self.reasons.items())
        super().__init__(
            f"materialize cannot restore {len(self.reasons)} tensor(s) of the module; nothing was changed:\n"
            f"{lines}{advice}"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reasons, self._advice)  # a launcher may send it to another process


class ReplayError(MaterializeError):
    """An operation recorded on meta failed when it was run on the real device."""


class MetaValueError(RuntimeError):
    """Code inside ``OnDevice(device="meta")`` asked for a value that is not known before ``materialize``."""
