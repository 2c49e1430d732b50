"""What is installed here and what it found: the report of the ``ds-train-utils`` command.

Every part of the report is collected alone, and a part that cannot be collected says why in its place: the report is
what a user sends when something does not work.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable, Sequence
from importlib import import_module, metadata
from typing import Any

DISTRIBUTIONS = (
    "ds-train-utils",
    "ds-logging",
    "ds-groups",
    "ds-ondevice",
    "ds-fragment",
    "ds-z3leaf",
    "ds-loader",
    "ds-numa",
)


def collect() -> dict[str, Any]:
    """The report as plain data.

    Returns:
        A dict with the keys ``python``, ``distributions``, ``torch``, ``accelerator``, ``backends``, ``numa`` and
        ``kernels``. A part that failed is ``{"error": text}``.
    """
    return {
        "python": f"{platform.python_version()} on {platform.platform()}",
        "distributions": {name: _version(name) for name in DISTRIBUTIONS},
        **{name: _attempt(part) for name, part in _PARTS.items()},
    }


def render(report: dict[str, Any]) -> str:
    """The report as lines of text, one fact a line."""
    rows = [("python", report["python"])]
    rows += [(name, version or "not installed") for name, version in report["distributions"].items()]
    for name in _PARTS:
        part = report[name]
        if isinstance(part, dict):
            part = f"unavailable: {part['error']}"
        elif isinstance(part, list):
            part = ", ".join(part) or "none"
        rows.append((name, part))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def main(argv: Sequence[str] | None = None) -> int:
    """The ``ds-train-utils`` command.

    Args:
        argv: the arguments after the command's name; those of the process when left out.

    Returns:
        The exit status, 0: a part that is missing is a line of the report, not a failure of the command.
    """
    parser = argparse.ArgumentParser(
        prog="ds-train-utils",
        description="Report the installed packages, and the torch, devices, backends and NUMA nodes they see.",
    )
    parser.add_argument("--json", action="store_true", help="write the report as JSON")
    options = parser.parse_args(argv)
    report = collect()
    sys.stdout.write((json.dumps(report, indent=2) if options.json else render(report)) + "\n")
    return 0


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
    try:  # on the path without having been installed, as in a checkout
        return str(import_module(f"{name.replace('-', '_')}.__about__").__version__)
    except Exception:
        return None


def _attempt(part: Callable[[], Any]) -> Any:
    try:
        return part()
    except Exception as error:  # a broken driver raises anything, and the rest of the report is still wanted
        return {"error": f"{type(error).__name__}: {error}"}


def _torch() -> str:
    torch = import_module("torch")
    builds = [f"{name} {version}" for name in ("cuda", "hip") if (version := getattr(torch.version, name, None))]
    return f"{torch.__version__} ({', '.join(builds) or 'CPU build'})"


def _accelerator() -> str:
    torch = import_module("torch")
    device = torch.accelerator.current_accelerator()
    if device is None or not torch.accelerator.is_available():
        return "none, the CPU is used"
    count = torch.accelerator.device_count()
    module = torch.get_device_module(device)
    names = (
        sorted({module.get_device_name(index) for index in range(count)}) if hasattr(module, "get_device_name") else []
    )
    return f"{count} x {device.type} ({', '.join(names)})"


def _backends() -> list[str]:
    dist = import_module("torch.distributed")
    if not dist.is_available():
        return []
    tests = {name: getattr(dist, f"is_{name}_available", None) for name in ("gloo", "nccl", "xccl", "mpi", "ucc")}
    return [name for name, test in tests.items() if test is not None and test()]


def _numa() -> str:
    machine = import_module("ds_numa").Topology.here()
    nodes = len(machine.nodes) if machine.numa else "none"
    return f"nodes {nodes}, cores {len(machine.cores)}, allowed CPUs {len(machine.allowed)}, GPUs {len(machine.gpus)}"


def _kernels() -> str:
    return str(import_module("ds_fragment.kernels").report()["in use"])


_PARTS: dict[str, Callable[[], Any]] = {
    "torch": _torch,
    "accelerator": _accelerator,
    "backends": _backends,
    "numa": _numa,
    "kernels": _kernels,
}
