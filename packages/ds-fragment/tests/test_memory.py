"""The memory that an exchange takes: two buckets."""

from __future__ import annotations

import gc
import time
import weakref
from typing import Any

import pytest
import torch
from ds_fragment import FlatPartition, iter_full
from ds_fragment.collective import exchange
from ranks import run_ranks
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SMALL = 4096  # bytes of a tensor that is not counted: statuses, and what else does not grow with the data


class Allocated(TorchDispatchMode):
    """How many bytes of new storages are alive, and the most that ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if torch.is_tensor(leaf):
                storage = leaf.untyped_storage()
                key = storage._cdata
                if key not in before and key not in self._seen and storage.nbytes() > SMALL:
                    self._seen.add(key)
                    self.alive += storage.nbytes()
                    self.peak = max(self.peak, self.alive)
                    weakref.finalize(storage, self._freed, key, storage.nbytes())
        return result

    def _freed(self, key: int, nbytes: int) -> None:
        self._seen.discard(key)
        self.alive -= nbytes


def wait_for_room(allocated: Allocated, most: float) -> None:
    """Start no bucket before there is room for it: gloo's threads let go of what was sent a moment after it arrived."""
    start = exchange._Gather.start

    def start_later(self: Any, bucket: Any) -> None:
        deadline = time.monotonic() + 3  # if this code holds it, there never will be
        size = sum(self.plan.shardings[item].nbytes for item in bucket.items)
        while allocated.alive + size > most and time.monotonic() < deadline:
            time.sleep(0.001)
        start(self, bucket)

    exchange._Gather.start = start_later  # type: ignore[method-assign]


def _peak(
    rank: int, sizes: list[int], bucket_bytes: int, fsdp: bool, most: float, dtype: torch.dtype | None = None
) -> tuple[int, int]:
    torch.manual_seed(0)
    model = nn.ParameterList(nn.Parameter(torch.randn(size // 64, 16)) for size in sizes)  # 4 bytes an element
    partition = None
    if fsdp:
        from torch.distributed.fsdp import fully_shard

        fully_shard(model)
    else:
        partition = FlatPartition(model.parameters())
    gc.disable()
    taken = 0
    with Allocated() as allocated:
        wait_for_room(allocated, most)
        for _, tensor in iter_full(model.named_parameters(), bucket_bytes=bucket_bytes, dtype=dtype):
            taken += tensor.nbytes
            del tensor
    assert partition is None or partition.rank == rank
    return allocated.peak, taken


@pytest.mark.parametrize("fsdp", [False, True], ids=["flat", "fsdp2"])
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("kind", ["packed", "in place", "mixed"])
def test_few_buckets_are_enough(world_size: int, fsdp: bool, kind: str) -> None:
    small, large = [32 << 10] * 400, [1 << 20] * 20  # bytes of each parameter
    sizes = {"packed": small, "in place": large, "mixed": [*small[:80], *large[:8], *small[:80], *large[:8]]}[kind]
    bucket_bytes = 4 << 20
    most = 2.25 * bucket_bytes + (64 << 10)  # a quarter is one of the large parameters
    assert sum(sizes) > most, "else the test shows nothing"
    for peak, taken in run_ranks(_peak, world_size, sizes, bucket_bytes, fsdp, most):
        assert taken == sum(sizes)
        assert peak <= most, f"{peak / bucket_bytes:.2f} buckets"
        assert peak > bucket_bytes / 2, "the next bucket should be under way"


def test_what_is_cast_is_not_kept_as_it_was() -> None:
    size = 4 << 20
    most = 2 * size + (64 << 10)
    for peak, taken in run_ranks(_peak, 2, [size] * 6, size, True, most, torch.bfloat16):
        assert taken == 3 * size
        assert size < peak <= most, f"{peak / size:.2f} buckets: it is cast before it travels"
