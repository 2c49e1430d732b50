"""One small adapter for each library whose loaders people wrap: how to begin it at a batch of an epoch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ds_loader._parts import Parts
from ds_loader.adapters.base import Adapter, Place, Run
from ds_loader.adapters.deepspeed import DeepSpeedAdapter
from ds_loader.adapters.pytorch import DataLoaderAdapter, StatefulDataLoaderAdapter
from ds_loader.adapters.streams import CombinedLoaderAdapter, HubDatasetAdapter, MosaicAdapter, NodesAdapter
from ds_loader.adapters.wrappers import (
    AccelerateDispatcherAdapter,
    AccelerateShardAdapter,
    AccelerateSkipAdapter,
    FabricAdapter,
)

__all__ = ["Adapter", "Place", "Run", "adapter_of"]

# The first one that fits is taken. Accelerate's loaders say that they are DataLoaders, so they are asked first.
_ADAPTERS: tuple[type[Adapter[Any]], ...] = (
    AccelerateShardAdapter,
    AccelerateDispatcherAdapter,
    AccelerateSkipAdapter,
    FabricAdapter,
    DeepSpeedAdapter,
    CombinedLoaderAdapter,
    NodesAdapter,
    HubDatasetAdapter,
    MosaicAdapter,
    StatefulDataLoaderAdapter,
    DataLoaderAdapter,
    Adapter,
)


def adapter_of(loader: Iterable[Any], parts: Parts) -> Adapter[Any]:
    """The adapter for a loader."""
    return next(kind for kind in _ADAPTERS if kind.fits(loader))(loader, parts)
