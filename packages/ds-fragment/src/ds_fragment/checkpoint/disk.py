"""What a save does to the file system: one function for each operation, so that a test can fail or kill any of them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_DAY = 86400.0  # seconds, after which a temporary counts as left behind where files cannot be locked


def create(path: Path) -> BinaryIO:
    """A new file."""
    return open(path, "xb")


def write(file: BinaryIO, data: bytes) -> None:
    """Append bytes."""
    file.write(data)


def write_tensor(file: BinaryIO, tensor: torch.Tensor) -> None:
    """Append the bytes of a contiguous CPU tensor."""
    nbytes = tensor.numel() * tensor.element_size()
    if nbytes:
        file.write((ctypes.c_char * nbytes).from_address(tensor.data_ptr()))


def close(file: BinaryIO) -> None:
    """Have the file on the disk, and close it."""
    with file:
        file.flush()
        os.fsync(file.fileno())


def rename(temporary: Path, path: Path) -> None:
    """Give a file its name, in the place of what had it."""
    os.replace(temporary, path)


def remove(path: Path) -> None:
    """Remove a file that may be gone already."""
    path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk, where the system can do so."""
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one save at a time change names in the folder, where the file system has locks."""
    try:
        number = os.open(folder, os.O_RDONLY)
    except OSError:
        yield
        return
    try:
        with contextlib.suppress(OSError):
            if fcntl is not None:
                fcntl.flock(number, fcntl.LOCK_EX)
        yield
    finally:
        os.close(number)


def hold(path: Path) -> int:
    """Make a file that says, as long as this process lives, that its save is under way; the number for `release`."""
    number = os.open(path, os.O_RDWR | os.O_CREAT)
    with contextlib.suppress(OSError):
        if fcntl is not None:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return number


def release(path: Path, number: int) -> None:
    """Remove what `hold` made."""
    path.unlink(missing_ok=True)
    os.close(number)


def is_held(path: Path) -> bool:
    """Whether the process that made the file with `hold` may still be at work."""
    try:
        number = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        if fcntl is None:
            raise OSError
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:  # no locks here
        return time.time() - path.stat().st_mtime < _DAY
    finally:
        os.close(number)
