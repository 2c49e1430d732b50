"""What one read of one parameter takes of the host: two ranks of a fake process group, which moves nothing.

    python packages/ds-fragment/benchmarks/bench_host.py --out docs/benchmarks/host_cpu.json

1,000 FSDP2 parameters of 24 x 16 are read one by one; printed are medians over the rounds, in microseconds a call,
beside the bare all-gather of the same shard into a fresh tensor.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ds_fragment
import torch
import torch.distributed as dist
from ds_fragment import tensor_fragment
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

COUNT = 1000


def main() -> None:
    """Measure, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    model = nn.ParameterList([nn.Parameter(torch.randn(24, 16)) for _ in range(COUNT)])
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    ds_fragment.attach(model, optimizer)
    params: list[Any] = list(model.parameters())
    for param in params:
        param.grad = param.detach().clone()
    optimizer.step()
    for param in params:
        param.grad = param.detach().clone()
    gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    calls: dict[str, Callable[[Any], object]] = {
        "bare all-gather": lambda param: gather(torch.empty(24, 16), param._local_tensor),
        "safe_get_full_fp32_param": tensor_fragment.safe_get_full_fp32_param,
        "safe_get_full_grad": tensor_fragment.safe_get_full_grad,
        "safe_get_full_optimizer_state": lambda param: tensor_fragment.safe_get_full_optimizer_state(param, "exp_avg"),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(options.rounds + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            for param in params:
                call(param)
            times[name].append((time.perf_counter() - begin) * 1e6 / COUNT)
    rows = [{"call": name, "median_us": round(statistics.median(spent[1:]), 1)} for name, spent in times.items()]
    for row in rows:
        print(f"{row['call']:32} {row['median_us']:6.1f} us")
    if options.out:
        about = {
            "command": "python " + shlex.join(sys.argv),
            "machine": f"{platform.machine()} CPU, one core",
            "torch": torch.__version__,
            "rounds": options.rounds,
        }
        options.out.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
