"""Whether this process's CPU mask was cut for its rank alone, by the launcher or a wrapper, before it started.

[Note: given masks] srun, mpirun and others may give each rank CPUs of its own, or give several ranks one socket. A mask
that every rank has alike (a container, taskset around the launcher) must be cut into shares; one that was cut for this
rank must not be cut again. Nothing says which it is, so the evidence is weighed in `find_given_mask`: what srun wrote
down, then the CPUs of the process that launched this one, then the size of the mask.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ds_numa._cgroup import read_group_cpus
from ds_numa._files import Tree
from ds_numa._launcher import agreeing_launchers, launcher_name
from ds_numa._process_tree import find_launcher, read_own_mask
from ds_numa._ranges import format_ranges
from ds_numa.topology import Topology

# These bind ranks to cores; the others only start processes, so a small mask under them is nobody's choice for a rank.
_BINDING_LAUNCHERS = (
    "Open MPI, IBM Spectrum MPI",
    "MVAPICH2",
    "IBM JSM (jsrun)",
    "MPICH, Intel MPI (hydra)",
    "PALS",
    "Flux",
)
_HOW_TO_LEAVE_IT = "start ranks unbound (mpirun --bind-to none, srun --cpu-bind=none) to let ds-numa cut"


@dataclass(frozen=True)
class GivenMask:
    """A mask that not all ranks of this machine share.

    Attributes:
        launcher: who is taken to have set it.
        sharers: how many ranks have this mask; 1 where it is this rank's alone, None where nobody can say.
        index: which of the sharers this rank is; None where that cannot be told.
        note: what a reader of the report should know.
    """

    launcher: str
    sharers: int | None
    index: int | None
    note: str


def find_given_mask(
    env: Mapping[str, str],
    topology: Topology,
    mask: Sequence[int],
    local_rank: int,
    num_local_procs: int,
    *,
    root: Path = Path("/"),
) -> GivenMask | None:
    """What is known of a mask that was cut for this rank; None where all ranks have it alike, so it is to be cut.

    Args:
        env: the environment of this process.
        topology: the machine.
        mask: the CPUs that this process may use.
        local_rank: its rank.
        num_local_procs: the number of ranks on the machine.
        root: the folder that holds ``proc`` and ``sys``.
    """
    online = {cpu for core in topology.cores for cpu in core}
    rows = agreeing_launchers(env, local_rank, num_local_procs)
    if not rows or not 1 < num_local_procs <= len(online):
        return None
    slurm = any(row.name == "Slurm" for row in rows)
    masks = _slurm_masks(env, num_local_procs) if slurm else []
    if masks and masks[local_rank] == set(mask):
        sharers = [rank for rank, other in enumerate(masks) if other == set(mask)]
        if len(sharers) == num_local_procs:
            return None
        return _given("Slurm", mask, len(sharers), sharers.index(local_rank))

    # /proc is evidence only if it speaks of this process with this mask.
    visible = read_own_mask(root) == tuple(mask)
    cpuset = read_group_cpus(Tree(root)) if visible else None
    limit = online.intersection(cpuset) if cpuset is not None and set(cpuset) >= set(mask) else online
    cut_by_whom, same_as_launcher = None, False
    for row in rows if visible else ():
        launcher = find_launcher(root, [row.local_rank or row.rank])
        if launcher is None or launcher.cpus is None:
            continue
        before = set(launcher.cpus) & limit
        if before > set(mask):
            cut_by_whom, limit = launcher_name(env, row), before
            break
        same_as_launcher = same_as_launcher or before == set(mask)
    if cut_by_whom is None and not same_as_launcher:
        if slurm and len(mask) < len(online) and _is_slurms_size(env, topology, mask):
            cut_by_whom, limit = "Slurm", online  # the cpuset may be that of one task
        elif len(mask) < len(limit):
            binding = _BINDING_LAUNCHERS + (("Slurm",) if _slurm_binds(env) else ())
            cut_by_whom = next((row.name for row in rows if row.name in binding), None)
    if cut_by_whom is None:
        return None
    if len(mask) * num_local_procs <= len(limit):
        given = _given(cut_by_whom, mask, 1, 0)
        if 2 * len(mask) * num_local_procs > len(limit):
            return given
        used = f"the ranks together have {len(mask) * num_local_procs} of {len(limit)} CPUs"
        return replace(given, note=f"{given.note}; {used}: {_HOW_TO_LEAVE_IT}")
    return _shared(cut_by_whom, topology, mask, limit, local_rank, num_local_procs)


def _given(launcher: str, mask: Sequence[int], sharers: int | None, index: int | None) -> GivenMask:
    what = f"bound already by {launcher}: CPUs {format_ranges(mask)}"
    if sharers != 1 and index is None:
        what += f"; several ranks share them, which cannot be told apart, so they are left whole: {_HOW_TO_LEAVE_IT}"
    elif sharers != 1:
        what += f", which {sharers} ranks share: this is number {index} of them"
    return GivenMask(launcher, sharers, index, what)


def _shared(
    launcher: str, topology: Topology, mask: Sequence[int], limit: set[int], local_rank: int, ranks: int
) -> GivenMask:
    """A mask of several ranks: which of them this is, if every launcher's order of ranks gives the same answer."""
    parts = _equal_parts(topology, mask, limit)
    if parts is None or ranks % len(parts):
        return _given(launcher, mask, None, None)
    sharers = ranks // len(parts)
    # Ranks fill one part after the other, or go round the parts.
    orders = [
        [(rank // sharers, rank % sharers) for rank in range(ranks)],
        [(rank % len(parts), rank // len(parts)) for rank in range(ranks)],
    ]
    # Every rank looks at all ranks, so that all of them decide alike.
    if any(filled[0] == dealt[0] and filled[1] != dealt[1] for filled, dealt in zip(*orders, strict=True)):
        return _given(launcher, mask, sharers, None)
    part = parts.index(set(mask))
    index = next((order[local_rank][1] for order in orders if order[local_rank][0] == part), None)
    return _given(launcher, mask, sharers, index)


def _equal_parts(topology: Topology, mask: Sequence[int], limit: set[int]) -> list[set[int]] | None:
    """Equal parts of the machine, one of which is the mask: its sockets, nodes, caches or cores."""
    nodes = [node.cpus for node in topology.nodes if node.cpus]
    for groups in (topology.sockets, nodes, topology.l3, topology.cores):
        parts = [part for part in (set(group) & limit for group in groups) if part]
        if len(parts) > 1 and set(mask) in parts and len({len(part) for part in parts}) == 1:
            return parts if set().union(*parts) == limit else None
    return None


def _is_slurms_size(env: Mapping[str, str], topology: Topology, mask: Sequence[int]) -> bool:
    """Whether the mask holds as many CPUs, or cores, as srun was asked for: ``--cpus-per-task``."""
    cores = sum(not set(core).isdisjoint(mask) for core in topology.cores)
    return env.get("SLURM_CPUS_PER_TASK", "") in (str(len(mask)), str(cores))


def _slurm_binds(env: Mapping[str, str]) -> bool:
    """Whether srun was told what to bind tasks to; it then writes no masks down."""
    told = f"{env.get('SLURM_CPU_BIND', '')},{env.get('SLURM_CPU_BIND_TYPE', '')}".lower().replace(":", ",")
    return not {"threads", "cores", "sockets", "ldoms", "rank", "rank_ldom"}.isdisjoint(told.split(","))


def _slurm_masks(env: Mapping[str, str], ranks: int) -> list[set[int]]:
    """The mask of each task of this node, as srun wrote it down; empty where it wrote none or nothing readable.

    Source: srun(1), ``--cpu-bind``: ``mask_cpu:0xFF,0xFF00`` or ``map_cpu:0,8``, each entry perhaps ``*count``; tasks
    past the end of the list start it again.
    """
    match = re.search(r"(mask_cpu|map_cpu):?([0-9a-fx,*]*)", env.get("SLURM_CPU_BIND", ""), re.IGNORECASE)
    kind, text = match.groups() if match else ("", "")
    if not text:
        kind, text = env.get("SLURM_CPU_BIND_TYPE", "").rstrip(":"), env.get("SLURM_CPU_BIND_LIST", "")
    if kind not in ("mask_cpu", "map_cpu"):
        return []
    masks: list[set[int]] = []
    for entry in text.split(","):
        part = re.fullmatch(r"(0x[0-9a-f]{1,2048}|\d{1,6})(?:\*(\d{1,5}))?", entry.strip(), re.IGNORECASE | re.ASCII)
        if not part:
            return []
        if kind == "mask_cpu":
            bits = int(part[1], 16)
            cpus = {bit for bit in range(bits.bit_length()) if bits >> bit & 1}
        else:
            cpus = {int(part[1], 16 if part[1][:2] in ("0x", "0X") else 10)}
        masks += [cpus] * int(part[2] or 1)
    return [masks[rank % len(masks)] for rank in range(ranks)] if masks else []
