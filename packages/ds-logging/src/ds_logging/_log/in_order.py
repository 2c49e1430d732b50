"""Take turns by rank, through the store of torch.distributed."""

from __future__ import annotations

import contextlib
import datetime as dt
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ds_logging._rank import group_rank

PATIENCE = 60.0  # seconds to wait for the rank before this one

_turns: Counter[str] = Counter()
_turns_lock = threading.RLock()
_thread = threading.local()


def has_turn() -> bool:
    """Say whether this thread is inside of `in_rank_order`: what it logs must be shown before it leaves."""
    return getattr(_thread, "has_turn", False)


@contextmanager
def in_rank_order(group: Any) -> Iterator[None]:
    """Enter when the rank before this one has left; rank 0 when the last rank has left the time before.

    All ranks of the group must come. Without a process group it does nothing; on a rank outside the group, either.
    """
    c10d: Any = sys.modules.get("torch.distributed.distributed_c10d")
    rank = group_rank(group)
    if c10d is None or not c10d.is_initialized() or rank < 0:
        yield
        return
    size = c10d.get_world_size(group)
    name = getattr(c10d.group.WORLD if group is None else group, "group_name", "default")
    with _turns_lock:
        turn = _turns[name]
        _turns[name] += 1
    # A prefix of its own: no key of torch's is touched.
    store = c10d.PrefixStore(f"ds_logging/in_order/{name}", c10d._get_default_store())
    before = f"{turn}/{rank - 1}" if rank else f"{turn - 1}/{size - 1}"
    if size > 1 and (rank or turn):
        _wait(store, before, rank - 1 if rank else size - 1)
    _thread.has_turn = True
    try:
        yield
    finally:
        _thread.has_turn = False
        if size > 1:
            store.set(f"{turn}/{rank}", "")


def _wait(store: Any, key: str, rank: int) -> None:
    from ds_logging._log.logger import logger

    try:
        store.wait([key], dt.timedelta(seconds=PATIENCE))
    except Exception as error:
        logger.warning("log_dist(in_order=True): rank %d did not come in %g s: %s", rank, PATIENCE, error)
        return
    with contextlib.suppress(Exception):  # a store that cannot delete keeps a few bytes
        store.delete_key(key)  # nobody else waits for it
