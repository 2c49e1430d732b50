"""This rank's shards of one quantity of many parameters: found, agreed on by all ranks, gathered and written."""

from __future__ import annotations

import contextlib
import hashlib
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from operator import attrgetter, is_
from typing import TypeVar

import torch
import torch.distributed as dist

from ds_fragment import _flight, kernels
from ds_fragment._collectives import CollectiveError
from ds_fragment.collective.agree import agree
from ds_fragment.collective.check import meet, time_limit
from ds_fragment.collective.digest import checksums
from ds_fragment.collective.exchange import Locate, Shards as Found, fetch, gather
from ds_fragment.collective.plan import Plan, bucket_bytes_for
from ds_fragment.collective.stages import gather_by_stages
from ds_fragment.engines.base import Adapter, held_by, is_state
from ds_fragment.engines.state import different_state
from ds_fragment.engines.versions import engine_changed, known_engine
from ds_fragment.errors import FragmentError, GradientUnavailableError, RankMismatchError, StateKeyError
from ds_fragment.record import record_of, records_of, registry
from ds_fragment.sharding import Sharding

K = TypeVar("K")

_engine, _generation, _version, _was = map(attrgetter, ("engine", "generation", "version", "home"))


class Shards:
    """One quantity of many parameters: how each is sharded, and this rank's shards.

    [Note: agreement] How optimizer state is sharded can depend on the optimizer, which may keep it otherwise on one
    rank, or not at all. The ranks that hold a parameter agree on it before the first exchange, so that the constructor
    is collective then. Later calls go by what was agreed: a rank on which that is not so any more sends an error
    instead of its shard, and the next call agrees anew. It does so only where all ranks of the group that shares the
    parameter know of the error, or some would agree while others read. State and gradients that each of several ranks
    holds whole are compared before every read, by one small collective for each group: see [Note: same] of `state`.

    Args:
        params: parameters of the model; a gathered copy stands for the parameter that it is a copy of.
        what: ``"value"``, ``"lp"``, ``"grad"``, or the key of an optimizer state.
        call: what the user called, for the messages of checked calls.

    Attributes:
        params: the parameters.
        adapters: of each, the engine's.
        homes: of each, how its value is sharded.
        shardings: of each, how the quantity is sharded.
        error: what this rank cannot tell or found wrong; it sends it instead of its first shards.
        told: the groups whose ranks all know of an error.
        checked: whether the call is made in `checked`.
    """

    def __init__(self, params: Sequence[torch.Tensor], what: str, call: str = "a read") -> None:
        self.what = what
        self.params: list[torch.Tensor]
        self.adapters: list[Adapter]
        self.homes: list[Sharding]
        self.error: Exception | None = None
        self.told: set[dist.ProcessGroup] = set()
        try:
            if not self._find_as_before(params):
                self._find(params)
        except (AttributeError, KeyError):
            with known_engine():
                raise
        self.shardings = self.homes if what == "value" else self._found()
        self.checked = time_limit() is not None
        if self.checked:
            meet(list(dict.fromkeys(group for home in self.homes for group in home.groups)), lambda: self._words(call))
        if is_state(what):
            with self.named_if_broken(range(len(self.params))):
                self._agree()
        if what == "grad":
            self._warn_of_unknown()
            self._compare(_unreduced)
        elif is_state(what) and not call.startswith("set_"):  # a write makes it the same
            self._compare(partial(different_state, what))

    def _find_as_before(self, params: Sequence[torch.Tensor]) -> bool:
        """Take what the records say, if all parameters are one engine's and all is as it was."""
        try:
            records = records_of(params)
        except AttributeError:  # something is no tensor
            return False
        engines = set(map(_engine, records))
        if len(engines) != 1 or None in engines or set(map(_generation, records)) != {registry.generation}:
            return False
        adapter: Adapter = engines.pop()
        try:
            versions = adapter.versions(params)
        except (FragmentError, AttributeError, KeyError):
            return False
        if versions is None or versions != list(map(_version, records)):
            return False
        self.params, self.adapters = list(params), [adapter] * len(records)
        self.homes = list(map(_was, records))
        return True

    def _find(self, params: Sequence[torch.Tensor]) -> None:
        """Ask which engine holds each parameter and how its value is sharded, and note it in the records."""
        held = list(map(held_by, params))
        self.adapters, self.params = [adapter for adapter, _ in held], [own for _, own in held]
        for adapter in dict.fromkeys(self.adapters):
            adapter.prepare([own for by, own in held if by is adapter])
        self.homes = list(map(self._home, self.adapters, self.params))
        for param, (adapter, own) in zip(params, held, strict=True):
            record, versions = record_of(own), adapter.versions([own])
            if own is param and versions is not None and self.error is None:
                record.engine, record.version, record.generation = adapter, versions[0], registry.generation

    def _home(self, adapter: Adapter, param: torch.Tensor) -> Sharding:
        """How the value is sharded; as before where the engine cannot tell any more, which is then an error."""
        record = record_of(param)
        try:
            record.home = adapter.sharding(param, "value")
        except (FragmentError, AttributeError, KeyError) as error:
            if record.home is None:  # nothing tells whom this rank would have to tell
                raise
            self._note(error)
        return record.home

    def _found(self) -> list[Sharding]:
        """How the quantity is sharded, of each parameter."""
        try:
            if len(set(self.adapters)) == 1 and self.adapters[0].like_values(self.params, self.what):
                return self.homes
        except (FragmentError, AttributeError, KeyError):
            pass  # it is raised again below, as an error of one parameter
        return [self._sharding(item) for item in range(len(self.params))]

    def _sharding(self, item: int) -> Sharding:
        try:
            return self.adapters[item].sharding(self.params[item], self.what)
        except (FragmentError, AttributeError, KeyError) as error:
            self._note(error)
            return self.homes[item]

    def _note(self, error: FragmentError | AttributeError | KeyError) -> None:
        """Keep an error to be sent to the other ranks."""
        told = error if isinstance(error, FragmentError) else engine_changed(error)
        if told is None:
            raise error
        if told is not error:
            told.__cause__ = error
        self.error = self.error or told

    def _agree(self) -> None:
        """See [Note: agreement]; the ranks need not agree on what no group shares."""
        known = [self._known(item) for item in range(len(self.params))]
        if self.error is None and all(map(is_, known, self.shardings)):
            return
        new, others = [], dict[tuple[dist.ProcessGroup, ...], list[int]]()
        for item, home in enumerate(self.homes):
            if known[item] is None and self.what not in record_of(self.params[item]).agreed:
                new.append(item)
            else:
                others.setdefault(home.shards, []).append(item)
        asked = [(new, [self.homes[item].groups for item in new])] if new else []
        for groups, items in others.items():
            if groups and any(known[item] is None for item in items):
                asked.append((items, [groups] * len(items)))
        for items, scopes in asked:
            if self._agree_on(items, scopes):
                for item in items:
                    known[item] = self.shardings[item]
        for item, (before, now) in enumerate(zip(known, self.shardings, strict=True)):
            if self.error is None and before is not None and before is not now and before != now:
                self.error = StateKeyError(
                    f"'{self.what}' of {self.name(item)} is not kept as at the last read (then {before.dtype} of shape "
                    f"{tuple(before.shape)}, now {now.dtype} of shape {tuple(now.shape)}): call again, so that the "
                    "ranks agree anew"
                )
        if self.error is not None:
            pairs = zip(self.homes, known, strict=True)
            self.shardings = [home if sharding is None else sharding for home, sharding in pairs]

    def _known(self, item: int) -> Sharding | None:
        """How the state is sharded, as far as that need not be agreed on."""
        home = self.homes[item]
        if not home.shards:
            return self.shardings[item]
        agreed, then = record_of(self.params[item]).agreed.get(self.what, (None, None))
        return agreed if then is home or then == home else None

    def _agree_on(self, items: Sequence[int], scopes: Sequence[Sequence[dist.ProcessGroup]]) -> bool:
        """Whether the ranks of some groups found the state of some parameters alike; all of them call it."""
        key = zlib.crc32(self.what.encode())
        shardings = [self.shardings[item] for item in items]
        kinds = [hash((key, *each.shape, each.dtype.itemsize, each.alone)) for each in shardings]
        groups = list(dict.fromkeys(group for scope in scopes for group in scope))
        name = lambda i: f"the state asked of {self.name(items[i])}"  # noqa: E731
        try:
            agree(self.error, groups, self.device(), kinds, name, scopes, _kept_otherwise)
        except FragmentError as error:
            self.error = error
            return False
        for item in items:
            record_of(self.params[item]).agreed[self.what] = (self.shardings[item], self.homes[item])
        return True

    def _doubt(self, told: set[dist.ProcessGroup]) -> None:
        """Have the next call agree anew, among those ranks of which all know that they have to."""
        if is_state(self.what):
            for param, home in zip(self.params, self.homes, strict=True):
                agreed = record_of(param).agreed
                if home.last.group in told and self.what in agreed:
                    agreed[self.what] = (None, home)

    def forget(self) -> None:
        """As if the ranks had never agreed; to be called where all that hold the parameters do."""
        for param in self.params:
            record_of(param).agreed.pop(self.what, None)

    def _warn_of_unknown(self) -> None:
        """Among several ranks, say that nothing tells over which of them a whole gradient is reduced."""
        if self.error is not None or not dist.is_initialized() or dist.get_world_size() == 1:
            return
        for item, (param, sharding) in enumerate(zip(self.params, self.shardings, strict=True)):
            if (
                sharding.alone
                and not registry.is_named(param)
                and param.requires_grad
                and all(group.size() == 1 for group in self._scope(item))
            ):
                warnings.warn(
                    f"the gradient of {self.name(item)} is this rank's own, and nothing tells whether it is reduced "
                    "over the ranks: call attach(model, optimizer) with the model as its engine wrapped it",
                    stacklevel=5,
                )
                return

    def _compare(self, differ: Callable[[str], FragmentError]) -> None:
        """Have the ranks compare what each of them holds whole; all of them call it.

        State that differs is each rank's own, see [Note: same] of `state`. A gradient that differs is not reduced: no
        engine tells for certain whether the last backward pass that came to a parameter reduced it.
        """
        scopes = {
            item: scope
            for item, sharding in enumerate(self.shardings)
            if sharding.alone and (scope := tuple(group for group in self._scope(item) if group.size() > 1))
        }
        if not scopes:
            return
        items, error, sums = list(scopes), self.error, list[int]()
        if error is None:
            try:
                for bucket in Plan([self.shardings[item] for item in items], self._bucket_bytes(None)).buckets:
                    sums += checksums(self.pieces([items[at] for at in bucket.items]))
            except Exception as caught:
                error = caught
        groups = list(dict.fromkeys(group for scope in scopes.values() for group in scope))
        name = lambda i: self.name(items[i])  # noqa: E731
        with self.named_if_broken(items):
            try:
                agree(error, groups, self.device(), sums, name, list(scopes.values()), differ)
            except FragmentError as told:
                self.error = told

    def _words(self, call: str) -> str:
        """The call in words, different for different parameters."""
        names = [self.name(item) for item in range(len(self.params))]
        shapes = [(name, *home.shape) for name, home in zip(names, self.homes, strict=True)]
        digest = hashlib.sha256(repr(shapes).encode()).hexdigest()[:8]
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        return f"{call}('{self.what}') with {shown or 'no parameters'} [{digest}]"

    def name(self, item: int) -> str:
        """The parameter's name for messages."""
        return registry.name_of(self.params[item])

    def local(self, item: int) -> torch.Tensor | None:
        """This rank's shard, or the error."""
        return self.pieces([item])[0]

    def pieces(self, items: Sequence[int]) -> Found:
        """This rank's shards of some of the parameters, or the error."""
        if self.error is not None:
            raise self.error
        adapters = self.adapters
        first = adapters[items[0]] if items else None
        try:
            if first is not None and all(adapters[item] is first for item in items):
                found = first.pieces([self.params[item] for item in items], self.what)
            else:
                found = [adapters[item].local(self.params[item], self.what) for item in items]
        except (AttributeError, KeyError):
            with known_engine():
                raise
        for item, shard in zip(items, found, strict=True):
            held, expected = 0 if shard is None else shard.numel(), self.shardings[item].held
            if held != expected:
                raise FragmentError(f"{self.name(item)}: {held} elements are here where its layout says {expected}")
        return found

    def full(
        self,
        keys: Sequence[K],
        bucket_bytes: int | None = None,
        dst: int | None = None,
        locate: Locate | None = None,
        dtype: torch.dtype | None = None,
    ) -> Iterator[tuple[K, torch.Tensor]]:
        """The whole tensors that are delivered here, each with its key; all ranks must take all of them.

        Args:
            keys: of each parameter, what is yielded beside it.
            bucket_bytes: see `iter_full`.
            dst: see `iter_full`.
            locate: gives this rank's shards of some items instead of `pieces`.
            dtype: what shards of more bytes an element are cast to before they travel.
        """
        _flight.check_earlier()
        shardings = self.shardings if dtype is None else [_narrowed(sharding, dtype) for sharding in self.shardings]
        plan = Plan([sharding.last for sharding in shardings], self._bucket_bytes(bucket_bytes))
        if any(sharding.stages for sharding in shardings):
            buckets = gather_by_stages(shardings, plan, locate or self.pieces, dst=dst, told=self.told)
        else:
            buckets = gather(plan, locate or self.pieces, dst=dst, told=self.told)
        for bucket in plan.buckets:
            with self.named_if_broken(bucket.items):
                tensors = next(buckets)
            for item in bucket.items:
                tensor = tensors.pop(0)
                if tensor is not None:
                    yield keys[item], tensor
                del tensor  # the caller may let go of it
        with self.named_if_broken(range(len(self.params))):
            next(buckets, None)  # there is no further bucket, but an error of another group may come

    def _bucket_bytes(self, given: int | None) -> int:
        return bucket_bytes_for(self.shardings) if given is None else given

    def gather(self, plan: Plan, locate: Locate) -> Iterator[list[torch.Tensor | None]]:
        """As `gather` of `exchange`, among the ranks that share the parameters."""
        _flight.check_earlier()
        return gather(plan, locate, told=self.told)

    def one(self) -> torch.Tensor:
        """The whole tensor of the only parameter; as `full`, and on a GPU without waiting: see `synchronize`."""
        sharding = self.shardings[0]
        if sharding.alone or sharding.stages:
            ((_, tensor),) = self.full([0])
            return tensor
        absent = self.what == "grad" and 0 in sharding.sent  # only a rank that holds a shard knows whether there is one
        waits = absent or self.checked or not self.params[0].requires_grad
        told = {sharding.shards[0]}
        try:
            try:
                tensor = fetch(sharding, self.pieces, later=None if waits else lambda _: self._doubt(told))
            finally:
                if _flight.unchecked:
                    _flight.check_earlier(newest=1)
        except Exception as error:  # to enter the context for every parameter takes as long as to find it
            if isinstance(error, FragmentError):  # all ranks of the group know of it
                self.told.update(told)
            with self.named_if_broken([0]):
                raise
        return tensor

    @contextlib.contextmanager
    def named_if_broken(self, items: Sequence[int]) -> Iterator[None]:
        """Say which parameters a collective was about that did not come to its end."""
        try:
            yield
        except CollectiveError as error:
            names = ", ".join(self.name(item) for item in items[:3]) + (", ..." if len(items) > 3 else "")
            raise FragmentError(f"the exchange of '{self.what}' of {names} {error}") from error
        except Exception:
            self._doubt(self.told)  # as do the other ranks that have been told
            raise

    def scopes(self) -> list[tuple[dist.ProcessGroup, ...]]:
        """For each parameter, the groups whose ranks write it together."""
        with known_engine():
            return [self._scope(item) for item in range(len(self.params))]

    def _scope(self, item: int) -> tuple[dist.ProcessGroup, ...]:
        writers = self.adapters[item].writers(self.params[item])
        return tuple(dict.fromkeys((*self.homes[item].groups, *self.shardings[item].groups, *writers)))

    def device(self) -> torch.device:
        """Where collectives about these parameters run."""
        return self.shardings[0].device if self.shardings else torch.device("cpu")


