"""One quantity of many parameters: where it is, agreed on by all ranks, and how it is brought together."""

from __future__ import annotations

import contextlib
import hashlib
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import repeat
from typing import TypeVar

import torch
import torch.distributed as dist

from ds_fragment._collectives import CollectiveError
from ds_fragment.collective.check import meet
from ds_fragment.collective.checksum import checksums
from ds_fragment.collective.exchange import (
    Locate,
    Pieces,
    Plan,
    Sharding,
    agree,
    bucket_bytes_for,
    fetch,
    gather,
    numels,
    plan_of,
)
from ds_fragment.collective.stages import gather_by_stages
from ds_fragment.engines.base import Adapter, is_state
from ds_fragment.engines.state import different_state
from ds_fragment.engines.survey import survey_of
from ds_fragment.engines.versions import known_engine
from ds_fragment.errors import FragmentError, GradientUnavailableError, RankMismatchError, StateKeyError
from ds_fragment.record import record_of, registry

K = TypeVar("K")


class _Agreements:
    """By parameter and state, where the ranks agreed that it is; until then, nothing.

    Attributes:
        changes: a count of what changed, so that a caller knows whether anything did.
    """

    def __init__(self) -> None:
        self.changes = 0

    def get(self, param: torch.Tensor, what: str, home: Sharding) -> Sharding | None:
        """Where the state is, if the ranks agreed when the parameter was where it is now."""
        sharding, then = record_of(param).agreed.get(what, (None, None))
        return sharding if then == home else None

    def ever(self, param: torch.Tensor, what: str) -> bool:
        """Whether they have agreed before."""
        return what in record_of(param).agreed

    def drop(self, param: torch.Tensor, what: str) -> None:
        """As if they never had."""
        if record_of(param).agreed.pop(what, None) is not None:
            self.changes += 1

    def put(self, param: torch.Tensor, what: str, sharding: Sharding | None, home: Sharding) -> None:
        """Remember it."""
        record_of(param).agreed[what] = (sharding, home)
        self.changes += 1


_agreements = _Agreements()


def _kept_otherwise(names: str) -> RankMismatchError:
    """The error for state that is not of one shape and dtype on all ranks."""
    return RankMismatchError(
        f"{names} is not kept alike: its shape, dtype or placement differs over the ranks, and nothing says what the "
        "whole is; read it in optimizer.state on each rank"
    )


