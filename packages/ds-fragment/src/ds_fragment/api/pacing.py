"""One rank sets the pace of a collective iteration, and the others wait for it on the host.

[Note: pacing] The rank that receives weights may spend minutes between two of them, in another process group. A
collective that the other ranks have started meanwhile would run into the time-out of its process group. So they start
none: before each step they wait for a key in the store of the default process group, which the receiver sets as it
comes to the step. The wait has no limit. Where the receiver ends early, it sets the key of the next step to a reason,
and the other ranks raise it. The last rank to leave an iteration deletes its keys.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from ds_fragment.errors import FragmentError

_GO, _ABANDONED = "go", "abandoned: "
_LOOK = timedelta(seconds=1)  # how long one wait lasts: Python can be interrupted between two


class Pace:
    """The steps of one iteration over the ranks of a group; see [Note: pacing]. All ranks make it.

    Args:
        group: the ranks that take part.
        dst: the global rank that sets the pace.
    """

    def __init__(self, group: dist.ProcessGroup, dst: int) -> None:
        self._dst, self._leads = dst, dist.get_rank() == dst
        self._size, self._step = group.size(), 0
        self._store: Any = distributed_c10d._get_default_store()
        ranks = dist.get_process_group_ranks(group)
        name = hashlib.sha256(repr((ranks, dst)).encode()).hexdigest()[:12]
        place = f"ds_fragment/weights/{name}"
        with self._there():  # each rank counts its iterations in the store, as a new store begins anew
            self._place = f"{place}/{self._store.add(f'{place}/begun/{dist.get_rank()}', 1)}"

    def step(self) -> None:
        """Let the other ranks come to the next step; on those, wait until they may.

        Raises:
            FragmentError: the receiver has ended early, or the store is gone.
        """
        self._step += 1
        if self._leads:
            self._tell(_GO)
            return
        key = self._key()
        with self._there():
            while not self._came(key):
                pass
            word = self._store.get(key).decode()
        if word != _GO:
            raise FragmentError(
                f"rank {self._dst} ended its iteration over the weights early ({word.removeprefix(_ABANDONED)}): it "
                "has to take all of them, until the iterator is exhausted"
            )

    def abandon(self, reason: str) -> None:
        """Tell the other ranks that there is no further step, and leave."""
        if self._leads:
            self._step += 1
            self._tell(f"{_ABANDONED}{reason}")
        self.leave()

    def leave(self) -> None:
        """Take part no more; the last rank to leave deletes the keys."""
        with self._there():
            if self._store.add(f"{self._place}/left", 1) < self._size:
                return
        with contextlib.suppress(RuntimeError, NotImplementedError):  # some stores cannot delete
            for step in range(1, self._step + 2):
                self._store.delete_key(self._key(step))
            self._store.delete_key(f"{self._place}/left")

    def _key(self, step: int | None = None) -> str:
        return f"{self._place}/{self._step if step is None else step}"

    def _tell(self, word: str) -> None:
        with self._there():
            self._store.set(self._key(), word)

    def _came(self, key: str) -> bool:
        """Whether there is the key, which is waited for a while."""
        try:
            self._store.wait([key], _LOOK)
        except RuntimeError:  # it took longer; if the store is gone, the next line says so
            return bool(self._store.check([key]))
        return True

    @contextlib.contextmanager
    def _there(self) -> Iterator[None]:
        """Say that the store is gone where it is."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, FragmentError):
                raise
            raise FragmentError(
                f"the store of the default process group does not answer: the rank or launcher that keeps it has ended "
                f"({error})"
            ) from error
