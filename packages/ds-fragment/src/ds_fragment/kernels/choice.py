"""The one switch between the CUDA kernels and torch's own operators, and the report on which of them is in use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, cast, get_args

import torch

from ds_fragment.errors import InvalidValueError
from ds_fragment.kernels.library import KernelError, loaded

Choice = Literal["auto", "cuda", "reference"]

VARIABLE = "DS_FRAGMENT_KERNELS"
_chosen: ContextVar[Choice | None] = ContextVar("ds_fragment_kernels", default=None)


def _valid(choice: str, what: str) -> Choice:
    if choice not in get_args(Choice):
        raise InvalidValueError(f"{what} is {choice!r}, expected one of {', '.join(get_args(Choice))}")
    return cast(Choice, choice)


def chosen() -> Choice:
    """The choice in force: the innermost `use_kernels`, else the variable DS_FRAGMENT_KERNELS, else ``auto``."""
    inside = _chosen.get()
    return _valid(os.environ.get(VARIABLE) or "auto", VARIABLE) if inside is None else inside


@contextmanager
def use_kernels(choice: Choice) -> Iterator[None]:
    """Choose what moves the fragments of CUDA tensors, within a ``with`` block and this thread or task.

    Tensors elsewhere than on a CUDA device are always moved by torch.

    Args:
        choice: ``auto`` for the CUDA kernels where they can run, ``cuda`` to make it an error where they cannot,
            ``reference`` for torch's own operators.

    Raises:
        InvalidValueError: it is none of these.

    >>> with use_kernels("reference"):
    ...     chosen()
    'reference'
    """
    token = _chosen.set(_valid(choice, "choice"))
    try:
        yield
    finally:
        _chosen.reset(token)


def usable(device: torch.device) -> bool:
    """Whether the kernels are chosen and run on a device.

    Raises:
        KernelError: ``cuda`` is chosen, and they do not run there.
    """
    if device.type != "cuda":
        return False
    choice = chosen()
    if choice == "reference":
        return False
    reason = loaded().why_not(device.index if device.index is not None else torch.cuda.current_device())
    if reason is not None and choice == "cuda":
        raise KernelError(f"the CUDA kernels were asked for, but {reason}")
    return reason is None


def why_reference() -> str | None:
    """Why torch moves the fragments of CUDA tensors here; None if the kernels do."""
    if chosen() == "reference":
        return f"it was chosen ({VARIABLE} or use_kernels)"
    found = loaded()
    reason = found.why_no_device()
    if reason is not None:
        return reason
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device"
    return found.why_not(torch.cuda.current_device())


def report() -> dict[str, str]:
    """The library, what it was compiled for, the driver, the devices, and what is in use; one line each."""
    found = loaded()
    reason = why_reference()
    lines = {"library": str(found.path) if found.library is not None else f"none: {found.reason}"}
    if found.library is not None:
        lines["architectures"] = found.architectures
        lines["compiled with"] = f"CUDA {found.toolkit}"
        lines["driver"] = f"runs CUDA up to {found.driver}" if found.driver else "none"
    lines["torch"] = f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"
    for index in range(torch.cuda.device_count()):
        capability = "".join(map(str, torch.cuda.get_device_capability(index)))
        state = found.why_not(index) or "ready"
        lines[f"cuda:{index}"] = f"{torch.cuda.get_device_name(index)}, sm_{capability}: {state}"
    lines["choice"] = chosen()
    lines["in use"] = "CUDA kernels" if reason is None else f"torch's own operators, because {reason}"
    return lines
