"""Bind the ranks of a machine to its NUMA nodes and cores.

import ds_numa

print(ds_numa.bind())  # at the top of a training script, before torch is imported
"""

from ds_numa import numactl
from ds_numa.__about__ import __version__
from ds_numa._gpus import visible_gpus
from ds_numa._ranges import format_ranges
from ds_numa.binding import BindReport, apply, bind
from ds_numa.errors import (
    AffinityConflictError,
    BindingError,
    CoreListError,
    GpuLookupError,
    MissingDependencyError,
    NotEnoughCoresError,
    NumaError,
    PlanError,
    RankError,
    TopologyError,
)
from ds_numa.numactl import (
    check_for_numactl_pkg,
    get_numa_cores,
    get_numactl_cmd,
    parse_range,
    parse_range_list,
)
from ds_numa.plan import Binding, Plan, plan_binding
from ds_numa.topology import Gpu, Nic, Node, Topology, probe

__all__ = [
    "AffinityConflictError",
    "BindReport",
    "Binding",
    "BindingError",
    "CoreListError",
    "Gpu",
    "GpuLookupError",
    "MissingDependencyError",
    "Nic",
    "Node",
    "NotEnoughCoresError",
    "NumaError",
    "Plan",
    "PlanError",
    "RankError",
    "Topology",
    "TopologyError",
    "__version__",
    "apply",
    "bind",
    "check_for_numactl_pkg",
    "format_ranges",
    "get_numa_cores",
    "get_numactl_cmd",
    "numactl",
    "parse_range",
    "parse_range_list",
    "plan_binding",
    "probe",
    "visible_gpus",
]


def __dir__() -> list[str]:
    """The public names and those with an underscore."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("_"))})
