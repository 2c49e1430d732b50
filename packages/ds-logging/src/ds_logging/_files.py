"""Writes a file whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ds_logging._rank import current_rank


def write_atomically(path: str | os.PathLike[str], chunks: Iterable[str]) -> None:
    """Write text; the file appears whole or not at all, and is on the disk when the call returns.

    Of several processes that write the same path the last one wins.
    """
    target = Path(path)
    unfinished = target.with_name(f".{target.name}.{current_rank()}.{os.getpid()}.tmp")  # ranks may share the folder
    try:
        with open(unfinished, "w", encoding="utf-8") as file:
            file.writelines(chunks)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)
