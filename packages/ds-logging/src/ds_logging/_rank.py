"""Which rank is this process? Read anew at every question, from what is known by then.

After ``init_process_group`` torch.distributed knows. Before it, the environment that the launcher made does. torch is
looked at only if somebody else has imported it.
"""

from __future__ import annotations

import operator
import os
import sys
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ds_logging.errors import RanksError

# (rank, world size) as launchers name them, the first that is set wins. MPI stands before Slurm: `mpirun` inside a
# batch job inherits SLURM_PROCID=0 in every process of the first node. Slurm and PMIx name no size that can be relied
# on: SLURM_NTASKS describes the job, also in a process that `srun` did not start.
LAUNCHERS: tuple[tuple[str, str | None], ...] = (
    ("RANK", "WORLD_SIZE"),  # torchrun, deepspeed, accelerate
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),  # Open MPI
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),  # MVAPICH2
    ("PMI_RANK", "PMI_SIZE"),  # MPICH, Intel MPI
    ("PMIX_RANK", None),
    ("SLURM_PROCID", None),
)


class Position(NamedTuple):
    """A rank and, where it is known, the number of ranks."""

    rank: int
    world_size: int | None


def current_position(environ: Mapping[str, str] | None = None) -> Position:
    """Return this process's place: from torch.distributed, else from the launcher, else rank 0 of an unknown number.

    Args:
        environ: the environment to read, ``os.environ`` unless given. Values that are no numbers count as unset.
    """
    dist = sys.modules.get("torch.distributed")
    # getattr: torch may be half imported, or built without torch.distributed.
    is_initialized = getattr(dist, "is_initialized", None)
    if dist is not None and is_initialized is not None and is_initialized():
        return Position(dist.get_rank(), dist.get_world_size())
    environ = os.environ if environ is None else environ
    for rank_name, size_name in LAUNCHERS:
        rank = _number(environ, rank_name)
        if rank is not None:
            return Position(rank, None if size_name is None else _number(environ, size_name))
    return Position(0, None)


def _number(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name, "").strip()
    return int(text) if text.isdecimal() else None


def is_selected(ranks: Iterable[int] | None, position: Position) -> bool:
    """Say whether ``ranks`` names the rank of ``position``.

    Args:
        ranks: ``None`` for rank 0, ``[-1]`` for every rank, an empty list for none, else ranks.
        position: where this process stands.

    Raises:
        RanksError: on every rank alike, whatever the own one is.
    """
    if ranks is None:
        return position.rank == 0
    chosen = _integers(ranks)
    if -1 in chosen:
        if any(rank != -1 for rank in chosen):
            raise RanksError(f"ranks={list(chosen)}: -1 means every rank; write ranks=[-1], or leave -1 out")
        return True
    size = position.world_size
    outside = [rank for rank in chosen if rank < 0 or (size is not None and rank >= size)]
    if outside:
        known = "an unknown number of ranks" if size is None else f"world size {size} (ranks 0 to {size - 1})"
        raise RanksError(
            f"ranks={list(chosen)}: {outside} out of range for {known}; name ranks of this job, or [-1] for all"
        )
    return position.rank in chosen


def _integers(ranks: Iterable[int]) -> tuple[int, ...]:
    if isinstance(ranks, (str, bytes)) or not isinstance(ranks, Iterable):
        raise RanksError(f"ranks={ranks!r} ({type(ranks).__name__}) is no list of ranks; write ranks=[0]")
    given = list(ranks)
    try:
        if any(isinstance(rank, bool) for rank in given):
            raise TypeError
        return tuple(operator.index(rank) for rank in given)
    except TypeError:
        raise RanksError(f"ranks={given!r} holds something other than integers; write ranks=[0, 1]") from None
