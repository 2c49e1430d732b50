"""The functions of ``deepspeed.utils.groups``."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace

import ds_groups
import pytest
import torch
import torch.distributed as dist
from ds_groups import TopologyError, parallel_state as groups
from ds_groups.errors import DivisibilityError, LayoutConflictError, NotInitializedError
from ranks import run_ranks


def total(rank, group):
    value = torch.tensor([10**rank])
    dist.all_reduce(value, group=group)
    return [member for member, digit in enumerate(reversed(str(value.item()))) if digit == "1"]


# Without a process group


def test_one_process_by_itself(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert groups._get_data_parallel_world_size() == groups._get_sequence_data_parallel_world_size() == 1
    assert groups._get_data_parallel_rank() == groups._get_sequence_data_parallel_rank() == 0
    assert groups._get_data_parallel_group_ranks() == [0]
    assert groups._get_broadcast_src_rank() == 0
    assert groups._get_sequence_parallel_world_size() == groups._get_model_parallel_world_size() == 1
    assert groups._get_sequence_parallel_rank() == 0
    assert groups._get_expert_model_parallel_world_size() == 1
    assert groups._get_zero_param_intra_parallel_group() is None
    assert groups._zero_param_parallel_is_initialized() is False
    assert groups._get_expert_parallel_group_dict() == groups._get_expert_data_parallel_group_dict() == {}
    assert groups._get_max_expert_size() is None


@pytest.mark.parametrize(
    "call",
    [
        groups._get_data_parallel_group,
        groups._clone_world_group,
        groups._get_local_all_to_all_group,
        groups._get_sequence_parallel_group,
        groups.get_tensor_model_parallel_group,
        groups.get_model_parallel_group,
        groups.get_data_parallel_group,
        groups.get_tensor_model_parallel_world_size,
        groups.get_tensor_model_parallel_src_rank,
        groups._get_max_expert_size_name,
        groups._get_max_expert_parallel_group,
        groups._get_zero_param_intra_parallel_rank_in_mygroup,
        lambda: groups._get_expert_parallel_group("ep_size_2"),
        lambda: groups._create_expert_and_data_parallel(2),
        lambda: groups._create_expert_data_and_model_parallel(2, None),
        lambda: groups._create_model_parallel(2),
        lambda: groups._create_zero_param_parallel_group(2),
        lambda: groups._init_tp_mesh_device(2),
        lambda: groups.initialize(2),
    ],
)
def test_groups_need_a_process_group(call):
    with pytest.raises(NotInitializedError, match=r"first|assign"):
        call()


def test_launched_ranks_are_not_taken_for_one(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    for call in (groups._get_data_parallel_world_size, groups._get_data_parallel_rank, groups._get_broadcast_src_rank):
        with pytest.raises(NotInitializedError, match=r"started 4 ranks \(WORLD_SIZE\)"):
            call()


def test_overrides_without_a_process_group():
    groups.set_tensor_model_parallel_world_size(4)
    groups.set_tensor_model_parallel_rank(3)
    try:
        assert groups.get_tensor_model_parallel_world_size() == groups.get_model_parallel_world_size() == 4
        assert groups.get_tensor_model_parallel_rank() == groups.get_model_parallel_rank() == 3
    finally:
        groups.set_tensor_model_parallel_world_size(None)
        groups.set_tensor_model_parallel_rank(None)


def test_divisibility():
    assert groups._ensure_divisibility(8, 4) is None
    for numbers in ((8, 3), (8, 0)):
        with pytest.raises(DivisibilityError, match=f"8 is not divisible by {numbers[1]}"):
            groups._ensure_divisibility(*numbers)


def test_public_names():
    assert all(inspect.isfunction(getattr(groups, name)) for name in groups.__all__)
    assert not any(name.startswith("_") for name in groups.__all__)
    source = Path(ds_groups.__file__).parent
    assert not any("\n    global " in path.read_text() for path in source.glob("*.py"))


def test_state_is_seen_by_every_function(monkeypatch):
    mpu = SimpleNamespace(
        get_data_parallel_world_size=lambda: 5,
        get_data_parallel_group_ranks=lambda: range(3, 8),
        get_model_parallel_world_size=lambda: 6,
        get_sequence_parallel_world_size=lambda: 7,
        get_sequence_parallel_rank=lambda: 2,
        get_sequence_parallel_group=lambda: "sequence",
        get_sequence_data_parallel_group=lambda: "both",
        get_data_parallel_group=lambda: "data",
    )
    monkeypatch.setattr(groups, "mpu", mpu)
    monkeypatch.setattr(groups, "expert_tensor_parallel_world_size", 9)
    assert groups._get_data_parallel_world_size() == 5
    assert groups._get_data_parallel_group_ranks() == [3, 4, 5, 6, 7]
    assert groups._get_model_parallel_world_size() == 6
    assert groups._get_sequence_parallel_world_size() == 7
    assert groups._get_sequence_parallel_rank() == 2
    assert groups._get_sequence_parallel_group() == "sequence"
    assert groups._get_sequence_data_parallel_group() == "both"
    assert groups._get_data_parallel_group() == "data"
    assert groups._get_expert_model_parallel_world_size() == 9


# Tensor parallel


def tensor_parallel(rank):
    first = groups._init_tp_mesh_device(2)
    assert groups._init_tp_mesh_device(2) == first  # the groups at every call, never None
    assert groups._init_tp_groups_with_new_group(2, 2) == first
    assert first == (groups.get_data_parallel_group(), groups.get_model_parallel_group())
    assert groups.get_tensor_model_parallel_world_size() == groups.get_data_parallel_world_size() == 2
    assert groups.get_tensor_model_parallel_rank() == rank % 2
    assert groups.get_data_parallel_rank() == rank // 2
    assert groups.get_tensor_model_parallel_src_rank() == rank // 2 * 2
    with pytest.raises(LayoutConflictError, match="exist with another layout"):
        groups._init_tp_mesh_device(4)
    groups.set_tensor_model_parallel_world_size(4)
    assert groups.get_tensor_model_parallel_world_size() == 4
    assert groups.get_tensor_model_parallel_src_rank() == rank // 2 * 2  # inside the group, whatever is reported
    data, model = groups._create_model_parallel(8)  # more than there are: all of them
    return total(rank, first[0]), total(rank, first[1]), total(rank, model), dist.get_process_group_ranks(data)


def test_tensor_parallel():
    assert run_ranks(tensor_parallel, 4)[3] == ([1, 3], [2, 3], [0, 1, 2, 3], [3])


# Experts


def expert_layout(rank, arguments, tensor):
    if tensor:
        mpu = SimpleNamespace(get_tensor_model_parallel_world_size=lambda: tensor)
        groups._create_expert_data_and_model_parallel(*arguments[:1], mpu, *arguments[1:])
        assert groups.expert_tensor_parallel_world_size == groups._get_expert_model_parallel_world_size() == tensor
    else:
        groups._create_expert_and_data_parallel(*arguments)
    name = f"ep_size_{arguments[0]}"
    expert, data = groups._get_expert_parallel_group(name), groups._get_expert_data_parallel_group(name)
    assert groups._get_max_expert_size_name() == name
    assert groups._get_max_expert_parallel_group() is expert
    assert groups._get_expert_parallel_group_dict() == {name: expert}
    assert groups._get_expert_data_parallel_group_dict() == {name: data}
    ranks, replicas = groups._get_expert_parallel_group_ranks(name), groups._get_expert_data_parallel_group_ranks(name)
    assert ranks[groups._get_expert_parallel_rank(name)] == rank
    assert replicas[groups._get_expert_data_parallel_rank(name)] == rank
    assert groups._get_expert_parallel_world_size(name) == len(ranks) == arguments[0]
    assert groups._get_expert_data_parallel_world_size(name) == len(replicas)
    assert groups._get_expert_parallel_src_rank(name) == ranks[0]  # in the group, strided or not
    assert groups._get_expert_broadcast_src_rank(name) == replicas[0]
    assert total(rank, expert) == ranks
    assert total(rank, data) == replicas
    return ranks, replicas


# arguments, tensor parallel size of an mpu (0: none), then the two groups of the last rank
LAYOUTS = {
    4: [
        ((2,), 0, [2, 3], [1, 3]),
        ((2, 1, 1, "tp", True), 0, [1, 3], [2, 3]),
        ((2, 1, 2), 0, [2, 3], [3]),
        ((2, 2), 0, [1, 3], [2, 3]),
        ((2, 2, 1, "sp"), 0, [2, 3], [1, 3]),
        ((4, 2), 0, [0, 1, 2, 3], [3]),
        ((2,), 2, [1, 3], [3]),
    ],
    8: [((2, False), 2, [5, 7], [3, 7]), ((2, True), 2, [3, 7], [5, 7])],
}


def one_layout_after_another(rank):
    answers = []
    for arguments, tensor, *_ in LAYOUTS[dist.get_world_size()]:
        answers.append(expert_layout(rank, arguments, tensor))
        dist.barrier()
        groups.destroy_groups()
    return answers


@pytest.mark.parametrize("world", LAYOUTS)
def test_expert_layouts(world):
    expected = [tuple(layout[2:]) for layout in LAYOUTS[world]]
    assert run_ranks(one_layout_after_another, world)[-1] == expected


def layout_conflict(rank):
    groups._create_expert_and_data_parallel(2)
    before = groups._get_expert_parallel_group("ep_size_2")
    groups._create_expert_and_data_parallel(2)  # the same again is no news
    assert groups._get_expert_parallel_group("ep_size_2") is before
    with pytest.raises(LayoutConflictError) as caught:
        groups._create_expert_and_data_parallel(2, use_data_before_expert_parallel_=True)
    groups._create_expert_and_data_parallel(4)
    assert groups._get_max_expert_size() == 4
    groups.destroy_groups()
    groups._create_expert_and_data_parallel(2, use_data_before_expert_parallel_=True)
    return str(caught.value), groups._get_expert_parallel_group_ranks("ep_size_2")


def test_the_other_order_is_refused_not_ignored():
    answers = run_ranks(layout_conflict, 4)
    assert answers[0][0].startswith("ep_size_2 groups exist with another layout: expert groups are [0, 1], [2, 3]")
    assert [ranks for _, ranks in answers] == [[0, 2], [1, 3], [0, 2], [1, 3]]


def refused_sizes(rank):
    made = len(dist.distributed_c10d._world.pg_map)
    spec = SimpleNamespace(world_size=8, ep_size=2, tp_size=1, pp_size=1)
    messages = []
    for call in (
        lambda: groups._create_expert_and_data_parallel(3),
        lambda: groups._create_expert_and_data_parallel(2, 3),
        lambda: groups._create_expert_and_data_parallel(2, 2, 3),
        lambda: groups._create_expert_and_data_parallel(2, mp_mode="xp"),
        lambda: groups._create_expert_and_data_parallel(2, folding_spec=spec),
        lambda: groups._create_expert_data_and_model_parallel(
            4, SimpleNamespace(get_model_parallel_world_size=lambda: 2)
        ),
        lambda: groups._init_tp_mesh_device(3),
        lambda: groups._init_tp_mesh_device(2, 4),
        lambda: groups._create_zero_param_parallel_group(3),
        lambda: groups._get_local_all_to_all_group(ranks_per_node=3),
        lambda: groups._create_model_parallel(3),
    ):
        with pytest.raises(TopologyError) as caught:
            call()
        messages.append(str(caught.value))
    assert len(dist.distributed_c10d._world.pg_map) == made
    assert groups.expert_tensor_parallel_world_size == 1
    return messages


def test_sizes_are_checked_on_every_rank_before_any_group():
    answers = run_ranks(refused_sizes, 4)
    assert all(messages == answers[0] for messages in answers)
    assert "expert size 3 must divide tp * cp * dp = 1 * 1 * 4 = 4" in answers[0][0]
    assert "expert size 4 must divide dp = 2" in answers[0][5]


def old_initialize(rank):
    mpu = SimpleNamespace(get_slice_parallel_world_size=lambda: 2, get_pipe_parallel_world_size=lambda: 1)
    groups.initialize(ep_size=2, mpu=mpu)
    assert groups.mpu is mpu
    return groups._get_expert_parallel_group_ranks("ep_size_2")


def test_initialize():
    assert run_ranks(old_initialize, 4) == [[0, 2], [1, 3], [0, 2], [1, 3]]


# Data, sequence, ZeRO


def whole_world(rank):
    group = groups._get_data_parallel_group()
    assert group is groups._clone_world_group() is groups._get_sequence_data_parallel_group()
    assert group is not dist.group.WORLD
    assert groups._get_data_parallel_world_size() == groups._get_sequence_data_parallel_world_size() == 3
    assert groups._get_data_parallel_rank() == groups._get_sequence_data_parallel_rank() == rank
    assert groups._get_broadcast_src_rank() == 0
    assert groups._get_data_parallel_group_ranks() == [0, 1, 2]
    return total(rank, group)


def test_without_mpu_all_ranks_are_data_parallel():
    assert run_ranks(whole_world, 3) == [[0, 1, 2]] * 3


def mesh(rank):
    groups.mesh_device = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data_parallel", "sequence_parallel"))
    assert groups._get_data_parallel_world_size() == groups._get_sequence_parallel_world_size() == 2
    assert (groups._get_data_parallel_rank(), groups._get_sequence_parallel_rank()) == (rank // 2, rank % 2)
    assert total(rank, groups._get_sequence_parallel_group()) == [rank // 2 * 2, rank // 2 * 2 + 1]
    assert groups._get_data_parallel_group_ranks() == [rank % 2, rank % 2 + 2]
    both = groups._get_sequence_data_parallel_group()
    assert groups._get_sequence_data_parallel_group() is both
    assert groups._get_broadcast_src_rank() == 0
    answer = total(rank, both), groups._get_sequence_data_parallel_rank()
    groups.mesh_device = dist.init_device_mesh("cpu", (4,), mesh_dim_names=("data",))
    with pytest.raises(NotInitializedError, match="none is called 'data_parallel'"):
        groups._get_data_parallel_group()
    assert groups._get_sequence_parallel_world_size() == 1
    groups.mesh_device = None
    return answer


def test_mesh_device():
    assert run_ranks(mesh, 4) == [([0, 1, 2, 3], rank) for rank in range(4)]


def sequence_only(rank):
    """DeepSpeed's Ulysses module has no data parallel group; the ranks beside the sequence ones are it, not None."""
    groups.mpu = SimpleNamespace(initialize_sequence_parallel=lambda: None, get_sequence_parallel_world_size=lambda: 2)
    assert groups._get_data_parallel_world_size() == 2
    assert groups._get_data_parallel_rank() == rank // 2
    assert groups._get_model_parallel_world_size() == 1
    assert groups._get_data_parallel_group() is groups._get_data_parallel_group()
    return total(rank, groups._get_data_parallel_group())


