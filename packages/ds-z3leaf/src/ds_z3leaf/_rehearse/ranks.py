"""The few object collectives of a rehearsal; one process alone needs no process group."""

from __future__ import annotations

from typing import Any, TypeVar

import torch.distributed as dist

from ds_z3leaf.errors import LeafError, LeafRehearsalError, LeafValueError

T = TypeVar("T")


class Ranks:
    """The ranks that rehearse together.

    Args:
        group: a process group; None stands for the default group, or for this process alone if there is none.

    Raises:
        LeafValueError: this rank is not in the group.

    Attributes:
        size: how many ranks.
        rank: of this process in the group.
        numbers: their global ranks.
    """

    def __init__(self, group: Any = None) -> None:
        self._group = group
        if not (dist.is_available() and dist.is_initialized()):
            self.size, self.rank, self.numbers = 1, 0, [0]
            return
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise LeafValueError(f"rank {dist.get_rank()} is not in the group: call it on the ranks of the group only")
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.numbers = dist.get_process_group_ranks(group if group is not None else dist.group.WORLD)

    def gather(self, value: T) -> list[T]:
        """Every rank's value, by rank. All ranks must call it."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value, group=self._group)
        return gathered

    def agree(self, error: BaseException | None, what: str) -> None:
        """Raise on every rank if any rank has an error, so that none waits for one that failed.

        Raises:
            LeafRehearsalError: a rank has an error; the message names the rank. An error of this package is raised
                as it is on the rank that has it.
        """
        told = self.gather(None if error is None else f"{type(error).__name__}: {error}")
        for rank, text in zip(self.numbers, told, strict=True):
            if text is not None:
                where = f"rank {rank} fails" if self.size > 1 else "it fails"
                if isinstance(error, LeafError):
                    raise error
                raise LeafRehearsalError(f"{what}: {where} with {text}") from error
