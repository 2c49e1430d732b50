"""``RepeatingLoader``: a loader that never ends, reshuffles every epoch, and resumes exactly on any number of ranks."""

from __future__ import annotations

import copy
import logging
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from types import GeneratorType, TracebackType
from typing import Any, Generic, Literal, TypeVar

import torch

from ds_loader import _ranks
from ds_loader._device import DeviceCopier, OneAhead
from ds_loader._ledger import Ledger
from ds_loader._order import Coverage, coverage
from ds_loader._parts import parts_of
from ds_loader._random import seed_from_torch
from ds_loader.adapters import Place, Run, adapter_of
from ds_loader.adapters.base import checksum, shut_down
from ds_loader.errors import EmptyLoaderError, LoaderStateError, LoaderWarning, OneShotLoaderError

__all__ = ["RepeatingLoader"]

_T = TypeVar("_T")
_LOG = logging.getLogger("ds.loader")
_ENDED: Iterator[Any] = iter(())
# Iterators of these modules give themselves when ``iter`` is called on them.
_SAFE = ("builtins", "itertools", "ds_loader._random", "ds_loader._device", "ds_loader.dataloader")

OnError = Callable[[Exception, int, int], Literal["skip", "retry"]]


class RepeatingLoader(Generic[_T]):
    """An endless iterator over a loader, one epoch after the other.

    Before each epoch ``set_epoch`` is called on every part of the loader that has it, at any depth, once. A random
    sampler of PyTorch without a generator is given one, and code that draws from the global generators of torch, random
    and numpy while it orders samples draws from private ones instead: all are seeded by (seed, epoch). Nothing is drawn
    from the global generators. Ranks start their epochs alone, unless ``on_uneven`` asks for more.

    What a loader cannot do is told once, at construction, by a ``LoaderWarning``.

    Args:
        loader: anything that can be iterated more than once; or, with ``max_steps``, a generator. The README lists
            libraries.
        set_epoch: ``"auto"``; ``"off"`` to call nothing; or a function that is called with the epoch instead.
        seed: of all orders. By default it follows from the state of torch's global generator, and generators that the
            samplers already have are left alone. If given, it seeds those, too. It has to be the same on all ranks.
        max_epochs, max_steps: after so many epochs, or batches on this rank, iteration ends with ``StopIteration``.
        on_error: what happens if loading a batch raises. ``"raise"``: the error is passed on and the next call tries
            the batch again; one that fails twice in a row is left out by the call after. ``"skip"``: it is left out,
            with a warning. A function is called with (error, epoch, batch) and returns ``"skip"`` or ``"retry"``, or
            raises.
        max_errors: how many errors are skipped or retried in one epoch before one is passed on.
        on_uneven: what happens if epochs differ in length among the ranks. ``"cycle"``: each rank goes on alone.
            ``"stop"``: an epoch ends for all when it ends for the shortest. ``"raise"``: it is an error. For the last
            two, all ranks of ``group`` start each epoch together, with one collective.
        group: a ``ProcessGroup``; by default all ranks.
        seamless: the workers of the next epoch start while the last batches of this one are used. It needs a
            map-style ``DataLoader`` with workers that are not persistent, and a dataset without ``set_epoch``.
        to_device: where batches are copied to, one ahead, on a stream of their own through pinned memory. Tensors in
            lists, tuples, dicts, and objects with ``.to`` are moved. Batches of Accelerate's loaders, which say which
            is the last, are not copied ahead.

    Attributes:
        loader: as given.
        seed: of the orders that are not the loader's own.

    Raises:
        TypeError: ``loader`` cannot be iterated, or an argument is of a wrong type.
        ValueError: an argument has a wrong value.
        OneShotLoaderError: (a TypeError) it can be iterated once only.

    Example:
        >>> from ds_loader import RepeatingLoader
        >>> batches = RepeatingLoader(["a", "b"])
        >>> [next(batches) for _ in range(3)], batches.epoch, len(batches)
        (['a', 'b', 'a'], 1, 2)
        >>> list(RepeatingLoader(["a", "b"], max_steps=5))
        ['a', 'b', 'a', 'b', 'a']
    """

    def __init__(
        self,
        loader: Iterable[_T],
        *,
        set_epoch: Literal["auto", "off"] | Callable[[int], object] = "auto",
        seed: int | None = None,
        max_epochs: int | None = None,
        max_steps: int | None = None,
        on_error: Literal["raise", "skip"] | OnError = "raise",
        max_errors: int = 10,
        on_uneven: Literal["cycle", "stop", "raise"] = "cycle",
        group: Any = None,
        seamless: bool = True,
        to_device: torch.device | str | int | None = None,
    ) -> None:
        _check_choice("set_epoch", set_epoch, ("auto", "off"), or_function=True)
        _check_choice("on_error", on_error, ("raise", "skip"), or_function=True)
        _check_choice("on_uneven", on_uneven, ("cycle", "stop", "raise"))
        _check_number("seed", seed)
        _check_number("max_epochs", max_epochs)
        _check_number("max_steps", max_steps)
        _check_number("max_errors", max_errors)
        if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
            raise TypeError(f"loader must be iterable, such as a DataLoader or a list, not {type(loader).__name__}")
        if max_steps is None and (isinstance(loader, GeneratorType) or _is_builtin_iterator(loader)):
            raise OneShotLoaderError(
                f"loader is a {type(loader).__name__}, which can be iterated only once: pass the DataLoader or list "
                "behind it, or an object whose __iter__ starts anew at every call; or pass max_steps, if it has as many"
            )
        self.loader = loader
        self.seed = seed_from_torch() if seed is None else seed
        self._seeded = seed is not None
        self._set_epoch = set_epoch
        self._max_epochs, self._max_steps = max_epochs, max_steps
        self._on_error, self._max_errors = on_error, max_errors
        self._on_uneven, self._group = on_uneven, group
        self._parts = parts_of(loader)
        self._adapter = adapter_of(loader, self._parts)
        self._copier = None if to_device is None else DeviceCopier(torch.device(to_device))
        self._seamless = seamless and self._adapter.workers
        if on_uneven != "cycle":
            _ranks.require_group(f"on_uneven={on_uneven!r}")
            if self._adapter.length() is None:
                raise ValueError(f"on_uneven={on_uneven!r} needs a loader with a length, which {self._name} has not")
        for limit in self._adapter.limits:
            warnings.warn(f"{self._name}: {limit}", LoaderWarning, stacklevel=2)

        self._iterator: Iterator[_T] = _ENDED
        self._started: _Epoch | None = None  # the epoch at hand, if it is being iterated
        self._ahead: _Epoch | None = None  # the next one, if its workers have been started
        self._resumed: Ledger | None = None  # where to go on; not begun yet
        self._epoch = 0
        self._batch = 0
        self._steps_before = 0  # batches handed out before those that _batch counts
        self._left_out = 0
        self._segments: tuple[tuple[int, int | None, int], ...] = ()
        self._errors = 0  # skipped or retried in this epoch
        self._failed_at: tuple[int, int] | None = None
        self._after_error = False
        self._any = False  # whether the loader ever gave a batch

    @property
    def epoch(self) -> int:
        """The epoch, from 0, of the batch handed out last."""
        return self._epoch

    @property
    def batch(self) -> int:
        """How many batches of this epoch have been handed out, or left out after errors, on this rank.

        In an epoch that was begun on another number of ranks or batch size, it counts from there.
        """
        return self._batch

    @property
    def step(self) -> int:
        """How many batches have been handed out since the beginning, on this rank."""
        return self._steps_before + self._batch - self._left_out

    @property
    def _name(self) -> str:
        return self._adapter.name

    def __len__(self) -> int:
        """The number of batches in one epoch.

        Raises:
            TypeError: the loader does not know it.
        """
        length = self._adapter.length()
        if length is None:
            raise TypeError(f"the loader ({self._name}) has no length, so an epoch has none")
        return length

    def __bool__(self) -> bool:
        return True  # not the length: the loader may have none

    def __iter__(self) -> RepeatingLoader[_T]:
        return self

    def __enter__(self) -> RepeatingLoader[_T]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __next__(self) -> _T:
        """The next batch; after the last of an epoch the first of the next.

        Raises:
            StopIteration: ``max_epochs`` or ``max_steps`` is reached, and in no other case.
            EmptyLoaderError: the loader gave no batch.
            OneShotLoaderError: it gave some before, but none when it was iterated again.
            LoaderStateError: the state that was loaded does not fit the data.
            UnevenRanksError: see ``on_uneven``.
        """
        while True:
            try:
                for batch in self._iterator:  # the fastest way to ask an iterator for one item
                    self._batch += 1
                    return batch
            except Exception as error:
                self._failed(error)
                continue
            self._advance()

    def skip(self, count: int) -> None:
        """Go on ``count`` batches later, over the ends of epochs too.

        They are passed over by their indices where the loader has indices, else they are loaded and dropped.

        Raises:
            ValueError: ``count`` is negative.
            TypeError: it is no integer.
        """
        _check_number("count", count)
        length = self._adapter.length()
        if not self._adapter.by_index or not length or len(self._segments) > 1 or self._on_uneven != "cycle":
            for _ in range(count):
                next(self)
            return
        epoch, batch = self._epoch, self._batch + count
        states = self._begin_states()
        while batch > length:
            if self._parts.own and not self._seeded:  # the next order follows from this one
                self._draw_all(epoch, states)
                states = None
            epoch, batch = epoch + 1, batch - length
        ledger = Ledger(seed=self.seed, epoch=epoch, batch=batch, step=self.step + count, generators=states)
        self._go_to(ledger, self._segments)

    def close(self) -> None:
        """End the loader's worker processes. The place is kept: the next batch starts them anew."""
        ledger = self._ledger()
        for started in (self._started, self._ahead):
            if started is not None:
                shut_down(started.raw)
        self._go_to(ledger, self._segments)
        self._adapter.close()

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is: enough to go on with exactly the next batch, in this process or another.

        It may be loaded on another number of ranks, or with another batch size, where the loader's order is known. All
        ranks have the same one then, except for ``batch``, ``step`` and ``first``.

        Returns:
            A new dict of numbers, strings and lists, which JSON can hold, and of what the loader itself gave.

        Raises:
            LoaderStateError: the loader's own state counts other batches: somebody else iterated it.
        """
        return copy.deepcopy(self._ledger().to_dict())

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken, with the same data.

        On another number of ranks, or with another batch size, the samples of that epoch go on that no rank handed out.

        Raises:
            LoaderStateError: a key or value is wrong, or the state does not fit; it says what differs. Nothing was
                changed.
        """
        ledger = Ledger.from_dict(state_dict)
        here = self._shape()
        differences = ledger.differences(here)
        segments = ledger.segments or ((ledger.world_size, ledger.batch_size, 0),)
        if self._seeded and ledger.seed != self.seed:
            differences.append(f"seed: {ledger.seed} in the state, {self.seed} here")
        if differences and (ledger.samples is None or here.samples is None):
            whose = "the loader that was saved" if ledger.samples is None else self._name
            raise LoaderStateError(
                "the state does not fit: " + "; ".join(differences) + f". The order of {whose} over all ranks is not "
                "known, so what is left of the epoch cannot be divided anew"
            )
        if differences and (ledger.length != here.length or (self._seeded and ledger.seed != self.seed)):
            raise LoaderStateError("the state does not fit: " + "; ".join(differences))
        if ledger.loader is not None and not self._adapter.keeps_state:
            raise LoaderStateError(
                "the state was saved with another kind of loader: it holds a state of that loader's own, but "
                f"{self._name} keeps none"
            )
        before = self._parts.states()
        self._parts.restore(ledger.generators or ())
        self._parts.restore(before)
        counted = self._adapter.counted(ledger.loader)
        if counted is not None and counted != ledger.batch - ledger.left_out:
            raise LoaderStateError(
                f"the loader's own state says that {counted} batches of this epoch were handed out, the ledger "
                f"says {ledger.batch - ledger.left_out}"
            )
        if differences:
            assert ledger.samples is not None
            self._require_same_order(ledger, segments[-1])
            _LOG.info("going on with %d of %s samples handed out; %s", ledger.samples, ledger.length, differences)
            segments = (*segments, (here.world_size, here.batch_size, ledger.samples))
            step = ledger.step
            ledger = Ledger(
                seed=ledger.seed, epoch=ledger.epoch, step=step, generators=ledger.generators, samples=ledger.samples
            )
        self.seed = ledger.seed
        self._go_to(copy.deepcopy(ledger), segments)

    def verify(self, group: Any = None) -> Coverage:
        """Prove from the ledger that every sample of this epoch is handed out once, over all ranks.

        The order of the epoch is drawn again and cut for every rank, as it was and as it will be; the samples are
        counted. With ``group``, all of its ranks call this, and their ledgers and orders are compared as well.

        Returns:
            The counts. ``lost`` is ``dropped``, and ``twice`` is 0 unless samples were repeated to even out ranks.

        Raises:
            LoaderStateError: samples are lost; or the ranks differ.
            TypeError: the order of this loader is not known.
        """
        plan, indices = self._adapter.plan, self._adapter.indices
        if plan is None or indices is None:
            raise TypeError(f"the order of {self._name} over all ranks is not known, so nothing can be proved about it")
        ledger = self._ledger()
        order = self._order(ledger)
        if group is not None:
            _ranks.require_alike(ledger, plan.rank, checksum(order), group)
        segments = ledger.segments or ((plan.world_size, plan.batch_size, 0),)
        found = coverage(ledger.epoch, order, segments, ledger.samples or 0, plan)
        if found.lost > found.dropped:
            raise LoaderStateError(f"{found.lost - found.dropped} samples of epoch {found.epoch} are lost: {found}")
        return found

    # How an epoch is begun and ended

    def _advance(self) -> None:
        """The iterator has ended: end its epoch, or begin the one at hand.

        Raises:
            StopIteration: that was all.
        """
        if self._max_steps is not None and self.step >= self._max_steps:
            raise StopIteration
        if self._started is not None:
            self._end_epoch()
        elif self._max_epochs is not None and self._epoch >= self._max_epochs:
            raise StopIteration
        else:
            self._begin_epoch()

    def _begin_epoch(self) -> None:
        started, self._ahead = self._ahead, None
        if started is None or started.epoch != self._epoch:
            started = self._start(self._epoch, self._resumed)
        self._resumed = None
        iterator: Iterator[_T] = started.raw
        if self._copier is not None and self._adapter.tells_end:
            iterator = map(self._copier.copy, iterator)
        elif self._copier is not None:
            iterator = started.ahead = OneAhead(iterator, self._copier, self._adapter.state)
        if self._seamless:
            # Weakly: in a cycle, workers would live until the garbage collector comes by; and it may come by in the
            # next workers, which have a copy of this process' memory and would end the iterator.
            iterator = _Watched(iterator, started.run, weakref.WeakMethod(self._start_next))
        most = self._most_batches()
        if most is not None:
            iterator = islice(iterator, most)
        self._started = started
        self._iterator = iterator if type(iterator).__module__ in _SAFE else _Only(iterator)

    def _start(self, epoch: int, at: Ledger | None) -> _Epoch:
        """Tell the parts which epoch it is, and iterate the loader."""
        self._tell(epoch)
        states = at.generators if at is not None else None
        if states is not None:
            self._parts.restore(tuple(states))
        self._adapter.synchronize()
        run = Run()
        place = Place(self.seed, epoch, run=run)
        states = self._parts.states()
        if at is not None:
            seen = self._segments[-1][2] if self._segments else 0
            place = Place(self.seed, epoch, at.batch, seen, copy.deepcopy(at.loader), at.first, run)
        try:
            return _Epoch(epoch, self._adapter.start(place), states, run)
        except StopIteration as error:
            raise RuntimeError(f"the loader ({self._name}) raised StopIteration when it was begun") from error

    def _start_next(self) -> None:
        if self._ahead is None and not (self._max_epochs is not None and self._epoch + 1 >= self._max_epochs):
            self._ahead = self._start(self._epoch + 1, None)

    def _tell(self, epoch: int) -> None:
        """Set the epoch, and seed the generators."""
        if callable(self._set_epoch):
            self._set_epoch(epoch)
        elif self._set_epoch == "auto":
            for set_epoch in self._parts.epoch_setters():
                set_epoch(epoch)
        self._parts.seed(self.seed, epoch, own=self._seeded)

    def _most_batches(self) -> int | None:
        """How many more batches of this epoch to hand out at most."""
        most = None if self._max_steps is None else self._max_steps - self.step
        if self._on_uneven != "cycle":
            length = self._epoch_length()
            shortest = _ranks.shortest_epoch(
                self._epoch, self._batch, length, self._group, must_be_even=self._on_uneven == "raise"
            )
            left = max(shortest - self._batch, 0)
            most = left if most is None else min(most, left)
        return most

    def _epoch_length(self) -> int:
        """Batches of this epoch on this rank, of the piece of it that this number of ranks goes through."""
        plan = self._adapter.plan
        if len(self._segments) > 1 and plan is not None:
            rest = range(plan.length - self._segments[-1][2])
            return sum(1 for _ in plan.batches(rest, plan.world_size, plan.rank, plan.batch_size))
        return len(self)

    def _end_epoch(self) -> None:
        cut = self._on_uneven == "stop" or len(self._segments) > 1  # an epoch that may rightly be empty here
        if self._batch == 0 and not self._any and not cut:
            raise self._at_end_of(
                EmptyLoaderError(
                    f"the loader ({self._name}) gave no batch in epoch {self._epoch}: is the dataset, or this rank's "
                    "share of it, empty, or smaller than one batch with drop_last=True?"
                )
            )
        if (self._batch == 0 and not cut) or _is_once_only(self.loader):
            raise self._at_end_of(
                OneShotLoaderError(
                    f"the loader ({self._name}) gave batches before, but none in epoch "
                    f"{self._epoch + (self._batch > 0)}: its __iter__ must start anew at every call"
                )
            )
        _LOG.debug("epoch %d ended after %d batches", self._epoch, self._batch)
        self._any = self._any or self._batch > 0
        self._steps_before = self.step
        self._epoch += 1
        self._batch = self._left_out = self._errors = 0
        self._segments = ()
        self._halt()

    def _at_end_of(self, error: Exception) -> Exception:
        """The error, and the next call begins this epoch again."""
        self._halt()
        return error

    def _halt(self) -> None:
        self._started = None
        self._iterator = _ENDED

    # Errors of the loader

    def _failed(self, error: Exception) -> None:
        """Raise the error, or see to it that the next batch can be fetched."""
        here = (self._epoch, self._batch)
        if isinstance(error, (LoaderStateError, EmptyLoaderError, OneShotLoaderError)):
            self._go_to(self._ledger_or(here), self._segments)
            raise error
        if self._on_error == "raise":
            again, self._failed_at = self._failed_at == here, here
            if again:
                _LOG.warning("batch %d of epoch %d failed twice; it is left out by the next call", here[1], here[0])
                self._leave_out(error)
            else:
                self._try_again()
            raise error
        self._errors += 1
        if self._errors > self._max_errors:
            _LOG.error("more than max_errors=%d errors in epoch %d", self._max_errors, here[0])
            self._try_again()
            raise error
        answer = self._on_error(error, *here) if callable(self._on_error) else self._on_error
        if answer not in ("skip", "retry"):
            raise ValueError(f"on_error must return 'skip' or 'retry', not {answer!r}") from error
        if answer == "retry":
            self._try_again()
        else:
            _LOG.warning("batch %d of epoch %d is left out: %s: %s", here[1], here[0], type(error).__name__, error)
            self._leave_out(error)

    def _try_again(self) -> None:
        """Begin a new iterator at this batch, where that is possible; the old one may be broken."""
        ledger = self._ledger()
        if (ledger.loader is None or not self._adapter.survives) and not _is_once_only(self.loader):
            self._go_to(ledger, self._segments)

    def _leave_out(self, error: Exception) -> None:
        """Go on behind this batch."""
        adapter = self._adapter
        if self._started is not None and adapter.survives and not _ended_by_error(self._started.raw):
            self._batch += 1
            self._left_out += 1
            return
        if not adapter.by_index:
            self._try_again()
            _LOG.error("%s ended with the error, and cannot be begun behind it", self._name)
            raise error
        ledger = self._ledger()
        self._batch += 1
        self._left_out += 1
        values = {**vars(ledger), "batch": self._batch, "left_out": self._left_out}
        self._go_to(Ledger(**values), self._segments)

    # The ledger

    def _shape(self) -> Ledger:
        """A ledger with what depends on the loader alone."""
        adapter = self._adapter
        known = adapter.plan is not None
        return Ledger(
            world_size=adapter.world_size,
            batch_size=adapter.batch_size,
            length=adapter.plan.length if adapter.plan is not None else adapter.length(),
            samples=0 if known else None,
        )

    def _ledger(self) -> Ledger:
        shape = self._shape()
        resumed, started = self._resumed, self._started
        segments = self._segments or ((shape.world_size, shape.batch_size, 0),)
        own = None
        if started is not None and self._batch > self._left_out:
            own = started.ahead.state if started.ahead is not None else self._adapter.state()
            counted = self._adapter.counted(own)
            if counted is not None and counted != self._batch - self._left_out:
                raise LoaderStateError(
                    f"the loader's own state says that {counted} batches of epoch {self._epoch} were handed out, but "
                    f"{self._batch - self._left_out} were handed out here: somebody else iterates {self._name}, too"
                )
        elif resumed is not None:
            own = resumed.loader
        first = started.run.first if started is not None else resumed.first if resumed is not None else None
        return Ledger(
            seed=self.seed,
            epoch=self._epoch,
            batch=self._batch,
            step=self.step,
            samples=self._samples(),
            world_size=shape.world_size,
            batch_size=shape.batch_size,
            length=shape.length,
            left_out=self._left_out,
            segments=segments,
            first=first,
            generators=self._begin_states(),
            loader=own,
        )

    def _ledger_or(self, here: tuple[int, int]) -> Ledger:
        """The ledger; without the loader's own state if that is what is wrong."""
        try:
            return self._ledger()
        except LoaderStateError:
            return Ledger(seed=self.seed, epoch=here[0], batch=here[1], step=self.step)

    def _begin_states(self) -> tuple[Any, ...] | None:
        """The states of the user's generators when this epoch began, or will."""
        if self._started is not None:
            return self._started.states
        if self._resumed is not None and self._resumed.generators is not None:
            return self._resumed.generators
        return self._parts.states()

    def _samples(self) -> int | None:
        plan = self._adapter.plan
        if plan is None:
            return None
        start = self._segments[-1][2] if self._segments else 0
        return start + plan.handed_out(self._batch, plan.length - start)

    def _go_to(self, ledger: Ledger, segments: tuple[tuple[int, int | None, int], ...]) -> None:
        """Begin anew at that place with the next call."""
        self._resumed = ledger
        self._ahead = None
        self._epoch, self._batch, self._left_out = ledger.epoch, ledger.batch, ledger.left_out
        self._steps_before = ledger.step - ledger.batch + ledger.left_out
        self._segments = segments
        self._halt()

    def _order(self, ledger: Ledger) -> list[Any]:
        """The order of the epoch at hand; generators and samplers are left as they were."""
        indices = self._adapter.indices
        before = self._parts.states()
        given = [generator.get_state() for generator in self._parts.given]
        self._tell(ledger.epoch)
        if ledger.generators is not None:
            self._parts.restore(tuple(ledger.generators))
        try:
            return indices.order(Place(self.seed, ledger.epoch))  # type: ignore[no-any-return]
        finally:
            self._parts.restore(before)
            for generator, state in zip(self._parts.given, given, strict=True):
                generator.set_state(state)

    def _require_same_order(self, ledger: Ledger, segment: tuple[int, int | None, int]) -> None:
        """Raise a LoaderStateError unless the first batch of a segment is what the ledger says that one rank had."""
        plan = self._adapter.plan
        world_size, batch_size, start = segment
        samples = (ledger.samples or 0) - start
        if plan is None or ledger.first is None or samples < world_size * (batch_size or 1):
            return  # of less than a whole step, the ranks may have had samples twice
        seed, self.seed = self.seed, ledger.seed
        try:
            order = self._order(ledger)
        finally:
            self.seed = seed
        rank, expected = ledger.first
        first = next(plan.batches(order[start:], world_size, rank, batch_size))
        if checksum([first] if batch_size is None else first) != expected:
            raise LoaderStateError(
                f"epoch {ledger.epoch} has another order than when the state was saved, so what is left of it is not "
                f"known here: it is ordered by {type(plan.sampler).__name__}; is it the same sampler, with the same "
                "seed, on every number of ranks?"
            )

    def _draw_all(self, epoch: int, states: tuple[Any, ...] | None) -> None:
        """Draw the indices of a whole epoch, for the generators that the next epoch goes on with."""
        self._tell(epoch)
        if states is not None:
            self._parts.restore(tuple(states))
        indices = self._adapter.indices
        indices.place = Place(self.seed, epoch)
        for _ in indices:
            pass


