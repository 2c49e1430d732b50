"""Have the ranks compare what they are about to do, so that a rank that is missing, or does something else, is named.

[Note: check] Off by default. With ``DS_FRAGMENT_CHECK=1``, or inside ``with checked():``, every collective call first
meets the other ranks in the store of the default process group: each rank leaves a line that says what it is called
with, and reads the others'. Nothing is communicated through the groups themselves, so that a rank that is elsewhere
cannot hang the ones that look for it. Who waits in vain for longer than the time-out says so in the store before it
raises; a rank that comes late finds that and raises too.
"""

from __future__ import annotations

import contextlib
import contextvars
import hashlib
import os
import time
from collections import Counter
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
_calls: Counter[tuple[int, str]] = Counter()  # by world (its store) and group


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
        turn = _calls[id(store), name]
        _calls[id(store), name] += 1
        _meet(store, f"ds_fragment/check/{name}/{turn}", ranks, call, limit)
        if turn:  # everybody has come to this turn, so everybody has read the one before
            with contextlib.suppress(RuntimeError):
                store.delete_key(f"ds_fragment/check/{name}/{turn - 1}/{dist.get_rank()}")


def _store() -> Any:
    return distributed_c10d._get_default_store()


def _meet(store: Any, place: str, ranks: Sequence[int], call: str, limit: float) -> None:
    me = dist.get_rank()
    store.set(f"{place}/{me}", call)
    deadline = time.monotonic() + limit
    calls: dict[int, str] = {}
    for rank in ranks:
        with contextlib.suppress(dist.DistStoreError, RuntimeError):
            store.wait([f"{place}/{rank}"], timedelta(seconds=max(0.01, deadline - time.monotonic())))
            calls[rank] = store.get(f"{place}/{rank}").decode()
    missing = [rank for rank in ranks if rank not in calls]
    if missing:
        store.set(f"{place}/given-up", f"{me} {' '.join(map(str, missing))}")
        raise RankMismatchError(
            f"rank {me} called {call}, and ranks {missing} of {list(ranks)} did not come within {limit:g} s: every "
            "rank of the group must make the call"
        )
    if store.check([f"{place}/given-up"]):
        other, *absent = store.get(f"{place}/given-up").decode().split()
        raise RankMismatchError(
            f"rank {me} called {call} too late: rank {other} has given up waiting for ranks {', '.join(absent)}"
        )
    others = {rank: other for rank, other in calls.items() if other != call}
    if others:
        told = "; ".join(f"rank {rank} called {calls[rank]}" for rank in [me, *list(others)[:3]])
        raise RankMismatchError(f"the ranks did not make the same call: {told}")
