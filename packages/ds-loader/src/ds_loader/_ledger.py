"""The ledger: where a stream of batches is, over all ranks, as a small dict that JSON can hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ds_loader.errors import LoaderStateError

VERSION = 2


@dataclass(frozen=True)
class Ledger:
    """What a state holds.

    Attributes:
        seed: of the orders that are not the loader's own.
        seeded: whether it was given, so that it seeds the user's generators, too.
        epoch: from 0.
        batch: batches of this epoch handed out on this rank, since the last change of ranks or batch size in it.
        step: batches handed out on this rank since the beginning.
        samples: samples of this epoch handed out on all ranks; None where the loader does not know its order.
        world_size: among how many ranks an epoch is divided.
        batch_size: samples of one rank in one batch; None where it is not known.
        length: samples in an epoch, or batches where the loader does not know its order; None where neither is known.
        workers: worker processes that a stream is divided among; None where they do not matter to the order.
        left_out: batches of this epoch that were left out after an error.
        segments: (world size, batch size, samples handed out before) of each piece of this epoch that one number of
            ranks went through. There is one, from 0, unless a state was loaded on another number.
        first: (rank, checksum) of the indices of that rank's first batch in this epoch; None where there are no indices
            or nothing was handed out.
        generators: states of the user's generators when the epoch began; None where the epoch has yet to begin.
        loader: the loader's own state, or None.
    """

    seed: int = 0
    seeded: bool = False
    epoch: int = 0
    batch: int = 0
    step: int = 0
    samples: int | None = None
    world_size: int = 1
    batch_size: int | None = None
    length: int | None = None
    workers: int | None = None
    left_out: int = 0
    segments: tuple[tuple[int, int | None, int], ...] = ()
    first: tuple[int, int] | None = None
    generators: tuple[Any, ...] | None = field(default=None, compare=False)
    loader: Any = field(default=None, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """As a dict of numbers, strings and lists, and of what the loader itself gave."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        for name in ("segments", "first", "generators"):
            values[name] = _lists(values[name])
        return {"version": VERSION, **values}

    @classmethod
    def from_dict(cls, state: Any) -> Ledger:
        """Check every key and type.

        Raises:
            LoaderStateError: one is wrong.
        """
        if not isinstance(state, Mapping):
            raise LoaderStateError(f"state_dict must be a dict, not {type(state).__name__}")
        if state.get("version", VERSION) != VERSION:
            raise LoaderStateError(f"state_dict has version {state['version']!r}, but this release reads {VERSION}")
        names = ["version", *(entry.name for entry in fields(cls))]
        missing, unknown = [name for name in names if name not in state], [key for key in state if key not in names]
        if missing or unknown:
            raise LoaderStateError(f"state_dict has missing keys {missing} and unknown keys {unknown}")
        for name in ("seed", "epoch", "batch", "step", "left_out"):
            _count(name, state[name])
        _count("world_size", state["world_size"], least=1)
        if not isinstance(state["seeded"], bool):
            raise LoaderStateError(f"state_dict['seeded'] must be True or False, not {state['seeded']!r}")
        for name, least in (("samples", 0), ("batch_size", 1), ("length", 0), ("workers", 0)):
            if state[name] is not None:
                _count(name, state[name], least=least)
        segments, first, generators = state["segments"], state["first"], state["generators"]
        if not isinstance(segments, (list, tuple)) or not all(_is_segment(item) for item in segments):
            raise LoaderStateError(
                f"state_dict['segments'] must be a list of [ranks, batch size, samples], not {segments!r}"
            )
        starts = [item[2] for item in segments]
        goes_on = starts == sorted(starts) and starts[:1] == [0] and starts[-1] <= (state["samples"] or 0)
        if segments and not (goes_on and list(segments[-1][:2]) == [state["world_size"], state["batch_size"]]):
            raise LoaderStateError(f"state_dict['segments'], {segments!r}, contradicts the rest of the state: {state}")
        if first is not None and not (isinstance(first, (list, tuple)) and len(first) == 2):
            raise LoaderStateError(f"state_dict['first'] must be [rank, checksum] or None, not {first!r}")
        if not isinstance(generators, (list, tuple)):
            raise LoaderStateError(
                f"state_dict['generators'] must be a list of states, not {type(generators).__name__}"
            )
        values = {name: state[name] for name in names[1:]}
        values["segments"] = tuple(tuple(item) for item in segments)
        values["first"] = None if first is None else tuple(first)
        values["generators"] = tuple(generators)
        return cls(**values)

    def differences(self, here: Ledger) -> dict[str, str]:
        """What of the shape of this ledger is not as it is ``here``: ``world_size: 4 in the state, 2 here``."""
        told = {}
        for name in ("world_size", "batch_size", "length", "workers"):
            old, new = getattr(self, name), getattr(here, name)
            if old != new:
                told[name] = f"{name}: {old} in the state, {new} here"
        return told


def _lists(value: Any) -> Any:
    return [_lists(item) for item in value] if isinstance(value, tuple) else value


def _count(name: str, value: Any, *, least: int = 0) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise LoaderStateError(f"state_dict[{name!r}] must be an integer of at least {least}, not {value!r}")


def _is_segment(item: Any) -> bool:
    return (
        isinstance(item, (list, tuple))
        and len(item) == 3
        and all(isinstance(number, int) or (number is None and place == 1) for place, number in enumerate(item))
    )
