"""Which rank is this process? From torch.distributed after ``init_process_group``, from the launcher before it.

torch is looked at only if somebody else has imported it.

[Note: cached rank] A hidden log line must cost next to nothing, and it asks for the rank. So the rank is kept together
with what it was read from: the default process group (a weak reference, or a destroyed group would live on), or the raw
values of the launcher's variables. Both are compared at every question, so a new group or a changed variable counts at
once. Each cache is one tuple that is replaced whole: threads and signal handlers need no lock.
"""

from __future__ import annotations

import operator
import os
import sys
import weakref
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ds_logging._launchers import LAUNCHERS
from ds_logging.errors import ArgumentError, RanksError


class Position(NamedTuple):
    """A rank and, where it is known, the number of ranks."""

    rank: int
    world_size: int | None


_module = sys.modules.get


def _no_group() -> None:
    return None


# (torch.distributed, its _world, weak reference to the default group, position)
_group_cache: tuple[Any, Any, Any, Position] = (None, None, _no_group, Position(0, None))
# (the environment's dictionary, the keys that decided, their raw values, position)
_environment_cache: tuple[Any, tuple[Any, ...], tuple[Any, ...], Position] = (None, (), (), Position(0, None))


class _NoWorld:
    _default_pg = None


# The same for the commonest question: (_world, weak reference to the default group, rank)
_rank_cache: tuple[Any, Any, int] = (_NoWorld, _no_group, 0)


def current_rank() -> int:
    """Return the rank of `current_position`."""
    world, reference, rank = _rank_cache
    group = world._default_pg
    if group is not None and group is reference():
        return rank
    return current_position().rank


def current_position(environ: Mapping[str, str] | None = None) -> Position:
    """Return this process's place: from torch.distributed, else from the launcher, else rank 0 of an unknown number.

    Args:
        environ: the environment to read, ``os.environ`` unless given. Values that are no numbers count as unset.
    """
    dist = _module("torch.distributed")
    if dist is not None:
        known, world, reference, position = _group_cache
        if known is not dist:
            found = _group_position(dist)
            if found is not None:
                return found
        else:
            group = world._default_pg
            if group is not None:
                return position if group is reference() else _group_position(dist) or position
    if environ is not None:
        return _read(environ)
    known, keys, values, position = _environment_cache
    # os.environ.get() encodes and decodes at every call; its dictionary of raw values does not.
    data = getattr(os.environ, "_data", None)
    if known is not None and data is known:
        if len(keys) == 2:  # a launcher that is asked first: the usual case
            if values[0] == data.get(keys[0]) and values[1] == data.get(keys[1]):
                return position
        elif not values:
            if data.keys().isdisjoint(keys):  # no launcher, as before
                return position
        elif values == tuple(map(data.get, keys)):
            return position
    return _environment_position(data)


def _group_position(dist: Any) -> Position | None:
    global _group_cache, _rank_cache
    # getattr: torch may be half imported, or built without torch.distributed.
    is_initialized = getattr(dist, "is_initialized", None)
    if is_initialized is None:
        return None
    position = Position(dist.get_rank(), dist.get_world_size()) if is_initialized() else None
    c10d = _module("torch.distributed.distributed_c10d")
    world: Any = getattr(c10d, "_world", None)
    if hasattr(world, "_default_pg") and getattr(c10d, "is_initialized", None) is is_initialized:
        group = world._default_pg
        reference = _no_group if group is None else weakref.ref(group)
        _group_cache = (dist, world, reference, position or Position(0, None))
        _rank_cache = (world, reference, position.rank if position is not None else 0)
    return position


def group_rank(group: Any) -> int:
    """Return the rank of this process within a process group; -1 if it is no member."""
    if group is None:
        return current_position().rank
    dist = _module("torch.distributed")
    if dist is None or not isinstance(group, (int, dist.ProcessGroup)):
        raise ArgumentError(f"group={group!r} is no process group of torch.distributed")
    return (
        -1 if isinstance(group, int) else int(dist.get_rank(group))
    )  # an int: new_group's GroupMember.NON_GROUP_MEMBER


