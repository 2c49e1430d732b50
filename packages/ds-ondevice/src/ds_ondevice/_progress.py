"""Tell how far long work is."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch

_LOG = logging.getLogger("ds.ondevice")

Tell: TypeAlias = Callable[[int, int], object]
Progress: TypeAlias = bool | Tell


@contextlib.contextmanager
def reporter(progress: Progress, name: str) -> Iterator[Tell]:
    """A function to call with bytes done and bytes in all.

    It is the caller's own where ``progress`` is one. For True it moves a bar on rank 0, or without rich writes a line
    to the log for every tenth. For False it does nothing.
    """
    if callable(progress):
        yield progress
        return
    if not progress or _rank() != 0:
        yield lambda done, total: None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
    except ImportError:
        yield _LogTenths(name)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _rank() -> int:
    dist = torch.distributed
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


class _LogTenths:
    def __init__(self, name: str) -> None:
        self._name, self._tenths = name, 0

    def __call__(self, done: int, total: int) -> None:
        tenths = 10 * done // total if total else 10
        if tenths > self._tenths:
            self._tenths = tenths
            _LOG.info("%s: %d of %d MB", self._name, done // 10**6, total // 10**6)
