"""What a loader is made of, at any depth: the objects that know about epochs, and the generators of its order."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data.dataloader import _BaseDataLoaderIter

from ds_loader._random import has_initial_seed, is_generator, mixed, set_state, state_of
from ds_loader.errors import LoaderStateError

# They draw from torch's global generator if they have none of their own.
_RANDOM_SAMPLERS = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
# Attributes that hold a map-style dataset: its generators make samples, they do not order them.
_DATASETS = frozenset({"dataset", "datasets", "data_source"})
# Objects of these packages are data, models or text processors, not parts of a loader (unless they are samplers or
# datasets): nobody looks into them.
_FOREIGN = frozenset(
    {"builtins", "numpy", "pandas", "pyarrow", "torch", "transformers", "tokenizers", "PIL", "datasets", "polars"}
)
_MOST_ITEMS = 256  # of a list or dict that is searched for parts; a longer one is data


@dataclass
class Parts:
    """The parts of one loader.

    Attributes:
        found: the loader and what it is made of, outer ones first, each once.
        own: generators that the user made. Their states when an epoch begins decide its order. Samplers with an
            ``initial_seed`` count as such.
        unseeded: random samplers of PyTorch without a generator, which shuffle by the global one.
        live: iterators that were begun before the loader came here.
    """

    found: list[Any]
    own: list[Any] = field(default_factory=list)
    unseeded: list[Any] = field(default_factory=list)
    live: list[Any] = field(default_factory=list)

    def epoch_setters(self) -> Iterator[Callable[[int], object]]:
        """``set_epoch`` of every part that has it."""
        for part in self.found:
            set_epoch = getattr(part, "set_epoch", None)
            if callable(set_epoch):
                yield set_epoch

    def seed(self, seed: int, epoch: int) -> None:
        """Seed the user's generators by (seed, epoch)."""
        for index, generator in enumerate(self.own):
            value = mixed(seed, epoch, index)
            if has_initial_seed(generator):
                generator.initial_seed = mixed(seed, index)  # to which it adds the epoch
            elif isinstance(generator, torch.Generator):
                generator.manual_seed(value)
            elif isinstance(generator, random.Random) or hasattr(generator, "seed"):
                generator.seed(value if isinstance(generator, random.Random) else value % 2**32)
            else:
                bits = generator.bit_generator
                bits.state = type(bits)(value).state

    def states(self) -> tuple[Any, ...]:
        """The states of the user's generators, as JSON."""
        return tuple(state_of(generator) for generator in self.own)

    def restore(self, states: tuple[Any, ...]) -> None:
        """Set the user's generators to what `states` returned.

        Raises:
            LoaderStateError: they do not fit. Nothing was changed.
        """
        if len(states) != len(self.own):
            raise LoaderStateError(
                f"state_dict['generators'] has {len(states)} state(s), but the loader and its samplers have "
                f"{len(self.own)} generator(s)"
            )
        before = self.states()
        for index, (generator, state) in enumerate(zip(self.own, states, strict=True)):
            try:
                set_state(generator, state)
            except Exception as error:
                for changed, old in zip(self.own[:index], before, strict=False):
                    set_state(changed, old)
                raise LoaderStateError(
                    f"state_dict['generators'][{index}] is no state of a {type(generator).__name__}: {error}"
                ) from None


def parts_of(loader: object) -> Parts:
    """Find the parts of a loader; nothing of it is changed."""
    parts = Parts([])
    seen: set[int] = set()
    queue: list[tuple[Any, bool]] = [(loader, False)]
    generators: dict[int, Any] = {}
    while queue:
        part, in_dataset = queue.pop(0)
        if id(part) in seen:
            continue
        seen.add(id(part))
        parts.found.append(part)
        # Lightning keeps a sampler in a dataset.
        in_dataset = in_dataset and not isinstance(part, (IterableDataset, Sampler))
        makes_samples = in_dataset or (isinstance(part, Dataset) and not isinstance(part, IterableDataset))
        if has_initial_seed(part):
            generators[id(part)] = part
            makes_samples = True  # it seeds its generator anew in every epoch
        elif isinstance(part, _RANDOM_SAMPLERS) and part.generator is None:
            parts.unseeded.append(part)
        for name, value in _members(part):
            if isinstance(value, _BaseDataLoaderIter):
                if name != "_iterator":  # where a DataLoader keeps one with persistent workers, and begins it anew
                    parts.live.append(value)
            elif is_generator(value):
                if not makes_samples:
                    generators[id(value)] = value
            elif _is_part(value):
                queue.append((value, in_dataset or name in _DATASETS))
    parts.own = list(generators.values())
    return parts


def _members(part: object) -> Iterator[tuple[str, Any]]:
    """The attributes of an object, and the items of those that are short lists or dicts."""
    if _is_foreign(part) and not isinstance(part, (Sampler, Dataset, DataLoader)):
        return
    attributes = dict(getattr(part, "__dict__", {}))
    for kind in type(part).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(part, name):
                attributes.setdefault(name, getattr(part, name))
    for name, value in attributes.items():
        if isinstance(value, (list, tuple, dict)) and len(value) <= _MOST_ITEMS:
            for item in value.values() if isinstance(value, dict) else value:
                yield name, item
        else:
            yield name, value


def _is_part(value: object) -> bool:
    if isinstance(value, (type, torch.nn.Module)):
        return False
    if isinstance(value, (Sampler, Dataset, DataLoader)) or callable(getattr(value, "set_epoch", None)):
        return True
    return hasattr(type(value), "__iter__") and not _is_foreign(value)


def _is_foreign(value: object) -> bool:
    return type(value).__module__.partition(".")[0] in _FOREIGN
