"""An index sampler that begins behind batches of an epoch, and notes what it drew."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice
from typing import Any

from torch.utils.data import BatchSampler, Sampler

from ds_loader._order import plan_of
from ds_loader._parts import Parts
from ds_loader._random import PrivatelyRandom
from ds_loader._skip import taken_from, too_few
from ds_loader.adapters.base import Place, checksum
from ds_loader.errors import LoaderStateError

# Samplers of these packages draw from generators of their own, or from a global one before their first index.
_TRUSTED = frozenset({"torch", "torchdata", "accelerate", "builtins"})


class EpochSampler(Sampler[Any]):
    """Stands before a loader's own index sampler, which it is otherwise like.

    Args:
        inner: the batch sampler of the loader, or its sampler.
        parts: of the loader.
        batched: whether ``inner`` gives batches.
        batch_size, drop_last: of the batches that somebody else makes of the samples that ``inner`` gives.

    Attributes:
        parts: as given.
        place: where the next iteration begins.
        plan: how the order is cut; None if it is not known.
        cut_by: the same on any number of ranks, which a wrapper of the loader may know better; None if a rank's first
            batch cannot be told.
    """

    def __init__(
        self, inner: Any, parts: Parts, *, batched: bool, batch_size: int | None = None, drop_last: bool = False
    ) -> None:
        self._inner = inner
        self.parts = parts
        self._batched = batched or isinstance(
            inner, BatchSampler
        )  # DataLoader(sampler=a batch sampler, batch_size=None)
        self.place: Place | None = None
        self.plan = plan_of(inner, batched=self._batched)
        if self.plan is not None and batch_size is not None:
            self.plan = replace(self.plan, batch_size=batch_size, drop_last=drop_last)
        self.cut_by = self.plan

    def __iter__(self) -> Iterator[Any]:
        # The place is taken now: the body of a generator would read it when the first index is asked for.
        return iter(self._inner) if self.place is None else self._run(self.place)

    def __len__(self) -> int:
        return len(self._inner)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_inner":  # while it is being copied or unpickled
            raise AttributeError(name)
        return getattr(self._inner, name)

    def order(self, place: Place) -> list[Any]:
        """The order of an epoch over all ranks. Generators are drawn from as often as by one epoch.

        Raises:
            LoaderStateError: it cannot be told.
        """
        plan = self.plan
        assert plan is not None
        states = self.parts.states()
        with place.streams():
            order = plan.order()
        if plan.distributed:
            self.parts.restore(states)
            with place.streams():
                share = list(plan.sampler)
            if share != list(plan.share(order, plan.world_size, plan.rank)):
                raise LoaderStateError(
                    f"{type(plan.sampler).__name__} divides its samples among ranks in another way than "
                    "DistributedSampler: what is left of an epoch cannot be divided anew. Go on with the same number "
                    "of ranks and batch size"
                )
        return order

    def _run(self, place: Place) -> Iterator[Any]:
        plan, source = self.plan, self._inner
        as_samples = not self._batched
        if place.seen:
            assert plan is not None
            order = self.order(place)
            self.check_first(order, place)
            rest = order[place.seen :]
            if self._batched:
                source = plan.batches(rest, plan.world_size, plan.rank, plan.batch_size)
            else:
                source = plan.share(rest, plan.world_size, plan.rank)
        elif self._batched and plan is not None and plan.simple:
            # Passing over samples is faster than making batches of them; and torchdata's batch sampler before 0.11
            # begins its first iteration at what it drew when it was made.
            source, as_samples = plan.sampler, True
        size = plan.batch_size or 1 if as_samples and plan is not None else 1
        streams = place.streams()
        with streams:
            iterator = iter(source)
            head = list(islice(iterator, size * max(place.again, 1)))
            if not place.seen:
                place.run.first = self._first(head[:size], place)
            if place.batch:
                taken = len(head) + taken_from(iterator, place.batch * size - len(head))
                whole = plan is not None and plan.drop_last and as_samples
                found = taken // size if whole else -(-taken // size)
                if found < place.batch:
                    raise too_few(place.batch, found)
                iterator = chain(head[: size * place.again], iterator)
            else:
                iterator = chain(head, iterator)
            if as_samples and self._batched and plan is not None and plan.batch_size is not None:
                iterator = iter(BatchSampler(iterator, plan.batch_size, plan.drop_last))
        yield from iterator if self._draws_at_the_start() else PrivatelyRandom(iterator, streams)
        place.run.exhausted = True

    def _first(self, head: Any, place: Place) -> tuple[int, int] | None:
        """(rank, checksum) of the first batch, which has to be the one that a state tells of."""
        if not head:
            return None
        rank = self.plan.rank if self.plan is not None else 0
        found = (rank, checksum(head if not self._batched or not isinstance(head[0], list) else head[0]))
        if place.first is not None and place.first[0] == rank and place.first != found:
            raise _other_samples(place)
        return found

    def check_first(self, order: Sequence[Any], place: Place) -> None:
        """The same of an epoch that was begun on another number of ranks or batch size: cut it as it was then."""
        if place.first is None or self.cut_by is None:
            return
        (world_size, batch_size), (rank, expected) = place.cut, place.first
        head = next(self.cut_by.batches(order, world_size, rank, batch_size), None)
        if checksum([head] if batch_size is None else head) != expected:
            raise _other_samples(place)

    def _draws_at_the_start(self) -> bool:
        """Whether the order is made by code that draws from a global generator for the first index at most."""
        parts: Iterable[Any] = (self._inner, getattr(self._inner, "sampler", None), getattr(self.plan, "sampler", None))
        inner = getattr(getattr(self._inner, "batch_sampler", None), "sampler", None)
        kinds = [type(part) for part in (*parts, inner) if part is not None]
        return self.plan is not None and all(kind.__module__.partition(".")[0] in _TRUSTED for kind in kinds)


def _other_samples(place: Place) -> LoaderStateError:
    return LoaderStateError(
        f"the first batch of epoch {place.epoch} has other samples than when the state was saved: is it the same "
        "dataset, the same seed of the sampler, the same shuffling?"
    )
