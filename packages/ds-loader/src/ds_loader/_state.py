"""The state of a ``RepeatingLoader``: which epoch, how many of its batches are out, and how its order came about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ds_loader.errors import LoaderStateError

_VERSION = 1
_KEYS = ("version", "epoch", "batch", "generators", "loader")


@dataclass(frozen=True)
class Position:
    """A place in an endless stream of batches.

    Attributes:
        epoch: from 0.
        batch: how many batches of this epoch have been handed out.
        generators: their states when the epoch began: 1-D, uint8, one for each generator.
        loader: what the source's own ``state_dict`` gave, or None.
    """

    epoch: int = 0
    batch: int = 0
    generators: tuple[torch.Tensor, ...] = field(default=(), compare=False)
    loader: Any = field(default=None, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """As a dict of numbers, tensors and what the source gave; ``torch.save`` takes it."""
        return {
            "version": _VERSION,
            "epoch": self.epoch,
            "batch": self.batch,
            "generators": [state.clone() for state in self.generators],
            "loader": self.loader,
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any], *, generators: int, stateful: bool) -> Position:
        """Check every key and value.

        Args:
            state: what ``to_dict`` gave.
            generators: how many generators the loader at hand has.
            stateful: whether it keeps a state of its own.

        Raises:
            LoaderStateError: something does not fit.
        """
        if not isinstance(state, Mapping):
            raise LoaderStateError(f"state_dict must be a dict, not {type(state).__name__}")
        missing, unknown = [key for key in _KEYS if key not in state], [key for key in state if key not in _KEYS]
        if missing or unknown:
            raise LoaderStateError(f"state_dict has missing keys {missing} and unknown keys {unknown}")
        if state["version"] != _VERSION:
            raise LoaderStateError(f"state_dict has version {state['version']!r}, but this release reads {_VERSION}")
        if (state["loader"] is not None) != stateful:
            kind = "has" if stateful else "has no"
            raise LoaderStateError(
                f"state_dict was saved with another kind of loader: this {kind} state_dict of its own, that differed"
            )
        return cls(
            epoch=_count(state, "epoch"),
            batch=_count(state, "batch"),
            generators=_generators(state["generators"], generators),
            loader=state["loader"],
        )


def _count(state: Mapping[str, Any], key: str) -> int:
    value = state[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise LoaderStateError(f"state_dict[{key!r}] must be an integer of at least 0, not {value!r}")
    return value


def _generators(states: Any, count: int) -> tuple[torch.Tensor, ...]:
    if not isinstance(states, (list, tuple)) or len(states) != count:
        size = len(states) if isinstance(states, (list, tuple)) else type(states).__name__
        raise LoaderStateError(
            f"state_dict['generators'] must be a list of {count} tensor(s), one for each generator of the loader and "
            f"its samplers, not {size}"
        )
    for index, state in enumerate(states):
        try:
            torch.Generator().set_state(state)
        except (TypeError, RuntimeError) as error:
            raise LoaderStateError(f"state_dict['generators'][{index}] is no state of a generator: {error}") from None
    return tuple(state.clone() for state in states)
