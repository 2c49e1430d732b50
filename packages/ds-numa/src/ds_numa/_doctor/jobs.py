"""Find the ranks of the jobs that run on this machine, by the variables that their launchers gave them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import psutil

from ds_numa._launchers import LAUNCHERS
from ds_numa.errors import RankError


@dataclass(frozen=True)
class RankProcess:
    """One rank: of the processes that have its number, the one with the most memory (the others are its workers).

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
    """

    launcher: str
    launcher_pid: int | None
    ranks: tuple[RankProcess, ...]


@dataclass(frozen=True)
class _Seen:
    """A process that has a rank."""

    pid: int
    parent: int
    launcher: str
    local_rank: int
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
    groups: dict[tuple[str, int], dict[int, list[_Seen]]] = {}
    for process in seen.values():
        key = (process.launcher, _launcher_pid(process, seen))
        groups.setdefault(key, {}).setdefault(process.local_rank, []).append(process)
    started = {launcher_pid for _, launcher_pid in groups}
    jobs = []
    for (launcher, launcher_pid), by_rank in groups.items():
        members = {process.pid for found in by_rank.values() for process in found}
        if len(by_rank) == 1 and members & started:
            continue  # a launcher that another one started, such as torchrun under srun
        ranks = [_rank_process(max(found, key=lambda process: process.memory)) for found in by_rank.values()]
        if 0 not in by_rank:
            ranks += _first_rank(launcher_pid)
        ranks.sort(key=lambda rank: rank.local_rank)
        job = Job(launcher, launcher_pid or None, tuple(ranks))
        if not pids or not members.isdisjoint(pids) or launcher_pid in pids:
            jobs.append(job)
    known = {process.pid for process in seen.values()} | {job.launcher_pid for job in jobs}
    jobs += [_single(pid) for pid in pids if pid not in known]
    return sorted(jobs, key=lambda job: (-len(job.ranks), job.launcher_pid or 0))


def local_rank_of(environ: Mapping[str, str]) -> tuple[str, int] | None:
    """The launcher's name and the local rank that an environment tells; None where it tells none."""
    for launcher in LAUNCHERS:
        text = environ.get(launcher.local_rank or "", "")
        if text.isascii() and text.isdecimal():
            return launcher.name, int(text)
    return None


def _ranked_processes() -> Iterator[_Seen]:
    for process in psutil.process_iter():
        try:
            environ = process.environ()
            found = local_rank_of(environ)
            if found is None:
                continue
            command = " ".join(process.cmdline()) or process.name()
            yield _Seen(process.pid, process.ppid(), *found, environ, command, process.memory_info().rss)
        except (psutil.Error, OSError):  # it ended, or it is another user's
            continue


def _launcher_pid(process: _Seen, seen: Mapping[int, _Seen]) -> int:
    """The first ancestor that does not have this rank by this launcher; 0 where there is none to be seen."""
    parent = process.parent
    while parent in seen and (seen[parent].launcher, seen[parent].local_rank) == (process.launcher, process.local_rank):
        parent = seen[parent].parent
    return parent


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


def _single(pid: int) -> Job:
    try:
        process = psutil.Process(pid)
        environ, command = process.environ(), " ".join(process.cmdline()) or process.name()
    except psutil.NoSuchProcess:
        raise RankError(f"--pid {pid}: there is no such process: take one from ps") from None
    except (psutil.Error, OSError) as error:
        raise RankError(f"--pid {pid}: its environment may not be read ({error}): run as its user") from None
    return Job("none", None, (RankProcess(pid, 0, environ, command, "no launcher gave it a rank"),))
