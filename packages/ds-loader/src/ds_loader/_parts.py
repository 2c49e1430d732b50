"""What a loader is made of: the objects that know about epochs, and the generators that decide the order."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

# They draw from torch's global generator if they have none of their own.
_TORCH_SAMPLERS = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


def parts_of(loader: object) -> list[object]:
    """The loader, its batch sampler, that one's sampler, its own sampler and its dataset; each object once."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    found = (
        loader,
        batch_sampler,
        getattr(batch_sampler, "sampler", None),
        getattr(loader, "sampler", None),
        getattr(loader, "dataset", None),
    )
    return list({id(part): part for part in found if part is not None}.values())


def epoch_setters(parts: list[object]) -> Iterator[Callable[[int], object]]:
    """``set_epoch`` of every part that has it."""
    for part in parts:
        set_epoch = getattr(part, "set_epoch", None)
        if callable(set_epoch):
            yield set_epoch


def separate_worker_seeds(loader: object) -> None:
    """Give a ``DataLoader`` that shares its generator with its sampler one of its own, to draw worker seeds from.

    Seeds are drawn whenever workers start, and after a resume they start at other times: with one generator for both,
    the order of later epochs would depend on that.
    """
    if not isinstance(loader, DataLoader) or not isinstance(loader.generator, torch.Generator):
        return
    _, *inner = parts_of(loader)
    if any(getattr(part, "generator", None) is loader.generator for part in inner):
        loader.generator = torch.Generator().set_state(loader.generator.get_state())


def own_generators(parts: list[object]) -> list[torch.Generator]:
    """The generators that decide the order of batches; each once.

    A random sampler of PyTorch that would draw from the global generator is given one of its own, seeded from there:
    the order of later epochs then depends on nothing that is not in the state.
    """
    found = []
    for part in parts:
        if isinstance(part, torch.utils.data.Dataset) and not isinstance(part, IterableDataset):
            continue  # a map-style dataset draws for samples, not for their order
        generator = getattr(part, "generator", None)
        if generator is None and isinstance(part, _TORCH_SAMPLERS):
            seed = int(torch.empty((), dtype=torch.int64).random_().item())
            generator = part.generator = torch.Generator().manual_seed(seed)
        if isinstance(generator, torch.Generator):
            found.append(generator)
    return list({id(generator): generator for generator in found}.values())
