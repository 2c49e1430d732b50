"""Rows of text as a table, and sizes for people."""

from __future__ import annotations

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[bool]) -> str:
    """Columns of equal width, two spaces apart; `right` says which are numbers."""
    widths = [max(len(line[at]) for line in (head, *rows)) for at in range(len(head))]
    lines = []
    for line in (head, *rows):
        cells = [
            text.rjust(width) if number else text.ljust(width)
            for text, width, number in zip(line, widths, right, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def show_bytes(count: int) -> str:
    """Bytes in the largest binary unit that leaves at least one, with three digits at most: 24, 1.5 KiB, 12 GiB."""
    size, units = float(count), ["", "KiB", "MiB", "GiB", "TiB", "PiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return str(count) if not units[0] else f"{size:.{max(0, 2 - len(str(int(size))))}f} {units[0]}"