def _environment_position(data: Any) -> Position:
    global _environment_cache
    position = _read(os.environ)
    names: list[str] = []
    for launcher in LAUNCHERS:
        names += [name for name in (launcher.rank, launcher.size) if name is not None]
        if _number(os.environ, launcher.rank) is not None:
            break
    if data is not None:
        keys = tuple(map(os.environ.encodekey, names))
        values = tuple(map(data.get, keys))
        none_set = all(value is None for value in values)
        _environment_cache = (data, keys, () if none_set else values, position)
    return position


def _read(environ: Mapping[str, str]) -> Position:
    for launcher in LAUNCHERS:
        rank = _number(environ, launcher.rank)
        if rank is not None:
            return Position(rank, None if launcher.size is None else _number(environ, launcher.size))
    return Position(0, None)


def local_rank() -> int | None:
    """Return the rank within the node as the launcher names it, ``None`` where it does not."""
    for launcher in LAUNCHERS:
        if launcher.local_rank is not None and _number(os.environ, launcher.rank) is not None:
            return _number(os.environ, launcher.local_rank)
    return _number(os.environ, "LOCAL_RANK")


def worker_id() -> int | None:
    """Return the number of the DataLoader worker that this process is, ``None`` in every other process."""
    info = getattr(_module("torch.utils.data._utils.worker"), "_worker_info", None)
    number = getattr(info, "id", None)
    return number if isinstance(number, int) else None


def rank_tag(rank: object) -> str:
    """Return what stands in front of a message: ``"[Rank 3] "``, or ``"[Rank 3 worker 1] "`` in a DataLoader worker."""
    worker = worker_id()
    return f"[Rank {rank}] " if worker is None else f"[Rank {rank} worker {worker}] "


def _number(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name, "").strip()
    return int(text) if text.isdecimal() else None


def is_selected(ranks: Iterable[int] | None, rank: int) -> bool:
    """Say whether ``ranks`` names ``rank``.

    Args:
        ranks: ``None`` for rank 0, ``[-1]`` for every rank, an empty list for none, else ranks. One that the job does
            not have is simply not there.
        rank: of this process.

    Raises:
        RanksError: on every rank alike, whatever the own one is.
    """
    if ranks is None:
        return rank == 0
    if type(ranks) is list or type(ranks) is tuple:  # the usual case, without a copy
        found = False
        for one in ranks:
            if type(one) is not int or one < 0:
                break
            if one == rank:
                found = True
        else:
            return found
    chosen = checked_ranks(ranks)
    return chosen is None or rank in chosen


def checked_ranks(ranks: object, argument: str = "ranks") -> tuple[int, ...] | None:
    """Return the ranks as integers, or ``None`` for ``[-1]``, every rank; ``argument`` is named in the error."""
    if isinstance(ranks, (str, bytes)) or not isinstance(ranks, Iterable):
        raise RanksError(f"{argument}={ranks!r} ({type(ranks).__name__}) is no list of ranks; write {argument}=[0]")
    given = list(ranks)
    try:
        if any(isinstance(rank, bool) for rank in given):
            raise TypeError
        chosen = tuple(operator.index(rank) for rank in given)
    except TypeError:
        raise RanksError(f"{argument}={given!r} holds something other than integers; write {argument}=[0, 1]") from None
    if -1 in chosen:
        if any(rank != -1 for rank in chosen):
            raise RanksError(f"{argument}={given}: -1 means every rank; write {argument}=[-1], or leave -1 out")
        return None
    negative = [rank for rank in chosen if rank < 0]
    if negative:
        raise RanksError(f"{argument}={given}: {negative} are no ranks; count from 0, or write [-1] for every rank")
    return chosen


def parse_ranks(ranks: object, argument: str = "ranks") -> frozenset[int] | None:
    """Return the ranks that a configuration names, ``None`` for all of them.

    >>> sorted(parse_ranks("0,8,16-18"))
    [0, 8, 16, 17, 18]
    """
    if not isinstance(ranks, str):
        chosen = checked_ranks(ranks, argument)
        return None if chosen is None else frozenset(chosen)
    if ranks.strip().lower() == "all":
        return None
    found: set[int] = set()
    for part in ranks.split(","):
        first, dash, last = (text.strip() for text in part.partition("-"))
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise RanksError(f"{argument}={ranks!r}: {part!r} is no rank; write for example 'all' or '0,8,16-23'")
        found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)
