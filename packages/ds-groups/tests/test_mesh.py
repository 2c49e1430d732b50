"""`to_device_mesh`: PyTorch's mesh over groups that exist already."""

from __future__ import annotations

import copy
import io
import itertools
import pickle

import pytest
import torch
import torch.distributed as dist
from ds_groups import ParallelTopology, RankRangeError, StaleGroupsError, TopologyError
from ds_groups._grid import RankGrid
from ds_groups._mesh import mesh_dims
from ds_groups._torch_mesh import find_root, rank_grid
from ranks import run_ranks
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


def count_groups():
    return len(dist.distributed_c10d._world.pg_map)


def summed(rank, group):
    """Which ranks a collective reaches, as decimal digits."""
    value = torch.tensor([10**rank])
    dist.all_reduce(value, group=group)
    return int(value)


def digits_of(ranks):
    return sum(10**rank for rank in ranks)


def mesh_of(rank, options, axes, names):
    bound = ParallelTopology(dist.get_world_size(), **options).bind(timeout=20)
    mesh = bound.to_device_mesh(*axes, names=names)
    count = count_groups()
    found = {}
    for place, (name, axis) in enumerate(zip(mesh.mesh_dim_names, axes or ("dp", "tp"), strict=True)):
        assert mesh.get_group(name) is bound.group(axis)
        assert mesh.get_local_rank(name) == bound.index(axis) == mesh.get_coordinate()[place]
        value = torch.tensor([rank])
        dist.all_reduce(value, group=mesh.get_group(name))
        found[name] = value.item()
    assert count_groups() == count
    return mesh.mesh.tolist(), found


def test_default_mesh_is_the_one_pytorch_would_build():
    answers = run_ranks(mesh_of, 4, {"tp": 2}, (), None)
    assert answers[3] == ([[0, 1], [2, 3]], {"dp": 4, "tp": 5})


def test_names_of_deepspeed():
    names = ("data_parallel", "sequence_parallel")
    answers = run_ranks(mesh_of, 4, {"cp": 2}, ("dp", "cp"), names)
    assert answers[1] == ([[0, 1], [2, 3]], {"data_parallel": 4, "sequence_parallel": 1})


def test_mesh_of_a_pipeline_stage():
    answers = run_ranks(mesh_of, 4, {"tp": 2, "pp": 2}, ("tp",), None)
    assert [mesh for mesh, _ in answers] == [[0, 1], [0, 1], [2, 3], [2, 3]]


def test_joined_axes_are_one_dimension():
    answers = run_ranks(mesh_of, 4, {"cp": 2}, ("dp_cp",), None)
    assert answers[2] == ([0, 1, 2, 3], {"dp_cp": 6})
    answers = run_ranks(mesh_of, 4, {"cp": 2, "pp": 2}, (("dp", "cp"), "tp"), ("data", "tensor"))
    assert answers[2] == ([[2], [3]], {"data": 5, "tensor": 2})


def flattened(rank, options, order, slices):
    """What flattening pairs of dimensions sums over, each stage in its own order."""
    topology = ParallelTopology(dist.get_world_size(), **options)
    bound = topology.bind(timeout=20)
    mesh = bound.to_device_mesh(*slices)
    pairs = list(itertools.combinations(slices, 2))
    stage = rank // (dist.get_world_size() // 2)
    found = {}
    for pair in pairs if stage == 0 else reversed(pairs):
        flat = mesh[pair]._flatten("_with_".join(pair))
        assert find_root(flat) is find_root(mesh)
        assert flat.get_local_rank() == flat.get_coordinate()[0] == flat.mesh.tolist().index(rank)
        found[pair] = summed(rank, flat.get_group())
    whole = mesh._flatten("loss")
    found["loss"] = summed(rank, whole.get_group())
    assert whole == mesh._flatten("loss")
    grid = torch.arange(topology.world_size).reshape([topology.size(axis) for axis in order])
    at = dict(zip(order, (grid == rank).nonzero()[0].tolist(), strict=True))
    for names, value in found.items():
        free = slices if names == "loss" else names
        where = tuple(slice(None) if axis in free else at[axis] for axis in order)
        assert value == digits_of(grid[where].flatten().tolist()), (names, value)


@pytest.mark.parametrize(
    ("world", "options", "slices"),
    [
        (4, {"pp": 2, "dp_shard": 1}, ("dp_replicate", "dp_shard")),
        (8, {"pp": 2, "dp_shard": 2}, ("dp_replicate", "dp_shard")),
        (8, {"pp": 2, "tp": 2, "dp_shard": 1}, ("dp_replicate", "dp_shard", "tp")),
        (8, {"pp": 2, "tp": 2, "dp_shard": 2}, ("dp_replicate", "dp_shard", "cp", "tp")),
    ],
)
def test_flattening_in_a_stage_joins_ranks_of_this_stage(world, options, slices):
    run_ranks(flattened, world, options, ("pp", "dp_replicate", "dp_shard", "cp", "tp"), slices)