class _Epoch:
    """An epoch that is being iterated."""

    def __init__(self, epoch: int, raw: Iterator[Any], states: tuple[Any, ...], run: Run) -> None:
        self.epoch = epoch
        self.raw = raw  # of the loader
        self.states = states  # of the user's generators when it began
        self.run = run
        self.ahead: OneAhead | None = None


class _Only(Iterator[_T]):
    """Asks for the next batch and nothing else; some iterators begin anew when ``iter`` is called on them."""

    def __init__(self, iterator: Iterator[_T]) -> None:
        self._iterator = iterator

    def __next__(self) -> _T:
        return next(self._iterator)


class _Watched(Iterator[_T]):
    """Calls a function once, when all indices of the epoch have been drawn."""

    def __init__(self, iterator: Iterator[_T], run: Run, method: weakref.WeakMethod[Callable[[], None]]) -> None:
        self._iterator, self._run, self._method = iterator, run, method
        self._called = False

    def __next__(self) -> _T:
        batch = next(self._iterator)
        if self._run.exhausted and not self._called:
            self._called = True
            call = self._method()
            if call is not None:
                call()
        return batch


def _is_builtin_iterator(loader: object) -> bool:
    return isinstance(loader, Iterator) and type(loader).__module__ in ("builtins", "itertools")


def _is_once_only(loader: object) -> bool:
    return isinstance(loader, GeneratorType) or _is_builtin_iterator(loader)


def _ended_by_error(raw: Any) -> bool:
    """Whether an iterator is a generator, or stands around one: it gives nothing after an exception."""
    return isinstance(raw, GeneratorType) or isinstance(getattr(raw, "iterator", None), GeneratorType)


def _check_choice(name: str, value: Any, choices: tuple[str, ...], *, or_function: bool = False) -> None:
    if or_function and callable(value):
        return
    if value not in choices:
        more = " or a function" if or_function else ""
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}{more}, not {value!r}")


def _check_number(name: str, value: int | None) -> None:
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, not {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{name} must be at least 0, not {value}")
