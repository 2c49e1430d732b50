from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest
from ds_numa._files import Tree, parse_list, parse_mask


def kernel_mask(cpus: set[int], words: int) -> str:
    """What ``%*pb`` prints: 32 bits a word, all but the first padded."""
    value = sum(1 << cpu for cpu in cpus)
    parts = [f"{value >> (32 * i) & 0xFFFFFFFF:08x}" for i in range(words)]
    return ",".join(reversed(parts))


def test_masks_hold_what_was_put_in() -> None:
    choose = random.Random(7)
    for words in (1, 2, 7, 16):
        for _ in range(40):
            cpus = {cpu for cpu in range(32 * words) if choose.random() < 0.3}
            assert parse_mask(kernel_mask(cpus, words)) == sorted(cpus)


@pytest.mark.parametrize(
    ("text", "cpus"),
    [("0", []), ("f", [0, 1, 2, 3]), ("1,00000000", [32]), ("100000000", [32]), ("00000000,00000001", [0])],
)
def test_masks_as_kernels_write_them(text: str, cpus: list[int]) -> None:
    assert parse_mask(text) == cpus


@pytest.mark.parametrize(
    ("text", "numbers"), [("", []), ("0", [0]), ("0-2,8", [0, 1, 2, 8]), ("8,0-1", [0, 1, 8]), ("0-1,1-2", [0, 1, 2])]
)
def test_lists(text: str, numbers: list[int]) -> None:
    assert parse_list(text) == numbers


@pytest.mark.parametrize("text", ["x", "1-", "-1", "3-1", "0-99999999999", "1,,2", "0x1", "1 2", ","])
def test_garbage_is_no_list(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_list(text)


@pytest.mark.parametrize("text", ["", "x", "1,-1", "1,100000000", "0-3", "f" * 40_000])
def test_garbage_is_no_mask(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_mask(text)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\n\0", "holds bytes that are no text"),
        (b"\0000-3", "holds bytes that are no text"),
        (b"\xff\xfe", "holds bytes that are no text"),
        (b"hello", "holds no list of numbers"),
        (b"0-3,", "holds no list of numbers"),
    ],
)
def test_a_file_that_tells_nothing_is_named(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "online").write_bytes(content)
    tree = Tree(tmp_path)
    assert tree.numbers("online") is None
    assert tree.notes == (f"online {reason}: it is taken as missing",)


@pytest.mark.parametrize("content", [b"0-3\n\0", b"0-3\0\0\0", b"0-3\n\0\xff"])
def test_text_ends_at_the_first_nul(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "online").write_bytes(content)
    tree = Tree(tmp_path)
    assert (tree.numbers("online"), tree.notes) == ([0, 1, 2, 3], ())


def test_a_missing_file_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("1")
    tree = Tree(str(tmp_path))
    assert (
        tree.numbers("nothing") is tree.numbers("file/below") is tree.number("nothing") is tree.mask("nothing") is None
    )
    assert tree.names("nothing") == tree.names("file") == tree.ids("nothing", "cpu") == []
    assert tree.notes == ()


def test_a_folder_in_the_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "online").mkdir()
    tree = Tree(tmp_path)
    assert tree.text("online") is None
    assert "online cannot be read (EISDIR)" in tree.notes[0]


def test_a_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "online")
    assert Tree(tmp_path).numbers("online") == []


def test_a_file_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, flags: int) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", path)  # a chmod would not stop root

    monkeypatch.setattr("ds_numa._files.os.open", refuse)
    tree = Tree(tmp_path)
    assert tree.text("online") is None
    assert "online cannot be read (EACCES)" in tree.notes[0]


def test_files_of_one_kind_make_one_note(tmp_path: Path) -> None:
    for cpu in range(12):
        (tmp_path / f"cpu{cpu}").write_text("?")
    tree = Tree(tmp_path)
    for cpu in range(12):
        tree.numbers(f"cpu{cpu}")
    assert tree.notes == ("cpu0 holds no list of numbers (and 11 more files like it): it is taken as missing",)


def test_long_files_are_read_to_their_end(tmp_path: Path) -> None:
    (tmp_path / "long").write_text("x" * 200_000)
    assert Tree(tmp_path).text("long") == "x" * 200_000