def like_torch(rank):
    """A mesh of all digits answers as the one that PyTorch makes, also sliced."""
    bound = ParallelTopology(8, tp=2, pp=2, dp_shard=1).bind(timeout=20)
    names = ("pp", "dp_replicate", "tp")
    theirs = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=names)
    choices = [("pp", "tp"), ("dp_replicate", "tp"), ("tp",), ("pp",)]
    slices = {names: theirs, **{choice: theirs[choice] for choice in choices}}
    ours = bound.to_device_mesh(*names)  # PyTorch 2.6 takes an equal mesh for the one that was made last
    for choice, other in slices.items():
        mine = ours[choice]
        assert mine.mesh.tolist() == other.mesh.tolist()
        assert list(mine.get_coordinate()) == list(other.get_coordinate())
        assert mine.shape == other.shape
        assert mine.ndim == other.ndim
        for name in choice:
            assert dist.get_process_group_ranks(mine.get_group(name)) == dist.get_process_group_ranks(
                other.get_group(name)
            )
            assert mine.get_local_rank(name) == other.get_local_rank(name)
    with pytest.raises(KeyError):
        ours["tp", "pp"]
    with pytest.raises(KeyError, match="is no dimension"):
        ours["cp"]
    assert ours[names] is ours


def test_answers_as_a_mesh_of_pytorch_does():
    run_ranks(like_torch, 8)


def one_root(rank):
    bound = ParallelTopology(8, tp=2, pp=2).bind(timeout=20)
    before = count_groups()
    data, tensor = bound.to_device_mesh("dp"), bound.to_device_mesh("tp")
    assert count_groups() == before + 2  # none of pp, which is only in the root
    root = find_root(data)
    assert find_root(tensor) is root
    assert root.mesh.tolist() == torch.arange(8).reshape(2, 2, 2).tolist()
    assert root["pp"].get_group() is bound.group("pp") is root.get_group("pp") is root.get_group(0)
    assert root["dp", "tp"].mesh.tolist() == bound.to_device_mesh("dp", "tp").mesh.tolist()
    return summed(rank, root["pp"].get_group())


def test_meshes_share_one_root_that_makes_groups_when_asked():
    assert run_ranks(one_root, 8) == [digits_of((rank % 4, rank % 4 + 4)) for rank in range(8)]


def expert_slices(rank):
    bound = ParallelTopology(8, tp=2, pp=2, ep=2).bind(timeout=20)
    mesh = bound.to_device_mesh("pp", "dp_replicate", "edp", "ep")
    assert find_root(mesh) == mesh  # as PyTorch's own mesh of all ranks
    assert find_root(bound.to_device_mesh("edp", "ep")) is find_root(bound.to_device_mesh("dp", "tp"))
    assert mesh.mesh.tolist() == torch.arange(8).reshape(2, 1, 2, 2).tolist()
    flat = mesh["dp_replicate", "edp"]._flatten()
    assert flat.mesh_dim_names == ("dp_replicate_edp",)
    return summed(rank, flat.get_group()), summed(rank, mesh["ep"].get_group())


def test_expert_axes_are_slices_of_the_same_root():
    answers = run_ranks(expert_slices, 8)
    assert answers[5] == (digits_of((5, 7)), digits_of((4, 5)))


def refused(rank):
    topology = ParallelTopology(4, tp=2, dp_shard=2, ep=2)
    bound = topology.bind(timeout=20)
    with pytest.raises(TopologyError, match="twice"):
        bound.to_device_mesh("dp", "dp_shard")
    with pytest.raises(TopologyError, match="mixes"):
        bound.to_device_mesh("ep", "tp")
    with pytest.raises(TopologyError, match="must name each of the axes"):
        bound.to_device_mesh("dp", names=("a", "b"))
    with pytest.raises(TopologyError, match="must name each of the axes"):
        bound.to_device_mesh("dp", "tp", names=("a", "a"))
    with pytest.raises(TopologyError, match="not known"):
        bound.to_device_mesh("data")
    count = len(bound)
    bound.to_device_mesh("tp", names=("a",))
    with pytest.raises(TopologyError, match="'a' is the axis tp"):
        bound.to_device_mesh("dp", names=("a",))
    mesh = bound.to_device_mesh("tp", "dp")
    with pytest.raises(TopologyError, match="slowest varying first"):
        mesh._flatten("all")
    with pytest.raises(TopologyError, match="backend_override"):
        mesh._flatten("other", backend_override="gloo")
    with pytest.raises(TopologyError, match="'pp' is the axis pp"):
        bound.to_device_mesh("dp", "tp")._flatten("pp")
    bound.close()
    with pytest.raises(StaleGroupsError):
        bound.to_device_mesh("tp")
    with pytest.raises(StaleGroupsError):
        mesh["tp"]
    return count


def test_refused():
    assert run_ranks(refused, 4) == [0] * 4


