"""Pipelines that keep a state: torchdata's nodes, Hugging Face's streams, MosaicML's StreamingDataset; and Lightning's
CombinedLoader, which keeps none.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from torch.utils.data import DataLoader

from ds_loader._parts import Parts
from ds_loader._random import PrivatelyRandom
from ds_loader.adapters.base import Adapter, Place, is_from
from ds_loader.adapters.pytorch import keeps_buffer

_T = TypeVar("_T")


class NodesAdapter(Adapter[_T]):
    """A ``torchdata.nodes.Loader``.

    At the end of an epoch its state means the end, and nothing else: asked to, it would begin the next epoch at once,
    and all that counts epochs would be one behind.
    """

    def __init__(self, loader: Iterable[_T], parts: Parts) -> None:
        super().__init__(loader, parts)
        self._view = copy.copy(loader)
        self._view.restart_on_stop_iteration = False  # type: ignore[attr-defined]
        self.keeps_state = True

    @classmethod
    def fits(cls, loader: object) -> bool:
        """See `Adapter.fits`."""
        return is_from(loader, "torchdata.nodes.loader", "Loader")

    def start(self, place: Place) -> Iterator[_T]:
        """See `Adapter.start`."""
        if place.own is not None:
            self._view.load_state_dict(place.own)  # type: ignore[attr-defined]
            return PrivatelyRandom(self._view, place.streams())
        iterator = PrivatelyRandom(self._view, place.streams())
        iterator.drop(place.batch)
        return iterator

    def state(self) -> Any:
        """See `Adapter.state`."""
        return self._view.state_dict()  # type: ignore[attr-defined]

    def counted(self, own: Any) -> int | None:
        """See `Adapter.counted`."""
        return own.get("num_yielded") if isinstance(own, dict) else None


class HubDatasetAdapter(Adapter[_T]):
    """A dataset of Hugging Face itself: a table, begun at a row; or a stream, which keeps a state.

    The state of a stream with a shuffle buffer lacks what is in the buffer; there, earlier examples are loaded and
    dropped.
    """

    def __init__(self, loader: Iterable[_T], parts: Parts) -> None:
        super().__init__(loader, parts)
        self._is_table = is_from(loader, "datasets.arrow_dataset", "Dataset")
        self.keeps_state = not self._is_table and not keeps_buffer(loader)
        self.by_index = self._is_table

    @classmethod
    def fits(cls, loader: object) -> bool:
        """See `Adapter.fits`."""
        return is_from(loader, "datasets.arrow_dataset", "Dataset") or is_from(
            loader, "datasets.iterable_dataset", "IterableDataset"
        )

    def start(self, place: Place) -> Iterator[_T]:
        """See `Adapter.start`."""
        if self._is_table and place.batch <= len(self.loader):  # type: ignore[arg-type]
            rest = self.loader.skip(place.batch) if place.batch else self.loader  # type: ignore[attr-defined]
            return iter(rest)
        return super().start(place)


class MosaicAdapter(Adapter[_T]):
    """A DataLoader over a ``StreamingDataset`` of MosaicML, which begins at any sample of any epoch, on any ranks."""

    def __init__(self, loader: DataLoader[_T], parts: Parts) -> None:
        super().__init__(loader, parts)
        self.keeps_state = True
        self.by_index = True
        self._template: dict[str, Any] | None = None

    @classmethod
    def fits(cls, loader: object) -> bool:
        """See `Adapter.fits`."""
        dataset = getattr(loader, "dataset", None)
        return isinstance(loader, DataLoader) and is_from(dataset, "streaming.base.dataset", "StreamingDataset")

    def start(self, place: Place) -> Iterator[_T]:
        """See `Adapter.start`."""
        dataset: Any = self.loader.dataset  # type: ignore[attr-defined]
        template = place.own if place.own is not None else self._state()
        seen = place.seen + place.batch * (self.batch_size or 1) * self.world_size
        dataset.load_state_dict({**template, "epoch": place.epoch, "sample_in_epoch": seen})
        return PrivatelyRandom(self.loader, place.streams())

    def state(self) -> Any:
        """See `Adapter.state`: what decides the order; where to begin is computed."""
        return self._state()

    def _state(self) -> dict[str, Any]:
        dataset: Any = self.loader.dataset  # type: ignore[attr-defined]
        return dict(dataset.state_dict(0, True))


class CombinedLoaderAdapter(Adapter[_T]):
    """Lightning's ``CombinedLoader``: earlier batches are loaded and dropped."""

    @classmethod
    def fits(cls, loader: object) -> bool:
        """See `Adapter.fits`."""
        modules = ("lightning.pytorch.utilities.combined_loader", "pytorch_lightning.utilities.combined_loader")
        return any(is_from(loader, module, "CombinedLoader") for module in modules)

    def length(self) -> int | None:
        """See `Adapter.length`; the loader knows it only after it was begun."""
        loader: Any = copy.copy(self.loader)
        iterator = type(self)._modes(loader)[loader._mode]["iterator"](loader.flattened, loader._limits)
        try:
            return len(iterator)
        except TypeError:  # of an endless part it is a float
            return None

    @staticmethod
    def _modes(loader: Any) -> Any:
        import sys

        return sys.modules[type(loader).__module__]._SUPPORTED_MODES
