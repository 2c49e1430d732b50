"""What a reader of a report should know besides: other pinning, libraries that counted the CPUs before, odd shares."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from ds_numa.plan import Binding
from ds_numa.topology import Topology

# (variable, values that switch the pinning off): OpenMP's own, Intel's and LLVM's, GNU's
_PINNING = {
    "OMP_PROC_BIND": ("false",),
    "OMP_PLACES": (),
    "KMP_AFFINITY": ("none", "disabled"),
    "GOMP_CPU_AFFINITY": (),
}
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS")


def environment_notes(env: Mapping[str, str]) -> list[str]:
    """Variables by which an OpenMP library pins threads as well."""
    return [
        f"{name} = {env[name]!r} is set: OpenMP pins its threads by it, maybe elsewhere: unset it"
        for name, off in _PINNING.items()
        if env.get(name, "").strip() and env[name].strip().lower() not in off
    ]


def library_notes(binding: Binding, env: Mapping[str, str], *, set_threads: bool) -> list[str]:
    """Libraries that were imported before, and so keep the number of threads that they counted.

    Args:
        binding: the rank's share.
        env: the environment.
        set_threads: set torch's number of threads instead of advising it.
    """
    torch: Any = sys.modules.get("torch")
    advised = binding.omp_num_threads
    if hasattr(torch, "get_num_threads") and hasattr(torch, "set_num_threads"):
        number = torch.get_num_threads()
        if set_threads and number != advised:
            torch.set_num_threads(advised)
            return [f"torch was imported before and had {number} threads: torch.set_num_threads({advised}) was called"]
        if number > advised:
            return [
                f"torch was imported before and keeps its {number} threads, more than the {advised} advised here: "
                f"call torch.set_num_threads({advised}), or bind before importing torch"
            ]
        return []
    if "numpy" in sys.modules and not any(name in env for name in _THREADS):
        return [
            "numpy was imported before, so its BLAS library keeps the threads that it counted then: bind before "
            f"importing numpy, or limit them to {advised} by threadpoolctl"
        ]
    return []


def core_notes(topology: Topology, binding: Binding) -> list[str]:
    """Fast and slow cores in one share."""
    kinds = [len(set(binding.cpus).intersection(group)) for group in topology.core_classes]
    if sum(1 for kind in kinds if kind) < 2:
        return []
    return [f"fast and slow cores are mixed ({' + '.join(map(str, kinds))} CPUs, the fastest first)"]


def gpu_notes(topology: Topology, binding: Binding) -> list[str]:
    """A GPU that hangs elsewhere than the CPUs, where no plan chose them."""
    gpu = next((gpu for gpu in topology.gpus if gpu.pci == binding.gpu), None)
    if gpu is None or gpu.node is None or gpu.node in binding.nodes:
        return []
    sockets = topology.sockets_of(gpu.node) if any(node.id == gpu.node for node in topology.nodes) else ()
    near = any(not set(binding.cpus).isdisjoint(topology.sockets[i]) for i in sockets)
    what = "node" if near or not sockets else "socket"
    return [f"GPU {gpu.pci} hangs on node {gpu.node}, on another {what} than this rank's CPUs: data crosses over"]
