"""Read the kernel's small text files; one that cannot be read is as good as empty."""

from __future__ import annotations

import contextlib
from pathlib import Path

from ds_numa._ranges import parse_range_list


def read_text(path: Path) -> str:
    """A file's text without the white space around it; empty where it cannot be read."""
    with contextlib.suppress(OSError):
        return path.read_text().strip()
    return ""


def read_list(path: Path) -> list[int]:
    """The numbers of a kernel list such as ``0-3,8``; none where the file is missing or empty."""
    text = read_text(path)
    return parse_range_list(text) if text else []
