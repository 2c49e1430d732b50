"""The ``ds-numa`` command: look at a machine, plan for it, bind and start a program, judge a running job."""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from ds_numa.__about__ import __version__
from ds_numa._described import read_described
from ds_numa._mempolicy import memory_policy_refusal
from ds_numa._planning.devices import Devices
from ds_numa._ranges import parse_range_list
from ds_numa.binding import find_gpus
from ds_numa.errors import NumaError
from ds_numa.numactl import numactl_args
from ds_numa.plan import MemoryMode, Mode, Plan, check_rank, plan_binding

_EXAMPLES = """examples:
  ds-numa show
  ds-numa plan --ranks 8 --mode l3
  ds-numa run --ranks 8 -- torchrun --nproc-per-node 8 train.py
  ds-numa doctor"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments without the program's name; those of this process when left out.

    Returns:
        The exit code.
    """
    logging.getLogger("ds.numa").addHandler(logging.NullHandler())  # what is logged is written out here as well
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a device's name may not fit the terminal's encoding
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.call(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the flush at the end is quiet
        return 1
    except (NumaError, OSError) as error:
        sys.stderr.write(f"ds-numa: {error}\n")
        return 1
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ds-numa",
        description="Bind the ranks of a machine to its NUMA nodes and cores.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ds-numa {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    show = commands.add_parser("show", help="what this machine looks like", description="What this machine looks like.")
    show.set_defaults(call=_show)
    show.add_argument("--json", action="store_true", help="as JSON, which --topology reads back")
    _add_plot(show)
    _add_topology(show)

    plan = commands.add_parser(
        "plan", help="which cores each rank would get", description="Which cores each rank would get. Changes nothing."
    )
    plan.set_defaults(call=_plan)
    plan.add_argument("--ranks", type=int, required=True, metavar="N", help="ranks on this machine")
    style = plan.add_mutually_exclusive_group()
    style.add_argument("--json", action="store_true", help="as JSON")
    style.add_argument("--numactl", action="store_true", help="as numactl commands, one for each rank")
    style.add_argument("--brief", action="store_true", help="without the drawing")
    _add_plot(plan)
    _add_choices(plan)
    _add_topology(plan)

    run = commands.add_parser(
        "run",
        help="start a launcher whose ranks bind themselves, or bind this rank and become a program",
        description="Around a launcher: start it, and every rank that it starts with Python binds itself first.\n"
        "Inside a launcher: bind this process to its rank's share of the machine, then become COMMAND.",
        epilog="examples:\n  ds-numa run --ranks 8 -- torchrun --nproc-per-node 8 train.py\n"
        "  torchrun --nproc-per-node 4 --no-python ds-numa run -- ./train",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.set_defaults(call=_run)
    run.add_argument("--ranks", type=int, metavar="N", help="ranks on this machine (default: the launcher's number)")
    run.add_argument("--rank", type=int, metavar="I", help="which of them this is (default: the launcher's number)")
    run.add_argument("--set-omp", action="store_true", help="set OMP_NUM_THREADS to the rank's number of cores")
    run.add_argument("--strict", action="store_true", help="do not start COMMAND if anything is refused (exit code 3)")
    run.add_argument("--quiet", action="store_true", help="do not say what was bound, unless something is refused")
    run.add_argument("--json", action="store_true", help="say what was bound as a line of JSON for each rank")
    _add_choices(run)
    _add_topology(run)
    run.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="the program and its arguments")

    doctor = commands.add_parser(
        "doctor",
        help="whether the ranks of a running job sit where they should",
        description="Find the ranks that run on this machine, and say of each whether its CPUs, its memory, its GPU "
        "and its network cards are near each other, beside a plan. Changes nothing.",
        epilog="exit codes: 0 all ranks sit well, 1 a rank does not or there is none",
    )
    doctor.set_defaults(call=_doctor)
    doctor.add_argument(
        "--pid", type=int, action="append", default=[], metavar="PID", help="only the job of this process"
    )
    _add_mode(doctor)
    doctor.add_argument("--measure", action="store_true", help="also measure bandwidths, in about two seconds")
    doctor.add_argument("--json", action="store_true", help="as JSON")
    _add_topology(doctor)
    return parser


def _add_choices(parser: argparse.ArgumentParser) -> None:
    _add_mode(parser)
    parser.add_argument("--cores", metavar="LIST", help="CPUs to deal out, such as 0-7,16-23 (default: all allowed)")
    parser.add_argument("--reserve", type=int, default=0, metavar="N", help="cores that no rank gets (default: 0)")
    parser.add_argument("--no-smt", action="store_true", help="one CPU of each physical core")
    parser.add_argument(
        *("--devices", "--gpus"),
        default="auto",
        metavar="WHICH",
        help="PCI addresses by rank, separated by commas, 'none', or 'auto': rank i uses cuda:i (default: auto)",
    )
    parser.add_argument(
        "--memory",
        choices=(*get_args(MemoryMode), "prefer"),
        default="preferred",
        help="memory of the rank's nodes (default: preferred)",
    )


def _add_mode(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--mode",
        choices=get_args(Mode),
        default="auto",
        help="auto: own cores near the GPU; node, socket: all of its GPU's; l3: one cache; cores: equal shares of the "
        "whole machine; exclusive: the node's cores by GPU (default: auto)",
    )


def _add_plot(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also save a picture (needs matplotlib)")


def _add_topology(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--topology",
        type=Path,
        metavar="FILE|FOLDER",
        help="not this machine as found, but what 'show --json' wrote, or a folder with copies of /sys and /proc",
    )


def _devices(which: str) -> list[str | None] | None:
    return None if which == "none" else [part.strip() or None for part in which.split(",")]


def _show(arguments: argparse.Namespace) -> int:
    machine = read_described(arguments.topology)
    if arguments.plot is not None:
        machine.plot(path=arguments.plot)
    if arguments.json:
        sys.stdout.write(json.dumps(machine.to_dict(), indent=2) + "\n")
        return 0
    machine.show()
    if arguments.topology is None:
        refusal = memory_policy_refusal()
        text = "memory policy: may be set" if refusal is None else f"memory policy: refused ({refusal})"
        sys.stdout.write(text + "\n")
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    machine = read_described(arguments.topology)
    notes: tuple[str, ...] = ()
    devices: Devices = "auto" if arguments.devices == "auto" else _devices(arguments.devices)
    if arguments.devices == "auto" and arguments.topology is None:
        devices, notes = find_gpus(machine, arguments.ranks)
    plan = plan_binding(
        machine,
        arguments.ranks,
        mode=arguments.mode,
        devices=devices,
        cores=arguments.cores,
        smt=not arguments.no_smt,
        memory=arguments.memory,
        reserve=arguments.reserve,
    )
    plan = Plan(plan.bindings, plan.notes + notes, plan.idle)
    if arguments.plot is not None:
        machine.plot(plan, arguments.plot)
    if arguments.json:
        sys.stdout.write(json.dumps(plan.to_dict(), indent=2) + "\n")
    elif arguments.numactl:
        for binding in plan.bindings:
            sys.stdout.write(" ".join(["numactl", *numactl_args(binding)]) + "\n")
    elif arguments.brief:
        sys.stdout.write(f"{plan}\n")
    else:
        machine.show(plan)
    return 0


def _run(arguments: argparse.Namespace) -> int:
    from ds_numa._run import run

    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not command:
        sys.stderr.write("ds-numa run: no command: write it after --, such as ds-numa run -- python train.py\n")
        return 2
    # What is wrong for every rank is better said once, before anything starts.
    if arguments.ranks is not None:
        check_rank(arguments.rank or 0, arguments.ranks)
    if arguments.cores is not None:
        parse_range_list(arguments.cores)
    if arguments.topology is not None:
        read_described(arguments.topology)
    options: dict[str, Any] = {
        "mode": arguments.mode,
        "cores": arguments.cores,
        "smt": not arguments.no_smt,
        "devices": "auto" if arguments.devices == "auto" else _devices(arguments.devices),
        "memory": arguments.memory,
        "reserve": arguments.reserve,
        "set_omp": arguments.set_omp,
        "topology": None if arguments.topology is None else str(arguments.topology.absolute()),
        "strict": arguments.strict,
        "quiet": arguments.quiet,
        "json": arguments.json,
    }
    return run(command, arguments.rank, arguments.ranks, options)


def _doctor(arguments: argparse.Namespace) -> int:
    from ds_numa._doctor.command import doctor

    machine = read_described(arguments.topology)
    return doctor(machine, arguments.pid, arguments.mode, measured=arguments.measure, as_json=arguments.json)
