"""Rank lists of `ds_groups.parallel_state` beside those that DeepSpeed's own functions make.

DeepSpeed's functions run as they are; only the ``dist`` that they see is replaced by a recorder that plays one rank
of any world, so that many worlds take no time. The last test starts real ranks.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest

pytest.importorskip("deepspeed")

from deepspeed.utils import groups as theirs
from ds_groups import _expert_tables as tables, parallel_state as ours
from ds_groups._mpu import sequence_layout
from ds_groups._topology import ParallelTopology
from ranks import run_ranks

WORLDS = (2, 4, 6, 8, 12, 16, 24)


class Recorder:
    """What DeepSpeed calls ``dist``: remembers the rank lists of new groups, which stand for the groups themselves."""

    def __init__(self, world_size, rank):
        self.world_size, self.rank = world_size, rank
        self.made = []

    def is_initialized(self):
        return True

    def get_world_size(self, group=None):
        return self.world_size if group is None else len(group)

    def get_rank(self, group=None):
        return self.rank if group is None else sorted(group).index(self.rank)

    def new_group(self, ranks):
        self.made.append(tuple(ranks))
        return tuple(ranks)


def forget():
    """Empty DeepSpeed's module globals."""
    for name, value in vars(theirs).items():
        if name.endswith(("_GROUP", "_RANKS")):
            if isinstance(value, dict):
                value.clear()
            else:
                setattr(theirs, name, None)
    theirs.mpu = theirs.mesh_device = None


@pytest.fixture
def deepspeed_as(monkeypatch):
    monkeypatch.setattr(theirs, "log_dist", lambda *args, **options: None)

    def play(world_size, rank):
        forget()
        recorder = Recorder(world_size, rank)
        monkeypatch.setattr(theirs, "dist", recorder)
        return recorder

    yield play
    forget()


def mine(table, rank):
    return next(group for group in table if rank in group)


def test_expert_rank_lists():
    count = 0
    for world, tp, ep, pp, before in itertools.product(WORLDS, (1, 2, 3, 4), (1, 2, 3, 4, 6, 8), (1, 2), (False, True)):
        if world % (tp * pp) or world // (tp * pp) % ep:
            continue
        count += 1
        assert ours._get_expert_parallel_ranks(world, tp, ep, pp, before) == theirs._get_expert_parallel_ranks(
            world, tp, ep, pp, before
        )
    assert count > 100


@pytest.mark.parametrize("before", [False, True])
def test_experts_over_the_stage(deepspeed_as, before):
    for world, ep, pp in itertools.product(WORLDS, (1, 2, 3, 4, 8), (1, 2)):
        if world % pp or world // pp % ep:
            continue
        expert, data = tables.folded_tables(world, ep, pp, data_before_expert=before)
        for rank in range(0, world, 3):
            recorder = deepspeed_as(world, rank)
            theirs._create_expert_and_data_parallel(ep, pp_size=pp, use_data_before_expert_parallel_=before)
            name = f"ep_size_{ep}"
            assert tuple(theirs._get_expert_parallel_group_ranks(name)) == mine(expert, rank)
            assert tuple(theirs._get_expert_data_parallel_group_ranks(name)) == mine(data, rank)
            assert len(recorder.made) == len(expert) + len(data)  # every rank makes every group there


@pytest.mark.parametrize("mode", ["tp", "sp"])
def test_experts_beside_tensor_parallelism(deepspeed_as, mode):
    for world, tp, ep in itertools.product(WORLDS, (2, 3, 4), (1, 2, 4)):
        if world % tp or world // tp % ep:  # a group within one lane; see below for the others
            continue
        if mode == "tp":
            expert, data = tables.strided_tables(world, tp, ep, 1, data_before_expert=False)
        else:
            expert, data = tables.folded_tables(world, ep, 1, data_before_expert=False)
        for rank in range(0, world, 3):
            deepspeed_as(world, rank)
            theirs._create_expert_and_data_parallel(ep, mp_size=tp, pp_size=1, mp_mode=mode)
            name = f"ep_size_{ep}"
            assert tuple(sorted(theirs._get_expert_parallel_group_ranks(name))) == mine(expert, rank)
            assert tuple(sorted(theirs._get_expert_data_parallel_group_ranks(name))) == mine(data, rank)


