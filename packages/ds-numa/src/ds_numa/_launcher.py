"""Which local rank this process is, from the environment that its launcher set."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ds_numa.errors import RankError

# (local rank, number of local ranks); the first pair whose rank is set counts
_VARIABLES = (
    ("LOCAL_RANK", "LOCAL_WORLD_SIZE"),  # torchrun, deepspeed, accelerate
    ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),  # Open MPI
    ("MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # Intel MPI, MPICH
    ("SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),  # srun; "4", "4(x2)", but not "4,3"
)


def find_rank(env: Mapping[str, str], local_rank: int | None, num_local_procs: int | None) -> tuple[int, int]:
    """The local rank and the number of local ranks; what the caller gives wins over the environment.

    Without a launcher the process is rank 0 of 1.

    Raises:
        RankError: a launcher's variable is no number, or one of the two is missing.
    """
    if local_rank is not None and num_local_procs is not None:
        return local_rank, num_local_procs
    for rank_name, size_name in _VARIABLES:
        if rank_name not in env or (size_name not in env and num_local_procs is None and rank_name != "LOCAL_RANK"):
            continue  # Slurm sets a rank without a size in batch scripts, where nothing was launched
        if num_local_procs is None and size_name not in env:
            raise RankError(f"{rank_name} = {env[rank_name]!r} is set but {size_name} is not: pass num_local_procs")
        rank = _read(env, rank_name) if local_rank is None else local_rank
        return rank, _read(env, size_name) if num_local_procs is None else num_local_procs
    if local_rank is None and num_local_procs in (None, 1):
        return 0, 1
    given, missing = ("local_rank", "num_local_procs") if num_local_procs is None else ("num_local_procs", "local_rank")
    raise RankError(f"{given} is given, but {missing} is not and no launcher set it (such as LOCAL_RANK): pass both")


def _read(env: Mapping[str, str], name: str) -> int:
    match = re.fullmatch(r"\s*(\d+)(\(x\d+\))?\s*", env[name])
    if not match:
        raise RankError(f"{name} = {env[name]!r} is not one number: pass local_rank and num_local_procs")
    return int(match[1])
