"""Find the ranks of the jobs that run on this machine, by the variables that their launchers gave them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import psutil

from ds_numa._commands import is_python
from ds_numa._launcher import find_rank
from ds_numa.errors import RankError

_JOB_NAMES = ("MASTER_PORT", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "SLURM_STEP_ID", "PMIX_NAMESPACE")
_WRAPPER = 64 << 20  # bytes; a process that has imported torch has more


@dataclass(frozen=True)
class RankProcess:
    """One rank: of the processes that have its number, the first that is more than a wrapper (the others are workers).

    Attributes:
        pid: its process.
        local_rank: its rank on this machine.
        environ: the environment that it was started with.
        command: its command line.
        assumed: why it is taken for this rank, where no variable says so.
    """

    pid: int
    local_rank: int
    environ: Mapping[str, str] = field(repr=False)
    command: str
    assumed: str | None = None


@dataclass(frozen=True)
class Job:
    """The ranks that one launcher started on this machine.

    Attributes:
        launcher: the launcher's name in the table of launchers, or ``"none"``.
        launcher_pid: the process that started the ranks; None where it cannot be seen (containers).
        ranks: by local rank.
        size: how many ranks the launcher says that it started here; None where it does not say.
        command: what started the ranks, such as ``torchrun``; empty where it cannot be seen.
    """

    launcher: str
    launcher_pid: int | None
    ranks: tuple[RankProcess, ...]
    size: int | None = None
    command: str = ""

    @property
    def missing(self) -> tuple[int, ...]:
        """The local ranks that are not seen: they ended, or another user runs them."""
        found = {rank.local_rank for rank in self.ranks}
        return tuple(sorted(set(range(self.size or max(found, default=0) + 1)) - found))


@dataclass(frozen=True)
class _Seen:
    """A process that has a rank."""

    pid: int
    parent: int
    launcher: str
    local_rank: int
    size: int | None
    environ: Mapping[str, str]
    command: str
    memory: int


def find_jobs(pids: Sequence[int] = ()) -> list[Job]:
    """The jobs whose processes this user may look at, those with the most ranks first.

    Args:
        pids: only jobs in which one of these is a rank, a child of a rank, or the launcher; all jobs when empty. A
            process without any rank is taken for the only rank of a job of its own.

    Raises:
        RankError: there is no process of that number, or its environment may not be read.
    """
    seen = {process.pid: process for process in _ranked_processes()}
    groups: dict[tuple[str, int, tuple[str, ...]], dict[int, list[_Seen]]] = {}
    for process in seen.values():
        first = _first_of_rank(process, seen)
        # Ranks of several jobs may have one parent: a supervisor, or process 1 after their launchers have ended.
        names = tuple(first.environ.get(name, "") for name in _JOB_NAMES)
        key = (process.launcher, first.parent, names)
        groups.setdefault(key, {}).setdefault(process.local_rank, []).append(process)
    started = {launcher_pid for _, launcher_pid, _ in groups}
    jobs = []
    for (launcher, launcher_pid, _), by_rank in groups.items():
        members = {process.pid for found in by_rank.values() for process in found}
        if len(by_rank) == 1 and members & started:
            continue  # a launcher that another one started, such as torchrun under srun
        ranks = [_rank_process(_main_process(found)) for found in by_rank.values()]
        if 0 not in by_rank:
            ranks += _first_rank(launcher_pid)
        ranks.sort(key=lambda rank: rank.local_rank)
        size = next((process.size for found in by_rank.values() for process in found), None)
        job = Job(launcher, launcher_pid or None, tuple(ranks), size, _short_command(launcher_pid))
        if not pids or not members.isdisjoint(pids) or launcher_pid in pids:
            jobs.append(job)
    known = {process.pid for process in seen.values()} | {job.launcher_pid for job in jobs}
    jobs += [_single(pid) for pid in pids if pid not in known]
    return sorted(jobs, key=lambda job: (-len(job.ranks), job.launcher_pid or 0))


def _ranked_processes() -> Iterator[_Seen]:
    for process in psutil.process_iter():
        try:
            environ = process.environ()
            found = find_rank(environ, None, None)
            if found.launcher is None or found.local_rank is None:
                continue
            command, memory = " ".join(process.cmdline()) or process.name(), process.memory_info().rss
            size = found.num_local_procs
            yield _Seen(process.pid, process.ppid(), found.launcher, found.local_rank, size, environ, command, memory)
        except (psutil.Error, OSError):  # it ended, or it is another user's
            continue


def _main_process(found: Sequence[_Seen]) -> _Seen:
    """The process that trains: the first of its rank, or where that only started another one (a shell), that one.

    The one with the most memory would be a worker of a data loader.
    """
    below: dict[int, list[_Seen]] = {}
    for process in found:
        below.setdefault(process.parent, []).append(process)

    def most(process: _Seen) -> int:
        return max([process.memory, *map(most, below.get(process.pid, []))])

    pids = {process.pid for process in found}
    main = max((process for process in found if process.parent not in pids), key=most)
    while main.memory < _WRAPPER and below.get(main.pid) and most(main) > main.memory:
        main = max(below[main.pid], key=most)
    return main


def _first_of_rank(process: _Seen, seen: Mapping[int, _Seen]) -> _Seen:
    """The first process of this rank: its parent, which has another rank or none, is the launcher."""
    while True:
        parent = seen.get(process.parent)
        if parent is None or (parent.launcher, parent.local_rank) != (process.launcher, process.local_rank):
            return process
        process = parent


def _rank_process(process: _Seen) -> RankProcess:
    return RankProcess(process.pid, process.local_rank, process.environ, process.command)


def _first_rank(launcher_pid: int) -> list[RankProcess]:
    """Rank 0 where it started the others itself: Lightning sets its variables after it has started."""
    try:
        process = psutil.Process(launcher_pid)
        if "python" not in process.name() and "python" not in " ".join(process.cmdline()[:1]):
            return []
        command = " ".join(process.cmdline())
        why = "it started the other ranks and has no rank of its own"
        return [RankProcess(launcher_pid, 0, process.environ(), command, why)]
    except (psutil.Error, OSError):
        return []


def _short_command(pid: int) -> str:
    """The program that a process runs, without folders and arguments: ``torchrun``, ``mpirun``."""
    try:
        words = psutil.Process(pid).cmdline()
    except (psutil.Error, OSError, ValueError):
        return ""
    if words and is_python(words[0]):
        words = [word for word in words[1:] if not word.startswith("-")] or words
    return os.path.basename(words[0]) if words else ""


def _single(pid: int) -> Job:
    try:
        process = psutil.Process(pid)
        environ, command = process.environ(), " ".join(process.cmdline()) or process.name()
    except psutil.NoSuchProcess:
        raise RankError(f"--pid {pid}: there is no such process: take one from ps") from None
    except (psutil.Error, OSError) as error:
        raise RankError(f"--pid {pid}: its environment may not be read ({error}): run as its user") from None
    return Job("none", None, (RankProcess(pid, 0, environ, command, "no launcher gave it a rank"),), 1)
