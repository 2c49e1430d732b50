"""Send the weights of a sharded trainer to an inference engine, as often as they change.

    python docs/examples/weight_sync.py

It starts two trainer ranks under FSDP2 and one process that stands for the inference engine: on GPUs with NCCL where
there are enough (three, or two for a single trainer rank), else on the CPU with gloo. There are two process groups that
know nothing of each other: the trainer's default group, and one of trainer rank 0 and the engine, made without a
default group, as vLLM makes its own for a weight transfer. A request with names, dtypes and shapes goes first, then one
broadcast for each tensor, as SGLang's ``update_weights_from_distributed`` has it. After each sync the engine compares
every byte with a checkpoint that `save_full` wrote. The second sync follows a training step, and sends only what the
step has changed: neither the frozen embedding, nor what rounds to the same bf16 numbers as before.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # optimizers import it; once a process group exists, that can abort torch 2.13 at exit
import torch.distributed as dist
import torch.multiprocessing as mp
from ds_fragment import WeightInfo, WeightSource, attach, save_full
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

HOST, LIMIT = "127.0.0.1", timedelta(seconds=120)
SYNCS = ("everything", "what a step has changed")


class Decoder(nn.Module):
    """A small language model with a frozen embedding."""

    def __init__(self, width: int = 256, layers: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(4096, width).requires_grad_(False)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True) for _ in range(layers)
        )
        self.head = nn.Linear(width, 4096, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits, (batch, length, 4096), of tokens, (batch, length)."""
        hidden = self.embed(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        logits: torch.Tensor = self.head(hidden)
        return logits


def sync_group(store: dist.Store, rank: int, device: torch.device) -> Any:
    """The group of trainer rank 0 (rank 0 here) and the engine (rank 1), beside whatever default group there is."""
    store = dist.PrefixStore("weight_sync", store)
    if device.type == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = LIMIT
        return dist.ProcessGroupNCCL(store, rank, 2, options)
    return dist.ProcessGroupGloo(store, rank, 2, LIMIT)


# The trainer's side.


def send(source: WeightSource, infos: Sequence[WeightInfo], group: Any, store: dist.Store, sync: int) -> None:
    """One update of the engine. All trainer ranks call it; rank 0 sends, the others bring their shards."""
    if dist.get_rank() == 0:
        request = {
            "names": [info.name for info in infos],
            "dtypes": [info.dtype_name for info in infos],
            "shapes": [list(info.shape) for info in infos],
        }
        store.set(f"request/{sync}", json.dumps(request))  # a server is asked over HTTP
    with contextlib.closing(iter(source)) as weights:
        for _, tensor in weights:
            group.broadcast(tensor.contiguous(), 0).wait()


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """One step on random tokens."""
    tokens = torch.randint(4096, (2, 16), generator=torch.Generator().manual_seed(dist.get_rank())).to(device)
    model(tokens).float().logsumexp(-1).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def timed(bring: Callable[[], Iterable[Any]], device: torch.device) -> float:
    """The least seconds of three times, by all ranks together; nothing is kept."""
    found = []
    for _ in range(4):  # the first is to warm up
        dist.barrier()
        begin = time.perf_counter()
        for _ in bring():
            pass
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        dist.barrier()
        found.append(time.perf_counter() - begin)
    return min(found[1:])


def compare(model: nn.Module, device: torch.device) -> None:
    """Print what it takes to have the bf16 weights on rank 0, beside a `full_tensor()` for each parameter."""
    infos = WeightSource(model).metadata()
    source = timed(lambda: WeightSource(model), device)
    full = timed(lambda: (param.full_tensor().bfloat16() for param in model.parameters()), device)  # type: ignore[attr-defined]
    lp_bytes = sum(info.nbytes for info in infos)
    if dist.get_rank() == 0:
        print(f"gathered by WeightSource:       {1e3 * source:6.1f} ms, {lp_bytes / 1e6:.1f} MB, on rank 0")
        print(f"gathered by full_tensor() each: {1e3 * full:6.1f} ms, {2 * lp_bytes / 1e6:.1f} MB, on every rank")


def trainer(rank: int, ranks: int, device: torch.device, store: dist.Store, folder: str) -> None:
    """A rank of the trainer."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=dist.PrefixStore("trainer", store), rank=rank, world_size=ranks, timeout=LIMIT
    )
    torch.manual_seed(0)
    model = Decoder().to(device)
    mesh, policy = init_device_mesh(device.type, (ranks,)), MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=1e-3)
    attach(model, optimizer)

    group = sync_group(store, 0, device) if rank == 0 else None
    source = WeightSource(model, changed_only=True)  # bf16, as the model computes; rank 0 receives
    for sync in range(len(SYNCS)):
        if sync:
            train_step(model, optimizer, device)
        save_full(model, Path(folder, f"{sync}.safetensors"), dtype=torch.bfloat16)
        send(source, source.changed(), group, store, sync)
    compare(model, device)
    dist.destroy_process_group()


# The engine's side.


def receive(group: Any, store: dist.Store, sync: int, device: torch.device) -> dict[str, torch.Tensor]:
    """The weights of one update."""
    store.wait([f"request/{sync}"], LIMIT)
    request = json.loads(store.get(f"request/{sync}"))
    found = {}
    for name, dtype, shape in zip(request["names"], request["dtypes"], request["shapes"], strict=True):
        found[name] = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
        group.broadcast(found[name], 0).wait()
    return found


def engine(device: torch.device, store: dist.Store, folder: str) -> None:
    """The process that the weights are for. It has no default group."""
    group = sync_group(store, 1, device)
    weights: dict[str, torch.Tensor] = {}
    for sync, words in enumerate(SYNCS):
        begin = time.perf_counter()
        found = receive(group, store, sync, device)
        seconds, nbytes = time.perf_counter() - begin, sum(tensor.nbytes for tensor in found.values())
        weights.update(found)
        right = load_file(Path(folder, f"{sync}.safetensors"))
        if set(weights) != set(right):
            raise RuntimeError(f"the engine has {sorted(weights)}, and the checkpoint {sorted(right)}")
        for name, tensor in right.items():
            if not torch.equal(weights[name].cpu().view(torch.int16), tensor.view(torch.int16)):
                raise RuntimeError(f"'{name}' is not what the checkpoint has")
        print(
            f"sync {sync + 1}, {words}: {len(found)} tensors, {nbytes / 1e6:.1f} MB, {1e3 * seconds:.0f} ms with the "
            f"wait; all {len(right)} are byte for byte those of the checkpoint",
            flush=True,
        )


def process(rank: int, ranks: int, on_gpu: bool, port: int, folder: str) -> None:
    """One of the processes: the trainer's ranks, and the engine after them."""
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    store = dist.TCPStore(HOST, port, is_master=False, timeout=LIMIT)
    if rank < ranks:
        trainer(rank, ranks, device, store, folder)
    else:
        engine(device, store, folder)


def main() -> None:
    """Start the processes, and the store that all of them meet in."""
    gpus = torch.cuda.device_count()
    ranks = min(2, gpus - 1) if gpus > 1 else 2
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    store = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(process, (ranks, gpus > 1, store.port, folder), nprocs=ranks + 1)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
