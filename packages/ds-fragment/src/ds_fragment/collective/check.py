"""Have the ranks compare what they are about to do, so that a rank that is missing, or does something else, is named.

[Note: check] Off by default. With ``DS_FRAGMENT_CHECK=1``, or inside ``with checked():``, every collective call first
meets the other ranks in the store of the default process group: each rank leaves a line that says what it is called
with, and reads the others'. Nothing is communicated through the groups themselves, so that a rank that is elsewhere
cannot hang the ones that look for it.

[Note: turns] The ranks of a group meet in one turn after the other. The store knows the turn, and a rank asks it at
each call; it counts nothing itself. A turn is ended once, by the first rank that either has seen all others in it or
has waited in vain for longer than the time-out. All ranks that are in the turn go by that end: all of them go on, or
all of them raise. Who comes afterwards is in the next turn, where what was left in an ended one is not looked at. So
the ranks meet again as soon as all of them call again, whoever stayed away before.
"""

from __future__ import annotations

import contextlib
import contextvars
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from ds_fragment.errors import RankMismatchError

_SWITCH = "DS_FRAGMENT_CHECK"
_TIMEOUT = "DS_FRAGMENT_CHECK_TIMEOUT"
_DEFAULT_TIMEOUT = 60.0  # seconds

_inside: contextvars.ContextVar[float | None] = contextvars.ContextVar("ds_fragment_checked", default=None)


@contextlib.contextmanager
def checked(timeout: float = _DEFAULT_TIMEOUT) -> Iterator[None]:
    """Check every call inside: that all ranks of a group make it, with the same parameters.

    Every rank enters it around the same calls. It costs a few small messages through the store for each call.

    Args:
        timeout: seconds to wait for the other ranks; then `RankMismatchError` names those that did not come.

    Raises:
        ValueError: ``timeout`` is not positive.
    """
    if not timeout > 0:
        raise ValueError(f"timeout is {timeout}, expected a positive number of seconds")
    token = _inside.set(timeout)
    try:
        yield
    finally:
        _inside.reset(token)


def time_limit() -> float | None:
    """How long to wait for other ranks, in seconds; None where calls are not checked."""
    inside = _inside.get()
    if inside is not None:
        return inside
    if os.environ.get(_SWITCH, "0") in ("", "0"):
        return None
    text = os.environ.get(_TIMEOUT, str(_DEFAULT_TIMEOUT))
    try:
        limit = float(text)
    except ValueError:
        limit = 0.0
    if not limit > 0:
        raise ValueError(f"{_TIMEOUT} is {text!r}, expected a positive number of seconds")
    return limit


def meet(groups: Sequence[dist.ProcessGroup], describe: Callable[[], str]) -> None:
    """Compare this call with that of every other rank of the groups, if calls are checked.

    Raises:
        RankMismatchError: a rank did not come within the time-out, or made another call.
    """
    limit = time_limit()
    if limit is None or not groups:
        return
    call, store = describe(), _store()
    for group in groups:
        ranks = dist.get_process_group_ranks(group)
        name = hashlib.sha256(repr(ranks).encode()).hexdigest()[:12]
        _meet(store, f"ds_fragment/check/{name}", ranks, call, limit)


def _store() -> Any:
    return distributed_c10d._get_default_store()


def _meet(store: Any, place: str, ranks: Sequence[int], call: str, limit: float) -> None:
    """One turn; see [Note: turns]."""
    me = dist.get_rank()
    turn = int(store.compare_set(f"{place}/turn", "", "0"))
    while store.check([f"{place}/{turn}/end"]):  # who ended it has not counted on yet
        turn += 1
    store.set(f"{place}/{turn}/{me}", call)
    deadline = time.monotonic() + limit
    missing = [rank for rank in ranks if not _came(store, f"{place}/{turn}/{rank}", deadline)]
    mine = " ".join(map(str, [me, *missing]))
    end = store.compare_set(f"{place}/{turn}/end", "", mine).decode()
    store.compare_set(f"{place}/turn", str(turn), str(turn + 1))  # by all ranks: one alone could be interrupted
    other, *absent = end.split()
    if missing and absent:
        late = _late(store, f"{place}/{turn - 1}/end", me)
        raise RankMismatchError(
            f"rank {me} called {call}, and ranks {missing} of {list(ranks)} did not come within {limit:g} s: every "
            f"rank of the group must make the call{late}"
        )
    if absent:
        raise RankMismatchError(f"rank {me} called {call} {_too_late(other, absent)}")
    calls = {rank: store.get(f"{place}/{turn}/{rank}").decode() for rank in ranks}
    if end == mine:  # one rank tidies up: all ranks are in this turn, so none looks at an earlier one
        _forget(store, place, turn, ranks)
    others = {rank: other for rank, other in calls.items() if other != call}
    if others:
        told = "; ".join(f"rank {rank} called {calls[rank]}" for rank in [me, *list(others)[:3]])
        raise RankMismatchError(f"the ranks did not make the same call: {told}")


def _came(store: Any, key: str, deadline: float) -> bool:
    """Whether there is the key before the deadline, or there now if that has passed."""
    left = deadline - time.monotonic()
    if left > 0:
        with contextlib.suppress(RuntimeError):  # a DistStoreError is one
            store.wait([key], timedelta(seconds=left))
            return True
    return bool(store.check([key]))


def _late(store: Any, end: str, me: int) -> str:
    """Words for a rank that the others have given up in the turn before; none for another."""
    other, *absent = store.get(end).decode().split() if store.check([end]) else [""]
    return f". It may have come {_too_late(other, absent)}" if str(me) in absent else ""


def _too_late(other: str, absent: Sequence[str]) -> str:
    return f"too late: rank {other} has given up waiting for ranks {', '.join(absent)}"


def _forget(store: Any, place: str, turn: int, ranks: Sequence[int]) -> None:
    """Delete what was left in the turns before this one."""
    with contextlib.suppress(RuntimeError):  # some stores cannot
        while turn and store.check([f"{place}/{turn - 1}/end"]):
            turn -= 1
            for key in (*ranks, "end"):
                store.delete_key(f"{place}/{turn}/{key}")
