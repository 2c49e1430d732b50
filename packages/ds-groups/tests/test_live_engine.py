"""One set of groups, with a stand-in for DeepSpeed's module: found, published, taken back, released."""

from __future__ import annotations

import sys
import weakref
from types import ModuleType, SimpleNamespace

import pytest
import torch.distributed as dist
from ds_groups import LayoutConflictError, NotInitializedError, PlanMismatchError, parallel_state as groups
from ds_groups._variables import DICTS, NAMES
from ranks import run_ranks

NAME = "ep_size_2"


def load(*, old=False):
    """Put a module in the place of DeepSpeed's; an ``old`` one has none of the variables."""
    module = ModuleType("deepspeed.utils.groups")
    module.mpu = module.mesh_device = None
    for name in () if old else NAMES:
        setattr(module, name, {} if name in DICTS else None)
    sys.modules[module.__name__] = module
    return module


def count():
    return len(dist.distributed_c10d._world.pg_map)


def new_groups(*tables):
    """Make every group of every table, as DeepSpeed does; returns this rank's of each."""
    rank = dist.get_rank()
    made = [(ranks, dist.new_group(ranks)) for table in tables for ranks in table]
    return [group for ranks, group in made if rank in ranks]


def engine_s_groups(rank):
    engine = load()
    expert, data, tensor, beside, world = new_groups([[0, 1]], [[0], [1]], [[0, 1]], [[0], [1]], [[0, 1]])
    engine._EXPERT_PARALLEL_GROUP[NAME], engine._EXPERT_DATA_PARALLEL_GROUP[NAME] = expert, data
    engine._TENSOR_MODEL_PARALLEL_GROUP = engine._MODEL_PARALLEL_GROUP = tensor
    engine._DATA_PARALLEL_GROUP = beside
    engine._ZERO_PARAM_INTRA_PARALLEL_GROUP = data
    engine._WORLD_GROUP = world
    engine._ALL_TO_ALL_GROUP.update({f"local_{rank}": beside, f"local_{1 - rank}": -100, "global_0": world})
    made = count()
    assert groups._get_max_expert_size_name() == NAME
    assert groups._get_expert_parallel_group(NAME) is expert
    assert groups._get_expert_parallel_group_ranks(NAME) == [0, 1]
    assert groups._get_expert_data_parallel_group(NAME) is data
    assert groups._get_expert_data_parallel_group_ranks(NAME) == [rank]
    assert groups._get_expert_parallel_group_dict() is engine._EXPERT_PARALLEL_GROUP
    assert groups._get_expert_data_parallel_group_dict() is engine._EXPERT_DATA_PARALLEL_GROUP
    assert groups.get_tensor_model_parallel_group() is groups.get_model_parallel_group() is tensor
    assert groups.get_data_parallel_group() is beside
    assert groups.get_tensor_model_parallel_src_rank() == 0
    assert groups._get_zero_param_intra_parallel_group_ranks() == [rank]
    assert groups._clone_world_group() is groups._get_data_parallel_group() is world
    assert groups._get_local_all_to_all_group() is engine._ALL_TO_ALL_GROUP
    # The functions that make groups find them.
    groups._create_expert_and_data_parallel(2)
    groups._create_zero_param_parallel_group(1)
    groups._get_local_all_to_all_group(ranks_per_node=1)
    assert groups._init_tp_mesh_device(2) == (beside, tensor)
    for other in (
        lambda: groups._create_zero_param_parallel_group(2),
        lambda: groups._init_tp_mesh_device(1),
        lambda: groups._get_local_all_to_all_group(ranks_per_node=2),
    ):
        with pytest.raises(LayoutConflictError, match="DeepSpeed made them"):
            other()
    groups.destroy_groups()
    assert groups._get_expert_parallel_group(NAME) is expert
    assert count() == made
    assert groups._ALL_TO_ALL_GROUP[f"local_{1 - rank}"] == -100
    dist.destroy_process_group(expert)  # and a DeepSpeed that keeps it
    with pytest.raises(NotInitializedError):
        groups._get_expert_parallel_group(NAME)
    assert groups._get_max_expert_size() is None


def test_groups_of_the_engine_are_found():
    run_ranks(engine_s_groups, 2)


def conflict_on_one_rank(rank):
    engine = load()
    (mine,) = new_groups([[0], [1, 2]])
    engine._ZERO_PARAM_INTRA_PARALLEL_GROUP = mine
    with pytest.raises(PlanMismatchError, match="fits the groups there are"):
        groups._create_zero_param_parallel_group(1)  # what rank 0 has
    return count()


def test_every_rank_learns_of_a_conflict_that_one_sees():
    assert len(set(run_ranks(conflict_on_one_rank, 3))) == 1


