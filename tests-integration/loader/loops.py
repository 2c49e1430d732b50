"""Loops by hand over a library's own loader, and the check that `RepeatingLoader` gives the same batches.

[Note: the oracle] The batches to expect come from an ordinary loop over a fresh loader of the library, told the epoch
as that library documents. `RepeatingLoader` takes no part in it.
"""

from __future__ import annotations

import itertools
import pickle
import random
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from ds_loader import LoaderWarning, RepeatingLoader

EPOCHS = 3
Make = Callable[[], Any]


def plain(value: Any) -> Any:
    """A batch as lists, numbers and dicts, which ``==`` compares."""
    if hasattr(value, "to_pydict"):  # a table of pyarrow
        return value.to_pydict()
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def seeded(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tell(loader: Any, epoch: int) -> None:
    """Set the epoch as the documentation of torch and of datasets has it: on the sampler, on the dataset."""
    for part in (loader, getattr(loader, "sampler", None), getattr(loader, "dataset", None)):
        if callable(getattr(part, "set_epoch", None)):
            part.set_epoch(epoch)


def by_hand(make: Make, epochs: int = EPOCHS, tell: Callable[[Any, int], None] = tell) -> list[list[Any]]:
    """The batches of each epoch of one loader."""
    loader = make()
    found = []
    for epoch in range(epochs):
        tell(loader, epoch)
        found.append([plain(batch) for batch in loader])
    return found


def take(loader: Iterable[Any], count: int) -> list[Any]:
    return [plain(batch) for batch in itertools.islice(loader, count)]


def repeated(source: Any, **options: Any) -> RepeatingLoader[Any]:
    """A `RepeatingLoader`; a `LoaderWarning` does not fail the test. Tests of warnings make their own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoaderWarning)
        return RepeatingLoader(source, **options)


def disturb(seed: int) -> None:
    """Global generators are as they are in any other run."""
    torch.manual_seed(seed)
    random.seed(seed)


def check_resume(
    make: Make, epochs: list[list[Any]], stops: Iterable[int] | None = None, between: int = 2, **options: Any
) -> None:
    """Stop after any number of batches, go on, stop again after ``between`` more, go on to the end of all epochs.

    Args:
        make: a fresh loader.
        epochs: what it has to give.
        stops: after how many batches; by default each number that leaves batches to go on with.
        between: batches from the first stop to the second.
        options: of `RepeatingLoader`.
    """
    stream = [batch for epoch in epochs for batch in epoch]
    for stop in range(len(stream) - between) if stops is None else stops:
        disturb(stop)
        first = repeated(make(), **options)
        assert take(first, stop) == stream[:stop]
        state = pickle.loads(pickle.dumps(first.state_dict()))
        assert take(first, 1) == stream[stop : stop + 1], f"a state after {stop} batches changed what comes next"
        first.close()
        disturb(1000 + stop)
        second = repeated(make(), **options)
        second.load_state_dict(state)
        assert (second.epoch, second.batch, second.step) == (state["epoch"], state["batch"], stop)
        assert take(second, between) == stream[stop : stop + between], f"after {stop} batches"
        state = pickle.loads(pickle.dumps(second.state_dict()))
        second.close()
        disturb(2000 + stop)
        third = repeated(make(), **options)
        third.load_state_dict(state)
        rest = stream[stop + between :]
        assert take(third, len(rest)) == rest, f"after {stop} batches and {between} more"
        assert third.step == len(stream)
        third.close()


def check_epochs(make: Make, epochs: list[list[Any]]) -> None:
    """Without a stop; the number of the epoch, too."""
    disturb(77)
    loader = repeated(make())
    for epoch, expected in enumerate(epochs):
        for at, batch in enumerate(expected, 1):
            assert take(loader, 1) == [batch], f"batch {at} of epoch {epoch}"
            assert (loader.epoch, loader.batch) == (epoch, at)
    loader.close()


def states_at(makes: dict[str, Make], stop: int) -> dict[str, bytes]:
    """States of many loaders after ``stop`` batches, for another process."""
    states = {}
    for name, make in makes.items():
        loader = repeated(make())
        take(loader, stop)
        states[name] = pickle.dumps(loader.state_dict())
        loader.close()
    return states


def go_on(makes: dict[str, Make], states: dict[str, bytes], count: int) -> dict[str, list[Any]]:
    """What comes next; for the other process."""
    disturb(4711)
    found = {}
    for name, state in states.items():
        loader = repeated(makes[name]())
        loader.load_state_dict(pickle.loads(state))
        found[name] = take(loader, count)
        loader.close()
    return found


def check_back_and_forth(make: Make, epochs: list[list[Any]]) -> None:
    """One object goes to places of several epochs, and always from the middle of another one."""
    stream = [batch for epoch in epochs for batch in epoch]
    loader = repeated(make())
    states = []
    for _ in stream[:-3]:
        states.append(loader.state_dict())
        next(loader)
    for stop in (1, len(states) - 1, 0, len(states) // 2, 0, len(epochs[0]), 1):
        loader.load_state_dict(states[stop])
        assert take(loader, 2) == stream[stop : stop + 2], f"back to {stop}"
        loader.skip(1)
        assert take(loader, 1) == stream[stop + 3 : stop + 4], f"back to {stop}, and one skipped"
    loader.close()
