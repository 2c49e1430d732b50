"""The one switch between the CUDA kernels and plain torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, cast, get_args

import torch

from ds_fragment.errors import InvalidValueError
from ds_fragment.kernels.errors import KernelError
from ds_fragment.kernels.library import loaded

Choice = Literal["auto", "cuda", "reference"]

VARIABLE = "DS_FRAGMENT_KERNELS"
_chosen: ContextVar[Choice | None] = ContextVar("ds_fragment_kernels", default=None)


def _valid(choice: str, what: str) -> Choice:
    if choice not in get_args(Choice):
        raise InvalidValueError(f"{what} is {choice!r}, expected one of {', '.join(get_args(Choice))}")
    return cast(Choice, choice)


def chosen() -> Choice:
    """What is in force: the innermost `use_kernels`, else the variable DS_FRAGMENT_KERNELS, else ``auto``."""
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
        KernelError: they are asked for, and do not.
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
