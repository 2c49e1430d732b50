"""The collectives of a rehearsal. One process alone needs no process group, and none needs numpy."""

from __future__ import annotations

import ctypes
import pickle
from typing import Any, TypeVar

import torch
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
        own = pickle.dumps(value)
        device = self._device()
        length = torch.tensor([len(own)], device=device)
        lengths = [torch.zeros_like(length) for _ in range(self.size)]
        dist.all_gather(lengths, length, group=self._group)
        sizes = [int(each) for each in lengths]
        padded = torch.frombuffer(bytearray(own.ljust(max(sizes), b"\0")), dtype=torch.uint8).to(device)
        gathered = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(gathered, padded, group=self._group)
        return [pickle.loads(_bytes(each, size)) for each, size in zip(gathered, sizes, strict=True)]

    def _device(self) -> torch.device:
        """Where the group's collectives take tensors."""
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is None or any(name in dist.get_backend(self._group) for name in ("gloo", "mpi")):
            return torch.device("cpu")
        return torch.device(accelerator.type)

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


def _bytes(tensor: torch.Tensor, size: int) -> bytes:
    """The first bytes of a tensor; ``numpy()`` would need numpy."""
    on_host = tensor.cpu()
    return ctypes.string_at(on_host.data_ptr(), size)
