"""One rank of a training run with DeepSpeed's own utility modules, or with ours under it; `test_dropin` starts two.

The program's argument is JSON with the fields of `Arguments`. Rank 0 appends one JSON line a scenario to ``out``, so
that what ran before a hang is known. Each scenario is named on stderr before it starts; one that takes too long shows
where its rank stood and ends the process.
"""

from __future__ import annotations

import faulthandler
import importlib
import inspect
import json
import os
import sys
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "deepspeed")]  # `engines` is the other folder's


@dataclass(frozen=True)
class Arguments:
    """What the program is told.

    Attributes:
        mode: ``"own"`` or ``"ours"``.
        out: the file of results.
        store: the file that ranks meet in; ``.again`` is appended for the second world.
        saves: where checkpoints are written.
        loads: where the other mode wrote its own, or None.
        only: the beginning of the names of the scenarios that are run; None is all.
        start: seconds until the first scenario.
        limit: seconds that one scenario may take.
    """

    mode: str
    out: str
    store: str
    saves: str
    loads: str | None
    only: tuple[str, ...] | None
    start: float
    limit: float


def replace_modules() -> None:
    """Put ours under DeepSpeed, and check that DeepSpeed has no other."""
    import ds_train_utils
    from ds_train_utils._exports import MODULES

    ds_train_utils.install()
    import deepspeed

    for name, home in MODULES.items():
        if name != "dataloader":  # DeepSpeed keeps its own
            theirs = importlib.import_module(f"deepspeed.utils.{name}")
            assert theirs is sys.modules[f"deepspeed.utils.{name}"] is importlib.import_module(home), name
    ours = [name for name in dir(deepspeed.utils) if name in ds_train_utils.__all__ and name != "RepeatingLoader"]
    strange = [name for name in ours if getattr(deepspeed.utils, name) is not getattr(ds_train_utils, name)]
    assert len(ours) > 40, ours
    assert not strange, strange
    assert (
        sys.modules["deepspeed.comm.comm"].comms_logger.__class__ is importlib.import_module("ds_logging").CommsLogger
    )


def refuse_ours() -> None:
    """See that nothing of ours is loaded with DeepSpeed's own modules, be it by a checkpoint that names it."""
    for name in ("ds_logging", "ds_groups", "ds_ondevice", "ds_fragment", "ds_z3leaf", "ds_loader", "ds_numa"):
        sys.modules[name] = None  # type: ignore[assignment]  # importing it raises


def meet(store: str, limit: float) -> None:
    """Make the world of both ranks, for torch and for DeepSpeed."""
    import deepspeed
    import torch.distributed as dist

    world = int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world),
        rank=int(os.environ["RANK"]),
        world_size=world,
        timeout=timedelta(seconds=limit * 0.75),
    )
    deepspeed.init_distributed(dist_backend="gloo", verbose=False, auto_mpi_discovery=False)


def part() -> None:
    """Leave the world and come back to a new one."""
    import deepspeed

    if "_release_process_group_references" not in inspect.getsource(deepspeed.comm.destroy_process_group):
        from scenarios import Skip

        raise Skip("DeepSpeed keeps groups of a world that was destroyed, and cannot use another")
    deepspeed.comm.destroy_process_group()


def main() -> None:
    """Run the scenarios."""
    arguments = Arguments(**json.loads(sys.argv[1]))
    print("starting", file=sys.stderr, flush=True)
    faulthandler.dump_traceback_later(arguments.start, exit=True)
    if arguments.mode == "ours":
        replace_modules()
    else:
        refuse_ours()
    import torch
    import torch.distributed as dist
    from engines import Case
    from observe import READ
    from scenarios import SCENARIOS, Run, Skip, train_case

    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.FileStore(f"{arguments.store}.results", world)
    meet(arguments.store, arguments.limit)
    run = Run(arguments.mode, Path(arguments.saves), Path(arguments.loads) if arguments.loads else None)

    def again(run: Run) -> dict[str, Any]:
        part()
        meet(f"{arguments.store}.again", arguments.limit)
        return {stage: train_case(run, Case(stage, "bf16"), READ) for stage in ("zero1", "zero3")}

    for name, function in {**SCENARIOS, "again": again}.items():
        if arguments.only is not None and not name.startswith(tuple(arguments.only)):
            continue
        print(f"scenario {name}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback_later(arguments.limit, exit=True)
        began = time.perf_counter()
        try:
            result = {"result": function(run)}
        except Skip as reason:
            result = {"skipped": str(reason)}
        except Exception:
            traceback.print_exc()
            result = {"raised": traceback.format_exc()}
        store.set(f"{name} {rank}", json.dumps(result))
        everywhere = [json.loads(store.get(f"{name} {other}")) for other in range(world)]
        raised = [one["raised"] for one in everywhere if "raised" in one]
        if rank == 0:
            line = {"name": name, "seconds": time.perf_counter() - began, **result}
            with open(arguments.out, "a") as file:
                file.write(json.dumps({**line, "raised": raised} if raised else line) + "\n")
        if 0 < len(raised) < world:
            break  # one rank alone: what the ranks send each other from here on does not fit together
    faulthandler.cancel_dump_traceback_later()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # nothing to wait for in threads of gloo and DeepSpeed


if __name__ == "__main__":
    main()