def offset(rank):
    bound = RankGrid({"tp": 2, "dp": 1}, span=range(2, 4), world_size=4).bind(timeout=20)
    if rank < 2:
        with pytest.raises(RankRangeError):
            bound.to_device_mesh("tp")
        return None
    mesh = bound.to_device_mesh("dp", "tp")
    return mesh.mesh.tolist(), summed(rank, mesh._flatten("both").get_group())


def test_a_plan_of_some_ranks():
    assert run_ranks(offset, 4) == [None, None, ([[2, 3]], 1100), ([[2, 3]], 1100)]


def custom_order(rank):
    bound = RankGrid({"tp": 2, "dp": 2}, span=(3, 1, 0, 2)).bind(timeout=20)
    mesh = bound.to_device_mesh("dp", "tp")
    assert mesh.mesh.tolist() == [[3, 1], [0, 2]]
    for place, axis in enumerate(("dp", "tp")):
        assert mesh.get_local_rank(axis) == mesh.get_coordinate()[place] == bound.index(axis)
    flat = mesh._flatten("all")  # not the default group, which counts 0 to 3
    assert flat.get_local_rank() == flat.get_coordinate()[0] == (3, 1, 0, 2).index(rank)


def test_groups_number_ranks_as_the_mesh_does():
    run_ranks(custom_order, 4)


def sharded(rank):
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    bound = ParallelTopology(2, tp=2, dp=1).bind(timeout=20)
    mesh = bound.to_device_mesh("tp")
    tensor = distribute_tensor(torch.arange(4.0), mesh, [Shard(0)])
    assert isinstance(tensor, DTensor)
    return tensor.to_local().tolist(), tensor.full_tensor().tolist()


def test_a_tensor_can_be_distributed_over_it():
    assert run_ranks(sharded, 2) == [([0.0, 1.0], [0.0, 1.0, 2.0, 3.0]), ([2.0, 3.0], [0.0, 1.0, 2.0, 3.0])]


def copies(rank):
    from torch.distributed.tensor import Shard, distribute_tensor

    bound = ParallelTopology(4, tp=2).bind(timeout=20)
    mesh = bound.to_device_mesh("dp", "tp")
    for other in (pickle.loads(pickle.dumps(mesh)), copy.deepcopy(mesh)):
        assert type(other) is DeviceMesh
        assert other == mesh
        assert hash(other) == hash(mesh)
        assert other.mesh.tolist() == mesh.mesh.tolist()
    tensor = distribute_tensor(torch.arange(8.0).reshape(4, 2), mesh, [Shard(0), Shard(1)])
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    assert b"ds_groups" not in buffer.getvalue()
    buffer.seek(0)
    assert torch.load(buffer, weights_only=False).full_tensor().tolist() == tensor.full_tensor().tolist()


def test_copies_are_plain_meshes():
    run_ranks(copies, 4)


def size_one(rank):
    bound = ParallelTopology(2).bind(timeout=20)
    mesh = bound.to_device_mesh("pp", "dp", "cp", "tp")
    assert mesh.mesh.tolist() == [[[[0]], [[1]]]]
    return summed(rank, mesh["tp"].get_group()), summed(rank, mesh["pp", "dp"]._flatten().get_group())


def test_axes_of_one_rank():
    assert run_ranks(size_one, 2) == [(1, 11), (10, 11)]


class Standing:
    """A topology as `rank_grid` sees it, without a process group."""

    def __init__(self, topology, rank):
        self.topology, self.rank = topology, rank


def grid_of(topology, axes, rank):
    standing = Standing(topology, rank)
    return rank_grid(standing, mesh_dims(standing, axes, None))


def test_grids():
    topology = ParallelTopology(16, tp=2, cp=2, pp=2, dp_shard=2, ep=4)
    whole = torch.arange(16)
    assert torch.equal(grid_of(topology, ("pp", "dp", "cp", "tp"), 9), whole.reshape(2, 2, 2, 2))
    assert grid_of(topology, ("dp", "tp"), 14).tolist() == [[10, 11], [14, 15]]
    assert grid_of(topology, ("dp_cp", "tp"), 0).tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert torch.equal(grid_of(topology, ("pp", "edp", "ep"), 3), whole.reshape(2, 2, 4))
    assert torch.equal(grid_of(topology, ("tp", "pp"), 4), torch.tensor([[4, 12], [5, 13]]))


def test_axes_without_strides_are_refused():
    sizes = {"tp": 2, "dp": 3}
    even = RankGrid(sizes).view(ep=3, edp=2, over=("tp", "dp"))
    assert [grid_of(even, ("ep",), rank).tolist() for rank in (0, 5)] == [[0, 1, 2], [3, 4, 5]]
    assert grid_of(even, ("edp", "ep"), 4).tolist() == [[0, 1, 2], [3, 4, 5]]
    uneven = RankGrid(sizes).view(ep=2, edp=3, over=("dp", "tp"))
    assert uneven.table("ep") == ((0, 2), (4, 1), (3, 5))
    for rank in range(6):
        for axis in ("ep", "edp"):
            with pytest.raises(TopologyError, match="no strides"):
                grid_of(uneven, (axis,), rank)
