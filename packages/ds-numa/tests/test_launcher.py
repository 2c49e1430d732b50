from __future__ import annotations

import pytest
from ds_numa._launcher import agreeing_launchers, find_rank
from ds_numa._launchers import LAUNCHERS, Launcher

SRUN = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}
ONE_TASK = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}
BATCH = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4"}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, (0, 1)),
        ({"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8"}, (3, 8)),  # torchrun
        ({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_SIZE": "2"}, (1, 2)),  # deepspeed.launcher.launch
        ({"LOCAL_RANK": "0", "WORLD_SIZE": "1"}, (0, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1)),
        ({"HOROVOD_RANK": "3", "HOROVOD_LOCAL_RANK": "1", "HOROVOD_LOCAL_SIZE": "2"}, (1, 2)),
        ({"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, (1, 2)),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}, (1, 2)),
        ({"MV2_COMM_WORLD_RANK": "9", "MV2_COMM_WORLD_LOCAL_RANK": "1", "MV2_COMM_WORLD_LOCAL_SIZE": "8"}, (1, 8)),
        ({"PALS_RANKID": "13", "PMI_RANK": "13", "PALS_LOCAL_RANKID": "1", "PALS_LOCAL_SIZE": "12"}, (1, 12)),
        ({"JSM_NAMESPACE_RANK": "7", "JSM_NAMESPACE_LOCAL_RANK": "1", "JSM_NAMESPACE_LOCAL_SIZE": "6"}, (1, 6)),
        (
            {"FLUX_TASK_RANK": "9", "FLUX_TASK_LOCAL_ID": "1", "FLUX_JOB_SIZE": "12", "FLUX_JOB_NNODES": "3"},
            (1, 4),
        ),
        ({"SLURM_LOCALID": "2", "SLURM_STEP_TASKS_PER_NODE": "4(x16)"}, (2, 4)),
        ({"SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_NODEID": "0"}, (1, 4)),
        ({"SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_NODEID": "2"}, (1, 3)),
        (SRUN | {"PMIX_RANK": "5"}, (1, 4)),  # srun --mpi=pmix
        (SRUN | {"PMI_RANK": "5", "PMI_SIZE": "8"}, (1, 4)),  # srun --mpi=pmi2
        (BATCH, (0, 1)),  # a batch script in which nothing was launched
        (BATCH | {"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}, (3, 4)),
        (ONE_TASK | {"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}, (3, 4)),  # srun -N2 torchrun
        (ONE_TASK | {"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, (1, 2)),  # mpirun in srun
        (SRUN | {"LOCAL_RANK": "1", "RANK": "5", "WORLD_SIZE": "8"}, (1, 4)),  # export LOCAL_RANK=$SLURM_LOCALID
    ],
)
def test_the_launchers_environment(env: dict[str, str], expected: tuple[int, int]) -> None:
    found = find_rank(env, None, None)
    assert (*found[:2], found.problem) == (*expected, None)


@pytest.mark.parametrize("launcher", [one for one in LAUNCHERS if one.local_rank], ids=lambda one: one.name)
def test_no_launcher_is_silently_rank_0_of_1(launcher: Launcher) -> None:
    env = {launcher.rank: "3", str(launcher.local_rank): "1"}
    found = find_rank(env, None, None)
    assert (found.local_rank, found.num_local_procs) == (1, None)
    assert "does not say how many ranks this machine has" in (found.problem or "")
    assert "pass num_local_procs" in (found.problem or "")
    assert find_rank(env, None, 2)[:2] == (1, 2)


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2", "NODE_RANK": "0"}, "Lightning does not say how many ranks"),
        (ONE_TASK | {"LOCAL_RANK": "0", "WORLD_SIZE": "4", "NODE_RANK": "0"}, "Lightning does not say"),
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_SIZE": "4"}, "LOCAL_SIZE = '4'"),  # left over from elsewhere
        ({"LOCAL_RANK": "x", "LOCAL_WORLD_SIZE": "8"}, "LOCAL_RANK = 'x' give no local rank"),
        ({"LOCAL_RANK": "-1", "LOCAL_WORLD_SIZE": "8"}, "LOCAL_RANK = '-1' give no local rank"),
        ({"LOCAL_RANK": "", "LOCAL_WORLD_SIZE": "8"}, "LOCAL_RANK = '' give no local rank"),
        ({"LOCAL_RANK": "9" * 5000, "LOCAL_WORLD_SIZE": "8"}, "give no local rank"),  # int() itself would raise
        ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "zwei"}, "LOCAL_WORLD_SIZE = 'zwei'"),
        ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE = '0'"),
        ({"LOCAL_RANK": "5", "LOCAL_WORLD_SIZE": "2"}, "local rank 5 of 2 cannot be"),
        ({"SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "4,3"}, "SLURM_STEP_TASKS_PER_NODE = '4,3'"),
        ({"SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "4,3", "SLURM_NODEID": "7"}, "Slurm does not say"),
        ({"FLUX_TASK_LOCAL_ID": "1", "FLUX_JOB_SIZE": "7", "FLUX_JOB_NNODES": "2"}, "Flux does not say"),
        ({"PMIX_RANK": "2"}, "PMIX_RANK = '2' give no local rank"),
        ({"RANK": "1", "WORLD_SIZE": "4"}, "LOCAL_RANK unset give no local rank"),
        (ONE_TASK | {"PMIX_RANK": "3"}, "PMIX_RANK = '3'"),  # prterun inside srun: what srun set is not of this job
    ],
)
def test_what_the_environment_leaves_open_is_named(env: dict[str, str], words: str) -> None:
    found = find_rank(env, None, None)
    assert words in (found.problem or "")
    assert ": pass " in (found.problem or "")


def test_the_callers_word_wins() -> None:
    env = {"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8"}
    assert find_rank(env, 1, 2) == (1, 2, None, None)
    assert find_rank(env, 1, None)[:2] == (1, 8)
    assert find_rank(env, None, 4)[:2] == (3, 4)
    assert find_rank({}, None, 1)[:2] == (0, 1)
    assert "local_rank was not given" in (find_rank({}, None, 4).problem or "")
    assert "num_local_procs was not given" in (find_rank({}, 1, None).problem or "")
    assert "local rank 3 of 2 cannot be" in (find_rank(env, None, 2).problem or "")


def test_launchers_that_number_the_ranks_alike() -> None:
    def names(env: dict[str, str], rank: int, ranks: int) -> list[str]:
        return [launcher.name.split(",")[0] for launcher in agreeing_launchers(env, rank, ranks)]

    assert names(SRUN | {"LOCAL_RANK": "1", "RANK": "5"}, 1, 4) == ["torchrun", "Slurm"]
    assert names(ONE_TASK | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}, 1, 4) == ["torchrun"]
    assert names(SRUN, 1, 2) == []
    assert names({}, 0, 1) == []
