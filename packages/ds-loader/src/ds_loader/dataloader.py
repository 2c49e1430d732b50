"""``RepeatingLoader``: a loader that never ends, reshuffles every epoch, and resumes exactly on any number of ranks.

One class, whose parts share the place in the stream: how epochs begin and end, errors of the loader, the ledger.
"""

from __future__ import annotations

import copy
import logging
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from types import TracebackType
from typing import Any, Generic, Literal, TypeVar

import torch

from ds_loader import _ranks
from ds_loader._arguments import check_choice, check_number
from ds_loader._device import DeviceCopier, OneAhead
from ds_loader._epoch import Epoch, Only, OutOfStep, Watched, ended_by_error
from ds_loader._ledger import Ledger
from ds_loader._order import Coverage, coverage
from ds_loader._parts import parts_of
from ds_loader._random import seed_from_torch
from ds_loader.adapters import Place, Run, adapter_of
from ds_loader.adapters.base import checksum, is_once_only, shut_down
from ds_loader.errors import EmptyLoaderError, LoaderStateError, LoaderWarning, OneShotLoaderError

__all__ = ["RepeatingLoader"]

_T = TypeVar("_T")
_LOG = logging.getLogger("ds.loader")
_ENDED: Iterator[Any] = iter(())
# Iterators of these modules give themselves when ``iter`` is called on them.
_SAFE = ("builtins", "itertools", "ds_loader._random", "ds_loader._device", "ds_loader._epoch")

OnError = Callable[[Exception, int, int], Literal["skip", "retry"]]


