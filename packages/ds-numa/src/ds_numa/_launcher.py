"""Which local rank this process is, from the environment that its launcher set."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from ds_numa._launchers import LAUNCHERS, Launcher


class FoundRank(NamedTuple):
    """What is known of this process's place on its machine.

    Attributes:
        local_rank: the rank on this machine; None where nothing says it.
        num_local_procs: the number of ranks on this machine; None where nothing says it.
        launcher: who set what was read; None where no launcher was asked or found.
        problem: why one of the two is None, and what to do; None where both are known.
    """

    local_rank: int | None
    num_local_procs: int | None
    launcher: str | None = None
    problem: str | None = None


def find_rank(env: Mapping[str, str], local_rank: int | None, num_local_procs: int | None) -> FoundRank:
    """The local rank and the number of local ranks; what the caller gives wins over the environment.

    Without a launcher the process is rank 0 of 1. The environment never raises: what it leaves open or contradicts is
    named in `FoundRank.problem`.
    """
    if local_rank is not None and num_local_procs is not None:
        return FoundRank(local_rank, num_local_procs)
    for launcher, rank in _rows(env):
        size = local_size(env, launcher)
        if size is None:
            size = _size_of_another(env, launcher, rank)
        found = FoundRank(
            rank if local_rank is None else local_rank,
            size if num_local_procs is None else num_local_procs,
            launcher_name(env, launcher),
        )
        return found._replace(problem=_problem(env, launcher, found))
    started = [
        one for one in LAUNCHERS if not _is_batch(env, one) and (one.rank in env or (one.local_rank or "") in env)
    ]
    if not started and local_rank is None and num_local_procs in (None, 1):
        return FoundRank(0, 1)
    if not started:
        missing = "num_local_procs" if num_local_procs is None else "local_rank"
        problem = f"no launcher set a local rank (such as LOCAL_RANK), and {missing} was not given: pass both"
        return FoundRank(local_rank, num_local_procs, None, problem)
    if local_rank is None and num_local_procs in (None, 1) and _number(env, started[0].size) == 1:
        return FoundRank(0, 1)
    problem = (
        f"{_shown(env, started[0].rank, started[0].local_rank)} give no local rank: pass local_rank and num_local_procs"
    )
    return FoundRank(local_rank, num_local_procs, launcher_name(env, started[0]), problem)


def agreeing_launchers(env: Mapping[str, str], local_rank: int, num_local_procs: int) -> list[Launcher]:
    """The launchers whose variables say that this process is this rank of that many."""
    return [
        launcher
        for launcher, rank in _rows(env)
        if rank == local_rank
        and num_local_procs in (local_size(env, launcher), _size_of_another(env, launcher, rank) or 0)
    ]


def local_size(env: Mapping[str, str], launcher: Launcher) -> int | None:
    """The number of ranks on this machine that this launcher's own variables give; None where they give none."""
    ranks, nodes = _number(env, launcher.size), _number(env, launcher.nodes)
    node = _number(env, launcher.node)
    for name in (launcher.local_size, launcher.other_local_size):
        counts = _counts(env.get(name or "", ""))
        if len(set(counts)) == 1:
            node = 0
        if node is not None and node < len(counts) and (ranks is None or counts[node] <= ranks):  # or it is a leftover
            return counts[node]
    if ranks and nodes and ranks % nodes == 0:  # Flux names no local size; it deals tasks out evenly
        return ranks // nodes
    return 1 if ranks == 1 else None


def _rows(env: Mapping[str, str]) -> Iterator[tuple[Launcher, int]]:
    """The launchers that set a local rank, with it. A launcher that numbers the job differently was not the last."""
    outermost: dict[str, int] = {}
    for launcher in LAUNCHERS:
        if _is_batch(env, launcher):
            continue
        rank, local_rank = _number(env, launcher.rank), _number(env, launcher.local_rank)
        if local_rank is not None and (rank is None or rank == outermost.get("rank", rank)):
            yield launcher, local_rank
        if rank is not None:
            outermost.setdefault("rank", rank)


def _is_batch(env: Mapping[str, str], launcher: Launcher) -> bool:
    """Whether Slurm only started a batch script, whose task 0 has ranks too, and launched nothing.

    srun alone sets the variables of a step and ranks above 0.
    """
    ranks = (_number(env, launcher.rank), _number(env, launcher.local_rank))
    return launcher.name == "Slurm" and launcher.local_size not in env and not any(ranks)


def _size_of_another(env: Mapping[str, str], launcher: Launcher, rank: int) -> int | None:
    """The local size of a launcher around this one that numbers the ranks alike (``LOCAL_RANK=$SLURM_LOCALID``)."""
    size = _number(env, launcher.size)
    for other, other_rank in _rows(env):
        other_size = _number(env, other.size)
        if other is not launcher and other_rank == rank and (size is None or other_size in (None, size)):
            found = local_size(env, other)
            if found is not None:
                return found
    return None


def _problem(env: Mapping[str, str], launcher: Launcher, found: FoundRank) -> str | None:
    rank, ranks = found.local_rank, found.num_local_procs
    sizes = _shown(env, launcher.local_size, launcher.other_local_size, launcher.nodes)
    if ranks is None:
        # Lightning starts the other processes of a machine from the first, which has no rank until then.
        hint = ", after launch()" if found.launcher == "Lightning" else ""
        return f"{found.launcher} does not say how many ranks this machine has ({sizes}): pass num_local_procs{hint}"
    if rank is not None and rank >= ranks:
        return (
            f"local rank {rank} of {ranks} cannot be ({_shown(env, launcher.local_rank)}, {sizes}): "
            "pass local_rank and num_local_procs"
        )
    return None


def launcher_name(env: Mapping[str, str], launcher: Launcher) -> str:
    """The launcher's name in a message. Many set torchrun's variables; Lightning alone sets them without RANK."""
    if launcher.local_rank != "LOCAL_RANK":
        return launcher.name
    return "Lightning" if "NODE_RANK" in env and "RANK" not in env else "the launcher that set LOCAL_RANK"


def _shown(env: Mapping[str, str], *names: str | None) -> str:
    return ", ".join(f"{name} = {env[name]!r}" if name in env else f"{name} unset" for name in names if name)


def _number(env: Mapping[str, str], name: str | None) -> int | None:
    """The variable's value; None where it is unset or no number that a launcher writes."""
    text = env.get(name or "", "").strip()
    return int(text) if re.fullmatch(r"\d{1,7}", text, re.ASCII) else None


def _counts(text: str) -> list[int]:
    """Ranks on each machine, from Slurm's ``4(x2),3``; empty where the text says nothing readable.

    Source: sbatch(1), SLURM_TASKS_PER_NODE.
    """
    counts: list[int] = []
    for part in text.split(",") if text.strip() else ():
        match = re.fullmatch(r"\s*(\d{1,7})(?:\(x(\d{1,5})\))?\s*", part, re.ASCII)
        if not match or int(match[1]) < 1 or len(counts) > 1_000_000:  # more machines than any job has
            return []
        counts += [int(match[1])] * int(match[2] or 1)
    return counts
