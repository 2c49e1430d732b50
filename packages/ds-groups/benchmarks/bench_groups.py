"""What rank tables and process groups cost on the host, beside Megatron, torch and DeepSpeed.

    python packages/ds-groups/benchmarks/bench_groups.py [--quick] [--json PATH]

Tables: one process, 131,072 ranks. Creation: PyTorch's fake process group at 64 and 512 ranks, where a group costs
nothing but the work of the host, and 4 gloo ranks. Everything by turns in one run; medians. Peers that are not
installed are left out and named.
"""

from __future__ import annotations

import os

os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", GLOO_SOCKET_IFNAME="lo", TORCH_CPP_LOG_LEVEL="ERROR")

import argparse
import contextlib
import json
import logging
import multiprocessing
import platform
import socket
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

WORLD = 131_072
SIZES = {"tp": 8, "cp": 2, "pp": 16, "ep": 8}
Ways = dict[str, Callable[[], object]]


def interleaved(ways: Ways, rounds: int) -> dict[str, float]:
    """Milliseconds of one call, the ways in turn; the median of the rounds after the first."""
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, call in ways.items():
            begun = time.perf_counter()
            call()
            if turn:
                samples[name].append((time.perf_counter() - begun) * 1e3)
    return {name: statistics.median(values) for name, values in samples.items()}