def test_sequence_parallel_mpu():
    assert run_ranks(sequence_only, 4) == [[0, 2], [1, 3], [0, 2], [1, 3]]


def zero_param(rank):
    assert groups._zero_param_parallel_is_initialized() is False
    groups._create_zero_param_parallel_group(2)
    groups._create_zero_param_parallel_group(2)
    assert groups._zero_param_parallel_is_initialized() is True
    assert groups._get_zero_param_intra_parallel_rank_in_mygroup() == rank % 2
    assert groups._get_zero_param_intra_parallel_group_world_size() == 2
    with pytest.raises(LayoutConflictError):
        groups._create_zero_param_parallel_group(4)
    ranks = groups._get_zero_param_intra_parallel_group_ranks()
    assert total(rank, groups._get_zero_param_intra_parallel_group()) == ranks
    return ranks


def test_zero_param():
    assert run_ranks(zero_param, 4) == [[0, 1], [0, 1], [2, 3], [2, 3]]


def all_to_all(rank):
    found = groups._get_local_all_to_all_group(ranks_per_node=2)
    before = dict(found)
    count = len(dist.distributed_c10d._world.pg_map)
    assert groups._get_local_all_to_all_group(ranks_per_node=2) == before
    assert len(dist.distributed_c10d._world.pg_map) == count
    assert list(found) == ["local_0", "local_1", "global_0", "global_1"]
    assert [name for name, group in found.items() if group] == [f"local_{rank // 2}", f"global_{rank % 2}"]
    return total(rank, found[f"local_{rank // 2}"]), total(rank, found[f"global_{rank % 2}"])


def test_all_to_all_groups_are_made_once():
    assert run_ranks(all_to_all, 4)[2] == ([2, 3], [0, 2])


def one_node(rank):
    found = groups._get_local_all_to_all_group()  # the harness launches all ranks on one node
    return list(found), total(rank, found["local_0"])


def test_all_to_all_on_one_node():
    assert run_ranks(one_node, 2) == [(["local_0"], [0, 1])] * 2
