"""`as_mpu` and `as_process_group_collection`: a topology by the names of Megatron and DeepSpeed."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from ds_groups import ParallelTopology, RankGrid
from ranks import run_ranks


def mpu_of(rank, options):
    bound = ParallelTopology(8, **options).bind(timeout=20)
    mpu = bound.as_mpu()
    found = {}
    for name in dir(mpu):
        if name.endswith("_group") and name.startswith("get_"):
            ranks = dist.get_process_group_ranks(getattr(mpu, name)())
            found[name.removeprefix("get_").removesuffix("_group")] = ranks
            prefix = name.removesuffix("_group")
            if hasattr(mpu, f"{prefix}_world_size"):
                assert getattr(mpu, f"{prefix}_world_size")() == len(ranks)
                assert getattr(mpu, f"{prefix}_rank")() == ranks.index(rank)
            if hasattr(mpu, f"{prefix}_group_ranks"):
                assert getattr(mpu, f"{prefix}_group_ranks")() == ranks
            if hasattr(mpu, f"{prefix}_src_rank"):
                assert getattr(mpu, f"{prefix}_src_rank")() == ranks[0]
    stages = (
        mpu.is_pipeline_first_stage(),
        mpu.is_pipeline_last_stage(),
        mpu.get_pipeline_model_parallel_first_rank(),
        mpu.get_pipeline_model_parallel_last_rank(),
        mpu.get_pipeline_model_parallel_prev_rank(),
        mpu.get_pipeline_model_parallel_next_rank(),
    )
    with pytest.raises(AttributeError, match="get_tensor_model_parallel_rank"):
        mpu.get_tensor_parallel_rank  # noqa: B018
    return found, stages, dist.get_process_group_ranks(mpu.get_data_parallel_group(with_context_parallel=True))


def test_functions_of_megatron():
    found, stages, whole = run_ranks(mpu_of, 8, {"tp": 2, "pp": 2, "cp": 1})[3]
    assert found == {
        "tensor_model_parallel": [2, 3],
        "slice_parallel": [2, 3],
        "pipeline_model_parallel": [3, 7],
        "pipe_parallel": [3, 7],
        "model_parallel": [2, 3, 6, 7],
        "data_parallel": [1, 3],
        "tensor_and_data_parallel": [0, 1, 2, 3],
        "context_parallel": [3],
        "tensor_and_context_parallel": [2, 3],
        "expert_model_parallel": [3],
        "expert_tensor_parallel": [3],
        "expert_tensor_and_model_parallel": [3],
        "expert_tensor_model_pipeline_parallel": [3, 7],
        "expert_data_parallel": [0, 1, 2, 3],
    }
    assert stages == (True, False, 3, 7, 7, 7)
    assert whole == [1, 3]


def test_sequence_parallel_functions_come_with_context_parallelism():
    found, _, whole = run_ranks(mpu_of, 8, {"tp": 2, "cp": 2})[5]
    assert found["sequence_parallel"] == [5, 7]
    assert found["sequence_data_parallel"] == whole == [1, 3, 5, 7]
    assert found["data_parallel"] == [1, 5]


def test_experts_inside_replicas_are_held_by_all_replicas():
    found, _, _ = run_ranks(mpu_of, 8, {"dp_shard": 4, "ep": 2})[0]
    assert found["expert_model_parallel"] == [0, 1]
    assert found["expert_data_parallel"] == [0, 2, 4, 6]


def collection_of(rank, names):
    bound = ParallelTopology(8, tp=2, pp=4, dp_shard=1).bind(timeout=20)
    groups = bound.as_process_group_collection()
    assert len(bound) == 0
    with pytest.raises(AttributeError, match="no process group 'hcp'; there are tp, pp"):
        groups.hcp  # noqa: B018
    found = {}
    for name in names:
        group = getattr(groups, name)
        found[name] = None if group is None else dist.get_process_group_ranks(group)
    assert groups.tp is bound.group("tp")
    groups.hcp = "assigned"
    assert groups.hcp == "assigned"
    return found


def test_attributes_of_megatron():
    names = ("tp", "pp", "mp", "dp", "tp_ep_pp", "expt_dp", "embd", "pos_embd", "inter_dist_opt", "intra_dist_opt")
    answers = run_ranks(collection_of, 8, names)
    pipeline = [1, 3, 5, 7]
    assert answers[3] == {
        "tp": [2, 3],
        "pp": pipeline,
        "mp": list(range(8)),
        "dp": [3],
        "tp_ep_pp": pipeline,
        "expt_dp": [2, 3],
        "embd": None,
        "pos_embd": None,
        "inter_dist_opt": None,
        "intra_dist_opt": list(range(8)),
    }
    assert answers[7]["embd"] == answers[1]["embd"] == [1, 7]
    assert answers[1]["pos_embd"] == [1]
    assert answers[7]["pos_embd"] is None


def grid_view(rank):
    bound = RankGrid({"tp": 2, "data": 1}).bind(timeout=20)
    mpu = bound.as_mpu()
    assert mpu.get_tensor_model_parallel_world_size() == 2
    assert mpu.get_data_parallel_world_size() == mpu.get_pipeline_model_parallel_world_size() == 1
    assert mpu.get_pipeline_model_parallel_rank() == 0
    assert mpu.is_pipeline_first_stage()
    assert mpu.is_pipeline_last_stage()
    assert not hasattr(mpu, "get_sequence_parallel_group")
    assert bound.as_process_group_collection().embd.size() == 1
    return dist.get_process_group_ranks(mpu.get_data_parallel_group())


def test_an_axis_that_the_plan_lacks_has_one_rank():
    assert run_ranks(grid_view, 2) == [[0], [1]]
