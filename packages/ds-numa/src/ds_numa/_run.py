"""``ds-numa run``: bind this process and become a program, or start a launcher whose ranks bind themselves.

[Note: two ways] Inside a launcher, ``ds-numa run`` is one rank: it binds and becomes COMMAND. Around a launcher, it is
no rank yet: it puts a folder with a ``sitecustomize`` module on ``PYTHONPATH`` and becomes the launcher. Every Python
process below imports that module when it starts. The ranks among them, which the launcher's variables tell, bind
themselves before they import anything else.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ds_numa._commands import is_python, starts_launcher
from ds_numa._described import read_described
from ds_numa._launcher import find_rank
from ds_numa.binding import MARK, bind
from ds_numa.errors import NumaError

OPTIONS = "DS_NUMA_RUN"  # JSON: how the ranks below are to bind
_SITE = Path(__file__).parent / "_site"


def run(command: Sequence[str], rank: int | None, ranks: int | None, options: dict[str, Any]) -> int:
    """Bind and become a program, or become a launcher whose ranks bind.

    Args:
        command: the program and its arguments.
        rank: the local rank that the user gave.
        ranks: the number of local ranks that the user gave.
        options: those of `bind`, ``topology`` as a path, and ``strict``, ``quiet``, ``json``.

    Returns:
        An exit code; only where the program was not started (or on Windows, which cannot replace a process).
    """
    alone = rank is None and find_rank(os.environ, None, ranks).launcher is None  # no launcher above this process
    if rank is None and starts_launcher(command):
        return start_launcher(command, options | {"num_local_procs": ranks})
    if alone and ranks != 1 and (ranks is not None or not is_python(command[0])):
        if ranks is None and not options["quiet"]:
            sys.stderr.write(
                f"ds-numa: no launcher set a rank, so {command[0]} is taken for a launcher, and its Python ranks bind "
                "themselves: give --ranks 1 to bind it as the only rank\n"
            )
        return start_launcher(command, options | {"num_local_procs": ranks})
    assumed = "no launcher set a rank, so this is taken for the only one: give --ranks N where it starts N ranks"
    if bind_and_say(rank, ranks, options, [assumed] if alone and ranks is None else []):
        return 3
    return become(command)


def start_launcher(command: Sequence[str], options: dict[str, Any]) -> int:
    """Become a launcher whose ranks bind with these options."""
    path = os.environ.get("PYTHONPATH", "")
    others = [entry for entry in path.split(os.pathsep) if entry != str(_SITE)] if path else []
    os.environ["PYTHONPATH"] = os.pathsep.join([str(_SITE), *others])
    os.environ[OPTIONS] = json.dumps(options)
    return become(command)


def bind_started_rank() -> None:
    """Bind this process if a launcher made it a rank; called when an interpreter below `start_launcher` starts."""
    try:
        options = json.loads(os.environ[OPTIONS])
        ranks = options.pop("num_local_procs")
    except (KeyError, ValueError, TypeError):
        return
    found = find_rank(os.environ, None, ranks)
    if found.launcher is None or starts_launcher(sys.orig_argv):
        return  # a tool, or a launcher that another one started, such as torchrun under srun
    if os.environ.get(MARK, "").startswith(f"{found.local_rank}/{found.num_local_procs}:"):
        return  # a process that a bound rank started: it has the rank's CPUs, or others that the rank chose for it
    told = find_rank(os.environ, None, None).num_local_procs
    if ranks is not None and told is not None and told != ranks:
        if told == 1:
            return  # a wrapper that starts a launcher
        sys.stderr.write(f"ds-numa: not bound: {found.launcher} started {told} ranks here, but --ranks is {ranks}\n")
        failed = bool(options["strict"])
    else:
        failed = bind_and_say(None, ranks, options)
        if MARK in os.environ and found.num_local_procs != 1:
            del os.environ[OPTIONS]  # what this rank starts inherits its share and need not look
    if failed:
        sys.stderr.flush()
        os._exit(3)  # Python goes on after an exception in sitecustomize


def bind_and_say(rank: int | None, ranks: int | None, options: dict[str, Any], notes: Sequence[str] = ()) -> bool:
    """Bind this process and write the report to standard error; True if it must not go on (``strict``)."""
    choices = dict(options)
    strict, quiet, as_json = (choices.pop(name, False) for name in ("strict", "quiet", "json"))
    logger, silent = logging.getLogger("ds.numa"), logging.NullHandler()
    logger.addHandler(silent)  # what is logged is written below
    try:
        if choices["topology"] is not None:
            choices["topology"] = read_described(Path(choices["topology"]))
        report = bind(rank, ranks, **choices)
    except NumaError as error:
        sys.stderr.write(f"ds-numa: not bound: {error}\n")
        return bool(strict)
    finally:
        logger.removeHandler(silent)
    report = replace(report, notes=(*notes, *report.notes))
    if as_json:
        sys.stderr.write(json.dumps(report.to_dict()) + "\n")
    elif not (quiet and report.complete):
        sys.stderr.write(f"ds-numa: {report}\n")
    return bool(strict) and not report.complete


def become(command: Sequence[str]) -> int:
    """Replace this process by a program; only a failure returns, with the exit code of a shell."""
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        if os.name == "nt":  # exec there returns to the caller at once, without the program's exit code
            return subprocess.call(list(command))
        os.execvp(command[0], list(command))
    except OSError as error:
        sys.stderr.write(f"ds-numa run: {command[0]}: {error.strerror}\n")
        return 127 if isinstance(error, FileNotFoundError) else 126