def published(rank, old):
    engine = load(old=old)
    groups._create_expert_and_data_parallel(2)
    data, tensor = groups._init_tp_mesh_device(2)
    groups._create_zero_param_parallel_group(2)
    groups._get_local_all_to_all_group(ranks_per_node=1)
    world = groups._clone_world_group()
    held = vars(engine)
    assert held["_EXPERT_PARALLEL_GROUP"] == {NAME: groups._get_expert_parallel_group(NAME)}
    assert held["_EXPERT_PARALLEL_GROUP_RANKS"] == {NAME: [0, 1]}
    assert held["_EXPERT_DATA_PARALLEL_GROUP"] == {NAME: groups._get_expert_data_parallel_group(NAME)}
    assert held["_EXPERT_DATA_PARALLEL_GROUP_RANKS"] == {NAME: [rank]}
    assert engine._TENSOR_MODEL_PARALLEL_GROUP is engine._MODEL_PARALLEL_GROUP is tensor
    assert engine._DATA_PARALLEL_GROUP is data
    assert engine._ZERO_PARAM_INTRA_PARALLEL_GROUP is groups._get_zero_param_intra_parallel_group()
    assert engine._WORLD_GROUP is world
    assert list(engine._ALL_TO_ALL_GROUP) == ["local_0", "local_1", "global_0"]
    assert all(getattr(groups, name) is getattr(engine, name) for name in NAMES)
    groups._create_expert_and_data_parallel(2)
    groups.destroy_groups()
    assert all(not getattr(engine, name) for name in NAMES)
    assert count() == 1


@pytest.mark.parametrize("old", [False, True])
def test_groups_made_here_are_the_engine_s(old):
    run_ranks(published, 2, old)


def made_before(rank):
    groups._create_expert_and_data_parallel(2)
    groups._create_zero_param_parallel_group(2)
    first, world = groups._get_expert_parallel_group(NAME), groups._clone_world_group()
    engine = load()
    (engine._WORLD_GROUP,) = new_groups([[0, 1]])
    assert groups._get_expert_parallel_group_dict() is engine._EXPERT_PARALLEL_GROUP == {NAME: first}
    assert groups._get_zero_param_intra_parallel_group() is engine._ZERO_PARAM_INTRA_PARALLEL_GROUP
    assert groups._clone_world_group() is engine._WORLD_GROUP is not world
    groups.destroy_groups()
    assert engine._EXPERT_PARALLEL_GROUP == {}
    assert engine._WORLD_GROUP is groups._clone_world_group()


def test_groups_made_before_deepspeed_was_imported():
    run_ranks(made_before, 2)


def released_alone(rank, live):
    if live:
        load()
    groups._create_expert_and_data_parallel(2)
    groups._init_tp_mesh_device(2)
    groups.set_tensor_model_parallel_world_size(8)
    groups._get_local_all_to_all_group(ranks_per_node=1)
    expert, data = groups._get_expert_parallel_group(NAME), groups._get_expert_data_parallel_group(NAME)
    assert groups.get_tensor_model_parallel_group() is expert  # the same ranks
    groups.mpu = mpu = SimpleNamespace()
    watch = weakref.ref(expert)
    dist.destroy_process_group(expert)
    groups._release_process_group_references(expert)
    del expert
    assert watch() is None  # no reference is left
    assert groups._get_expert_parallel_group_dict() == groups._EXPERT_PARALLEL_GROUP_RANKS == {}
    assert groups._get_expert_data_parallel_group(NAME) is data
    assert groups._get_local_all_to_all_group()[f"local_{rank}"] is data
    assert groups.get_data_parallel_group() is data
    assert groups._MPU_TENSOR_MODEL_PARALLEL_WORLD_SIZE is None
    assert groups.mpu is mpu


@pytest.mark.parametrize("live", [False, True])
def test_a_group_is_released(live):
    run_ranks(released_alone, 2, live)


def released_with_the_world(rank, live):
    engine = load() if live else None
    released = []
    sequence = ModuleType("deepspeed.runtime.sequence_parallel.parallel_state_sp")
    sequence._release_sequence_parallel_groups = lambda: released.append("sequence")
    sys.modules[sequence.__name__] = sequence
    groups._create_expert_and_data_parallel(2)
    groups._clone_world_group()
    if live:
        (engine._ZERO_PARAM_INTRA_PARALLEL_GROUP,) = new_groups([[0], [1]])
    groups.mpu, groups.mesh_device, groups.expert_tensor_parallel_world_size = SimpleNamespace(), object(), 4
    groups.set_tensor_model_parallel_rank(3)
    dist.destroy_process_group()
    groups._release_process_group_references()
    assert released == ["sequence"]
    for module in (groups, engine) if live else (groups,):
        assert module.mpu is module.mesh_device is module._MPU_TENSOR_MODEL_PARALLEL_RANK is None
        assert module.expert_tensor_parallel_world_size == 1
        assert all(not getattr(module, name) for name in NAMES)


@pytest.mark.parametrize("live", [False, True])
def test_everything_is_released_with_the_world(live):
    run_ranks(released_with_the_world, 2, live)


def stale_group_of_the_engine(rank):
    engine = load()
    (old,) = new_groups([[0, 1]])
    engine._WORLD_GROUP = old
    dist.destroy_process_group(old)  # by torch, which tells nobody
    assert groups._clone_world_group() is engine._WORLD_GROUP is not old


def test_a_dead_group_of_the_engine_is_replaced():
    run_ranks(stale_group_of_the_engine, 2)
