import sys
from types import SimpleNamespace

import pytest
from ds_logging._launchers import LAUNCHERS
from ds_logging._rank import current_position, current_rank, is_selected, local_rank, parse_ranks
from ds_logging.errors import RanksError


@pytest.mark.parametrize(
    ("environ", "wanted"),
    [
        ({}, (0, None)),
        ({"RANK": "3", "WORLD_SIZE": "8"}, (3, 8)),
        ({"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4"}, (2, 4)),
        ({"MV2_COMM_WORLD_RANK": "2", "MV2_COMM_WORLD_SIZE": "4"}, (2, 4)),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, (1, 2)),
        ({"PMIX_RANK": "5"}, (5, None)),
        ({"SLURM_PROCID": "6", "SLURM_NTASKS": "8"}, (6, None)),
        ({"SLURM_PROCID": "6", "SLURM_NTASKS": "9", "SLURM_STEP_NUM_TASKS": "8"}, (6, 8)),
        ({"RANK": "1", "WORLD_SIZE": "2", "SLURM_PROCID": "0"}, (1, 2)),  # torchrun under srun
        ({"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "SLURM_PROCID": "0"}, (3, 4)),  # mpirun in sbatch
        ({"RANK": "gold", "SLURM_PROCID": "2"}, (2, None)),
        ({"RANK": "", "PMI_RANK": "1"}, (1, None)),
        ({"RANK": "-1"}, (0, None)),
        ({"RANK": " 4 ", "WORLD_SIZE": "many"}, (4, None)),
    ],
)
def test_the_rank_before_init_is_the_launchers(environ, wanted):
    assert current_position(environ) == wanted


def fake_dist(initialized=True):
    return SimpleNamespace(is_initialized=lambda: initialized, get_rank=lambda: 5, get_world_size=lambda: 6)


def test_the_rank_after_init_is_the_process_groups(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setitem(sys.modules, "torch.distributed", fake_dist())
    assert current_position() == (5, 6)


@pytest.mark.parametrize("module", [fake_dist(initialized=False), SimpleNamespace()])
def test_torch_without_a_process_group_leaves_it_to_the_launcher(monkeypatch, module):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setitem(sys.modules, "torch.distributed", module)
    assert current_position() == (1, None)


@pytest.mark.parametrize(
    ("ranks", "selected"),
    [
        (None, {0}),
        ([-1], {0, 1, 2, 3}),
        ([], set()),
        ([0], {0}),
        ((1, 3), {1, 3}),
        (range(2), {0, 1}),
        ({2}, {2}),
        ([0, 7, 9], {0}),  # a rank that is not there is not there
        ([4], set()),
    ],
)
def test_selection(ranks, selected):
    assert {rank for rank in range(4) if is_selected(ranks, rank)} == selected


def test_an_iterator_is_read_once():
    assert is_selected(iter([1, 2]), 2)


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ([-2], ["ranks=[-2]", "count from 0"]),
        ([0, -3], ["[-3]"]),
        ([-1, 0], ["ranks=[-1, 0]", "every rank"]),
        (0, ["ranks=0", "int", "ranks=[0]"]),
        ("0", ["ranks='0'", "str"]),
        (["0"], ["ranks=['0']", "integers"]),
        ([0.0], ["ranks=[0.0]", "integers"]),
        ([True], ["ranks=[True]", "integers"]),
        ([None], ["ranks=[None]", "integers"]),
    ],
)
def test_a_wrong_selection_is_an_error_on_every_rank(ranks, words):
    for rank in range(4):
        with pytest.raises(RanksError) as error:
            is_selected(ranks, rank)
        assert all(word in str(error.value) for word in words), str(error.value)


def test_integers_of_other_types_are_ranks():
    class Index:
        def __index__(self):
            return 2

    assert is_selected([Index()], 2)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("all", None),
        (" ALL ", None),
        ("0", {0}),
        ("0,8,16-18", {0, 8, 16, 17, 18}),
        (" 1 , 3 - 4 ", {1, 3, 4}),
        ([-1], None),
        ([2, 5], {2, 5}),
        ([], set()),
    ],
)
def test_ranks_of_a_configuration(text, wanted):
    assert parse_ranks(text) == wanted


@pytest.mark.parametrize("text", ["", "a", "1,,2", "3-1", "-1", "1-", 0, ["0"], None])
def test_wrong_ranks_of_a_configuration_name_themselves(text):
    with pytest.raises(RanksError, match="DS_LOG_RANKS="):
        parse_ranks(text, "DS_LOG_RANKS")


def test_a_changed_environment_counts_at_once(monkeypatch):
    assert current_rank() == 0
    for name, rank in (("SLURM_PROCID", 1), ("PMI_RANK", 2), ("RANK", 3)):
        monkeypatch.setenv(name, str(rank))
        assert (current_rank(), current_position().rank) == (rank, rank)
    monkeypatch.setenv("RANK", "4")
    assert current_rank() == 4
    monkeypatch.delenv("RANK")
    assert current_rank() == 2
    monkeypatch.setattr("os.environ", {"RANK": "6"})
    assert current_rank() == 6


def test_every_launcher_is_known_by_its_own_variables():
    for launcher in LAUNCHERS:
        environ = {launcher.rank: "3"}
        if launcher.size is not None:
            environ[launcher.size] = "8"
        assert current_position(environ) == (3, None if launcher.size is None else 8), launcher.name


def test_a_launcher_inside_a_batch_job_is_not_hidden_by_what_it_inherits():
    ranks = [launcher.rank for launcher in LAUNCHERS]
    inherited = dict.fromkeys(("SLURM_PROCID", "FLUX_TASK_RANK"), "0")
    for name in (
        "OMPI_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_RANK",
        "PMI_RANK",
        "PALS_RANKID",
        "JSM_NAMESPACE_RANK",
        "RANK",
    ):
        assert current_position({**inherited, name: "5"}).rank == 5
    assert len(ranks) == len(set(ranks))


@pytest.mark.parametrize(("name", "value"), [("LOCAL_RANK", "2"), ("SLURM_LOCALID", "2"), ("MPI_LOCALRANKID", "2")])
def test_the_rank_within_the_node(monkeypatch, name, value):
    assert local_rank() is None
    monkeypatch.setenv(next(one.rank for one in LAUNCHERS if one.local_rank == name), "6")
    monkeypatch.setenv(name, value)
    assert local_rank() == 2
