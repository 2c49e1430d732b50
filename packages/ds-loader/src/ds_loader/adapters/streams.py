"""Pipelines that keep a state: torchdata's nodes, Hugging Face's streams, MosaicML's StreamingDataset; and Lightning's
CombinedLoader, which keeps none.
"""

from __future__ import annotations

import copy
import sys
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

    Its nodes count epochs by themselves. They are told the epoch here, which they do not know after a state of another
    run. Only the sources of a weighted sampler go on with their own counts, since it begins them anew within an epoch.

    The state of a shuffle buffer, or of a random sampler that is begun anew within an epoch, does not tell the order.
    There, the state is that of the epoch's beginning, and earlier items are loaded and dropped.
    """

    def __init__(self, loader: Iterable[_T], parts: Parts) -> None:
        super().__init__(loader, parts)
        self._samplers = self._nodes("torchdata.nodes.adapters", "SamplerWrapper")
        self._mixers = self._nodes("torchdata.nodes.samplers.multi_node_weighted_sampler", "MultiNodeWeightedSampler")
        draws_again = self._mixers and (parts.own or parts.unseeded)
        self._drops = bool(draws_again) or any(keeps_buffer(part) for part in parts.found)
        self._at_begin: Any = None
        for node in self._samplers:
            if node.epoch != 0 or getattr(node.epoch_updater, "__name__", "") != "_default_epoch_updater":
                self.limits.append(
                    "initial_epoch and epoch_updater of SamplerWrapper have no effect: its epochs are those of this "
                    "loader, from 0"
                )

    @classmethod
    def fits(cls, loader: object) -> bool:
        """See `Adapter.fits`."""
        return is_from(loader, "torchdata.nodes.loader", "Loader")

    def start(self, place: Place) -> Iterator[_T]:
        """See `Adapter.start`."""
        loader: Any = self.loader
        follows = self._cursors.enter(place)
        if place.own is not None:
            loader.load_state_dict(place.own)
        elif not (follows and self._mixers):
            for node in self._samplers:
                node.epoch, node._started = place.epoch, False
            for node in self._mixers:
                node._epoch, node._started = place.epoch, False
        loader._iter_for_state_dict = False  # it was asked for a state before: the next iteration would ignore another
        # At the end of an epoch its state means the end, and not the beginning of the next.
        restarts, loader.restart_on_stop_iteration = loader.restart_on_stop_iteration, False
        try:
            iterator = PrivatelyRandom(self.loader, place.streams())
        finally:
            loader.restart_on_stop_iteration = restarts
        if self._drops:
            self._at_begin = loader.state_dict()
        if self._drops or place.own is None:
            iterator.drop(place.batch, place.left_out)
        else:  # it forgets that an epoch was begun, which the next one has to know
            for node in (*self._samplers, *self._mixers):
                node._started = node._started or node._num_yielded > 0
        return iterator

    def interrupt(self) -> None:
        """See `Adapter.interrupt`."""
        super().interrupt()
        for part in self.parts.found:
            stop = getattr(getattr(part, "_it", None), "_shutdown", None)
            if callable(stop):
                stop()

    def close(self) -> None:
        """See `Adapter.close`."""
        self.interrupt()

    def state(self) -> Any:
        """See `Adapter.state`."""
        return self._at_begin if self._drops else super().state()

    def counted(self, own: Any) -> int | None:
        """See `Adapter.counted`."""
        return own.get("num_yielded") if isinstance(own, dict) and not self._drops else None

    def _nodes(self, module: str, name: str) -> list[Any]:
        return [part for part in self.parts.found if is_from(part, module, name)]


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
        if self._is_table and place.batch < len(self.loader):  # type: ignore[arg-type]
            return iter(self.loader.skip(place.batch))  # type: ignore[attr-defined]
        return super().start(place)

    def _is_loader(self, part: object) -> bool:
        return False  # a stream keeps its place after its state was loaded


class MosaicAdapter(Adapter[_T]):
    """A ``StreamingDataset`` of MosaicML, or a DataLoader over one. It begins at any sample of any epoch, on any ranks.

    Its state tells what decides the order: canonical nodes and the seed. Epoch and sample are set here. It is kept in
    memory that the workers share, so that persistent ones hear of it.
    """

    def __init__(self, loader: Iterable[_T], parts: Parts) -> None:
        super().__init__(loader, parts)
        self.keeps_state = True
        self.by_index = True
        self._dataset: Any = getattr(loader, "dataset", loader)
        self._order: dict[str, Any] | None = None  # of the state that was loaded last
        self._written: int | None = None  # the epoch of the place that was written last
        size = getattr(loader, "batch_size", None)
        if self._dataset.batch_size != (size or 1):
            self.limits.append(
                f"cannot resume exactly, because batch_size is {self._dataset.batch_size} in the StreamingDataset and "
                f"{size or 1} in the loader: give both the same"
            )

    @classmethod
    def fits(cls, loader: object) -> bool:
        """See `Adapter.fits`."""
        dataset = getattr(loader, "dataset", None) if isinstance(loader, DataLoader) else loader
        return is_from(dataset, "streaming.base.dataset", "StreamingDataset")

    def start(self, place: Place) -> Iterator[_T]:
        """See `Adapter.start`."""
        dataset = self._dataset
        self._order = place.own if place.own is not None else self._order
        seen = place.seen + place.batch * (self.batch_size or 1) * self.world_size
        if seen >= dataset.epoch_size and seen:
            return iter(())
        # Where it goes on by itself nothing is written: another rank of this host may be reading the same memory.
        if seen or place.epoch == self._written or place.epoch != dataset.next_epoch:
            order = self._order if self._order is not None else self.state()
            dataset.next_epoch = place.epoch  # it would pass over a state of an epoch before that one
            dataset.load_state_dict({**order, "epoch": place.epoch, "sample_in_epoch": seen})
            self._written = place.epoch
        return PrivatelyRandom(self.loader, place.streams())

    @property
    def world_size(self) -> int:
        """See `Adapter.world_size`."""
        return int(self._dataset._parallel_rank_world.num_ranks)

    def samples(self, batch: int, seen: int) -> int | None:
        """See `Adapter.samples`."""
        return min(seen + batch * (self.batch_size or 1) * self.world_size, int(self._dataset.epoch_size))

    def size(self) -> int | None:
        """See `Adapter.size`."""
        return int(self._dataset.epoch_size)

    def state(self) -> Any:
        """See `Adapter.state`: what decides the order; where to begin is computed."""
        return dict(self._dataset.state_dict(0, True))


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
        modes = sys.modules[type(loader).__module__]._SUPPORTED_MODES
        iterator = modes[loader._mode]["iterator"](loader.flattened, loader._limits)
        try:
            return len(iterator)
        except TypeError:  # of an endless part it is a float
            return None