@contextlib.contextmanager
def quietly() -> Any:
    """Import peers without what they say about themselves."""
    logging.disable(logging.INFO)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def tables(rounds: int) -> dict[str, float]:
    """A rank's own groups along every axis, and whole expert tables, at 131,072 ranks."""
    from ds_groups import megatron

    rank = WORLD // 2 + 1
    axes = ("tp", "cp", "dp", "pp", "ep", "edp")
    ready = megatron(WORLD, **SIZES, etp=1)
    ways: Ways = {
        "ds-groups: make the plan": lambda: megatron(WORLD, **SIZES, etp=1),
        "ds-groups: own groups, 6 axes": lambda: [ready.ranks(axis, rank) for axis in axes],
        "ds-groups: whole table, ep": lambda: ready.table("ep"),
        "ds-groups: whole table, edp": lambda: ready.table("edp"),
    }
    with contextlib.suppress(ImportError), quietly():
        from megatron.core.hyper_comm_grid import HyperCommGrid
        from megatron.core.parallel_state import RankGenerator

        os.environ["WORLD_SIZE"] = str(WORLD)
        grid = HyperCommGrid(
            [1, SIZES["ep"], WORLD // SIZES["ep"] // SIZES["pp"], SIZES["pp"]], ["tp", "ep", "dp", "pp"]
        )
        generator = RankGenerator(
            tp=1, ep=SIZES["ep"], dp=WORLD // SIZES["ep"] // SIZES["pp"], pp=SIZES["pp"], cp=1, order="tp-cp-ep-dp-pp"
        )
        ways |= {
            "HyperCommGrid: whole table, ep": lambda: grid._gen_rank_enum(["ep"]),
            "HyperCommGrid: whole table, edp": lambda: grid._gen_rank_enum(["dp"]),
            "Megatron's RankGenerator: whole table, ep": lambda: generator.get_ranks("ep"),
        }
    with contextlib.suppress(ImportError), quietly():
        from deepspeed.utils.groups import _get_expert_parallel_ranks as theirs

        ways["DeepSpeed: expert tables"] = lambda: theirs(WORLD, 8, 8, 16)
    from ds_groups import _expert_tables
    from ds_groups.parallel_state import _get_expert_parallel_ranks as ours

    def layout() -> None:
        for axis in _expert_tables.folded(WORLD, 8, 16, data_before_expert=False):
            axis.ranks(rank)

    ways["parallel_state: layout and own ranks of expert groups"] = layout

    ways["parallel_state: expert tables"] = lambda: ours(WORLD, 8, 8, 16)
    found = interleaved(ways, rounds)
    os.environ.pop("WORLD_SIZE", None)
    return found


def fake_world(world: int) -> None:
    """Start PyTorch's fake process group: every collective returns at once."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", rank=1, world_size=world, store=FakeStore())


def creation(rounds: int) -> dict[str, Any]:
    """All groups of one plan, made and destroyed, over the fake process group."""
    import torch.distributed as dist
    from ds_groups import ParallelTopology
    from torch.distributed import distributed_c10d as c10d

    found: dict[str, Any] = {}
    calls = [0]
    real = c10d._new_process_group_helper

    def counted(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        return real(*arguments, **options)

    sizes = {"tp": 8, "cp": 2, "pp": 2, "ep": 8}
    axes = ("tp", "cp", "dp", "pp", "ep", "edp")
    for world in (64, 512):
        fake_world(world)
        plan = ParallelTopology(world, **sizes)

        def ours(plan: ParallelTopology = plan) -> None:
            with plan.bind() as groups:
                for axis in axes:
                    groups.group(axis)

        ways: Ways = {"ds-groups": ours}
        with contextlib.suppress(ImportError), quietly():
            from megatron.core.hyper_comm_grid import HyperCommGrid

            def theirs(world: int = world) -> None:
                dense = HyperCommGrid([8, 2, world // 32, 2], ["tp", "cp", "dp", "pp"])
                experts = HyperCommGrid([8, world // 16, 2], ["ep", "edp", "pp"])
                for grid, names in ((dense, ("tp", "cp", "dp", "pp")), (experts, ("ep", "edp"))):
                    for name in names:
                        grid.create_pg(name)
                for grid in (dense, experts):
                    for group in grid._pgs.values():
                        dist.destroy_process_group(group)

            os.environ["WORLD_SIZE"] = str(world)
            ways["HyperCommGrid"] = theirs
        found[f"{world} ranks, ms"] = interleaved(ways, rounds)
        c10d._new_process_group_helper = counted
        import ds_groups._c10d as own

        own._MAKE = counted
        for name, call in ways.items():
            calls[0] = 0
            call()
            found.setdefault(f"{world} ranks, calls of torch's constructor on one rank", {})[name] = calls[0]
        c10d._new_process_group_helper = own._MAKE = real
    os.environ.pop("WORLD_SIZE", None)
    return found


def modes(rounds: int) -> dict[str, float]:
    """Host time of asking for every group at 131,072 ranks, by mode, the groups themselves being fake."""
    import ds_groups._c10d as own
    from ds_groups import ParallelTopology, parallel_state

    fake_world(WORLD)
    plan = ParallelTopology(WORLD, **SIZES)
    real = own.mode_of

    def ask(mode: str) -> None:
        own.mode_of = lambda backend: mode
        with plan.bind() as groups:
            groups.create()

    def experts() -> None:
        parallel_state._create_expert_and_data_parallel(8, pp_size=16)
        parallel_state.destroy_groups()

    ways: Ways = {
        "mode members": lambda: ask("members"),
        "mode split": lambda: ask("split"),
        "parallel_state: expert groups": experts,
    }
    found = interleaved(ways, rounds)
    own.mode_of = real
    return found


def _gloo(rank: int, world: int, port: int, rounds: int, queue: Any) -> None:
    import torch
    import torch.distributed as dist
    from ds_groups import ParallelTopology

    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, world, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    rows = {"tp": [[0, 1], [2, 3]], "dp": [[0, 2], [1, 3]]}

    def with_torch() -> None:
        made = [dist.new_subgroups_by_enumeration(table)[0] for table in rows.values()]
        dist.barrier()
        for group in made:
            dist.destroy_process_group(group)

    def with_ours() -> None:
        with ParallelTopology(world, tp=2).bind() as groups:
            groups.create()
            dist.barrier()

    def unverified() -> None:
        with ParallelTopology(world, tp=2).bind() as groups:
            groups.create(verify=False)
            dist.barrier()

    def with_mesh() -> None:
        from torch.distributed.device_mesh import init_device_mesh

        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        dist.barrier()
        for group in mesh.get_all_groups():
            dist.destroy_process_group(group)

    ways: Ways = {
        "ds-groups: create()": with_ours,
        "ds-groups: create(verify=False)": unverified,
        "new_subgroups_by_enumeration": with_torch,
        "init_device_mesh": with_mesh,
    }
    found = interleaved(ways, rounds)
    if rank == 0:
        queue.put(found)
    dist.barrier()
    dist.destroy_process_group()


def gloo(rounds: int) -> dict[str, float]:
    """The groups of tp=2 and dp=2 on 4 gloo ranks of this machine, made and destroyed."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [context.Process(target=_gloo, args=(rank, 4, port, rounds, queue)) for rank in range(4)]
    for process in ranks:
        process.start()
    found: dict[str, float] = queue.get(timeout=120)
    for process in ranks:
        process.join(30)
    return found


def main() -> None:
    """Measure, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    rounds = 3 if options.quick else 15
    import torch

    missing = []
    for name in ("megatron.core", "deepspeed"):
        try:
            with quietly():
                __import__(name)
        except ImportError:
            missing.append(name)
    report = {
        "command": "python packages/ds-groups/benchmarks/bench_groups.py --json PATH",
        "unit": "ms, median",
        "rounds": rounds,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "not installed": missing,
        "tables at 131,072 ranks": tables(rounds),
        "host time at 131,072 ranks": modes(rounds),
        "creation": creation(rounds),
        "4 gloo ranks": gloo(rounds),
    }
    text = json.dumps(report, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
