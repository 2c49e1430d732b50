"""`ds_groups.parallel_state` beside a running engine of DeepSpeed's, where only the user's imports were replaced.

Each test starts a real engine on two ranks, and then asks every getter that both modules have for the same thing. Where
DeepSpeed answers, ours gives the same object, or an equal value, except for what is in `DIFFERENT`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Collection
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn

pytest.importorskip("deepspeed")

ENV = {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "4"}
OPTIMIZER = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
CONFIG = {"train_micro_batch_size_per_gpu": 2, "optimizer": OPTIMIZER}

DIFFERENT = {
    # DeepSpeed's says that there is one by None, which is as false as its False.
    "_zero_param_parallel_is_initialized": "True where there is one",
    # DeepSpeed's gives ranges here and there; a list of the same ranks has another type.
    "_get_data_parallel_group_ranks": "a list",
    "_get_expert_parallel_group_ranks": "a list",
    "_get_expert_data_parallel_group_ranks": "a list",
}
OF_MESH = {
    # ZeRO shards over data and sequence ranks; DeepSpeed leaves the sequence ones out where they come from a mesh.
    "_get_sequence_data_parallel_group",
    "_get_sequence_data_parallel_world_size",
    "_get_sequence_data_parallel_rank",
    "_get_broadcast_src_rank",
    "_get_data_parallel_group_ranks",  # DeepSpeed's are all ranks
}
OF_ZERO_GROUP = {  # DeepSpeed answers for all ranks where there is no such group
    "_get_zero_param_intra_parallel_rank_in_mygroup",
    "_get_zero_param_intra_parallel_group_world_size",
    "_get_zero_param_intra_parallel_group_ranks",
}
OF_ULYSSES = {
    # DeepSpeed's is None where the mpu knows sequence groups only.
    "_get_data_parallel_group",
    "_get_data_parallel_world_size",
    "_get_data_parallel_rank",  # of all ranks, because the group is None
}
NAME = "ep_size_2"


def modules() -> tuple[ModuleType, ModuleType]:
    theirs = importlib.import_module("deepspeed.utils.groups")
    ours = importlib.import_module("ds_train_utils.groups")
    assert theirs is not ours
    return theirs, ours


def getters(theirs: ModuleType, ours: ModuleType) -> list[str]:
    """Every function ``get_...`` of both modules that takes nothing, or the name of expert groups."""
    both = [name for name, _ in inspect.getmembers(theirs, inspect.isfunction) if hasattr(ours, name)]
    found = [name for name in both if name.startswith(("get_", "_get_", "_zero_param_parallel_is"))]
    return [name for name in found if name not in ("_get_expert_parallel_ranks", "_get_local_all_to_all_group")]


def answer(module: ModuleType, name: str) -> Any:
    function = getattr(module, name)
    return function(NAME) if "group_name" in inspect.signature(function).parameters else function()


def compare(expected: set[str], besides: Collection[str] = ()) -> None:
    """Ask both modules everything.

    Args:
        expected: names of which DeepSpeed must have an answer, so that the comparison is not empty.
        besides: names of which the answers differ on purpose, and are not compared.
    """
    theirs, ours = modules()
    answered = set()
    for name in getters(theirs, ours):
        try:
            right = answer(theirs, name)
        except (AssertionError, KeyError, AttributeError, TypeError):
            continue  # DeepSpeed has no answer: there is no such group
        if right == "ep_size_None" or (name in OF_ZERO_GROUP and theirs._ZERO_PARAM_INTRA_PARALLEL_GROUP is None):
            with pytest.raises(RuntimeError):  # DeepSpeed speaks of groups that there are not
                answer(ours, name)
            continue
        answered.add(name)
        if name in besides:
            continue
        made = len(dist.distributed_c10d._world.pg_map)
        seen = answer(ours, name)
        assert len(dist.distributed_c10d._world.pg_map) == made, name
        if name == "_zero_param_parallel_is_initialized":
            assert seen is (theirs._ZERO_PARAM_INTRA_PARALLEL_GROUP is not None), name
        elif name in DIFFERENT:
            assert (type(seen), seen) == (list, list(right)), name
        elif isinstance(right, (dist.ProcessGroup, dict)):
            assert seen is right, name
        else:
            assert (seen, name) == (right, name)
    assert expected <= answered, expected - answered
    assert (ours.mpu, ours.mesh_device) == (theirs.mpu, theirs.mesh_device)
    assert ours.expert_tensor_parallel_world_size == theirs.expert_tensor_parallel_world_size


def engine(model: nn.Module, config: dict[str, Any] | None = None, **options: Any) -> Any:
    import deepspeed

    torch.manual_seed(0)
    deepspeed.init_distributed("gloo", verbose=False)
    made, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config={**CONFIG, **(config or {})}, **options
    )
    return made


class Mpu:
    """A Megatron-style object for two data parallel ranks and no model parallelism."""

    def __init__(self) -> None:
        self.single = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
        self.both = dist.new_group([0, 1])

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.both

    def get_data_parallel_group_ranks(self) -> list[int]:
        return [0, 1]

    def get_data_parallel_world_size(self) -> int:
        return 2

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank()

    def get_sequence_parallel_group(self) -> dist.ProcessGroup:
        return self.single

    def get_sequence_parallel_world_size(self) -> int:
        return 1

    def get_sequence_parallel_rank(self) -> int:
        return 0

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.single

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_rank(self) -> int:
        return 0

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank


DENSE = {
    "_get_broadcast_src_rank",
    "_get_data_parallel_group",
    "_get_data_parallel_rank",
    "_get_data_parallel_world_size",
    "_get_expert_model_parallel_world_size",
    "_get_expert_parallel_group_dict",
    "_get_max_expert_size",
    "_get_model_parallel_world_size",
    "_get_sequence_data_parallel_group",
    "_get_sequence_data_parallel_rank",
    "_get_sequence_data_parallel_world_size",
    "_get_sequence_parallel_rank",
    "_get_sequence_parallel_world_size",
    "_get_zero_param_intra_parallel_group",
}


def an_mpu(rank: int) -> None:
    mpu = Mpu()
    engine(nn.Linear(4, 4), {"zero_optimization": {"stage": 1}}, mpu=mpu)
    theirs, ours = modules()
    assert ours.mpu is theirs.mpu is mpu
    compare(DENSE | {"_get_sequence_parallel_group", "_get_data_parallel_group_ranks"})


def test_an_mpu_given_to_the_engine() -> None:
    run_ranks(an_mpu, 2, timeout=180, env=ENV)


def no_mpu(rank: int) -> None:
    engine(nn.Linear(4, 4))
    theirs, ours = modules()
    assert ours._clone_world_group() is theirs._clone_world_group()
    compare(DENSE | {"_get_data_parallel_group_ranks"})
    for module in (theirs, ours):
        with pytest.raises(KeyError, match="sequence parallel group"):
            module._get_sequence_parallel_group()


def test_all_ranks_are_data_parallel() -> None:
    run_ranks(no_mpu, 2, timeout=180, env=ENV)


EXPERTS = {
    "_get_expert_broadcast_src_rank",
    "_get_expert_data_parallel_group",
    "_get_expert_data_parallel_group_dict",
    "_get_expert_data_parallel_group_ranks",
    "_get_expert_data_parallel_rank",
    "_get_expert_data_parallel_world_size",
    "_get_expert_parallel_group",
    "_get_expert_parallel_group_dict",
    "_get_expert_parallel_group_ranks",
    "_get_expert_parallel_rank",
    "_get_expert_parallel_src_rank",
    "_get_expert_parallel_world_size",
    "_get_max_expert_parallel_group",
    "_get_max_expert_size",
    "_get_max_expert_size_name",
}


def mixture() -> nn.Module:
    from deepspeed.moe.layer import MoE

    return MoE(hidden_size=4, expert=nn.Linear(4, 4), num_experts=2, ep_size=2, k=1, min_capacity=0)


def step(made: Any) -> None:
    out, *_ = made(torch.ones(2, 4))
    made.backward(out.square().mean())
    made.step()


def experts(rank: int) -> None:
    made = engine(mixture())
    compare(DENSE | EXPERTS)
    theirs, ours = modules()
    before = ours._get_expert_parallel_group(NAME)
    ours._create_expert_and_data_parallel(2)  # what the engine made already
    assert ours._get_expert_parallel_group(NAME) is before
    step(made)
    ours.destroy_groups()  # leaves the engine's
    assert theirs._get_expert_parallel_group(NAME) is before is ours._get_expert_parallel_group(NAME)
    step(made)


def test_expert_groups_of_the_engine() -> None:
    run_ranks(experts, 2, timeout=180, env=ENV)


def experts_of_ours(rank: int) -> None:
    import deepspeed

    theirs, ours = modules()
    deepspeed.init_distributed("gloo", verbose=False)
    ours._create_expert_and_data_parallel(2)
    expert, data = ours._get_expert_parallel_group(NAME), ours._get_expert_data_parallel_group(NAME)
    made = engine(mixture())
    assert made.module.deepspeed_moe.ep_group is expert
    assert theirs._get_expert_data_parallel_group(NAME) is data
    assert theirs._get_expert_parallel_group_ranks(NAME) == [0, 1]
    compare(DENSE | EXPERTS)
    step(made)
    ours.destroy_groups()
    assert theirs._get_expert_parallel_group_dict() == theirs._get_expert_data_parallel_group_dict() == {}


def test_the_engine_uses_expert_groups_made_first() -> None:
    run_ranks(experts_of_ours, 2, timeout=180, env=ENV)


def mesh(rank: int) -> None:
    engine(nn.Linear(4, 4), {"train_batch_size": 2}, mesh_param=(1, 2))
    theirs, ours = modules()
    assert ours.mesh_device is theirs.mesh_device is not None
    compare(DENSE | {"_get_sequence_parallel_group"}, besides=OF_MESH)
    assert dist.get_process_group_ranks(ours._get_sequence_data_parallel_group()) == [0, 1]


def test_a_mesh_given_to_the_engine() -> None:
    run_ranks(mesh, 2, timeout=180, env=ENV)


def mesh_of_the_config(rank: int) -> None:
    engine(nn.Linear(4, 4), {"train_batch_size": 2, "data_parallel_size": 1, "sequence_parallel_size": 2})
    theirs, ours = modules()
    assert ours.mesh_device is theirs.mesh_device is not None
    assert ours._get_sequence_parallel_world_size() == 2
    compare(DENSE | {"_get_sequence_parallel_group"}, besides=OF_MESH)


def test_a_mesh_named_in_the_config() -> None:
    run_ranks(mesh_of_the_config, 2, timeout=180, env=ENV)


def ulysses(rank: int) -> None:
    import deepspeed
    from deepspeed.runtime.sequence_parallel import parallel_state_sp as sequence

    deepspeed.init_distributed("gloo", verbose=False)
    sequence.initialize_sequence_parallel(sequence_parallel_size=2)
    engine(nn.Linear(4, 4), {"zero_optimization": {"stage": 1}}, mpu=sequence)
    _, ours = modules()
    compare((DENSE - OF_ULYSSES) | {"_get_sequence_parallel_group"}, besides=OF_ULYSSES)
    assert dist.get_process_group_ranks(ours._get_data_parallel_group()) == [rank]


def test_ulysses() -> None:
    run_ranks(ulysses, 2, timeout=180, env=ENV)


def tensor_parallel(rank: int) -> None:
    import deepspeed

    theirs, ours = modules()
    deepspeed.init_distributed("gloo", verbose=False)
    theirs._init_tp_mesh_device(2)
    names = {name for name in getters(theirs, ours) if name.startswith("get_")}
    assert len(names) == 10
    compare(DENSE | names)
    assert ours._init_tp_mesh_device(2) == (theirs.get_data_parallel_group(), theirs.get_model_parallel_group())
    theirs.mpu = theirs  # as AutoTP does
    compare(DENSE | names)
    theirs.mpu = None
    theirs.set_tensor_model_parallel_world_size(8)
    ours.set_tensor_model_parallel_rank(5)
    for module in (theirs, ours):
        assert module.get_tensor_model_parallel_world_size() == module.get_model_parallel_world_size() == 8
        assert module.get_tensor_model_parallel_rank() == module.get_model_parallel_rank() == 5


def test_tensor_parallel_groups_of_the_engine() -> None:
    run_ranks(tensor_parallel, 2, timeout=180, env=ENV)


def zero_param(rank: int) -> None:
    engine(nn.Linear(4, 4), {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}})
    compare(DENSE | OF_ZERO_GROUP)
    _, ours = modules()
    assert ours._zero_param_parallel_is_initialized() is True
    ours._create_zero_param_parallel_group(2)  # what the engine made already


def test_groups_that_share_zero_parameters() -> None:
    run_ranks(zero_param, 2, timeout=180, env=ENV)


def destroyed(rank: int) -> None:
    import deepspeed.comm

    engine(mixture(), mpu=None)
    theirs, ours = modules()
    ours._create_zero_param_parallel_group(2)
    ours.mpu = mpu = Mpu()
    assert theirs.mpu is mpu
    deepspeed.comm.destroy_process_group()
    ours._release_process_group_references()  # DeepSpeed calls its own, and before 0.19.8 none
    for module in (theirs, ours):
        assert module.mpu is module._WORLD_GROUP is module._ZERO_PARAM_INTRA_PARALLEL_GROUP is None
        assert module._get_expert_parallel_group_dict() == module._EXPERT_PARALLEL_GROUP_RANKS == {}


def test_the_world_is_destroyed() -> None:
    run_ranks(destroyed, 2, timeout=180, env=ENV)