def _narrowed(sharding: Sharding, dtype: torch.dtype) -> Sharding:
    """The sharding of the same shards in a dtype of fewer bytes; itself where that is no narrower."""
    both_floating = sharding.dtype.is_floating_point and dtype.is_floating_point
    if not both_floating or dtype.itemsize >= sharding.dtype.itemsize:
        return sharding
    key = str(dtype)
    if key not in sharding.plans:
        stages = tuple(_narrowed(stage, dtype) for stage in sharding.stages)
        sharding.plans[key] = replace(sharding, dtype=dtype, stages=stages, plans={})
    found: Sharding = sharding.plans[key]
    return found


def _kept_otherwise(names: str) -> RankMismatchError:
    """The error for state that is not of one shape and dtype on all ranks."""
    return RankMismatchError(
        f"{names} is not kept alike: its shape, dtype or placement differs over the ranks, and nothing says what the "
        "whole is; read it in optimizer.state on each rank"
    )


def _unreduced(names: str) -> FragmentError:
    return GradientUnavailableError(
        f"the gradients of {names} are not reduced: each rank holds another. Read them after a backward pass that "
        "reduces, not under no_sync()"
    )


def commit(shards: Shards, targets: Sequence[torch.Tensor | None], pieces: Sequence[torch.Tensor | None]) -> None:
    """Write this rank's shards; what is None on either side stays as it is.

    Args:
        shards: what is written.
        targets: where the engines hold the shards.
        pieces: the new contents, of any floating dtype.
    """
    copied: list[tuple[torch.Tensor, torch.Tensor]] = []
    with torch.no_grad(), known_engine():
        for item, (target, piece) in enumerate(zip(targets, pieces, strict=True)):
            if target is None or piece is None or not piece.numel():
                continue
            adapter = shards.adapters[item]
            if type(adapter).write is Adapter.write:
                copied.append((target.detach(), piece))
            else:
                adapter.write(shards.params[item], shards.what, piece)
        if copied:
            kernels.copy([target for target, _ in copied], [piece for _, piece in copied])


def refresh(shards: Shards, wholes: Sequence[torch.Tensor] | None) -> None:
    """Have each engine bring its low-precision weights up to date; collective where ``wholes`` is None."""
    items: dict[Adapter, list[int]] = {}
    for item, adapter in enumerate(shards.adapters):
        items.setdefault(adapter, []).append(item)
    for adapter, chosen in items.items():
        values = None if wholes is None else [wholes[item] for item in chosen]
        with shards.named_if_broken(chosen), known_engine():
            adapter.refresh_lp([shards.params[item] for item in chosen], values)
