"""``ds-numa run``: bind this process and become a program, or start a launcher whose ranks bind themselves.

[Note: two ways] Inside a launcher, ``ds-numa run`` is one rank: it binds and becomes COMMAND. Around a launcher, it is
no rank yet: it puts a folder with a ``sitecustomize`` module on ``PYTHONPATH`` and becomes the launcher. Every Python
process below imports that module when it starts. The ranks among them, which the launcher's variables tell, bind
themselves before they import anything else.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ds_numa._launcher import find_rank
from ds_numa.binding import bind
from ds_numa.errors import NumaError
from ds_numa.topology import Topology

OPTIONS = "DS_NUMA_RUN"  # JSON: how the ranks below are to bind
_SITE = Path(__file__).parent / "_site"
_LAUNCHERS = ("torchrun", "accelerate", "deepspeed", "ds", "fabric", "mpirun", "mpiexec", "srun", "flux", "jsrun")
_MODULES = ("torch.distributed.run", "torch.distributed.launch", "accelerate.commands.launch", "deepspeed")


def is_launcher(command: Sequence[str]) -> bool:
    """Whether a command starts ranks: one of the launchers by name, or ``python -m`` one.

    >>> is_launcher(["/usr/bin/torchrun", "train.py"]), is_launcher(["python", "-m", "torch.distributed.run", "x.py"])
    (True, True)
    >>> is_launcher(["python", "train.py"])
    False
    """
    words = [word for word in command if word != "-u"]
    name = os.path.basename(words[0])
    if name in _LAUNCHERS or name.startswith(("mpirun.", "mpiexec.")):  # mpirun.openmpi, mpiexec.hydra
        return True
    return name.startswith("python") and words[1:2] == ["-m"] and (words[2:3] or [""])[0].startswith(_MODULES)


def start_launcher(command: Sequence[str], options: dict[str, Any]) -> int:
    """Become a launcher whose ranks bind with these options of `bind`, and ``strict``, ``quiet``, ``json``."""
    os.environ[OPTIONS] = json.dumps(options)
    others = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry and entry != str(_SITE)]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(_SITE), *others])
    return become(command)


def bind_started_rank() -> None:
    """Bind this process if a launcher made it a rank; called when an interpreter below `start_launcher` starts."""
    try:
        options = json.loads(os.environ[OPTIONS])
    except (KeyError, ValueError):
        return
    ranks = options.pop("num_local_procs")
    found = find_rank(os.environ, None, ranks)
    if found.launcher is None:
        return  # the launcher itself, or a tool that it uses
    told = find_rank(os.environ, None, None).num_local_procs
    if ranks is not None and told is not None and told != ranks:
        if told > 1:  # 1: a launcher that another launcher started, such as torchrun under srun
            sys.stderr.write(
                f"ds-numa: not bound: {found.launcher} started {told} ranks here, but --ranks is {ranks}\n"
            )
        return
    if bind_and_say(None, ranks, options):
        sys.stderr.flush()
        os._exit(3)  # Python goes on after an exception in sitecustomize


def bind_and_say(rank: int | None, ranks: int | None, options: dict[str, Any]) -> bool:
    """Bind this process and write the report to standard error; True if it must not go on (``strict``)."""
    choices = dict(options)
    strict, quiet, as_json = (choices.pop(name, False) for name in ("strict", "quiet", "json"))
    if choices["topology"] is not None:
        choices["topology"] = Topology.from_dict(choices["topology"])
    try:
        report = bind(rank, ranks, **choices)
    except NumaError as error:
        sys.stderr.write(f"ds-numa: not bound: {error}\n")
        return bool(strict)
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
        os.execvp(command[0], list(command))
    except OSError as error:
        sys.stderr.write(f"ds-numa run: {command[0]}: {error.strerror}\n")
        return 127 if isinstance(error, FileNotFoundError) else 126
