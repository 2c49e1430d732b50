"""Random numbers of an epoch: seeds that follow from (seed, epoch), states as JSON, and private global generators."""

from __future__ import annotations

import base64
import hashlib
import operator
import random
import sys
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch

from ds_loader._skip import drop

_T = TypeVar("_T")


def mixed(seed: int, *numbers: int) -> int:
    """A seed of 63 bits that follows from all of the numbers."""
    digest = hashlib.blake2b(repr((seed, *numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seed_from_torch() -> int:
    """A seed that follows from the state of torch's global CPU generator, from which nothing is drawn."""
    digest = hashlib.blake2b(bytes(torch.random.get_rng_state().tolist()), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def is_generator(value: object) -> bool:
    """Whether it is a generator of torch, of ``random``, or of numpy."""
    if isinstance(value, (torch.Generator, random.Random)):
        return True
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, (numpy.random.Generator, numpy.random.RandomState))


def has_initial_seed(value: object) -> bool:
    """Whether it is a sampler that orders by ``initial_seed`` and the epoch, as Accelerate's SeedableRandomSampler."""
    return isinstance(getattr(value, "initial_seed", None), int)


def state_of(generator: Any) -> Any:
    """The state of a generator as JSON: a string for torch's, lists and numbers for the others."""
    if has_initial_seed(generator):
        return generator.initial_seed
    if isinstance(generator, torch.Generator):
        return base64.b64encode(bytes(generator.get_state().tolist())).decode()
    if isinstance(generator, random.Random):
        version, numbers, gauss = generator.getstate()
        return [version, list(numbers), gauss]
    bits = getattr(generator, "bit_generator", None) or generator._bit_generator
    return _plain(bits.state)


def set_state(generator: Any, state: Any) -> None:
    """Give a generator the state that `state_of` returned.

    Raises:
        TypeError, ValueError, RuntimeError, KeyError: it is no such state.
    """
    if has_initial_seed(generator):
        generator.initial_seed = operator.index(state)
    elif isinstance(generator, torch.Generator):
        raw = base64.b64decode(state, validate=True)
        generator.set_state(torch.tensor(list(raw), dtype=torch.uint8))
    elif isinstance(generator, random.Random):
        version, numbers, gauss = state
        generator.setstate((version, tuple(numbers), gauss))
    else:
        bits = getattr(generator, "bit_generator", None) or generator._bit_generator
        bits.state = _arrays(state)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value.tolist() if hasattr(value, "tolist") else value


def _arrays(value: Any) -> Any:
    import numpy as np

    if isinstance(value, dict):
        return {key: _arrays(item) for key, item in value.items()}
    return np.array(value, dtype=np.uint64) if isinstance(value, list) else value


class PrivateStreams:
    """Streams of random numbers that stand in for the global ones of torch (CPU), ``random`` and numpy.

    ``with streams:`` puts them in the place of the global ones and takes them away again: code inside draws numbers
    that follow from (seed, epoch) alone, and the global generators are as they were. numpy's is exchanged if numpy has
    been imported.
    """

    def __init__(self, seed: int, epoch: int) -> None:
        self._torch = torch.Generator().manual_seed(mixed(seed, epoch, -1)).get_state()
        self._python = random.Random(mixed(seed, epoch, -2)).getstate()
        self._numpy_seed = mixed(seed, epoch, -3)
        self._numpy: Any = None
        self._saved: list[tuple[torch.Tensor, Any, Any]] = []

    def __enter__(self) -> PrivateStreams:
        numpy = sys.modules.get("numpy")
        held = None
        if numpy is not None and hasattr(numpy.random, "get_bit_generator"):  # numpy 1.24
            if self._numpy is None:
                self._numpy = numpy.random.MT19937(self._numpy_seed)
            held = numpy.random.get_bit_generator()
            numpy.random.set_bit_generator(self._numpy)
        self._saved.append((torch.random.get_rng_state(), random.getstate(), held))
        torch.random.set_rng_state(self._torch)
        random.setstate(self._python)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        state, python, held = self._saved.pop()
        self._torch, self._python = torch.random.get_rng_state(), random.getstate()
        torch.random.set_rng_state(state)
        random.setstate(python)
        if held is not None:
            numpy = sys.modules["numpy"]
            self._numpy = numpy.random.get_bit_generator()
            numpy.random.set_bit_generator(held)


class PrivatelyRandom(Iterator[_T], Generic[_T]):
    """An iterator over ``source`` that runs its code with private streams; it goes on after an exception."""

    def __init__(self, source: Iterable[_T], streams: PrivateStreams) -> None:
        self._streams = streams
        with streams:
            self.iterator = iter(source)

    def __next__(self) -> _T:
        with self._streams:
            return next(self.iterator)

    def drop(self, count: int, may_fail: int = 0) -> None:
        """See `ds_loader._skip.drop`."""
        with self._streams:
            drop(self.iterator, count, may_fail)
