"""The same groups over NCCL, with and without a device bound to the default group. Needs two GPUs; run by hand."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ds_groups import GroupOptions, ParallelTopology, StaleGroupsError, from_mesh, parallel_state as groups
from ranks import run_ranks

WORLD = min(torch.cuda.device_count(), 4)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(WORLD < 2, reason="needs two GPUs")]


def start(rank, folder, bound, backend):
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank) if bound else None
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group(backend, store=store, rank=rank, world_size=WORLD, device_id=device)


def total(rank, group, device="cuda"):
    value = torch.tensor([10.0**rank], device=device)
    dist.all_reduce(value, group=group)
    return value.item()


def work(rank, folder, bound, backend):
    start(rank, folder, bound, backend)
    dist.new_group([0], backend="gloo", use_local_synchronization=True)  # names of PyTorch differ from now on
    sums = []
    for _ in range(2):
        plan = ParallelTopology(WORLD, tp=2, ep=2, order="pp-tp-cp-dp").bind(timeout=60)
        plan.verify(timeout=60)
        plan.create("tp", "dp", "ep")
        sums += [total(rank, plan.group(axis)) for axis in ("tp", "dp", "ep", "tp_dp")]
        torch.cuda.synchronize()
        dist.barrier()
        plan.close()
    groups._create_expert_and_data_parallel(WORLD)
    sums.append(total(rank, groups._get_expert_parallel_group(f"ep_size_{WORLD}")))
    cpu = ParallelTopology(WORLD, tp=2).bind(backend="gloo", timeout=60)
    sums.append(total(rank, cpu.group("tp"), "cpu"))
    cpu_mode = cpu.mode
    mesh = ParallelTopology(WORLD, tp=2).bind(timeout=60).to_device_mesh("dp", "tp")
    torch.cuda.synchronize()
    dist.barrier()
    dist.destroy_process_group()
    return plan.mode, cpu_mode, mesh.device_type, sums


def expected(rank):
    def add(ranks):
        return sum(10.0**member for member in ranks)

    pair = add((rank // 2 * 2, rank // 2 * 2 + 1))
    turn = [pair, add(range(rank % 2, WORLD, 2)), pair, add(range(WORLD))]
    return [*turn, *turn, add(range(WORLD)), pair]


@pytest.mark.parametrize("backend", ["nccl", "cpu:gloo,cuda:nccl"])
@pytest.mark.parametrize(("bound", "mode"), [(False, "members"), (True, "split")])
def test_groups_work(tmp_path, bound, mode, backend):
    answers = run_ranks(work, WORLD, str(tmp_path), bound, backend, init=False, timeout=120)
    for rank, answer in enumerate(answers):
        assert answer == (mode, "members", "cuda", expected(rank))


def lonely(rank, folder):
    """One rank makes and uses a group of its own while the other does nothing: no one waits."""
    start(rank, folder, False, "nccl")
    plan = ParallelTopology(WORLD, tp=WORLD).bind(timeout=60)
    answer = total(rank, plan.group("dp")) if rank == 0 else None
    torch.cuda.synchronize()
    dist.barrier()
    dist.destroy_process_group()
    return answer


def test_members_only(tmp_path):
    assert run_ranks(lonely, WORLD, str(tmp_path), init=False, timeout=120)[0] == 1.0


def one_rank_groups(rank, folder):
    """Bound to a device, where PyTorch splits every group from the world: those of one rank wait for nobody."""
    start(rank, folder, True, "nccl")
    plan = ParallelTopology(WORLD, tp=WORLD).bind(timeout=60)
    answer = None
    if rank == 0:
        device = dist.group.WORLD.bound_device_id
        assert plan.group("cp") is plan.group("pp")
        answer = total(rank, plan.group("cp"))
        assert dist.group.WORLD.bound_device_id == device
    torch.cuda.synchronize()
    dist.barrier()
    with ParallelTopology(WORLD, tp=2).bind(timeout=60) as after:  # the world can still be split
        pair = total(rank, after.group("tp"))
        torch.cuda.synchronize()
        dist.barrier()
    dist.destroy_process_group()
    return answer, pair


def test_groups_of_one_rank(tmp_path):
    answers = run_ranks(one_rank_groups, WORLD, str(tmp_path), init=False, timeout=120)
    assert [answer for answer, _ in answers] == [1.0, *[None] * (WORLD - 1)]
    assert [pair for _, pair in answers] == [expected(rank)[0] for rank in range(WORLD)]


def with_options(rank, folder, bound):
    start(rank, folder, bound, "nccl")
    given = dist.ProcessGroupNCCL.Options()
    given.is_high_priority_stream = True
    given.config.max_ctas = 4
    options = GroupOptions(timeout=50, pg_options=given, warm_up=True)
    plan = ParallelTopology(WORLD, tp=2, ep=2).bind(timeout=60, axes={"ep": options})
    plan.create()
    assert given.group_name == ""
    assert list(given.global_ranks_in_group) == []
    used = plan.group("ep")._get_backend(torch.device("cuda")).options
    found = used.is_high_priority_stream, used.config.max_ctas, used._timeout.total_seconds()
    assert plan.group("ep") is not plan.group("tp")
    sums = [total(rank, plan.group(axis)) for axis in ("ep", "tp")]
    again = ParallelTopology(WORLD, tp=2, ep=2).bind(timeout=60, axes={"ep": options})
    assert again.group("ep") is plan.group("ep")
    torch.cuda.synchronize()
    dist.barrier()
    plan.close()
    again.close()
    dist.destroy_process_group()
    return found, sums


@pytest.mark.parametrize("bound", [False, True])
def test_options_reach_the_backend(tmp_path, bound):
    for rank, (found, sums) in enumerate(run_ranks(with_options, WORLD, str(tmp_path), bound, init=False, timeout=120)):
        assert found == (True, 4, 50.0)
        assert sums == [expected(rank)[0]] * 2


def broken_off(rank, folder, bound):
    """Rank 0 starts a reduction that nobody joins, breaks it off, and all bind again."""
    start(rank, folder, bound, "nccl")
    plan = ParallelTopology(WORLD, tp=2).bind(timeout=60, warm_up=True)
    group = plan.group("tp")
    if rank == 0:
        dist.all_reduce(torch.ones(1, device="cuda"), group=group, async_op=True)
    plan.abort()
    with pytest.raises(StaleGroupsError, match="was aborted"):
        plan.group("tp")
    again = ParallelTopology(WORLD, tp=2).bind(timeout=60)
    answer = total(rank, again.group("tp"))
    torch.cuda.synchronize()
    dist.barrier()
    dist.destroy_process_group()
    return answer


@pytest.mark.parametrize("bound", [False, True])
def test_abort_and_bind_again(tmp_path, bound):
    answers = run_ranks(broken_off, WORLD, str(tmp_path), bound, init=False, timeout=120)
    assert answers == [expected(rank)[0] for rank in range(WORLD)]


def meshes(rank, folder, bound):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    start(rank, folder, bound, "nccl")
    turns = []
    for _ in range(2):
        plan = ParallelTopology(WORLD, dp_shard=1).bind(timeout=60)
        mesh = plan.to_device_mesh("dp_replicate", "dp_shard")
        assert mesh.device_type == "cuda"
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 4).cuda()
        eager = [parameter.detach().clone().requires_grad_() for parameter in layer.parameters()]
        torch.nn.functional.linear(torch.ones(2, 4, device="cuda"), *eager).sum().backward()
        fully_shard(layer, mesh=mesh)
        layer(torch.ones(2, 4, device="cuda")).sum().backward()
        for parameter, reference in zip(layer.parameters(), eager, strict=True):
            torch.testing.assert_close(parameter.grad.full_tensor(), reference.grad)
        rows = torch.arange(4.0 * WORLD).reshape(WORLD, 4).cuda()
        tensor = distribute_tensor(rows, plan.to_device_mesh("dp"), [Shard(0)])
        torch.testing.assert_close((tensor * 2).full_tensor(), rows * 2)
        turns.append(total(rank, mesh._flatten("loss").get_group()))
        assert from_mesh(mesh).group("dp_replicate") is mesh.get_group("dp_replicate")
        torch.cuda.synchronize()
        dist.barrier()
        plan.close()
    dist.destroy_process_group()
    return turns


@pytest.mark.parametrize("bound", [False, True])
def test_meshes(tmp_path, bound):
    whole = sum(10.0**member for member in range(WORLD))
    assert run_ranks(meshes, WORLD, str(tmp_path), bound, init=False, timeout=100) == [[whole, whole]] * WORLD
