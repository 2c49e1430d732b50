"""Materialize a model that was sharded by FSDP2 on meta: time and peak memory of each rank.

    python packages/ds-ondevice/benchmarks/fsdp2_meta.py [layers] [width]

It starts one rank a GPU through torchrun. It checks the shards of the first and last layer against eager construction
of the whole model from the same seed.
"""

import os
import sys
import time

import torch
import torch.distributed as dist
from ds_ondevice import OnDevice, materialize
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def build(layers: int, width: int) -> nn.Sequential:
    return nn.Sequential(*(nn.TransformerEncoderLayer(width, 16, 4 * width, batch_first=True) for _ in range(layers)))


def main() -> None:
    if not torch.cuda.is_available():
        print("fsdp2_meta.py measures GPUs, and there is none here")
        return
    if "LOCAL_RANK" not in os.environ:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={torch.cuda.device_count()}"]
        os.execv(sys.executable, [sys.executable, *launcher, *sys.argv])
    layers, width = (int(value) for value in (*sys.argv[1:], "8", "1024")[:2])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    mesh = init_device_mesh("cuda", (dist.get_world_size(),))
    start = time.perf_counter()
    with OnDevice(torch.bfloat16, device="meta"):
        model = build(layers, width)
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    built = time.perf_counter() - start
    torch.manual_seed(1)
    start = time.perf_counter()
    materialize(model, device)
    torch.cuda.synchronize()
    restored = time.perf_counter() - start
    peak, held = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    torch.manual_seed(1)
    with OnDevice(torch.bfloat16, device=device):
        eager = build(layers, width)
    for index in (0, layers - 1):
        for actual, expected in zip(model[index].parameters(), eager[index].parameters(), strict=True):
            assert torch.equal(actual.full_tensor(), expected)
    loss = model(torch.randn(2, 16, width, device=device, dtype=torch.bfloat16)).float().square().mean()
    loss.backward()
    if dist.get_rank() == 0:
        total = sum(p.numel() * p.element_size() for p in eager.parameters())
        print(f"model {total / 2**20:.0f} MiB; on meta {built:.2f} s; materialize {restored:.2f} s; ", end="")
        print(f"held {held / 2**20:.0f} MiB, peak {peak / 2**20:.0f} MiB")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
