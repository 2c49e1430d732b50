"""`deepspeed.utils.numa` under its own names: the plan as a `numactl` command, and what the machine looks like.

Nothing here runs `numactl`; only the command that `get_numactl_cmd` returns needs it.
"""

from __future__ import annotations

import logging
import os
import shutil

from ds_numa._mempolicy import memory_policy_refusal
from ds_numa._ranges import format_ranges, parse_range, parse_range_list
from ds_numa.errors import AffinityConflictError
from ds_numa.plan import Binding, check_rank, plan_binding, select_cpus
from ds_numa.topology import Topology

__all__ = [
    "check_for_numactl_pkg",
    "get_numa_cores",
    "get_numactl_cmd",
    "numactl_args",
    "parse_range",
    "parse_range_list",
]

logger = logging.getLogger("ds.numa")


def get_numa_cores() -> list[list[int]]:
    """The CPUs that this process may use, one list for each NUMA node by ascending id; empty for nodes without any.

    Ids may be sparse: ``[node.id for node in Topology.here().nodes]`` tells them.
    """
    machine = Topology.here()
    allowed = set(machine.allowed)
    return [[cpu for cpu in node.cpus if cpu in allowed] for node in machine.nodes]


def check_for_numactl_pkg() -> bool:
    """Whether the `numactl` program can be found."""
    return shutil.which("numactl") is not None


def get_numactl_cmd(
    bind_core_list: str | None,
    num_local_procs: int,
    local_rank: int,
    *,
    topology: Topology | None = None,
) -> tuple[int, list[str]]:
    """The `numactl` command that starts one rank on its share of the machine.

    Args:
        bind_core_list: the CPUs to deal out, such as ``"0-7,16-23"``, in any order; all that are allowed when None.
        num_local_procs: how many ranks run on the machine.
        local_rank: which of them.
        topology: the machine; this one when left out.

    Returns:
        How many threads the rank should run (one for each of its physical cores, or for each of its CPUs where the
        caller listed them), and the words to put before its command. Memory is bound (``-m``) to the nodes of the
        CPUs. It is preferred (``-p``, or ``-P`` for several nodes) where it is high-bandwidth memory, or where binding
        would shut out memory of unknown kind. Neither is there where there is nothing to choose or the container
        refuses memory policy.

    Raises:
        CoreListError: `bind_core_list` cannot be read, or names CPUs that are not there or not allowed.
        NotEnoughCoresError: there are more ranks than CPUs.
        RankError: `local_rank` or `num_local_procs` is out of range.
        AffinityConflictError: ``KMP_AFFINITY`` is set, which works against `numactl`.

    >>> machine = Topology.from_dict({"nodes": {"0": {"cpus": "0-3"}, "8": {"cpus": "4-7"}}})
    >>> get_numactl_cmd(None, 2, 1, topology=machine)[0]
    4
    """
    check_rank(local_rank, num_local_procs)
    if "KMP_AFFINITY" in os.environ:
        raise AffinityConflictError(
            f"KMP_AFFINITY = {os.environ['KMP_AFFINITY']!r} pins threads too and works against numactl: unset it"
        )
    here = topology is None
    machine = Topology.here() if topology is None else topology
    cores = None if bind_core_list is None else select_cpus(machine, str(bind_core_list), "bind_core_list")
    plan = plan_binding(machine, num_local_procs, cores=cores, devices=None, memory="bind")
    binding = plan[local_rank]
    for note in plan.notes:
        logger.info("%s", note)
    if here and not check_for_numactl_pkg():
        logger.warning("numactl is not installed, so its command will not start: install it, or use ds_numa.bind()")
    refusal = memory_policy_refusal() if here and binding.memory != "none" else None
    if refusal is not None:
        logger.warning("memory policy is refused here (%s), so the command binds CPUs only", refusal)
    threads = binding.num_cores if bind_core_list is None else len(binding.cpus)
    return threads, ["numactl", *numactl_args(binding, memory=refusal is None)]


def numactl_args(binding: Binding, *, memory: bool = True) -> list[str]:
    """A binding as arguments of `numactl`; with ``memory=False`` the CPUs only.

    Source: numactl(8). ``-m`` binds memory, ``-i`` interleaves it, ``-p`` prefers one node and ``-P`` several
    (numactl 2.0.15 and later, Linux 5.15 and later).
    """
    args = []
    if memory and binding.memory != "none":
        flags = {"bind": "-m", "interleave": "-i", "preferred": "-p" if len(binding.memory_nodes) == 1 else "-P"}
        args = [flags[binding.memory], format_ranges(binding.memory_nodes)]
    return [*args, "-C", format_ranges(binding.cpus)]
