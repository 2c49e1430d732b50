"""Cores and CPUs that are set aside before the rest is dealt out, and what is dealt out where cores are few."""

from __future__ import annotations

from collections.abc import Sequence

from ds_numa._planning.layout import Core
from ds_numa._ranges import format_ranges
from ds_numa._words import count
from ds_numa.errors import NotEnoughCoresError, PlanError


def keep_free(cores: Sequence[Core], reserve: int, needed: int, notes: list[str]) -> list[Core]:
    """The cores but for `reserve` of them: the lowest of each node in turn.

    Raises:
        NotEnoughCoresError: there are `needed` cores, but without the reserve there would not be; or nothing is left.
        PlanError: `reserve` is no number of cores.
    """
    if isinstance(reserve, bool) or not isinstance(reserve, int) or reserve < 0:
        raise PlanError(f"reserve = {reserve!r} must be a number of physical cores, 0 or more")
    if reserve == 0:
        return list(cores)
    left = len(cores) - reserve
    if left < 1 or left < needed <= len(cores):
        raise NotEnoughCoresError(
            f"reserve = {reserve} leaves {max(left, 0)} of {count(len(cores), 'usable core')}, but "
            f"{needed} must be left: reserve fewer cores or start fewer ranks"
        )
    blocks: dict[int | None, list[Core]] = {}
    for core in cores:
        blocks.setdefault(core.node, []).append(core)
    turns = sorted(
        (turn, -1 if node is None else node, core.number)
        for node, block in blocks.items()
        for turn, core in enumerate(block)
    )
    free = {number for _, _, number in turns[:reserve]}
    cpus = [cpu for core in cores if core.number in free for cpu in core.cpus]
    notes.append(f"{count(reserve, 'core')} of reserve={reserve} stay free: CPUs {format_ranges(cpus)}")
    return [core for core in cores if core.number not in free]


def split_siblings(cores: list[Core], ranks: int, smt: bool, notes: list[str]) -> list[Core]:
    """The cores, or their CPUs one by one where there are more ranks than cores.

    Raises:
        NotEnoughCoresError: there are more ranks than either.
    """
    if len(cores) >= ranks:
        return cores
    cpus = [cpu for core in cores for cpu in core.cpus]
    if smt and len(cpus) >= ranks:
        notes.append(f"{count(ranks, 'rank')} share {count(len(cores), 'core')}: sibling CPUs are dealt out one by one")
        return [core._replace(cpus=(cpu,)) for core in cores for cpu in core.cpus]
    usable = cpus if smt else [core.cpus[0] for core in cores]
    raise NotEnoughCoresError(
        f"num_local_procs = {ranks} ranks need {ranks} CPUs, but {len(usable)} may be used ({format_ranges(usable)}): "
        "start fewer ranks or allow more CPUs"
    )


def one_cpu_each(cores: Sequence[Core], notes: list[str]) -> list[Core]:
    """Each core with the lowest of its CPUs only."""
    siblings = [cpu for core in cores for cpu in core.cpus[1:]]
    if siblings:
        notes.append(f"one CPU of each core is used: the sibling CPUs {format_ranges(siblings)} stay idle")
    return [core._replace(cpus=core.cpus[:1]) for core in cores]
