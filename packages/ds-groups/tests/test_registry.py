"""One registry a world: equal groups are one, the last holder destroys it, names stay, addresses do not."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.distributed as dist
from ds_groups import (
    GroupCreationError,
    ParallelTopology,
    PlanMismatchError,
    RankGrid,
    RankRangeError,
    StaleGroupsError,
    TopologyError,
    _c10d,
    _registry,
    parallel_state as groups,
)
from ds_groups._pool import GroupPool
from ranks import run_ranks


def total(rank, group):
    value = torch.tensor([10**rank])
    dist.all_reduce(value, group=group)
    return value.item()


def living():
    return len(dist.distributed_c10d._world.pg_map)


def shared(rank):
    before = living()
    first, second = (ParallelTopology(4, tp=2, ep=2).bind(timeout=20) for _ in range(2))
    group = first.group("tp")
    assert second.group("tp") is group
    assert second.group("ep") is group
    assert (len(first), len(second), living() - before) == (1, 1, 1)
    first.close()
    sums = [total(rank, second.group("tp"))]
    second.close()
    second.close()
    assert living() == before
    with pytest.raises(StaleGroupsError):
        first.group("tp")
    # parallel_state holds the same group as a topology with its options
    groups._create_expert_and_data_parallel(2)
    expert = groups._get_expert_parallel_group("ep_size_2")
    plain = ParallelTopology(4, tp=2).bind()
    assert plain.group("tp") is expert
    groups.destroy_groups()
    sums.append(total(rank, plain.group("tp")))
    plain.close()
    assert living() == before
    return sums


def test_the_last_holder_destroys():
    assert run_ranks(shared, 4) == [[11, 11], [11, 11], [1100, 1100], [1100, 1100]]


def names_and_stores(rank):
    names, used_before = [], []
    make = _c10d._MAKE
    assert _c10d._can_make()

    def spy(*args, **options):
        names.append(args[5])
        used_before.append(args[4].check([f"mark/{rank}"]))
        args[4].set(f"mark/{rank}", "")
        return make(*args, **options)

    _c10d._MAKE = spy
    dist.new_group([0])  # PyTorch's own counters differ from here on
    for _ in range(3):
        with ParallelTopology(2, tp=2, dp=1).bind(timeout=20) as bound:
            assert total(rank, bound.group("tp")) == 11
    with ParallelTopology(2, tp=2, dp=1).bind(timeout=21) as bound:
        bound.group("tp")
    return names, used_before


def test_names_stay_and_what_is_in_the_store_does_not():
    (names, used_before), other = run_ranks(names_and_stores, 2)
    assert (names, used_before) == other
    assert names[0] == names[1] == names[2] != names[3]
    assert used_before == [False] * 4


def options_differ(rank):
    bound = ParallelTopology(2, tp=2, dp=1).bind(timeout=20 + rank)
    with pytest.raises(PlanMismatchError) as caught:
        bound.group("tp")
    bound = ParallelTopology(2, tp=2, dp=1).bind(timeout=20)
    return caught.value.differences, total(rank, bound.group("tp"))


def test_members_with_different_options_are_told():
    assert run_ranks(options_differ, 2) == [({"timeout": {"20.0": (0,), "21.0": (1,)}}, 11)] * 2


def alone(rank):
    """Groups of one rank: one for all axes, no meeting, not made by create()."""
    before = living()
    bound = ParallelTopology(2, tp=2).bind(timeout=20)
    bound.create()
    made = living() - before
    if rank == 0:  # nobody else takes part
        one = bound.group("cp")
        assert bound.group("pp") is one is bound.group("dp")
        assert total(rank, one) == 1
        assert dist.get_process_group_ranks(one) == [0]
        assert living() - before == made + 1
        assert ParallelTopology(2, tp=2).bind(timeout=20).group("pp") is one
    dist.barrier()
    bound.close()
    return made


def test_groups_of_one_rank():
    assert run_ranks(alone, 2) == [1, 1]


def world_group(rank):
    plain = ParallelTopology(2, tp=2).bind()
    assert plain.group("tp") is dist.group.WORLD
    timed = ParallelTopology(2, tp=2).bind(timeout=20)
    assert timed.group("tp") is not dist.group.WORLD
    own = GroupPool(share_world=False).get(ParallelTopology(2, tp=2).axis("tp"), "tp")
    assert own is not dist.group.WORLD
    plain.close()
    dist.barrier()
    return total(rank, own)


def test_the_whole_world_is_the_default_group():
    assert run_ranks(world_group, 2) == [11, 11]


def somebody_else_destroys(rank):
    first = ParallelTopology(4, tp=2).bind(timeout=20)
    dist.destroy_process_group(first.group("tp"))
    with pytest.raises(StaleGroupsError, match="destroyed by somebody else"):
        first.group("tp")
    second = ParallelTopology(4, tp=2).bind(timeout=20)  # did not hold it, so makes it
    group = second.group("tp")
    first.close()  # lets go of the old one, not of this
    return total(rank, group)


def test_a_destroyed_group_is_made_for_new_holders():
    assert run_ranks(somebody_else_destroys, 4) == [11, 11, 1100, 1100]


def adopted(rank):
    mine = dist.new_group([0, 1])
    pool = GroupPool()
    pool.adopt((0, 1), mine)
    if rank < 2:
        assert pool.get(ParallelTopology(4, tp=2).axis("tp"), "tp") is mine
        assert len(pool) == 0
    pool.close()
    return total(rank, mine) if rank < 2 else None


def test_adopted_groups_stay():
    assert run_ranks(adopted, 4) == [11, 11, None, None]


def aborted(rank):
    bound = ParallelTopology(4, tp=2).bind(timeout=20)
    bound.create()
    groups_held = [bound.group(axis) for axis in ("tp", "dp")]
    dist.barrier()
    if rank == 0:
        bound.abort()  # alone: the others do nothing
        assert not any(map(_c10d.is_alive, groups_held))
    dist.barrier()
    bound.abort()
    bound.abort()
    assert "aborted" in repr(bound)
    with pytest.raises(StaleGroupsError, match="was aborted; call bind"):
        bound.group("tp")
    bound.close()
    again = ParallelTopology(4, tp=2).bind(timeout=20)
    again.create()
    return total(rank, again.group("tp")), living()


def test_abort_waits_for_nobody_and_bind_works_again():
    assert run_ranks(aborted, 4) == [(11, 3), (11, 3), (1100, 3), (1100, 3)]


def a_member_fails(rank):
    make = _c10d._MAKE
    assert _c10d._can_make()

    def broken(*args, **options):
        raise RuntimeError("no such device")

    if rank == 1:
        _c10d._MAKE = broken
    else:

        def lazy(*args, **options):  # a backend that does not connect when it is made
            return make(1, 0, [0], *args[3:], **options)

        _c10d._MAKE = lazy
    bound = ParallelTopology(2, tp=2, dp=1).bind(timeout=20)
    with pytest.raises(GroupCreationError) as caught:
        bound.group("tp")
    _c10d._MAKE = make
    return str(caught.value), total(rank, bound.group("tp"))


def test_all_members_learn_that_one_could_not_make_it():
    for message, found in run_ranks(a_member_fails, 2):
        assert "no such device" in message
        assert found == 11


def offset(rank, mode):
    """A plan for ranks 1 and 2 of 4."""
    bound = RankGrid({"tp": 2}, span=range(1, 3), world_size=4).bind(timeout=20)
    bound._pool.mode = mode
    bound.create()
    if rank not in (1, 2):
        for _ in range(2):
            with pytest.raises(RankRangeError):
                bound.group("tp")
        result = None
    else:
        result = total(rank, bound.group("tp"))
    bound.close()
    return result


@pytest.mark.parametrize("mode", ["members", "split", "everyone"])
def test_ranks_outside_the_plan(mode):
    assert run_ranks(offset, 4, mode) == [None, 110, 110, None]


def own_order(rank, mode):
    bound = RankGrid({"tp": 2}, span=(1, 0)).bind(timeout=20)
    bound._pool.mode = mode
    try:
        group = bound.group("tp")
    except TopologyError as error:
        return str(error)
    return dist.get_rank(group), bound.index("tp"), total(rank, group)


@pytest.mark.parametrize("mode", ["members", "split"])
def test_members_are_numbered_in_the_order_of_the_axis(mode):
    assert run_ranks(own_order, 2, mode) == [(1, 1, 11), (0, 0, 11)]


def test_everyone_mode_refuses_an_order_of_its_own():
    for message in run_ranks(own_order, 2, "everyone"):
        assert "new_group sorts ranks" in message


def other_axes(rank):
    bound = ParallelTopology(4, tp=2).bind(timeout=20)
    with pytest.raises(PlanMismatchError) as caught:
        bound.create("tp") if rank == 0 else bound.create("dp")
    bound.create("tp", verify=False)
    return caught.value.differences, len(bound)


def test_create_compares_what_is_made():
    assert run_ranks(other_axes, 4) == [({"create": {'["tp"]': (0,), '["dp"]': (1, 2, 3)}}, 1)] * 4


def spelled_otherwise(rank):
    """The same groups under other names are no difference."""
    bound = ParallelTopology(4, tp=2, ep=2).bind(timeout=20)
    bound.create(*(("tp", "dp") if rank % 2 else ("edp", "ep", "dp_shard")))
    return len(bound)


def test_create_compares_groups_and_not_names():
    assert run_ranks(spelled_otherwise, 4) == [2] * 4


def make_world():
    dist.init_process_group("fake", store=dist.HashStore(), rank=5, world_size=512)


def test_the_fake_backend_meets_nobody():
    pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    make_world()
    try:
        bound = ParallelTopology(512, tp=8, cp=2, pp=4, ep=8).bind(timeout=30)
        bound.verify(timeout=1)
        bound.create()
        assert {group.group_desc for group in bound._pool._made.values()} == set(bound.topology.axes_in_use())
        for axis in bound.topology.axes_in_use():
            assert dist.get_process_group_ranks(bound.group(axis)) == list(bound.ranks(axis))
        bound.close()
    finally:
        dist.destroy_process_group()


def test_a_registry_dies_with_its_world():
    pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    make_world()
    found = weakref.ref(_registry.registry())
    ParallelTopology(512, tp=8).bind().create()
    dist.destroy_process_group()
    gc.collect()
    assert found() is None
    make_world()
    assert len(ParallelTopology(512, tp=8).bind()) == 0
    dist.destroy_process_group()


def poor_store(rank):
    class Poor:
        def check(self, keys):
            raise RuntimeError("not implemented")

    bound = ParallelTopology(2, tp=2, dp=1).bind(timeout=5)
    bound._pool._registry._store = Poor()
    messages = []
    for call in (bound.verify, lambda: bound.group("tp"), bound.create):
        with pytest.raises(StaleGroupsError.__mro__[1]) as caught:
            call()
        messages.append((type(caught.value).__name__, str(caught.value)))
    return messages


def test_a_store_that_cannot_be_used_is_named():
    for messages in run_ranks(poor_store, 2):
        for name, message in messages:
            assert name == "StoreError"
            assert "through the Poor of the default process group: not implemented" in message


def no_store(rank):
    """As under MPI: no store, and every rank calls new_group."""
    bound = ParallelTopology(2, tp=2).bind(timeout=20)
    bound._pool._registry._store = None
    bound._pool.mode = "everyone"
    bound.create()
    with pytest.raises(_c10d.GroupCreationError.__mro__[1]) as caught:
        bound.verify()
    return type(caught.value).__name__, total(rank, bound.group("tp"))


def test_without_a_store_nothing_is_compared():
    assert run_ranks(no_store, 2) == [("StoreError", 11)] * 2
