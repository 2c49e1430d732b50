"""Read the small text files of ``sys`` and ``proc``; one that cannot be read counts as missing, and a note names it."""

from __future__ import annotations

import errno
import os
import re

_HIGHEST = (1 << 16) - 1  # far above any CPU or node; keeps garbage from filling the memory
_LONGEST = 1 << 22  # bytes; a link in a copied tree may lead to an endless file
# A copied tree may hold a pipe, and opening one would wait for a writer. Windows has no such flag, nor such trees.
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)


class Tree:
    """The files below one root folder, by paths relative to it.

    A missing file is ordinary: kernels differ. A file that is there and tells nothing (no permission, bytes that are no
    text, no number where one belongs) is not: the reader goes on without it, and `notes` names it.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = os.path.join(os.fspath(root), "")
        self._faults: dict[tuple[str, str], list[str]] = {}

    @property
    def notes(self) -> tuple[str, ...]:
        """What could not be read, one sentence for all files of the same kind; paths are relative to the root."""
        sentences = []
        for (_, reason), paths in self._faults.items():
            others = f" (and {len(paths) - 1} more files like it)" if len(paths) > 1 else ""
            sentences.append(f"{paths[0]} {reason}{others}: it is taken as missing")
        return tuple(sentences)

    def fault(self, path: str, reason: str) -> None:
        """Remember that a file tells nothing; files whose paths differ in digits alone are of one kind."""
        kind = re.sub(r"\d+", "#", path)
        self._faults.setdefault((kind, reason), []).append(path)

    def text(self, path: str, *, start: int | None = None) -> str | None:
        """A file's text without the white space around it, or what its first `start` bytes hold.

        None where it is missing or cannot be read.
        """
        try:
            handle = os.open(self.root + path, _FLAGS)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            self.fault(path, f"cannot be read ({errno.errorcode.get(error.errno or 0, '?')})")
            return None
        try:
            raw = os.read(handle, start or 4096)
            if len(raw) > 3000 and start is None:  # the kernel gives long files in pieces of up to a page
                raw = self._read_on(handle, raw)
            if len(raw) > _LONGEST:
                self.fault(path, "does not end")
                return None
        except OSError as error:
            self.fault(path, f"cannot be read ({errno.errorcode.get(error.errno or 0, '?')})")
            return None
        finally:
            os.close(handle)
        text, nul, _ = raw.partition(b"\0")  # some tools copy the kernel's buffer with the NUL that ends it
        try:
            found = text.decode().strip()
        except UnicodeDecodeError:
            found = ""
        if not found and (nul or text.strip()):
            self.fault(path, "holds bytes that are no text")
            return None
        return found

    @staticmethod
    def _read_on(handle: int, raw: bytes) -> bytes:
        pieces, size = [raw], len(raw)
        while size <= _LONGEST and (piece := os.read(handle, 1 << 16)):
            pieces.append(piece)
            size += len(piece)
        return b"".join(pieces)

    def number(self, path: str) -> int | None:
        """The whole number in a file, which may be negative."""
        text = self.text(path)
        if not text:
            return None
        try:
            return int(text)
        except ValueError:
            self.fault(path, "holds no whole number")
            return None

    def numbers(self, path: str) -> list[int] | None:
        """The numbers of a kernel list such as ``0-3,8``, ascending; an empty file is an empty list."""
        text = self.text(path)
        if text is None:
            return None
        try:
            return parse_list(text)
        except ValueError:
            self.fault(path, "holds no list of numbers")
            return None

    def mask(self, path: str) -> list[int] | None:
        """The numbers of a kernel mask such as ``1,0000000f``: words of 32 bits, the highest first."""
        text = self.text(path)
        if text is None:
            return None
        try:
            return parse_mask(text)
        except ValueError:
            self.fault(path, "holds no mask")
            return None

    def cpus(self, *pairs: tuple[str, str]) -> list[int] | None:
        """The first of several files that tells its CPUs. Each pair names a list and the mask that says the same."""
        for listed, masked in pairs:
            found = self.numbers(listed)
            if found is None:
                found = self.mask(masked)
            if found is not None:
                return found
        return None

    def names(self, path: str) -> list[str]:
        """The names in a folder, sorted; none where there is no such folder."""
        try:
            return sorted(os.listdir(self.root + path))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            self.fault(path, f"cannot be listed ({errno.errorcode.get(error.errno or 0, '?')})")
            return []

    def ids(self, path: str, prefix: str) -> list[int]:
        """The ids in the names ``<prefix><id>`` of a folder, ascending."""
        start = len(prefix)
        found = []
        for name in self.names(path):
            digits = name[start:]
            if name.startswith(prefix) and digits.isascii() and digits.isdecimal():
                number = int(digits)
                if number > _HIGHEST:
                    self.fault(f"{path.rstrip('/')}/{name}", f"has a number above {_HIGHEST}")
                elif digits == str(number):  # the kernel pads no number
                    found.append(number)
        return sorted(found)

    def exists(self, path: str) -> bool:
        """Whether there is a file, folder or link, even one that leads nowhere."""
        return os.path.lexists(self.root + path)


def parse_list(text: str) -> list[int]:
    """Read a kernel list. Raises `ValueError` for anything else.

    >>> parse_list("0-2,8"), parse_list("")
    ([0, 1, 2, 8], [])
    """
    if not text:
        return []
    if "-" in text:
        found: list[int] = []
        for part in text.split(","):
            first, dash, last = part.partition("-")
            start = int(first)
            end = int(last) if dash else start
            if not 0 <= start <= end <= _HIGHEST:
                raise ValueError(part)
            found += range(start, end + 1)
    else:  # siblings, of which there is a file for each core: the shortest way
        found = list(map(int, text.split(",")))
    found = sorted(set(found))
    if found[-1] > _HIGHEST:
        raise ValueError(text)
    return found


def parse_mask(text: str) -> list[int]:
    """Read a kernel mask. Raises `ValueError` for anything else.

    >>> parse_mask("1,80000001")
    [0, 31, 32]
    """
    bits = 0
    for word in text.split(","):
        value = int(word, 16)
        # One long word is legal: some kernels write masks without commas.
        if value < 0 or (bits and value >> 32):
            raise ValueError(word)
        bits = bits << 32 | value
    if bits.bit_length() > _HIGHEST:
        raise ValueError(text)
    found = []
    while bits:
        lowest = bits & -bits
        found.append(lowest.bit_length() - 1)
        bits ^= lowest
    return found
