"""FSDP2, tensor parallelism and `torch.compile` over meshes of one topology, in pipeline stages."""

from __future__ import annotations

import copy

import torch
from ds_groups import ParallelTopology
from ranks import run_ranks
from torch import nn

CLOSE = 1e-6  # of parameters near 1, after three steps


def batch(step: int, place: int) -> torch.Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * step + place))


def train(model: nn.Module, plain: nn.Module, place: int, count: int) -> None:
    """Three steps of both: ``plain`` sees what all data ranks see."""
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, plain)]
    for step in range(3):
        model(batch(step, place)).square().mean().backward()
        torch.stack([plain(batch(step, each)).square().mean() for each in range(count)]).mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def furthest(state: dict[str, torch.Tensor], plain: nn.Module) -> float:
    pairs = zip(state.values(), plain.state_dict().values(), strict=True)
    return max((value.full_tensor() - other).abs().max().item() for value, other in pairs)  # type: ignore[attr-defined]


def two_dimensions(rank: int) -> float:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    bound = ParallelTopology(8, tp=2, pp=2, dp_shard=2).bind(timeout=60)
    tensor, data = bound.to_device_mesh("tp"), bound.to_device_mesh("dp")
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    model = parallelize_module(copy.deepcopy(plain), tensor, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    for layer in (model[0], model[2]):  # type: ignore[index]
        fully_shard(layer, mesh=data)
    train(fully_shard(model, mesh=data), plain, bound.index("dp"), bound.size("dp"))
    return furthest(model.state_dict(), plain)


def hybrid(rank: int) -> float:
    from torch.distributed.fsdp import fully_shard

    bound = ParallelTopology(8, pp=2, dp_shard=2).bind(timeout=60)
    torch.manual_seed(0)
    plain = nn.Linear(8, 4)
    model = copy.deepcopy(plain)
    train(
        fully_shard(model, mesh=bound.to_device_mesh("dp_replicate", "dp_shard")),
        plain,
        bound.index("dp"),
        bound.size("dp"),
    )
    return furthest(copy.deepcopy(model.state_dict()), plain)


def compiled(rank: int) -> list[float]:
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh = ParallelTopology(4, tp=2, pp=2).bind(timeout=60).to_device_mesh("tp")

    def gather(local: torch.Tensor) -> torch.Tensor:
        return DTensor.from_local(local, mesh, [Shard(0)], run_check=False).redistribute(mesh, [Replicate()]).to_local()

    found: list[float] = torch.compile(gather, backend="aot_eager", fullgraph=True)(torch.full((1,), rank)).tolist()
    return found


def test_fsdp_and_tensor_parallel_meshes_have_one_root() -> None:
    assert max(run_ranks(two_dimensions, 8, timeout=150)) < CLOSE


def test_hybrid_sharding_in_a_pipeline_stage() -> None:
    assert max(run_ranks(hybrid, 8, timeout=150)) < CLOSE


def test_compiled_tensor_parallel_code_takes_the_mesh() -> None:
    assert run_ranks(compiled, 4, timeout=150) == [[0, 1], [0, 1], [2, 3], [2, 3]]