class RepeatingLoader(Generic[_T]):
    """An endless iterator over a loader, one epoch after the other.

    Before each epoch ``set_epoch`` is called on every part of the loader that has it, at any depth, once. Code that
    draws from the global generators of torch, random and numpy while it orders samples, as PyTorch's random samplers
    do, draws from private ones instead, which are seeded by (seed, epoch). The global ones are left as they are. Ranks
    start their epochs alone, unless ``on_uneven`` asks for more.

    What a loader cannot do is told once, at construction, by a ``LoaderWarning``.

    Args:
        loader: anything that can be iterated more than once; or, with ``max_steps`` or ``max_epochs=1``, a generator.
            The README lists libraries.
        set_epoch: ``"auto"``; ``"off"`` to call nothing; or a function that is called with the epoch instead.
        seed: of all orders. By default it follows from the state of torch's global generator, and generators that the
            samplers already have are left alone. If given, it seeds those, too. It has to be the same on all ranks.
        max_epochs, max_steps: after so many epochs, or batches on this rank, iteration ends with ``StopIteration``.
        on_error: what happens if loading a batch raises. ``"raise"``: the error is passed on and the next call tries
            the batch again; one that fails twice in a row is left out by the call after. ``"skip"``: it is left out,
            with a warning. A function is called with (error, epoch, batch) and returns ``"skip"`` or ``"retry"``, or
            raises. Where one rank loads for all, as in Accelerate's dispatcher, an error is final.
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
        check_choice("set_epoch", set_epoch, ("auto", "off"), or_function=True)
        check_choice("on_error", on_error, ("raise", "skip"), or_function=True)
        check_choice("on_uneven", on_uneven, ("cycle", "stop", "raise"))
        check_number("seed", seed)
        check_number("max_epochs", max_epochs)
        check_number("max_steps", max_steps)
        check_number("max_errors", max_errors, optional=False)
        if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
            raise TypeError(f"loader must be iterable, such as a DataLoader or a list, not {type(loader).__name__}")
        if max_steps is None and max_epochs != 1 and is_once_only(loader):
            raise OneShotLoaderError(
                f"loader is a {type(loader).__name__}, which can be iterated only once: pass the DataLoader or list "
                "behind it, or an object whose __iter__ starts anew at every call; or pass max_steps or max_epochs=1"
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
        if self._adapter.in_step and on_error != "raise":
            raise ValueError(f"on_error must be 'raise' for a {self._name}: all ranks go through its batches together")
        for limit in self._adapter.limits:
            warnings.warn(f"{self._name}: {limit}", LoaderWarning, stacklevel=2)

        self._iterator: Iterator[_T] = _ENDED
        self._started: Epoch | None = None  # the epoch at hand, if it is being iterated
        self._ahead: Epoch | None = None  # the next one, if its workers have been started
        self._resumed: Ledger | None = None  # where to go on; not begun yet
        self._epoch = 0
        self._batch = 0
        self._steps_before = 0  # batches handed out before those that _batch counts
        self._left_out = 0
        self._segments: tuple[tuple[int, int | None, int], ...] = ()
        self._errors = 0  # skipped or retried in this epoch
        self._failed_at: tuple[int, int] | None = None
        self._agreed: int | None = None  # what `_shortest` found: a rank may begin an epoch again alone
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
                if self._failed(error):
                    raise
                continue
            self._advance()

    def skip(self, count: int) -> None:
        """Go on ``count`` batches later, over the ends of epochs too, but not over ``max_epochs`` and ``max_steps``.

        They are passed over by their indices where the loader has indices, else they are loaded and dropped.

        Raises:
            ValueError: ``count`` is negative.
            TypeError: it is no integer.
        """
        check_number("count", count, optional=False)
        length = self._adapter.length()
        if not self._adapter.by_index or not length or len(self._segments) > 1 or self._on_uneven != "cycle":
            for _ in islice(self, count):
                pass
            return
        if self._max_steps is not None:
            count = min(count, max(self._max_steps - self.step, 0))
        if self._max_epochs is not None:
            count = min(count, max((self._max_epochs - self._epoch) * length - self._batch, 0))
        epoch, batch = self._epoch, self._batch + count
        ledger = replace(self._ledger(), batch=batch, step=self.step + count)
        states = ledger.generators
        while batch > length:
            if self._parts.own and not self._seeded:  # the next order follows from this one
                self._draw_all(epoch, states)
                states = None
            epoch, batch = epoch + 1, batch - length
            ledger = Ledger(seed=self.seed, seeded=self._seeded, epoch=epoch, batch=batch, step=ledger.step)
        self._go_to(ledger, self._segments)

    def close(self) -> None:
        """End the loader's worker processes. The place is kept: the next batch starts them anew."""
        ledger = self._ledger_or((self._epoch, self._batch))
        self._end_workers()
        self._go_to(ledger, self._segments)

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
        if self._seeded and (ledger.seed, ledger.seeded) != (self.seed, True):
            differences["seed"] = f"seed: {ledger.seed if ledger.seeded else None} in the state, {self.seed} here"
        if differences:
            told = "the state does not fit: " + "; ".join(differences.values())
            divided = {"world_size", "batch_size"}
            if divided & differences.keys() and (ledger.samples is None or here.samples is None):
                whose = "the loader that was saved" if ledger.samples is None else self._name
                raise LoaderStateError(
                    f"{told}. The order of {whose} over all ranks is not known, so what is left of the epoch cannot be "
                    "divided anew"
                )
            if not differences.keys() <= divided:
                raise LoaderStateError(told)
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
        segments = ledger.segments or ((ledger.world_size, ledger.batch_size, 0),)
        if differences:
            _LOG.info("going on behind %s of %s samples; %s", ledger.samples, ledger.length, list(differences.values()))
            behind = ledger.samples or 0
            went = tuple(segment for segment in segments if segment[2] < behind)
            segments = (*went, (here.world_size, here.batch_size, behind))
            ledger = replace(ledger, batch=0, left_out=0, first=ledger.first if went else None)
            self._require_same_order(ledger, segments[0])
        self.seed, self._seeded = ledger.seed, ledger.seeded
        self._failed_at = self._agreed = None
        self._go_to(copy.deepcopy(ledger), segments)

    def verify(self, group: Any = None) -> Coverage:
        """Prove from the ledger that every sample of this epoch is handed out once, over all ranks.

        The order of the epoch is drawn again and cut for every rank, as it was and as it will be; the samples are
        counted. With ``group``, all of its ranks call this, and their ledgers and orders are compared as well.

        Returns:
            The counts. ``lost`` is ``dropped``, and ``twice`` is 0 unless samples were repeated to even out ranks.

        Raises:
            LoaderStateError: samples are lost, or more come twice than even out the ranks; or the ranks differ.
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
        evened = max(ranks * ((size or 1) if plan.shard is not None else 1) for ranks, size, _ in segments)
        if found.twice >= evened:
            raise LoaderStateError(f"{found.twice} samples of epoch {found.epoch} come twice: {found}")
        return found

    # How an epoch is begun and ended

    def _advance(self) -> None:
        """The iterator has ended: end its epoch, or begin the one at hand.

        Raises:
            StopIteration: that was all.
        """
        if self._max_steps is not None and self.step >= self._max_steps:
            raise StopIteration
        if self._started is not None and self._ended_early(self._started):
            message = f"the dataset of the loader ({self._name}) raised StopIteration"
            if self._failed(RuntimeError(message)):
                raise RuntimeError(message)
        elif self._started is not None:
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
            iterator = Watched(iterator, started.run, weakref.WeakMethod(self._start_next))
        started.batches, started.begun_at, started.until = iterator, self._batch, self._shortest()
        self._started = started
        self._iterate(started)

    def _iterate(self, started: Epoch) -> None:
        """Hand out the rest of an epoch, as far as the limits allow."""
        left = [] if started.until is None else [started.until - self._batch]
        if self._max_steps is not None:
            left.append(self._max_steps - self.step)
        iterator = islice(started.batches, max(min(left), 0)) if left else started.batches
        self._iterator = iterator if type(iterator).__module__ in _SAFE else Only(iterator)

    def _start(self, epoch: int, at: Ledger | None) -> Epoch:
        """Tell the parts which epoch it is, and iterate the loader."""
        run = Run()
        place = Place(self.seed, epoch, run=run)
        if at is not None:
            segments = self._segments or ((1, None, 0),)
            run.first = at.first
            place = Place(
                self.seed,
                epoch,
                batch=at.batch,
                seen=segments[-1][2],
                own=copy.deepcopy(at.loader),
                first=at.first,
                cut=segments[0][:2],
                left_out=at.left_out,
                run=run,
            )
        try:
            self._tell(epoch, at.generators if at is not None else None)
            self._adapter.synchronize()
            states = self._parts.states()
            return Epoch(epoch, self._adapter.start(place), states, run)
        except StopIteration as error:
            raise RuntimeError(f"the loader ({self._name}) raised StopIteration when it was begun") from error

    def _start_next(self) -> None:
        over = self._max_epochs is not None and self._epoch + 1 >= self._max_epochs
        length = self._adapter.length()
        if self._max_steps is not None and length is not None:
            over = over or self._max_steps - self.step <= length - self._batch
        if self._ahead is None and not over:
            self._ahead = self._start(self._epoch + 1, None)

    def _tell(self, epoch: int, states: tuple[Any, ...] | None = None) -> None:
        """Set the epoch, and seed the generators; those that are not seeded here get their states, if there are any."""
        if callable(self._set_epoch):
            self._set_epoch(epoch)
        elif self._set_epoch == "auto":
            for set_epoch in self._parts.epoch_setters():
                set_epoch(epoch)
        if self._seeded:
            self._parts.seed(self.seed, epoch)
        elif states is not None:
            self._parts.restore(states)

    def _shortest(self) -> int | None:
        """The batch at which this epoch ends for the shortest rank, if it ends there for all."""
        if self._on_uneven != "cycle" and self._agreed is None:
            length = self._epoch_length()
            self._agreed = _ranks.shortest_epoch(
                self._epoch, self._batch, length, self._group, must_be_even=self._on_uneven == "raise"
            )
        return self._agreed

    def _ended_early(self, started: Epoch) -> bool:
        """Whether an iterator of PyTorch ended before its indices did: the dataset raised StopIteration."""
        if self._adapter.indices is None or type(started.raw).__module__ != "torch.utils.data.dataloader":
            return False
        if started.until is not None and self._batch >= started.until:
            return False
        asked: int = getattr(started.raw, "_send_idx", 0)  # of its workers
        return not started.run.exhausted or asked > self._batch - started.begun_at

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
        if (self._batch == 0 and not cut) or (is_once_only(self.loader) and self._max_epochs != 1):
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
        self._agreed = None
        self._halt()

    def _at_end_of(self, error: Exception) -> Exception:
        """The error, and the next call begins this epoch again."""
        self._halt()
        return error

    def _halt(self) -> None:
        self._started = None
        self._iterator = _ENDED

    # Errors of the loader

    def _failed(self, error: Exception) -> bool:
        """See to it that the next batch can be fetched.

        Returns:
            Whether the caller has to raise the error. It is not raised here: its traceback would hold this frame, and
            this frame the error, in a cycle that keeps worker processes alive.
        """
        here = (self._epoch, self._batch)
        if self._adapter.in_step:
            self._iterator = OutOfStep()
            return True
        if isinstance(error, (LoaderStateError, EmptyLoaderError, OneShotLoaderError)):
            self._go_to(self._ledger_or(here), self._segments)
            return True
        if self._on_error == "raise":
            again, self._failed_at = self._failed_at == here, here
            if not again:
                self._try_again()
            elif self._leave_out():
                _LOG.warning("batch %d of epoch %d failed twice; it is left out by the next call", here[1], here[0])
            return True
        self._errors += 1
        if self._errors > self._max_errors:
            _LOG.error("more than max_errors=%d errors in epoch %d", self._max_errors, here[0])
            self._try_again()
            return True
        try:
            answer = self._on_error(error, *here) if callable(self._on_error) else self._on_error
            if answer not in ("skip", "retry"):
                raise ValueError(f"on_error must return 'skip' or 'retry', not {answer!r}") from error
        except Exception as raised:
            self._try_again()
            if isinstance(raised, StopIteration):
                raise RuntimeError("on_error raised StopIteration") from raised
            raise
        traceback.clear_frames(error.__traceback__)  # torch's hold the error, in a cycle that keeps workers alive
        if answer == "retry":
            self._try_again()
            return False
        name, text = type(error).__name__, str(error)  # a log record may be kept: not with the error and its frames
        _LOG.warning("batch %d of epoch %d is left out: %s: %s", here[1], here[0], name, text)
        return not self._leave_out()

    def _try_again(self) -> None:
        """Begin a new iterator at this batch, where that is possible; the old one may be broken."""
        ledger = self._ledger()
        if (ledger.loader is None or not self._adapter.survives) and not is_once_only(self.loader):
            self._end_workers()
            self._go_to(ledger, self._segments)

    def _leave_out(self) -> bool:
        """Go on behind this batch; False if that cannot be done."""
        adapter = self._adapter
        if self._started is not None and adapter.survives and not ended_by_error(self._started.raw):
            self._batch += 1
            self._left_out += 1
            self._iterate(self._started)  # a limit around the iterator ended with the error
            return True
        if not adapter.by_index:
            self._try_again()
            _LOG.error("%s ended with the error, and cannot be begun behind it", self._name)
            return False
        ledger = self._ledger()
        self._batch += 1
        self._left_out += 1
        self._end_workers()
        self._go_to(replace(ledger, batch=self._batch, left_out=self._left_out), self._segments)
        return True

    def _end_workers(self) -> None:
        for started in (self._started, self._ahead):
            if started is not None:
                shut_down(started.raw)
        self._adapter.close()

    # The ledger

    def _shape(self) -> Ledger:
        """A ledger with what depends on the loader alone."""
        adapter = self._adapter
        return Ledger(
            world_size=adapter.world_size,
            batch_size=adapter.batch_size,
            length=adapter.size(),
            workers=adapter.stream_workers,
            samples=adapter.samples(0, 0),
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
        return replace(
            shape,
            seed=self.seed,
            seeded=self._seeded,
            epoch=self._epoch,
            batch=self._batch,
            step=self.step,
            samples=self._adapter.samples(self._batch, segments[-1][2]),
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
            return Ledger(seed=self.seed, seeded=self._seeded, epoch=here[0], batch=here[1], step=self.step)

    def _begin_states(self) -> tuple[Any, ...] | None:
        """The states of the user's generators when this epoch began, or will."""
        if self._started is not None:
            return self._started.states
        if self._resumed is not None and self._resumed.generators is not None:
            return self._resumed.generators
        return self._parts.states()

    def _go_to(self, ledger: Ledger, segments: tuple[tuple[int, int | None, int], ...]) -> None:
        """Begin anew at that place with the next call."""
        self._adapter.interrupt()
        self._resumed = ledger
        self._ahead = None
        self._epoch, self._batch, self._left_out = ledger.epoch, ledger.batch, ledger.left_out
        self._steps_before = ledger.step - ledger.batch + ledger.left_out
        self._segments = segments
        self._halt()

    def _order(self, ledger: Ledger) -> list[Any]:
        """The order of the epoch that a ledger is in; generators are left as they were."""
        indices = self._adapter.indices
        before = self._parts.states()
        self._tell(ledger.epoch, ledger.generators)
        try:
            return indices.order(Place(ledger.seed, ledger.epoch))  # type: ignore[no-any-return]
        finally:
            self._parts.restore(before)

    def _require_same_order(self, ledger: Ledger, segment: tuple[int, int | None, int]) -> None:
        """Raise a LoaderStateError if a rank's first batch in an epoch would have had other samples here."""
        if ledger.first is None or self._adapter.indices is None:
            return
        place = Place(ledger.seed, ledger.epoch, first=ledger.first, cut=segment[:2])
        self._adapter.indices.check_first(self._order(ledger), place)

    def _draw_all(self, epoch: int, states: tuple[Any, ...] | None) -> None:
        """Draw the indices of a whole epoch, for the generators that the next epoch goes on with."""
        self._tell(epoch, states)
        indices = self._adapter.indices
        if indices is not None:
            indices.place = Place(self.seed, epoch)
            for _ in indices:
                pass
