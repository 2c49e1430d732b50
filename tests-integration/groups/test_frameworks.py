"""Presets against the frameworks themselves: megatron-core's rank generator and grid, torchtitan's device meshes."""

from __future__ import annotations

import itertools
import random
import warnings
from math import prod

import pytest
import torch.distributed as dist
from ds_groups import RankGrid, TopologyError, megatron, torchtitan
from torch.testing._internal.distributed.fake_pg import FakeStore

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    parallel_state = pytest.importorskip("megatron.core.parallel_state")
    hyper = pytest.importorskip("megatron.core.hyper_comm_grid")


def divisors(number):
    return [value for value in range(1, number + 1) if number % value == 0]


def factorisations(number, parts):
    if parts == 1:
        yield (number,)
        return
    for first in divisors(number):
        for rest in factorisations(number // first, parts - 1):
            yield (first, *rest)


ORDERS = ["-".join(order) for order in itertools.permutations(("tp", "cp", "ep", "dp", "pp"))]
DENSE = ("tp", "cp", "dp", "pp", "tp-pp", "dp-cp", "tp-cp", "tp-dp", "tp-dp-cp")
EXPERT = {"tp": "etp", "ep": "ep", "dp": "edp", "tp-ep": ("etp", "ep"), "tp-ep-pp": ("etp", "ep", "pp"), "pp": "pp"}


def rows(table):
    return sorted(tuple(sorted(group)) for group in table)


@pytest.mark.parametrize("world", [4, 8, 12, 16, 24, 32, 64])
def test_megatron(world):
    """Its `RankGenerator`, called as `initialize_model_parallel` does, for a sample of all sizes and orders."""
    turns = random.Random(world)
    layouts = [
        (tp, cp, pp, dp, etp, ep)
        for tp, cp, pp, dp in factorisations(world, 4)
        for etp in divisors(tp * cp * dp)
        for ep in divisors(tp * cp * dp // etp)
    ]
    made = 0
    for tp, cp, pp, dp, etp, ep in turns.sample(layouts, min(len(layouts), 150)):
        order = turns.choice(ORDERS)
        edp = tp * cp * dp // etp // ep
        dense = parallel_state.RankGenerator(tp=tp, ep=1, dp=dp, pp=pp, cp=cp, order=order)
        expert = parallel_state.RankGenerator(tp=etp, ep=ep, dp=edp, pp=pp, cp=1, order=order)
        sizes = {"tp": tp, "cp": cp, "pp": pp, "ep": ep, "etp": etp, "order": order}
        if dense.get_ranks("pp") != expert.get_ranks("pp"):  # Megatron asserts that they are equal
            with pytest.raises(TopologyError, match="put pp last"):
                megatron(world, **sizes)
            continue
        made += 1
        topology = megatron(world, **sizes)
        for token in DENSE:
            assert rows(topology.table(tuple(token.split("-")))) == rows(dense.get_ranks(token)), (topology, token)
        for token, axis in EXPERT.items():
            assert rows(topology.table(axis)) == rows(expert.get_ranks(token)), (topology, token)
    assert made > 20


@pytest.mark.parametrize("offset", [0, 8])
def test_hyper_comm_grid(monkeypatch, offset):
    monkeypatch.setenv("WORLD_SIZE", "64")
    for shape in factorisations(24, 4):
        names = ["tp", "cp", "dp", "pp"]
        theirs = hyper.HyperCommGrid(list(shape), names, rank_offset=offset)
        ours = RankGrid(dict(zip(names, shape, strict=True)), span=range(offset, offset + 24), world_size=64)
        for count in range(1, 5):
            for axes in itertools.combinations(names, count):
                ordered, _ = theirs._order_dims(list(axes))
                assert rows(ours.table(axes)) == rows(theirs._gen_rank_enum(ordered)), (shape, axes)


@pytest.fixture
def fake_world():
    def start(world):
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())

    yield start
    if dist.is_initialized():
        dist.destroy_process_group()


AXES = {
    "pp": "pp",
    "dp_replicate": "dp_replicate",
    "fsdp": "fsdp",
    "dp_shard": "dp_shard",
    "cp": "cp",
    "tp": "tp",
    "ep": "ep",
    "efsdp": "efsdp",
    "batch": "batch",
    "loss": "loss",
}


@pytest.mark.parametrize("world", [8, 16, 64])
@pytest.mark.parametrize("backend", ["partial_dtensor", "spmd_types"])
def test_torchtitan(fake_world, world, backend):
    """The groups of rank 0 in the meshes that its `ParallelDims` builds, over PyTorch's fake process group."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dims = pytest.importorskip("torchtitan.distributed.parallel_dims")
    fake_world(world)
    turns = random.Random(world)
    compared = set()
    layouts = [
        (*sizes, ep) for sizes in factorisations(world, 5) for ep in divisors(prod(sizes[:3])) if sizes[4] * ep > 1
    ]
    for tp, cp, dp_shard, dp_replicate, pp, ep in turns.sample(layouts, min(40, len(layouts))):
        sizes = {"tp": tp, "cp": cp, "dp_shard": dp_shard, "dp_replicate": dp_replicate, "pp": pp, "ep": ep}
        topology = torchtitan(world, **sizes)
        theirs = dims.ParallelDims(**sizes, world_size=world, spmd_backend=backend)
        for name, axis in AXES.items():
            try:
                mesh = theirs.get_optional_mesh(name)
            except (AssertionError, KeyError, ValueError, AttributeError):  # this backend has no such axis
                continue
            if mesh is None:
                continue
            compared.add(name)
            assert tuple(mesh.mesh.flatten().tolist()) == topology.ranks(axis, 0), (sizes, name)
    assert compared >= {"pp", "dp_replicate", "cp", "tp", "ep", "efsdp"}


def answers_of(found, rank):
    """Groups as their global ranks."""
    if isinstance(found, dist.ProcessGroup):
        return sorted(dist.get_process_group_ranks(found))
    return sorted(found) if isinstance(found, list) else found


@pytest.mark.parametrize("rank", [0, 5, 15])
@pytest.mark.parametrize(
    "sizes", [{"tp": 2, "cp": 2, "pp": 2, "ep": 2, "etp": 1}, {"tp": 4, "ep": 2}, {"cp": 2, "pp": 4}], ids=str
)
def test_mpu_and_collection_answer_as_megatron(rank, sizes):
    """Every getter that both have, after Megatron's own `initialize_model_parallel` over a fake process group."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    dist.init_process_group("fake", rank=rank, world_size=16, store=FakeStore())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=sizes.get("tp", 1),
                pipeline_model_parallel_size=sizes.get("pp", 1),
                context_parallel_size=sizes.get("cp", 1),
                expert_model_parallel_size=sizes.get("ep", 1),
                expert_tensor_parallel_size=sizes.get("etp"),
                create_gloo_process_groups=False,
            )
        bound = megatron(16, **sizes).bind()
        mpu, ours = bound.as_mpu(), bound.as_process_group_collection()
        compared = 0
        for name, getter in vars(parallel_state).items():
            if name.startswith(("get_", "is_pipeline")) and name in dir(mpu):
                if not name.endswith(("_group", "_rank", "_world_size", "_ranks", "_stage")):
                    continue
                try:
                    theirs = getter()
                except (AssertionError, TypeError):  # not initialized by it, or wants arguments
                    continue
                compared += 1
                assert answers_of(getattr(mpu, name)(), rank) == answers_of(theirs, rank), name
        assert compared > 25
        collection = ProcessGroupCollection.use_mpu_process_groups()
        for name in dir(ours):
            theirs = getattr(collection, name, None)
            if theirs is not None and theirs is not dist.GroupMember.NON_GROUP_MEMBER:
                assert answers_of(getattr(ours, name), rank) == answers_of(theirs, rank), name
        bound.close()
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
