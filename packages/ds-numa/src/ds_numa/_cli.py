"""The ``ds-numa`` command: show a machine, plan for it, run a program on its share.

Exit codes: 0 done, 1 the request cannot be met, 2 wrong usage, 3 something was refused (``run --strict``),
126 or 127 the program cannot be started; otherwise ``run`` ends as the program does.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from ds_numa.__about__ import __version__
from ds_numa._mempolicy import memory_policy_refusal
from ds_numa._ranges import format_ranges
from ds_numa.binding import bind, find_gpus
from ds_numa.errors import NumaError, TopologyError
from ds_numa.numactl import numactl_args
from ds_numa.plan import MemoryMode, plan_binding
from ds_numa.topology import Node, Topology


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments without the program's name; those of this process when left out.

    Returns:
        The exit code.
    """
    logging.getLogger("ds.numa").addHandler(logging.NullHandler())  # what is logged is written out here as well
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.call(arguments)
    except NumaError as error:
        sys.stderr.write(f"ds-numa: {error}\n")
        return 1
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ds-numa", description="Bind the ranks of a machine to its NUMA nodes and cores."
    )
    parser.add_argument("--version", action="version", version=f"ds-numa {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    show = commands.add_parser("show", help="what this machine looks like", description="What this machine looks like.")
    show.set_defaults(call=_show)
    show.add_argument("--json", action="store_true", help="as JSON, which --topology reads back")
    _add_topology(show)

    plan = commands.add_parser(
        "plan", help="which cores each rank would get", description="Which cores each rank would get. Changes nothing."
    )
    plan.set_defaults(call=_plan)
    plan.add_argument("--ranks", type=int, required=True, metavar="N", help="ranks on this machine")
    style = plan.add_mutually_exclusive_group()
    style.add_argument("--json", action="store_true", help="as JSON")
    style.add_argument("--numactl", action="store_true", help="as numactl commands, one for each rank")
    _add_choices(plan)
    _add_topology(plan)

    run = commands.add_parser(
        "run",
        help="bind, then become a program",
        description="Bind this process to one rank's share of the machine, then become COMMAND.",
        epilog="example: torchrun --nproc-per-node 4 --no-python ds-numa run -- python train.py",
    )
    run.set_defaults(call=_run)
    run.add_argument("--ranks", type=int, metavar="N", help="ranks on this machine (default: LOCAL_WORLD_SIZE)")
    run.add_argument("--rank", type=int, metavar="I", help="which of them this is (default: LOCAL_RANK)")
    run.add_argument("--set-omp", action="store_true", help="set OMP_NUM_THREADS to the rank's number of cores")
    run.add_argument("--strict", action="store_true", help="do not start COMMAND if anything is refused (exit code 3)")
    run.add_argument("--quiet", action="store_true", help="do not say what was bound, unless something is refused")
    _add_choices(run)
    run.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="the program and its arguments")
    return parser


def _add_choices(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cores", metavar="LIST", help="CPUs to deal out, such as 0-7,16-23 (default: all allowed)")
    parser.add_argument("--no-smt", action="store_true", help="one CPU of each physical core")
    parser.add_argument(
        "--gpus",
        default="auto",
        metavar="WHICH",
        help="PCI addresses by rank, separated by commas, 'none', or 'auto': rank i uses cuda:i (default: auto)",
    )
    parser.add_argument(
        "--memory", choices=get_args(MemoryMode), default="prefer", help="memory of the rank's nodes (default: prefer)"
    )


def _add_topology(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--topology", type=Path, metavar="FILE", help="a machine that 'show --json' described, not this one"
    )


def _topology(path: Path | None) -> Topology:
    if path is None:
        return Topology.here()
    try:
        return Topology.from_dict(json.loads(path.read_text()))
    except (OSError, json.JSONDecodeError) as error:
        raise TopologyError(
            f"--topology = '{path}' cannot be read ({error}): write it with ds-numa show --json"
        ) from None


def _gpus(which: str) -> list[str | None] | None:
    return None if which == "none" else [part.strip() or None for part in which.split(",")]


def _show(arguments: argparse.Namespace) -> int:
    machine = _topology(arguments.topology)
    if arguments.json:
        sys.stdout.write(json.dumps(machine.to_dict(), indent=2) + "\n")
        return 0
    cpus = sum(len(core) for core in machine.cores)
    nodes = f"NUMA nodes: {len(machine.nodes)}" if machine.numa else "NUMA nodes: the kernel shows none"
    lines = [
        f"{nodes}; cores: {len(machine.cores)}; CPUs: {cpus}; allowed: {len(machine.allowed)} "
        f"({format_ranges(machine.allowed)})"
    ]
    lines += [_describe(node, machine) for node in machine.nodes if machine.numa]
    for index, gpu in enumerate(machine.gpus):
        where = "node unknown" if gpu.node is None else f"node {gpu.node}"
        lines.append(f"GPU {index}: {gpu.pci}, {where}" + (f", {gpu.model}" if gpu.model else ""))
    if arguments.topology is None:
        refusal = memory_policy_refusal()
        lines.append("memory policy: may be set" if refusal is None else f"memory policy: refused ({refusal})")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def _describe(node: Node, machine: Topology) -> str:
    kinds = {
        "hbm": "high-bandwidth memory",
        "gpu": "memory of a GPU",
        "empty": "no CPUs, no memory",
        "unknown": "memory without CPUs, of unknown kind",
    }
    size = "" if node.memory_bytes is None else f", {node.memory_bytes / 2**30:.1f} GiB"
    what = f"CPUs {format_ranges(node.cpus)}" if node.cpus else kinds[node.kind]
    denied = machine.allowed_memory is not None and node.id not in machine.allowed_memory and node.kind != "empty"
    return f"node {node.id}: {what}{size}" + (" (memory not allowed)" if denied else "")


def _plan(arguments: argparse.Namespace) -> int:
    machine = _topology(arguments.topology)
    notes: tuple[str, ...] = ()
    if arguments.gpus == "auto":
        gpus, notes = find_gpus(machine, arguments.ranks)
    else:
        gpus = _gpus(arguments.gpus)
    plan = plan_binding(
        machine, arguments.ranks, cores=arguments.cores, smt=not arguments.no_smt, gpus=gpus, memory=arguments.memory
    )
    if arguments.json:
        data = plan.to_dict()
        text = json.dumps(data | {"notes": data["notes"] + list(notes)}, indent=2)
    elif arguments.numactl:
        text = "\n".join(" ".join(["numactl", *numactl_args(binding)]) for binding in plan.bindings)
    else:
        text = "\n".join([str(plan), *(f"note: {note}" for note in notes)])
    sys.stdout.write(text + "\n")
    return 0


def _run(arguments: argparse.Namespace) -> int:
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not command:
        sys.stderr.write("ds-numa run: no command: write it after --, such as ds-numa run -- python train.py\n")
        return 2
    report = bind(
        arguments.rank,
        arguments.ranks,
        cores=arguments.cores,
        smt=not arguments.no_smt,
        gpus="auto" if arguments.gpus == "auto" else _gpus(arguments.gpus),
        memory=arguments.memory,
        set_omp=arguments.set_omp,
    )
    if not (arguments.quiet and report.complete):
        sys.stderr.write(f"ds-numa: {report}\n")
    if arguments.strict and not report.complete:
        return 3
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.stderr.write(f"ds-numa run: {command[0]}: {error.strerror}\n")
        return 127 if isinstance(error, FileNotFoundError) else 126
