"""`as_mpu` in an engine of DeepSpeed's: the losses of an ``mpu`` written by hand."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ds_groups import ParallelTopology
from ranks import run_ranks
from torch import nn

pytest.importorskip("deepspeed")

ENV = {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "4"}
CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    "gradient_clipping": 0.1,
    "zero_optimization": {"stage": 1},
}


class ByHand:
    """Tensor parallel neighbours, data parallel ranks beside them; groups by `new_group`."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        tensor = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        data = [dist.new_group([0, 2]), dist.new_group([1, 3])]
        self._tensor, self._data = tensor[rank // 2], data[rank % 2]

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._tensor

    get_tensor_model_parallel_group = get_model_parallel_group

    def get_model_parallel_rank(self) -> int:
        return self._rank % 2

    get_tensor_model_parallel_rank = get_model_parallel_rank

    def get_model_parallel_world_size(self) -> int:
        return 2

    get_tensor_model_parallel_world_size = get_model_parallel_world_size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._data

    def get_data_parallel_rank(self) -> int:
        return self._rank // 2

    def get_data_parallel_world_size(self) -> int:
        return 2


class Join(torch.autograd.Function):
    """Sums over the tensor parallel ranks; the gradient goes to each of them."""

    @staticmethod
    def forward(ctx, partial, group):  # type: ignore[no-untyped-def]
        total = partial.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        return gradient, None


class Split(nn.Module):
    """Two layers, the first split by columns and the second by rows."""

    def __init__(self, group: dist.ProcessGroup, place: int) -> None:
        super().__init__()
        torch.manual_seed(place)
        self.first, self.second = nn.Linear(8, 4), nn.Linear(4, 3, bias=False)
        for weight in self.parameters():
            weight.model_parallel = True  # type: ignore[attr-defined]
        self.group = group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        joined: torch.Tensor = Join.apply(self.second(self.first(x).relu()), self.group)
        return joined.square().mean()


def losses(rank: int, ours: bool) -> tuple[list[float], float]:
    import deepspeed
    from deepspeed.utils import groups

    mpu = ParallelTopology(4, tp=2).bind(timeout=30).as_mpu() if ours else ByHand(rank)
    model = Split(mpu.get_tensor_model_parallel_group(), mpu.get_tensor_model_parallel_rank())
    engine, *_ = deepspeed.initialize(model=model, config=CONFIG, mpu=mpu)
    assert groups.mpu is mpu
    assert dist.get_process_group_ranks(engine.optimizer.dp_process_group) == [rank % 2, rank % 2 + 2]
    found = []
    for step in range(4):
        seed = torch.Generator().manual_seed(100 * step + mpu.get_data_parallel_rank())
        loss = engine(torch.randn(2, 8, generator=seed))
        engine.backward(loss)
        engine.step()
        found.append(loss.item())
    return found, float(engine.get_global_grad_norm())


def test_losses_are_those_of_an_mpu_by_hand() -> None:
    by_hand = run_ranks(losses, 4, False, env=ENV, timeout=150)
    assert run_ranks(losses, 4, True, env=ENV, timeout=150) == by_hand
    assert by_hand[0][0] != by_hand[2][0]  # the data ranks see other samples
    assert by_hand[0][0][0] > 0
    assert by_hand[0] == by_hand[1]  # tensor ranks share a loss and a norm