def test_where_deepspeed_reduces_different_experts_together(deepspeed_as):
    """Groups across lanes: PyTorch sorts the members, so DeepSpeed's replica lists mix first and second experts."""
    deepspeed_as(6, 4)
    theirs._create_expert_and_data_parallel(2, mp_size=2, pp_size=1, mp_mode="tp")
    assert theirs._get_expert_parallel_group_ranks("ep_size_2") == [4, 1]  # place 1 of the sorted group
    assert theirs._get_expert_data_parallel_group_ranks("ep_size_2") == [0, 4, 3]  # 0 and 3 stand at place 0
    expert, data = tables.strided_tables(6, 2, 2, 1, data_before_expert=False)
    assert mine(expert, 4) == (1, 4)
    assert mine(data, 4) == (2, 4, 5)
    assert {mine(expert, rank).index(rank) for rank in (2, 4, 5)} == {1}


def test_folding_spec(deepspeed_as):
    from deepspeed.module_inject.auto_ep_folding import build_folding_spec, expected_folding_group_tables

    for world, tp, ep in itertools.product((4, 8, 16), (1, 2, 4), (2, 4)):
        spec = build_folding_spec(world_size=world, pp_size=1, tp_size=tp, ep_size=ep)
        expected = expected_folding_group_tables(spec)
        expert, data = tables.from_spec(spec, world, ep, tp, 1)
        assert (expert.table(), data.table()) == (expected.ep_groups, expected.edp_groups)
        topology = ParallelTopology(world, tp=tp, ep=ep)
        assert tuple(topology.groups("tp")) == expected.tp_groups
        assert tuple(topology.groups("dp")) == expected.dense_dp_groups


def test_tensor_zero_and_all_to_all_groups(deepspeed_as, monkeypatch):
    for world, size in itertools.product(WORLDS, (1, 2, 3, 4)):
        if world % size:
            continue
        topology = ParallelTopology(world, tp=size)
        nodes = ParallelTopology(world, dp_shard=size)
        for rank in range(0, world, 3):
            deepspeed_as(world, rank)
            assert theirs._init_tp_groups_with_new_group(size) == (
                topology.ranks("dp", rank),
                topology.ranks("tp", rank),
            )
            assert theirs._create_model_parallel(size) == (topology.ranks("dp", rank), topology.ranks("tp", rank))
            theirs._create_zero_param_parallel_group(size)
            assert theirs._get_zero_param_intra_parallel_group() == nodes.ranks("dp_shard", rank)
            if size < world:
                monkeypatch.setattr(
                    theirs, "get_accelerator", lambda size=size: SimpleNamespace(device_count=lambda: size)
                )
                found = theirs._get_local_all_to_all_group()
                expected = {f"local_{i}": group for i, group in enumerate(nodes.groups("dp_shard"))}
                expected |= {f"global_{i}": group for i, group in enumerate(nodes.groups("dp_replicate"))}
                assert found == expected


def test_where_deepspeed_names_a_rank_outside_the_group(deepspeed_as):
    deepspeed_as(8, 5)
    theirs._create_expert_data_and_model_parallel(2, SimpleNamespace(get_model_parallel_world_size=lambda: 2))
    assert theirs._get_expert_parallel_src_rank("ep_size_2") == 4
    assert theirs._get_expert_parallel_group_ranks("ep_size_2") == [5, 7]
    assert mine(tables.lane_tables(8, 2, 2, 1, data_before_expert=False)[0], 5) == (5, 7)


def test_ulysses_leaves_the_data_parallel_ranks():
    assert sequence_layout(8, 4)["data"].table() == ((0, 4), (1, 5), (2, 6), (3, 7))


def side_by_side(rank):
    import deepspeed.comm as comm

    comm.init_distributed(dist_backend="gloo", dist_init_required=False, verbose=False)
    answers = []
    for module in (theirs, ours):
        module._create_expert_and_data_parallel(2)
        data, model = module._init_tp_groups_with_new_group(2)
        name = "ep_size_2"
        answers.append(
            [
                comm.get_all_ranks_from_group(module._get_expert_parallel_group(name)),
                comm.get_all_ranks_from_group(module._get_expert_data_parallel_group(name)),
                comm.get_all_ranks_from_group(data),
                comm.get_all_ranks_from_group(model),
                module._get_expert_parallel_rank(name),
                module._get_expert_data_parallel_world_size(name),
                module._get_expert_broadcast_src_rank(name),
                module.get_tensor_model_parallel_src_rank(),
                module._get_broadcast_src_rank(),
                module._get_data_parallel_rank(),
                list(module._get_data_parallel_group_ranks()),
                list(module._get_expert_parallel_group_dict()),
            ]
        )
    return answers


def test_side_by_side_in_one_process_group():
    for deepspeed, project in run_ranks(side_by_side, 4, timeout=120, env={"DS_ACCELERATOR": "cpu"}):
        assert deepspeed == project
