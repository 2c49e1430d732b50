"""Run a function on several ranks, as the tests of every package do.

[Note: ranks] A *rank* here is a process forked from one fork server that has torch imported already, so that a
test with four ranks starts in a fraction of a second. Ranks talk over gloo on the loopback address and meet in a
file, so that no port is ever taken twice. Every wait has a time-out: a hang fails in seconds, names its test and
shows where each rank stood.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib.util
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

DEFAULT_TIMEOUT = 60.0  # seconds, for the whole test


class RankError(AssertionError):
    """At least one rank failed; the message holds every rank's traceback."""


def run_ranks(
    fn: Callable[..., Any],
    world_size: int = 2,
    *args: Any,
    timeout: float = DEFAULT_TIMEOUT,
    env: dict[str, str] | None = None,
    init: bool = True,
    killed: tuple[int, ...] = (),
) -> list[Any]:
    """Call ``fn(rank, *args)`` on ``world_size`` processes and return what each returned, by rank.

    Args:
        fn: a function at the top level of a test module; its module is loaded again, by path, in each rank.
        world_size: how many processes.
        args: more arguments, picklable.
        timeout: seconds until every rank must have answered; collectives time out at half of it.
        env: environment variables set in every rank before anything else.
        init: make the default gloo process group first and destroy it afterwards.
        killed: ranks that the test kills on purpose: they need not answer, and return None.

    Raises:
        RankError: a rank raised, died or did not answer in time.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "torch", "torch.distributed"])  # ignored where there is no torch
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        processes, pipes = [], []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            job = (str(_source_of(fn)), fn.__qualname__, rank, world_size, args, timeout, dict(env or {}), init, folder)
            process = context.Process(target=_rank_main, args=(sender, *job), name=f"rank{rank}", daemon=True)
            process.start()
            sender.close()
            processes.append(process)
            pipes.append(receiver)
        try:
            answers = _collect(pipes, time.monotonic() + timeout)
        finally:
            for process in processes:
                if process.is_alive():
                    process.join(timeout=2.0)
                if process.is_alive():
                    process.kill()
                process.join()
        problems = []
        for rank in range(world_size):
            answer = answers.get(rank)
            if answer is None and rank in killed:
                continue
            if answer is None:
                stack = Path(folder, f"stack-{rank}")
                where = stack.read_text() if stack.exists() else ""
                code = processes[rank].exitcode
                problems.append(f"rank {rank}: no answer within {timeout} s (exit code {code})\n{where}")
            elif not answer[0]:
                problems.append(f"rank {rank}:\n{answer[1]}")
        if problems:
            raise RankError(f"{fn.__qualname__} on {world_size} ranks failed\n" + "\n".join(problems))
        return [answers[rank][1] if rank in answers else None for rank in range(world_size)]


def _source_of(fn: Callable[..., Any]) -> Path:
    return Path(fn.__code__.co_filename).resolve()


def _collect(pipes: list[Connection], deadline: float) -> dict[int, tuple[bool, Any]]:
    answers: dict[int, tuple[bool, Any]] = {}
    pending = dict(enumerate(pipes))
    while pending:
        ready = wait(list(pending.values()), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for rank in [rank for rank, pipe in pending.items() if pipe in ready]:
            with contextlib.suppress(EOFError):
                answers[rank] = pending[rank].recv()
            del pending[rank]
        if any(not ok for ok, _ in answers.values()):
            # One rank failed: the others may wait for it for ever. Give them a moment to say what they saw.
            deadline = min(deadline, time.monotonic() + 5.0)
    return answers


def _rank_main(
    pipe: Connection,
    source: str,
    qualname: str,
    rank: int,
    world_size: int,
    args: tuple[Any, ...],
    timeout: float,
    env: dict[str, str],
    init: bool,
    folder: str,
) -> None:
    stack = open(Path(folder, f"stack-{rank}"), "w")  # noqa: SIM115  (lives as long as the process)
    faulthandler.dump_traceback_later(max(1.0, timeout - 2.0), file=stack)
    os.environ.update(
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            **env,
        }
    )
    try:
        if init:
            _init_process_group(rank, world_size, timeout, folder)
        result = _load(source, qualname)(rank, *args)
        if init:
            import torch.distributed as dist

            if dist.is_initialized():
                dist.destroy_process_group()
        answer = (True, result)
    except BaseException:
        answer = (False, traceback.format_exc())
    try:
        pipe.send(answer)
    except Exception:
        pipe.send((False, f"the result cannot be pickled\n{traceback.format_exc()}"))
    pipe.close()
    faulthandler.cancel_dump_traceback_later()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if answer[0] else 1)


def _init_process_group(rank: int, world_size: int, timeout: float, folder: str) -> None:
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    store, limit = dist.FileStore(str(Path(folder, "store")), world_size), timedelta(seconds=timeout / 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=limit)
    # A rank that has connected may be done, and gone, before another one has.
    store.set(f"connected/{rank}", "")
    store.wait([f"connected/{other}" for other in range(world_size)], limit)


def _load(source: str, qualname: str) -> Callable[..., Any]:
    name = f"_ranks_{Path(source).stem}"
    spec = importlib.util.spec_from_file_location(name, source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(Path(source).parent))
    spec.loader.exec_module(module)
    found: Any = module
    for part in qualname.split("."):
        found = getattr(found, part)
    return getattr(found, "__wrapped__", found)
