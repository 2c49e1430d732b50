"""DeepSpeed's own loader: ``engine.deepspeed_io``, ``engine.training_dataloader``."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, TypeVar

from ds_loader._parts import Parts
from ds_loader.adapters.base import Adapter, Place, is_from
from ds_loader.adapters.indices import EpochSampler

_T = TypeVar("_T")


class DeepSpeedAdapter(Adapter[_T]):
    """Drives a copy of a ``DeepSpeedDataLoader``, which makes a DataLoader of its dataset and sampler every epoch."""

    survives = False  # it iterates by a generator

    def __init__(self, loader: Any, parts: Parts) -> None:
        super().__init__(loader, parts)
        self.keeps_state = False
        self._iterator: Any = None
        self.by_index = not loader.curriculum_learning_enabled
        if self.by_index:
            self.indices = EpochSampler(
                loader.data_sampler,
                parts,
                batched=False,
                batch_size=loader.batch_size,
                drop_last=loader.dataloader_drop_last,
            )
            self.plan = self.indices.plan
        else:
            self.limits.append(
                "cannot resume exactly, because its curriculum sampler is not told where to begin: restore it by "
                "DeepSpeed's load_checkpoint"
            )

    @classmethod
    def fits(cls, loader: object) -> bool:
        """See `Adapter.fits`."""
        return is_from(loader, "deepspeed.runtime.dataloader", "DeepSpeedDataLoader")

    def start(self, place: Place) -> Iterator[_T]:
        """See `Adapter.start`."""
        if not self.by_index:
            return super().start(place)
        self._cursors.enter(place)
        view = copy.copy(self.loader)
        self.indices.place = place
        view.data_sampler = self.indices  # type: ignore[attr-defined]
        with place.streams():  # it draws seeds for its workers
            return iter(view)
