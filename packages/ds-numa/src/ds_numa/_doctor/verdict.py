"""Compare where the ranks of a job sit with where a plan would put them. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

from ds_numa._doctor.binder import bound_by
from ds_numa._doctor.devices import far_cards, near_cards, same_socket
from ds_numa._doctor.examine import Placement
from ds_numa._doctor.jobs import Job
from ds_numa._ranges import format_ranges
from ds_numa.errors import NumaError
from ds_numa.plan import Mode, Plan, plan_binding
from ds_numa.topology import Topology

_MOST_MISSING = 64  # verdicts; a size that a launcher left behind may be any number
_FAR_SHARE, _FAR_BYTES = 0.1, 64 << 20  # less memory than this on other nodes is not worth a word


@dataclass(frozen=True)
class Verdict:
    """What there is to say of one rank.

    Attributes:
        local_rank: its rank on this machine.
        pid: its process; None where none is seen.
        off: what is wrong; empty where the rank sits well.
        how: in which way it sits well, or where the plan would put it.
        notes: what else a reader should know.
        cpus: the CPUs that it may use.
        planned: the CPUs that the plan gives it; empty without a plan.
        gpu: PCI address of its GPU, or None.
        memory: bytes by node, without mapped files; None where the kernel does not show it.
        policy: the memory policy of most of it, or None.
        bound_by: who bound it, as far as that can be told; empty where nobody did.
        cards: the network cards nearest to its GPU, or to its CPUs where it has none.
    """

    local_rank: int
    pid: int | None
    off: tuple[str, ...]
    how: str
    notes: tuple[str, ...]
    cpus: tuple[int, ...]
    planned: tuple[int, ...]
    gpu: str | None
    memory: Mapping[int, int] | None
    policy: str | None
    bound_by: str = ""
    cards: str = ""

    def __str__(self) -> str:
        state = f"OFF: {'; '.join(self.off)}" if self.off else "ok"
        who = f"rank {self.local_rank}" + ("" if self.pid is None else f" (process {self.pid})")
        parts = ["; ".join(filter(None, (f"{who}: {state}", self.how, self.bound_by)))]
        if self.memory:
            total = sum(self.memory.values()) or 1
            shares = [f"{100 * size / total:.0f} % on node {node}" for node, size in sorted(self.memory.items())]
            parts.append(f"memory: {total / 2**30:.2f} GiB, {', '.join(shares)}, policy {self.policy}")
        parts += [f"GPU {self.gpu}"] if self.gpu else []
        parts += [self.cards] if self.cards else []
        return "; ".join(parts + [f"note: {note}" for note in self.notes])


@dataclass(frozen=True)
class Diagnosis:
    """The verdicts on the ranks of one job, and what concerns all of them."""

    launcher: str
    launcher_pid: int | None
    verdicts: tuple[Verdict, ...]
    notes: tuple[str, ...] = ()
    command: str = ""

    @property
    def ok(self) -> bool:
        """No rank is off."""
        return not any(verdict.off for verdict in self.verdicts)

    def __str__(self) -> str:
        by = f" (process {self.launcher_pid})" if self.launcher_pid else ""
        count = f"{len(self.verdicts)} rank{'s' if len(self.verdicts) > 1 else ''}"
        starter = "no launcher" if self.launcher == "none" else f"started by {self.command or self.launcher}{by}"
        head = f"{count}, {starter}"
        bad = sum(bool(verdict.off) for verdict in self.verdicts)
        tail = f"{bad} of {len(self.verdicts)} off" if bad else "all ok"
        return "\n".join([head, *map(str, self.verdicts), *(f"note: {note}" for note in self.notes), tail])

    def to_dict(self) -> dict[str, Any]:
        """Plain data that ``json`` can write."""
        ranks = [
            asdict(verdict) | {"cpus": format_ranges(verdict.cpus), "planned": format_ranges(verdict.planned)}
            for verdict in self.verdicts
        ]
        return {
            "launcher": self.launcher,
            "launcher_pid": self.launcher_pid,
            "command": self.command,
            "ok": self.ok,
            "ranks": ranks,
            "notes": list(self.notes),
        }


def judge(
    machine: Topology, job: Job, placements: Sequence[Placement], gpus: Sequence[str | None], *, mode: Mode = "auto"
) -> Diagnosis:
    """Judge every rank of a job.

    A rank sits well where its CPUs are those that a plan of any mode gives it, or where they are its own and near its
    GPU. CPUs that are all there are count only where the asked mode gives them. What the launcher may use, or else all
    that the ranks may use together, is what the plans deal out.

    Args:
        machine: this machine, whatever of it the caller itself may use.
        job: the job.
        placements: where its ranks sit, in their order.
        gpus: the PCI address of each rank's GPU or None, likewise.
        mode: the mode of the plan that the others are compared with.
    """
    known = {cpu for core in machine.cores for cpu in core}
    together = {cpu for placement in placements for cpu in placement.cpus}
    given = next((set(placement.parent_cpus) for placement in placements if placement.parent_cpus), together) & known
    given = given or known
    base = tuple(sorted(given | together & known))
    machine = replace(machine, allowed=base)
    plans: dict[Mode, Plan] = {}
    notes = []
    if job.missing:
        notes.append("no plan is made, because not all ranks are seen")
    elif job.ranks:
        plans = _plans(machine, gpus, mode, notes)
    if given < known:
        notes.append(f"the launcher itself may use CPUs {format_ranges(given)} of {format_ranges(known)} only")
    verdicts = [_judge(machine, index, job, placements, gpus[index], plans, mode) for index in range(len(job.ranks))]
    missing = job.missing
    verdicts += [_missing(rank) for rank in missing[:_MOST_MISSING]]
    if len(missing) > _MOST_MISSING:
        notes.append(f"{len(missing) - _MOST_MISSING} more ranks are not seen")
    verdicts.sort(key=lambda verdict: verdict.local_rank)
    return Diagnosis(job.launcher, job.launcher_pid, tuple(verdicts), tuple(notes), job.command)


def _missing(local_rank: int) -> Verdict:
    why = "no process of it is seen: it has ended, or another user runs it"
    return Verdict(local_rank, None, (why,), "", (), (), (), None, None, None)


def _plans(machine: Topology, gpus: Sequence[str | None], mode: Mode, notes: list[str]) -> dict[Mode, Plan]:
    """The plan of the asked mode first, then those of the others that this machine allows."""
    plans: dict[Mode, Plan] = {}
    devices = list(gpus) if any(gpus) else None
    for name in dict.fromkeys((mode, *get_args(Mode))):
        try:
            plans[name] = plan_binding(machine, len(gpus), mode=name, devices=devices)
        except NumaError as error:
            if name == mode:
                notes.append(f"no plan can be made: {error}")
    if mode in plans:
        notes.extend(plans[mode].notes)
    return plans


def _judge(
    machine: Topology,
    index: int,
    job: Job,
    placements: Sequence[Placement],
    gpu: str | None,
    plans: Mapping[Mode, Plan],
    mode: Mode,
) -> Verdict:
    rank, here = job.ranks[index], placements[index]
    planned = plans[mode][index] if mode in plans else None
    fits = [mode for mode, plan in plans.items() if plan[index].cpus == here.cpus]
    if here.cpus == machine.allowed and mode not in fits:
        fits = []  # a mode that nobody asked for, whose node or socket is the whole machine: nobody bound this rank
    fitting = next(iter(fits), None)
    off = [] if fitting else _wrong_cpus(machine, index, placements, gpu)
    where = f"CPUs {format_ranges(here.cpus)}"
    if fitting:
        how = f"{where}, as a plan of mode {fitting!r} has it"
    elif off:
        how = f"the plan gives it CPUs {format_ranges(planned.cpus)}" if planned else "no plan to compare with"
    else:
        how = f"{where}, its own, though another share than the plan's"
    off += [
        f"{count} of {here.threads} threads may use CPUs {format_ranges(cpus)}"
        for cpus, count in here.stray_threads.items()
    ]
    off += _wrong_memory(machine, here)
    cards = far_cards(machine, gpu, rank.environ)
    off += [cards] if cards else []
    notes = [rank.assumed] if rank.assumed else []
    threads = rank.environ.get("OMP_NUM_THREADS", "")
    if threads.isdecimal() and int(threads) > len(here.cpus):
        notes.append(f"OMP_NUM_THREADS = {threads} is more than its {len(here.cpus)} CPUs")
    if here.memory is None:
        notes.append("where its memory lies is not shown (no numa_maps, or another user's process)")
    return Verdict(
        rank.local_rank,
        rank.pid,
        tuple(off),
        how,
        tuple(notes),
        here.cpus,
        planned.cpus if planned else (),
        gpu,
        here.memory,
        here.policy,
        bound_by(machine, job, rank, here),
        near_cards(machine, gpu, here.cpus),
    )


def _wrong_cpus(machine: Topology, index: int, placements: Sequence[Placement], gpu: str | None) -> list[str]:
    here = set(placements[index].cpus)
    if len(placements) > 1 and here >= set(machine.allowed):
        return [f"it is not bound: it may use all of the {len(here)} CPUs that {len(placements)} ranks share"]
    off = []
    shared = {i: here.intersection(other.cpus) for i, other in enumerate(placements) if i != index}
    shared = {i: cpus for i, cpus in shared.items() if cpus}
    if shared:
        others = format_ranges(shared)
        off.append(f"it shares CPUs {format_ranges(set().union(*shared.values()))} with rank {others}")
    home = next((device.node for device in machine.gpus if device.pci == gpu), None)
    if home is not None:
        far = [
            node for node in machine.nodes if here.intersection(node.cpus) and not same_socket(machine, node.id, home)
        ]
        if far:
            nodes = format_ranges(node.id for node in far)
            off.append(f"it may run on node {nodes}, but its GPU hangs on node {home}, of another socket")
    return off


def _wrong_memory(machine: Topology, here: Placement) -> list[str]:
    """Memory on nodes that are neither the CPUs' own nor memory without CPUs (which somebody chose)."""
    if not here.memory or not machine.numa:
        return []
    nodes = [node for node in machine.nodes if node.cpus and set(node.cpus).isdisjoint(here.cpus)]
    far = {node.id: here.memory[node.id] for node in nodes if here.memory.get(node.id)}
    size = sum(far.values())
    if size < _FAR_BYTES or size < _FAR_SHARE * sum(here.memory.values()):
        return []
    return [f"{size / 2**30:.2f} GiB of its memory lie on node {format_ranges(far)}, where none of its CPUs are"]
