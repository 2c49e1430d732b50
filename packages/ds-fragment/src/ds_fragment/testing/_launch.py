"""The suite on processes of its own: a cell that hangs is ended and recorded, and the next one begins anew.

[Note: conductor] The parent process sends each rank a cell and waits for all verdicts. If they do not come in time,
or the ranks may be out of step because one raised and another did not, it kills the ranks and starts fresh ones.
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
import warnings
from collections.abc import Callable, Iterable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ds_fragment.testing._cells import CELLS, Cell
from ds_fragment.testing._engine import Engine
from ds_fragment.testing._judge import Verdict, judge, together
from ds_fragment.testing._table import Record, Table

_START = 300.0  # seconds: DeepSpeed compiles an operator the first time


def conduct(
    source: str | os.PathLike[str],
    name: str,
    cells: Iterable[Cell] = CELLS,
    *,
    timeout: float = 30.0,
    report: Callable[[Record], None] | None = None,
) -> Table:
    """Try every cell of an engine in processes that this starts. Call it on one process that is no rank itself.

    Args:
        source: a Python file with a dict ``ENGINES`` of engines by name; each rank loads it.
        name: which of them.
        cells: which cells, in which order.
        timeout: seconds that a cell may take; what takes longer is a ``hang``.
        report: called with each record.

    Raises:
        RuntimeError: the ranks do not start.
    """
    engine, table = engines_of(source)[name], Table()
    ranks: _Ranks | None = None
    tried = 0  # since the ranks were started
    try:
        for cell in cells:
            if ranks is not None and tried == engine.cells_per_start:
                ranks.kill()
                ranks = None
            if ranks is None:
                ranks, tried = _Ranks(source, engine), 0
            tried += 1
            begin = time.monotonic()
            verdicts = ranks.judge(cell, timeout)
            verdict = together(verdicts)
            seconds = round(time.monotonic() - begin, 3)
            record = Record(engine.name, engine.layout, cell, verdict.result, verdict.detail, verdict.text, seconds)
            table.records.append(record)
            if report is not None:
                report(record)
            if len({one.result for one in verdicts}) > 1 or verdict.result in ("untyped", "hang"):
                ranks.kill()
                ranks = None
    finally:
        if ranks is not None:
            ranks.kill()
    return table


def engines_of(source: str | os.PathLike[str]) -> dict[str, Engine]:
    """The engines that a file defines."""
    path = Path(source).resolve()
    module_name = f"_conformance_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    spec.loader.exec_module(module)
    engines: dict[str, Engine] = module.ENGINES
    return engines


class _Ranks:
    """The processes of one world."""

    def __init__(self, source: str | os.PathLike[str], engine: Engine) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed"])
        self._folder = tempfile.TemporaryDirectory(prefix="conformance-")
        self._processes, self._pipes = [], []
        for rank in range(engine.world_size):
            ours, theirs = context.Pipe()
            arguments = (theirs, str(source), engine.name, rank, self._folder.name, dict(engine.env))
            process = context.Process(target=_serve, args=arguments, name=f"rank{rank}", daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        answers = self._answers(_START)
        problems = [answer for answer in answers if answer != "ready"]
        if problems:
            self.kill()
            raise RuntimeError(f"engine {engine.name} does not start: {problems[0]}")

    def judge(self, cell: Cell, timeout: float) -> list[Verdict]:
        """The verdict of each rank; a hang where none came."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send((cell, timeout))
        answers = self._answers(timeout)
        return [answer if isinstance(answer, Verdict) else Verdict("hang", str(answer)) for answer in answers]

    def _answers(self, timeout: float) -> list[Any]:
        deadline, answers = time.monotonic() + timeout, []
        for rank, pipe in enumerate(self._pipes):
            try:
                ready = pipe.poll(max(0.0, deadline - time.monotonic()))
                answers.append(pipe.recv() if ready else f"no answer in {timeout:g} s{self._where(rank)}")
            except (EOFError, OSError):
                self._processes[rank].join(2.0)
                answers.append(f"the process died, exit code {self._processes[rank].exitcode}")
        return answers

    def _where(self, rank: int) -> str:
        """The innermost lines of where a rank stands, as faulthandler left them."""
        path = Path(self._folder.name, f"stack-{rank}")
        lines = path.read_text().splitlines() if path.exists() else []
        main = [line.strip() for line in lines if "ds_fragment" in line and "testing" not in line][:2]
        return f", in {'; '.join(main)}" if main else ""

    def kill(self) -> None:
        """End all processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._folder.cleanup()


def _serve(pipe: Connection, source: str, name: str, rank: int, folder: str, env: dict[str, str]) -> None:
    """What a rank does: try cells until the parent is gone."""
    stack = open(Path(folder, f"stack-{rank}"), "w")  # noqa: SIM115  (lives as long as the process)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # engines talk much; what goes wrong is in the records
    try:
        os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo", **env})
        engine = _started(source, name, rank, folder)
        answer: Any = "ready"
    except BaseException:
        answer = traceback.format_exc()
    pipe.send(answer)
    with contextlib.suppress(EOFError, OSError):
        while answer == "ready":
            cell, timeout = pipe.recv()
            faulthandler.dump_traceback_later(max(1.0, timeout - 1.0), file=stack)
            verdict = judge(engine, cell)
            faulthandler.cancel_dump_traceback_later()
            pipe.send(verdict)
    os._exit(0)


def _started(source: str, name: str, rank: int, folder: str) -> Engine:
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import FileStore

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the engines' own, once for each cell
    engine = engines_of(source)[name]
    os.environ.update({"WORLD_SIZE": str(engine.world_size), "LOCAL_WORLD_SIZE": str(engine.world_size)})
    dist.init_process_group(
        "gloo",
        store=FileStore(str(Path(folder, "store")), engine.world_size),
        rank=rank,
        world_size=engine.world_size,
        timeout=timedelta(seconds=_START),
    )
    if engine.prepare is not None:
        engine.prepare()
    return engine
