from __future__ import annotations

import pytest
from ds_numa._launcher import find_rank
from ds_numa.errors import RankError


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, (0, 1)),
        ({"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8"}, (3, 8)),
        ({"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, (1, 2)),
        ({"MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}, (1, 2)),
        ({"SLURM_LOCALID": "2", "SLURM_STEP_TASKS_PER_NODE": "4(x16)"}, (2, 4)),
        ({"SLURM_LOCALID": "0"}, (0, 1)),  # a batch script in which nothing was launched
        ({"SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "1", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}, (3, 4)),
    ],
)
def test_the_launchers_environment(env: dict[str, str], expected: tuple[int, int]) -> None:
    assert find_rank(env, None, None) == expected


def test_the_callers_word_wins() -> None:
    env = {"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8"}
    assert find_rank(env, 1, 2) == (1, 2)
    assert find_rank(env, 1, None) == (1, 8)
    assert find_rank(env, None, 4) == (3, 4)
    assert find_rank({}, None, 1) == (0, 1)


@pytest.mark.parametrize(
    ("env", "rank", "ranks", "message"),
    [
        ({"LOCAL_RANK": "3"}, None, None, "LOCAL_WORLD_SIZE is not: pass num_local_procs"),
        ({"LOCAL_RANK": "x", "LOCAL_WORLD_SIZE": "8"}, None, None, "LOCAL_RANK = 'x' is not one number"),
        ({"LOCAL_RANK": "-1", "LOCAL_WORLD_SIZE": "8"}, None, None, "LOCAL_RANK = '-1' is not one number"),
        ({"SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "4,3"}, None, None, "'4,3' is not one number"),
        ({}, 1, None, "local_rank is given, but num_local_procs is not"),
        ({}, None, 4, "num_local_procs is given, but local_rank is not"),
    ],
)
def test_half_an_environment_is_an_error(
    env: dict[str, str], rank: int | None, ranks: int | None, message: str
) -> None:
    with pytest.raises(RankError, match=message):
        find_rank(env, rank, ranks)
