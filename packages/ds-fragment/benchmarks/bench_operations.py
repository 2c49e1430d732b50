"""Write, change, measure and send a sharded model: ds-fragment beside what users do today.

    python packages/ds-fragment/benchmarks/bench_operations.py --out docs/benchmarks/operations_cpu.json
    python packages/ds-fragment/benchmarks/bench_operations.py --cases llama small --out ...

It starts its own ranks (2, or --ranks) through torchrun, on GPUs where there are some, and measures as bench_exchange
does: all contestants in turn, the second of two calls counts, medians of the slowest rank. DeepSpeed takes part where
it is installed. Each row names its peer, and the ratio to it.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ds_fragment
import torch
import torch._dynamo  # torch 2.13 may abort at exit if the first optimizer, which imports it, is made after the group
import torch.distributed as dist
from _shapes import shapes_of
from bench_exchange import Bag, measure, write_figures
from ds_fragment import tensor_fragment
from torch import nn

Call = Callable[[], Any]
Rows = dict[str, dict[str, Call]]  # by operation, the contestants; the first is the peer


def fsdp2(case: str, device: torch.device) -> Rows:
    """FSDP2 in fp32, after a step and a backward pass."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.fsdp import fully_shard

    model = Bag(shapes_of(case), device)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters())
    ds_fragment.attach(model, optimizer)
    for _ in range(2):
        model(torch.full((), 1e-3, device=device)).backward()
        if not optimizer.state:
            optimizer.step()
    params: list[Any] = list(model.parameters())
    values = {name: param.full_tensor().detach() for name, param in model.named_parameters()}
    named = dict(model.named_parameters())
    pairs = [(named[name], value) for name, value in values.items()]
    few = pairs[:100]
    full = StateDictOptions(full_state_dict=True)

    def clamp_by_hand() -> None:
        with torch.no_grad():
            torch._foreach_clamp_max_([param._local_tensor for param in params], 3.0)

    def norms_by_hand() -> list[float]:
        squares = torch.stack(torch._foreach_norm([param._local_tensor for param in params])).square()
        dist.all_reduce(squares)
        found: list[float] = squares.sqrt().tolist()
        return found

    def total_by_hand() -> float:
        norms = [nn.utils.get_total_norm([param.grad for param in params])]
        return float(norms[0].full_tensor())  # type: ignore[operator]

    return {
        "write all": {
            "set_model_state_dict": lambda: set_model_state_dict(model, dict(values), options=full),
            "ds-fragment, set_many": lambda: ds_fragment.set_many(pairs),
            "ds-fragment, set_many by name from a generator": lambda: ds_fragment.set_many(
                ((name, value) for name, value in values.items()), model=model
            ),
        },
        "write 100 one by one": {
            "set_model_state_dict, all at once": lambda: set_model_state_dict(model, dict(values), options=full),
            "ds-fragment, safe_set_full_fp32_param": lambda: [
                tensor_fragment.safe_set_full_fp32_param(param, value) for param, value in few
            ],
        },
        "clamp all": {
            "torch._foreach_clamp_max_ of the shards": clamp_by_hand,
            "ds-fragment, map_shards": lambda: ds_fragment.map_shards(params, lambda _, shard: shard.clamp_(max=3.0)),
            "ds-fragment, update_many": lambda: ds_fragment.update_many(params, lambda _, whole: whole.clamp_(max=3.0)),
        },
        "norm of each": {
            "torch._foreach_norm and one all-reduce": norms_by_hand,
            "ds-fragment, norms": lambda: ds_fragment.norms(params),
        },
        "total norm of gradients": {
            "torch.nn.utils.get_total_norm": total_by_hand,
            "ds-fragment, total_norm": lambda: ds_fragment.total_norm(params, "grad"),
        },
        "send bf16 weights": {
            "full_tensor() loop": lambda: [param.full_tensor().bfloat16() for param in params],
            "cast, then full_tensor() loop": lambda: [param.detach().bfloat16().full_tensor() for param in params],
            "ds-fragment, iter_full(dtype=bf16)": lambda: [
                None for _ in ds_fragment.iter_full(model, dtype=torch.bfloat16)
            ],
            "ds-fragment, WeightSource": lambda: [
                None for _ in ds_fragment.WeightSource(model, what="value", dtype=torch.bfloat16)
            ],
        },
    }


def deepspeed(stage: int, case: str, device: torch.device) -> Rows:
    """ZeRO in bf16: writes by DeepSpeed's own functions, which check nothing, and by those of the same names here."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

    model = Bag(shapes_of(case), device, torch.bfloat16)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config)
    ds_fragment.attach(engine)
    params = list(model.parameters())
    pairs = [(param, safe_get_full_fp32_param(param)) for param in params[:100]]
    return {
        f"write 100 one by one, ZeRO-{stage}": {
            "DeepSpeed, safe_set_full_fp32_param": lambda: [safe_set_full_fp32_param(p, v) for p, v in pairs],
            "ds-fragment, safe_set_full_fp32_param": lambda: [
                tensor_fragment.safe_set_full_fp32_param(p, v) for p, v in pairs
            ],
            "ds-fragment, set_many": lambda: ds_fragment.set_many(pairs),
        }
    }


def run(options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """All rows of the table."""
    rows = []
    has_deepspeed = importlib.util.find_spec("deepspeed") is not None
    for case in options.cases:
        for stage in (0, 1, 3) if has_deepspeed else (0,):
            operations = deepspeed(stage, case, device) if stage else fsdp2(case, device)
            times: dict[tuple[str, str], list[float]] = {}
            for number in range(options.rounds + 1):
                for operation, contestants in operations.items():
                    for name, call in contestants.items():
                        spent = measure(call, device)
                        if number:
                            times.setdefault((operation, name), []).append(spent)
            for operation, contestants in operations.items():
                medians = {name: statistics.median(times[operation, name]) for name in contestants}
                peer = next(iter(medians))
                for name, median in medians.items():
                    row = {"case": case, "quantity": operation, "contestant": name, "median_ms": round(median, 3)}
                    rows.append({**row, "to_fastest_peer": round(median / medians[peer], 3)})
            del operations
            gc.collect()
    return rows


def main() -> None:
    """Start the ranks, or be one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cases", nargs="+", default=["mixed"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--ranks", type=int)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    gpus = torch.cuda.device_count()
    if "LOCAL_RANK" not in os.environ:
        environment = {"OMP_NUM_THREADS": "1", "LOCAL_SIZE": "0", **({} if gpus else {"DS_ACCELERATOR": "cpu"})}
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.ranks or gpus or 2}"]
        os.execve(sys.executable, [sys.executable, *launcher, *sys.argv], {**environment, **os.environ})
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpus else "gloo")
    rows = run(options, device)
    if dist.get_rank() == 0:
        for row in rows:
            print(f"{row['case']:6} {row['quantity']:32} {row['contestant']:48}", end="")
            print(f"{row['median_ms']:9.2f} ms  {row['to_fastest_peer']:6.2f} x peer")
        if options.out:
            write_figures(options.out, rows, options.rounds)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
