"""Whether a command starts a launcher, which starts ranks. Pure.

A launcher may stand behind programs that only start another one (``env``, ``uv run``, ``bash -c``).
"""

from __future__ import annotations

import itertools
import os
import shlex
from collections.abc import Sequence

_LAUNCHERS = frozenset(
    [
        "torchrun",
        "accelerate",
        "accelerate-launch",
        "deepspeed",
        "ds",
        "fabric",
        "lightning",
        "horovodrun",
        "composer",
        "colossalai",
        "mpirun",
        "mpiexec",
        "orterun",
        "prterun",
        "prun",
        "srun",
        "flux",
        "jsrun",
        "aprun",
        "ibrun",
    ]
)
_MODULES = ("torch.distributed.run", "torch.distributed.launch", "accelerate", "deepspeed", "lightning.fabric")
_SHELLS = frozenset(["sh", "bash", "dash", "zsh", "ksh", "ash", "fish"])
_WRAPPERS = frozenset(
    [
        "env",
        "nohup",
        "nice",
        "ionice",
        "time",
        "timeout",
        "numactl",
        "taskset",
        "stdbuf",
        "setsid",
        "chrt",
        "sudo",
        "exec",
        "xvfb-run",
        "catchsegv",
        "uv",
        "uvx",
        "poetry",
        "pdm",
        "pipenv",
        "hatch",
        "rye",
        "conda",
        "mamba",
        "micromamba",
        "pixi",
        "singularity",
        "apptainer",
        "nsys",
        "ncu",
        "rocprof",
        "perf",
        "strace",
        "ds-numa",
    ]
)


def starts_launcher(command: Sequence[str]) -> bool:
    """Whether a command starts ranks, directly or behind programs that only start another one.

    >>> starts_launcher(["/usr/bin/torchrun", "train.py"]), starts_launcher(["env", "X=1", "torchrun", "train.py"])
    (True, True)
    >>> starts_launcher(["python3", "-um", "torch.distributed.run", "x.py"]), starts_launcher(["bash", "-c", "srun x"])
    (True, True)
    >>> starts_launcher(["python", "train.py"]), starts_launcher(["./train", "--launcher", "torchrun"])
    (False, False)
    """
    if not command:
        return False
    name, rest = os.path.basename(command[0]), command[1:]
    if name in _LAUNCHERS or name.startswith(("mpirun.", "mpiexec.")):  # mpirun.openmpi, mpiexec.hydra
        return True
    if is_python(command[0]):
        return _python_starts_launcher(rest)
    if name in _SHELLS:
        return any(_mentions_launcher(text) for option, text in itertools.pairwise(rest) if _is_c(option))
    if name not in _WRAPPERS:
        return False
    for i, word in enumerate(rest):
        if starts_launcher(rest[i:]):
            return True
        if is_python(word) or os.path.basename(word) in _SHELLS:
            return False  # what follows are arguments of this program
    return False


def is_python(word: str) -> bool:
    """Whether a word names an interpreter of Python, by its file's name.

    >>> is_python("/usr/bin/python3.12"), is_python("pythonize")
    (True, False)
    """
    name = os.path.basename(word).removesuffix(".exe")
    return (name.startswith("python") and name[6:].replace(".", "").rstrip("t").isdigit()) or name == "python"


def _python_starts_launcher(words: Sequence[str]) -> bool:
    takes_value = False
    for i, word in enumerate(words):
        if takes_value:
            takes_value = False
        elif word in ("-X", "-W"):
            takes_value = True
        elif word.startswith("-") and not word.startswith("--") and "m" in word:
            module = word.partition("m")[2] or (words[i + 1] if i + 1 < len(words) else "")
            return module in _MODULES or module.startswith(tuple(f"{name}." for name in _MODULES))
        elif not word.startswith("-"):
            return os.path.basename(word) in _LAUNCHERS  # python /venv/bin/torchrun
        elif "c" in word and not word.startswith("--"):
            return False
    return False


def _is_c(option: str) -> bool:
    return option.startswith("-") and not option.startswith("--") and option.endswith("c")


def _mentions_launcher(script: str) -> bool:
    """Whether a shell script starts a launcher in one of its commands."""
    try:
        words = list(shlex.shlex(script, posix=True, punctuation_chars=True))
    except ValueError:  # quotes that do not close
        return False
    return any(starts_launcher(words[i:]) for i in range(len(words)))