class Shards:
    """One quantity of many parameters: where each is, and this rank's pieces.

    [Note: agreement] Where optimizer state is can depend on the optimizer, which a rank may lack or keep otherwise. The
    ranks that hold a parameter agree on it before the first exchange, so that the constructor is collective then. Later
    ones go by what was agreed: a rank on which that is not so any more sends an error in the place of its data, and the
    next call agrees anew. It does so only where all ranks of the group that shares the parameter know of the error, and
    among them, or some would agree while others read. A place that cannot be told becomes an error that this rank sends
    with the first piece, as does a disagreement. State that each of several ranks holds whole is compared before every
    read, by one small collective for each of their groups: see [Note: same] of the module `_state`.
    """

    def __init__(self, params: Sequence[torch.Tensor], what: str, call: str = "a read") -> None:
        self.what = what
        self._survey, self.params = survey_of(params, what)
        self.adapters, self.homes = self._survey.adapters, self._survey.homes
        self.shardings, self.error = self._survey.shardings, self._survey.error
        self.told: set[dist.ProcessGroup] = set()  # the groups whose ranks all know of an error
        if self._survey.groups:
            meet(self._survey.groups, lambda: self._words(call))
        if is_state(what) and self._survey.agreed_at != _agreements.changes:
            with self.named_if_broken(range(len(params))):
                self._agree()
        if what == "grad":
            self._warn_of_unknown()
            self._compare(_unreduced)
        elif is_state(what) and not call.startswith("set_"):  # a write makes it the same
            self._compare(partial(different_state, what))

    def _agree(self) -> None:
        """See [Note: agreement]; what no group holds is nobody else's business."""
        known = [self._known(item) for item in range(len(self.params))]
        new, others = [], dict[tuple[dist.ProcessGroup, ...], list[int]]()
        for item, home in enumerate(self.homes):
            if known[item] is None and not _agreements.ever(self.params[item], self.what):
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
        if known == self.shardings and self.error is None:
            self._survey.agreed_at = _agreements.changes
            return
        for item, (before, now) in enumerate(zip(known, self.shardings, strict=True)):
            if self.error is None and before is not None and before != now:
                self.error = StateKeyError(
                    f"'{self.what}' of {self.name(item)} is not kept as at the last read (then {before.dtype} of shape "
                    f"{tuple(before.shape)}, now {now.dtype} of shape {tuple(now.shape)}): call again, so that the "
                    "ranks agree anew"
                )
        if self.error is not None:
            self.shardings = [
                home if sharding is None else sharding for home, sharding in zip(self.homes, known, strict=True)
            ]

    def _warn_of_unknown(self) -> None:
        """Among several ranks, say that nothing tells over which of them a whole gradient is reduced."""
        if self.error is not None or not dist.is_initialized() or dist.get_world_size() == 1:
            return
        shared = set(self._survey.shared[0])
        for item, (param, sharding) in enumerate(zip(self.params, self.shardings, strict=True)):
            if sharding.alone and item not in shared and not registry.is_named(param) and param.requires_grad:
                warnings.warn(
                    f"the gradient of {self.name(item)} is this rank's own, and nothing tells whether it is reduced "
                    "over the ranks: call attach(model, optimizer) with the model as its engine wrapped it",
                    stacklevel=5,
                )
                return

    def _compare(self, differ: Callable[[str], FragmentError]) -> None:
        """Have the ranks compare what each of them holds whole; all of them call it.

        State that differs is each rank's own, see [Note: same] of the module `_state`. A gradient that differs is not
        reduced: no engine tells for certain whether the last backward pass that came to a parameter reduced it.
        """
        survey = self._survey
        as_found = self.shardings is survey.shardings
        items, scopes = survey.shared if as_found else survey.to_compare(self.params, self.shardings)
        if not items:
            return
        error: Exception | None = self.error
        sums: list[int] = []
        if error is None:
            try:
                for some in self._filled(items):
                    sums += checksums(self.pieces(some))
            except Exception as caught:
                error = caught
        groups = list(dict.fromkeys(group for scope in scopes for group in scope))
        name = lambda i: self.name(items[i])  # noqa: E731
        with self.named_if_broken(items):
            try:
                agree(error, groups, self.device(), sums, name, scopes, differ)
            except FragmentError as told:
                self.error = told

    def _filled(self, items: Sequence[int]) -> Iterator[list[int]]:
        """The items, as many at a time as fill a bucket: some engines make a copy of each piece that they are asked."""
        limit = bucket_bytes_for(self.shardings)
        some, filled = list[int](), 0
        for item in items:
            some.append(item)
            filled += self.shardings[item].nbytes
            if filled >= limit:
                yield some
                some, filled = [], 0
        if some:
            yield some

    def _known(self, item: int) -> Sharding | None:
        """Where the state is to be found, as far as that need not be agreed on."""
        home = self.homes[item]
        return _agreements.get(self.params[item], self.what, home) if home.shards else self.shardings[item]

    def _agree_on(self, items: Sequence[int], scopes: Sequence[Sequence[dist.ProcessGroup]]) -> bool:
        """Whether the ranks of some groups found the state of some parameters alike; all of them call it."""
        key = zlib.crc32(self.what.encode())
        shardings = [self.shardings[item] for item in items]
        kinds = [hash((key, *sharding.shape, sharding.dtype.itemsize, sharding.alone)) for sharding in shardings]
        groups = list(dict.fromkeys(group for scope in scopes for group in scope))
        name = lambda i: f"the state asked of {self.name(items[i])}"  # noqa: E731
        try:
            agree(self.error, groups, self.device(), kinds, name, scopes, _kept_otherwise)
        except FragmentError as error:
            self.error = error
            return False
        for item in items:
            _agreements.put(self.params[item], self.what, self.shardings[item], self.homes[item])
        return True

    def _doubt(self) -> None:
        """Have the next call agree anew, among those of whom all know that they have to."""
        for param, home in zip(self.params, self.homes, strict=True):
            if home.last.group in self.told and _agreements.ever(param, self.what):
                _agreements.put(param, self.what, None, home)

    def forget(self) -> None:
        """As if the ranks had never agreed; to be called where all that hold the parameters do."""
        for param in self.params:
            _agreements.drop(param, self.what)

    def _words(self, call: str) -> str:
        """The call in words, different for different parameters."""
        names = [self.name(item) for item in range(len(self.params))]
        shapes = [(name, *sharding.shape) for name, sharding in zip(names, self.homes, strict=True)]
        digest = hashlib.sha256(repr(shapes).encode()).hexdigest()[:8]
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        return f"{call}('{self.what}') with {shown or 'no parameters'} [{digest}]"

    def name(self, item: int) -> str:
        """The parameter's name for messages."""
        return registry.name_of(self.params[item])

    def local(self, item: int) -> torch.Tensor | None:
        """This rank's piece, or the error."""
        return self.pieces([item])[0]

    def pieces(self, items: Sequence[int]) -> Pieces:
        """This rank's pieces of some of the parameters, or the error."""
        if self.error is not None:
            raise self.error
        survey, params = self._survey, self.params
        try:
            if len(survey.by_adapter) == 1:
                found = self.adapters[0].pieces([params[item] for item in items], self.what)
            else:
                found = [self.adapters[item].local(params[item], self.what) for item in items]
        except (AttributeError, KeyError):
            with known_engine():
                raise
        held, expected = numels(found), [survey.held[item] for item in items]
        if held != expected:
            wrong = next(i for i in range(len(items)) if held[i] != expected[i])
            raise FragmentError(
                f"{self.name(items[wrong])}: {held[wrong]} elements are here where its layout says {expected[wrong]}"
            )
        return found

    def full(
        self,
        keys: Sequence[K],
        bucket_bytes: int | None = None,
        dst: int | None = None,
        locate: Locate | None = None,
    ) -> Iterator[tuple[K, torch.Tensor]]:
        """The whole tensors that are delivered here, each with its key; all ranks must take all of them.

        ``locate`` stands in for `pieces`.
        """
        plan = self._plan(bucket_bytes)
        if any(sharding.stages for sharding in self.shardings):
            settle, told = self._to_settle(), self.told
            buckets = gather_by_stages(self.shardings, plan, locate or self.pieces, dst=dst, settle=settle, told=told)
        else:
            buckets = self.gather(plan, locate or self.pieces, dst)
        for items in plan.buckets:
            with self.named_if_broken(items):
                tensors = next(buckets)
            here = [item for item, tensor in zip(items, tensors, strict=True) if tensor is not None]
            # Taken out of the list, which others know too: what the caller lets go of is held no longer.
            tensors[:] = [tensor for tensor in reversed(tensors) if tensor is not None]
            yield from zip(map(keys.__getitem__, here), map(list.pop, repeat(tensors)), strict=False)
        with self.named_if_broken(range(len(self.params))):
            next(buckets, None)  # there is no further bucket, but word of how it went elsewhere

    def gather(self, plan: Plan, locate: Locate, dst: int | None = None) -> Iterator[list[torch.Tensor | None]]:
        """As `gather` of the module `_exchange`, among the ranks that share the parameters."""
        return gather(plan, locate, dst=dst, settle=self._to_settle(), told=self.told)

    def _to_settle(self) -> Sequence[dist.ProcessGroup]:
        survey = self._survey
        return survey.settle if self.shardings is survey.shardings else survey.to_settle(self.shardings)

    def _plan(self, bucket_bytes: int | None) -> Plan:
        """What travels with what."""
        last = self._survey.plan if self.shardings is self._survey.shardings else None
        if last is not None and last[0] == bucket_bytes:
            return last[1]
        limit = bucket_bytes
        if limit is None:
            limit = bucket_bytes_for(self.shardings)
            if self.device().type != "cpu":  # two of the largest parameter are taken in any case
                limit = max([limit, *(sharding.nbytes for sharding in self.shardings if not sharding.alone)])
        plan = plan_of([sharding.last for sharding in self.shardings], limit)
        if self.shardings is self._survey.shardings:
            self._survey.plan = (bucket_bytes, plan)
        return plan

    def one(self) -> torch.Tensor:
        """The whole tensor of the only parameter; as `full`, without what it takes for many."""
        if self.shardings[0].alone or self.shardings[0].stages:
            ((_, tensor),) = self.full([0])
        else:
            try:
                tensor = fetch(self._plan(1), self.pieces)
            except Exception as error:  # to enter the context for every parameter takes as long as to look it up
                if isinstance(error, FragmentError):  # which all ranks of the group read
                    self.told.update(self.shardings[0].groups[:1])
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
            self._doubt()  # as do the others where they have been told
            raise

    def scopes(self) -> list[tuple[dist.ProcessGroup, ...]]:
        """For each parameter, the groups whose ranks write it together."""
        with known_engine():
            return [self._survey.scope(item, param, self.shardings[item]) for item, param in enumerate(self.params)]

    def device(self) -> torch.device:
        """Where collectives about these parameters run."""
        return self.shardings[0].device if self.shardings else torch.device("cpu")


def _unreduced(names: str) -> FragmentError:
    return GradientUnavailableError(
        f"the gradients of {names} are not reduced: each rank holds another. Read them after a backward pass that "
        "reduces, not under no_sync()"
    )


def commit(targets: Sequence[torch.Tensor | None], pieces: Sequence[torch.Tensor | None]) -> None:
    """Copy the pieces to where they belong; what is None on either side stays as it is."""
    with torch.no_grad():
        for target, piece in zip(targets, pieces, strict=True):
            if target is not None and piece is not None and piece.numel():
                target.copy_(piece.view(target.shape))


def refresh(shards: Shards, wholes: Sequence[torch.Tensor] | None) -> None:
    """Have each engine bring its low-precision weights up to date; collective where ``wholes`` is None."""
    items: dict[Adapter, list[int]] = {}
    for item, adapter in enumerate(shards.adapters):
        items.setdefault(adapter, []).append(item)
    for adapter, chosen in items.items():
        values = None if wholes is None else [wholes[item] for item in chosen]
        with shards.named_if_broken(chosen), known_engine():
            adapter.refresh_lp([shards.params[item] for item in chosen], values)
