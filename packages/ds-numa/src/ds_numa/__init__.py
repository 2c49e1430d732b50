"""Bind the ranks of a machine to its NUMA nodes and cores.

import ds_numa

print(ds_numa.bind())  # at the top of a training script, before torch is imported

Importing this package loads no module of it: each name comes with its first use.
"""

from ds_numa.__about__ import __version__

TYPE_CHECKING = False  # the module `typing` is not imported for it
if TYPE_CHECKING:
    from ds_numa import binding as binding, errors as errors, numactl, plan as plan, topology as topology
    from ds_numa._gpus import visible_gpus
    from ds_numa._ranges import format_ranges, parse_range, parse_range_list
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
    from ds_numa.numactl import check_for_numactl_pkg, get_numa_cores, get_numactl_cmd
    from ds_numa.plan import Binding, Plan, plan_binding
    from ds_numa.topology import Gpu, Nic, Node, Topology, probe

_NAMES = {  # by the module that holds them
    "binding": "BindReport apply bind",
    "errors": "AffinityConflictError BindingError CoreListError GpuLookupError MissingDependencyError "
    "NotEnoughCoresError NumaError PlanError RankError TopologyError",
    "numactl": "check_for_numactl_pkg get_numa_cores get_numactl_cmd",
    "plan": "Binding Plan plan_binding",
    "topology": "Gpu Nic Node Topology probe",
    "_gpus": "visible_gpus",
    "_ranges": "format_ranges parse_range parse_range_list",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}

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


def __getattr__(name: str) -> object:
    """Load a name, or one of the public modules, at its first use."""
    if name not in _HOME and (name not in _NAMES or name.startswith("_")):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module = import_module(f"{__name__}.{_HOME.get(name, name)}")
    value = getattr(module, name) if name in _HOME else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names and those with an underscore."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("_"))})
