"""`Registry`: the process groups of one world, each made once and shared, and how its ranks meet to make them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import threading
import time
import weakref
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from . import _c10d
from ._axis import Partition
from ._meeting import NotMetError, Part, Round, Verdict
from ._options import Settings
from ._verify import mismatch
from ._waits import Picture, Wait, Waits, describe, shown, spell_missing
from .errors import DeadlockError, GroupCreationError, GroupsError, StoreError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_log = logging.getLogger("ds.groups")

LOOK_AFTER = 5.0  # seconds that a rank waits until it asks who waits for whom; doubles every time
LOOK_AGAIN = 0.5  # seconds until a cycle is read again
WARN_AGAIN = 300.0  # seconds between warnings of one wait


class Key(NamedTuple):
    """What makes two groups the same one."""

    who: Hashable
    settings: Settings


@dataclass
class _Shared:
    group: dist.ProcessGroup | None  # None where this rank is in no group of the axis
    holders: int = 0


class Registry:
    """Every group that this package made in one world; dies with the default process group.

    Only one thread at a time makes groups or waits for other ranks: ``lock`` is held meanwhile.
    """

    def __init__(self, default: dist.ProcessGroup) -> None:
        self.lock = threading.RLock()
        self.rank: int = default.rank()
        self.world_size: int = default.size()
        self._default = weakref.ref(default)
        self.is_alone = _c10d.is_alone()
        self._store = None if self.is_alone else _c10d.default_store()
        self._waits = None if self._store is None else Waits(self._store, self.rank)
        self._shared: dict[Key, _Shared] = {}
        self._rounds: dict[str, int] = {}  # topic -> the next round
        self._warm: weakref.WeakSet[dist.ProcessGroup] = weakref.WeakSet()

    @property
    def meets(self) -> bool:
        """Whether there are other ranks, and a store to meet them in."""
        return self._store is not None

    def is_stale(self) -> bool:
        """Whether the default process group is no longer the one that this was made for."""
        return not _c10d.is_initialized() or self._default() is not dist.group.WORLD

    def acquire(
        self, key: Key, axis: Partition, ranks: tuple[int, ...] | None, *, mode: _c10d.Mode, what: str
    ) -> dist.ProcessGroup | None:
        """The group of ``key``, made now unless it is there; counts one holder more.

        Args:
            key: of the group.
            axis: that it belongs to.
            ranks: this rank's own ones; None where it is in no group of the axis.
            mode: who takes part in making it.
            what: the group is for.

        Returns:
            The group; None where ``ranks`` is None.
        """
        with self.lock:
            shared = self._shared.get(key)
            if shared is None or (shared.group is not None and not _c10d.is_alive(shared.group)):
                shared = self._shared[key] = _Shared(self._make(key, axis, ranks, mode, what))
            if key.settings.warm_up and shared.group is not None:
                self.warm_up(shared.group, what)
            shared.holders += 1
            return shared.group

    def release(self, key: Key, group: dist.ProcessGroup | None) -> None:
        """One holder less of this group; the last one destroys it."""
        with self.lock:
            shared = self._shared.get(key)
            if shared is None or shared.group is not group:  # somebody else destroyed it, and it was made again
                return
            shared.holders -= 1
            if shared.holders == 0 or (group is not None and not _c10d.is_alive(group)):
                del self._shared[key]
                if group is not None:
                    _c10d.destroy(group)

    def warm_up(self, group: dist.ProcessGroup, what: str) -> None:
        """Use the group once, if nobody has asked for that before. Every member must call.

        Raises:
            GroupCreationError: it does not work.
        """
        if group in self._warm:
            return
        try:
            _c10d.warm_up(group, what)
        except RuntimeError as error:
            if isinstance(error, GroupsError):
                raise
            raise GroupCreationError(f"rank {self.rank} could not use the new {what} group: {error}") from error
        self._warm.add(group)

    def abort(self, groups: Iterable[tuple[Key, dist.ProcessGroup | None]]) -> None:
        """Break off these groups, whoever else holds them; waits for no other rank, nor for a thread that does."""
        held = list(groups)
        for key, group in held:
            shared = self._shared.get(key)
            if shared is not None and shared.group is group:
                del self._shared[key]
        _c10d.abort(group for _, group in held if group is not None)

    def meet(self, topic: str, ranks: Sequence[int], what: str, text: str, seconds: float) -> int:
        """Wait until all of ``ranks`` are here with the same text.

        Args:
            topic: of the meeting, the same on all of them.
            ranks: who meets, in the same order everywhere.
            what: this rank waits for.
            text: what it holds, a JSON object.
            seconds: how long to wait.

        Returns:
            The number of the round in which they met: the same on all of them, and a new one every time.

        Raises:
            NotMetError: some did not come in time.
            PlanMismatchError: they hold different texts.
            DeadlockError: ranks wait for each other in a cycle.
            StoreError: the store cannot be used.
        """
        assert self._store is not None
        deadline = time.monotonic() + seconds
        place = ranks.index(self.rank)
        absent: set[Part] | None = None  # those who came to no round that this rank was in
        with self.lock:
            try:
                while True:
                    number, meeting = self._open_round(self._store, topic, len(ranks))
                    wait = Wait(self.rank, what, ranks, meeting)
                    verdict = self._take_part(wait, place, text, deadline)
                    if "broken" not in verdict:
                        self._raise(verdict, ranks)
                        return number
                    missing = {Part(*part) for part in verdict["broken"]}
                    absent = missing if absent is None else (absent & missing or missing)
                    if time.monotonic() >= deadline:
                        seen, picture, _ = self._waits_of().look(wait)
                        parts = sorted(absent)
                        found = tuple(ranks[first] for first, _ in parts)
                        raise NotMetError(found, spell_missing(ranks, parts), describe(picture, seen))
            except (GroupsError, NotMetError):
                raise
            except (RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
                raise self._store_error(error) from error

    # Making

    def _make(
        self, key: Key, axis: Partition, ranks: tuple[int, ...] | None, mode: _c10d.Mode, what: str
    ) -> dist.ProcessGroup | None:
        settings = key.settings
        _log.debug("making %s group of ranks %s (mode %s)", what, ranks, mode)
        if ranks is not None and len(ranks) == 1 and _c10d.can_make_single():
            name = f"ds-{_digest('one', self.rank, settings.as_dict())}"
            return _c10d.make_single(settings=settings, name=name, description=what)
        who: Sequence[int] = ranks if mode == "members" and ranks is not None else range(self.world_size)
        topic = f"ranks/{_digest(*who)}" if mode == "members" else f"axis/{axis.key}"
        group_text = f"the {what} group of ranks {_listed(ranks)}" if ranks is not None else f"the {what} groups"
        seconds = _c10d.timeout_of(settings).total_seconds()
        try:
            number = self._agree_to_make(topic, who, group_text, settings, seconds)
        except NotMetError as error:
            everybody = "every rank of the group" if mode == "members" else "every rank of the world"
            raise GroupCreationError(
                f"rank {self.rank} could not make {group_text}: {error.spelled} did not come within {seconds:g} s; "
                f"{everybody} must ask for it, and for several groups in the same order\n{error.picture}",
                error.missing,
            ) from None
        confirm = None
        if self._store is not None and mode != "everyone" and ranks is not None:
            confirm = Round(self._store, f"ds-groups/made/{topic}/{number}/{ranks[0]}", len(ranks))
        try:
            if mode == "everyone":
                group = _c10d.make_every(axis.table(), settings=settings, description=what)
            else:
                group = _c10d.make_own(
                    ranks if ranks is not None else axis.table()[0],
                    settings=settings,
                    name=f"ds-{_digest(key.who, ranks, settings.as_dict())}",
                    prefix=f"ds-groups/round/{number}/",
                    description=what,
                )
        except BaseException as error:
            if confirm is not None:
                confirm.decide({"failed": f"rank {self.rank}: {error}"})
            if not isinstance(error, RuntimeError | ValueError | TypeError):
                raise
            raise GroupCreationError(f"rank {self.rank} could not make {group_text}: {error}") from error
        if confirm is not None and ranks is not None and group is not None:
            self._confirm(confirm, group, ranks, group_text, seconds)
        return group

    def _agree_to_make(self, topic: str, who: Sequence[int], what: str, settings: Settings, seconds: float) -> int:
        if not self.meets:
            self._rounds[topic] = self._rounds.get(topic, 0) + 1
            return self._rounds[topic]
        return self.meet(topic, who, what, json.dumps(settings.as_dict(), sort_keys=True), seconds)

    def _confirm(
        self, confirm: Round, group: dist.ProcessGroup, ranks: tuple[int, ...], what: str, seconds: float
    ) -> None:
        """Wait until all members have made it: Gloo fails where one closes a group while another still connects."""
        wait = Wait(self.rank, f"the members of {what} to have made it", ranks, confirm)
        verdict = self._take_part(wait, ranks.index(self.rank), "", time.monotonic() + seconds)
        if "go" in verdict:
            return
        _c10d.destroy(group)
        self._raise(verdict, ranks)
        late = spell_missing(ranks, [Part(*part) for part in verdict.get("broken", [])])
        why = verdict.get("failed") or f"{late} did not make it within {seconds:g} s"
        raise GroupCreationError(f"rank {self.rank} could not make {what}: {why}")

    # Waiting

    def _open_round(self, store: Store, topic: str, size: int) -> tuple[int, Round]:
        """The first round of the topic that has no verdict; only once for each."""
        number = self._rounds.get(topic, 0)
        hint = f"ds-groups/next/{topic}"
        while True:
            found = Round(store, f"ds-groups/meet/{topic}/{number}", size)
            if found.verdict() is None:
                self._rounds[topic] = number + 1
                return number, found
            number += 1
            text = store.compare_set(hint, "", "")
            number = max(number, int(text or 0))
            store.set(hint, str(number))

    def _take_part(self, wait: Wait, place: int, text: str, deadline: float) -> Verdict:
        """Enter a round and wait for its verdict; at the deadline it is broken."""
        meeting, waits = wait.round, self._waits_of()
        verdict = None
        try:
            verdict = meeting.arrive(place, text)
            if verdict is not None:
                return verdict
            waits.note(wait)
            try:
                verdict = self._watch(wait, deadline)
            finally:
                waits.clear()
        except BaseException:  # interrupted: the others must not go on with this rank
            with contextlib.suppress(RuntimeError):  # the store may be the reason
                meeting.decide({"broken": [Part(place, place)]})
            raise
        return verdict or meeting.decide({"broken": meeting.missing()})

    def _watch(self, wait: Wait, deadline: float) -> Verdict | None:
        begun = time.monotonic()
        pause, warned = LOOK_AFTER, -WARN_AGAIN
        while True:
            now = time.monotonic()
            verdict = wait.round.wait(min(pause, deadline - now))
            if verdict is not None or time.monotonic() >= deadline:
                return verdict
            short = min(pause, deadline - now) - (time.monotonic() - now)
            if short > 0.01:  # the store gave up early
                time.sleep(short)
            waited = time.monotonic() - begun
            verdict = self._look(wait, waited, deadline, warn=waited - warned >= WARN_AGAIN)
            if verdict is not None:
                return verdict
            warned = waited if waited - warned >= WARN_AGAIN else warned
            pause *= 2

    def _look(self, wait: Wait, waited: float, deadline: float, *, warn: bool) -> Verdict | None:
        """Say who waits for whom, and end a wait that is part of a cycle."""
        waits = self._waits_of()
        waits.note(wait, long=True)
        seen, picture, cycle = waits.look(wait)
        if not picture[wait.rank][1]:
            return wait.round.verdict()  # the last one came just now
        if warn:
            _log.warning("rank %d waits for %.0f s already\n%s", self.rank, waited, describe(picture, seen))
        if not cycle:
            return None
        verdict = wait.round.wait(min(LOOK_AGAIN, max(0.0, deadline - time.monotonic())))
        if verdict is not None or not waits.stands(cycle):
            return verdict
        waiting = {other.rank: picture[other.rank] for other in cycle}
        for other in cycle:
            other.round.decide({"deadlock": waiting})
        return wait.round.verdict()

    def _raise(self, verdict: Verdict, ranks: Sequence[int]) -> None:
        if "differences" in verdict:
            raise mismatch(verdict, ranks)
        if "deadlock" in verdict:
            waits: Picture = {int(rank): (what, tuple(on)) for rank, (what, on) in verdict["deadlock"].items()}
            raise DeadlockError(
                f"rank {self.rank} is in a deadlock: {shown(sorted(waits))} wait for each other\n"
                f"{describe(waits, {})}\n"
                "ask for groups in the same order on every rank, or let create() make them",
                waits,
            )

    def _waits_of(self) -> Waits:
        assert self._waits is not None
        return self._waits

    def _store_error(self, error: Exception) -> StoreError:
        return StoreError(
            f"rank {self.rank} cannot agree with others through the {_kind(self._store)} of the default process group: "
            f"{error}; init_process_group() with a TCPStore, a FileStore or a HashStore, and keep its server alive"
        )


_registries: weakref.WeakKeyDictionary[dist.ProcessGroup, Registry] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def registry() -> Registry:
    """The one registry of the present world.

    Raises:
        NotInitializedError: there is no process group.
    """
    default = _c10d.default_group()
    with _lock:
        found = _registries.get(default)
        if found is None:
            found = _registries[default] = Registry(default)
        return found


def _kind(store: object) -> str:
    """The class of the store that a prefix store is a view of."""
    inner = store
    while isinstance(inner, c10d.PrefixStore):
        inner = inner.underlying_store
    return type(inner).__name__


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]


def _listed(ranks: Sequence[int]) -> str:
    return str(list(ranks)) if len(ranks) <= 16 else f"[{', '.join(map(str, ranks[:8]))}, ... {len(ranks)} ranks]"
