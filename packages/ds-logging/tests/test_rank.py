import sys
from types import SimpleNamespace

import pytest
from ds_logging._rank import Position, current_position, is_selected
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
    [(None, {0}), ([-1], {0, 1, 2, 3}), ([], set()), ([0], {0}), ((1, 3), {1, 3}), (range(2), {0, 1}), ({2}, {2})],
)
def test_selection(ranks, selected):
    assert {rank for rank in range(4) if is_selected(ranks, Position(rank, 4))} == selected


def test_an_iterator_is_read_once():
    assert is_selected(iter([1, 2]), Position(2, 4))


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ([4], ["ranks=[4]", "world size 4", "0 to 3"]),
        ([0, 7, 9], ["[7, 9]", "world size 4"]),
        ([-2], ["ranks=[-2]", "out of range"]),
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
            is_selected(ranks, Position(rank, 4))
        assert all(word in str(error.value) for word in words), str(error.value)


def test_an_unknown_world_size_bounds_nothing_above():
    assert not is_selected([100], Position(0, None))
    with pytest.raises(RanksError, match="unknown number of ranks"):
        is_selected([-3], Position(0, None))


def test_integers_of_other_types_are_ranks():
    class Index:
        def __index__(self):
            return 2

    assert is_selected([Index()], Position(2, 4))
