"""Begin an epoch behind batches that were handed out before."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from torch.utils.data import DataLoader, IterableDataset

from ds_loader.errors import LoaderStateError

_T = TypeVar("_T")


def iter_from(loader: Iterable[_T], batch: int) -> Iterator[_T]:
    """Iterate over ``loader`` from its batch number ``batch`` on.

    Of a plain map-style ``DataLoader`` only the indices of the earlier batches are drawn; every other source loads
    its earlier batches, which are dropped.

    Raises:
        LoaderStateError: the source has fewer batches than that.
    """
    if batch == 0:
        return iter(loader)
    if isinstance(loader, DataLoader) and _is_plain(loader):
        return iter(_without_first(loader, batch))
    iterator = iter(loader)
    _drop(iterator, batch)
    return iterator


def _is_plain(loader: DataLoader[Any]) -> bool:
    """Whether it draws indices first and loads by them, the way PyTorch's own does."""
    untouched = all(
        getattr(type(loader), name) is getattr(DataLoader, name)
        for name in ("__iter__", "_get_iterator", "_index_sampler")
    )
    return untouched and not isinstance(loader.dataset, IterableDataset)


def _without_first(loader: DataLoader[_T], batch: int) -> DataLoader[_T]:
    """A copy of the loader, with workers of its own, whose indices begin later."""
    later = copy.copy(loader)
    name = "sampler" if loader.batch_sampler is None else "batch_sampler"
    # Through __dict__: a DataLoader refuses to have these set.
    vars(later).update({name: _Later(getattr(loader, name), batch), "_iterator": None})
    return later


class _Later:
    """A sampler without its first items."""

    def __init__(self, sampler: Iterable[Any], first: int) -> None:
        self._sampler = sampler
        self._first = first

    def __iter__(self) -> Iterator[Any]:
        iterator = iter(self._sampler)
        _drop(iterator, self._first)
        yield from iterator


def _drop(iterator: Iterator[Any], count: int) -> None:
    dropped = sum(1 for _ in itertools.islice(iterator, count))
    if dropped < count:
        raise LoaderStateError(
            f"the state says that {count} batches of this epoch were handed out, but the source has {dropped}: "
            "is it the same data, batch size and number of ranks?"
        )
