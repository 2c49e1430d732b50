"""A save that is killed at any operation on the disk leaves the old file or the new one, whole."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ds_fragment import save_full
from ds_fragment.checkpoint import disk
from ds_fragment.checkpoint.files import Reader
from fragment_oracle import raised
from ranks import run_ranks
from torch import nn

FUNCTIONS = ("create", "write", "write_tensor", "close", "rename", "remove", "sync_folder", "hold", "release")
ORIGINAL = {name: getattr(disk, name) for name in FUNCTIONS}
SINGLE, SHARDS = 1 << 30, 40


def model_of(value: float) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4), nn.BatchNorm1d(4))
    for tensor in model.state_dict().values():
        tensor.fill_(value)
    return model


def held(path: Path) -> float:
    """The value that every element of the file has, and of the optimizer state beside it."""
    with Reader(path) as reader:
        assert set(reader.shapes) == set(model_of(0).state_dict())
        values = {value for name in reader.shapes for value in reader.tensor(name).flatten().tolist()}
        if "optimizer" in reader.metadata:
            with Reader(path.with_name(reader.metadata["optimizer"])) as beside:
                assert {name.split("/")[1] for name in beside.shapes} == {"momentum_buffer"}
                values |= {value for name in beside.shapes for value in beside.tensor(name).flatten().tolist()}
    (value,) = values
    return value


def files_of(path: Path) -> set[str]:
    """The names of the files of the current save."""
    with Reader(path) as reader:
        names = {file.name for file in (*reader.paths, reader.path)}
        beside = reader.metadata.get("optimizer")
    return names if beside is None else names | files_of(path.with_name(beside))


def save(value: float, path: Path, max_shard_bytes: int, *, background: bool = False) -> None:
    """Save a model and its optimizer, and wait."""
    model = model_of(value)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    for param in model.parameters():
        optimizer.state[param] = {"momentum_buffer": torch.full_like(param, value)}
    saving = save_full(model, path, optimizer=optimizer, max_shard_bytes=max_shard_bytes, background=background)
    if saving is not None:
        saving.wait()


def on_operation(number: int, act: Callable[[], None]) -> list[str]:
    """Call ``act`` before the operation of that number; returns what is done, as it is done."""
    done: list[str] = []

    def wrap(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any) -> Any:
            done.append(name)
            if len(done) == number:
                if name == "write_tensor":  # half of it arrives
                    args[0].write(b"x")
                    args[0].flush()
                act()
            return function(*args)

        return wrapped

    for name in FUNCTIONS:
        setattr(disk, name, wrap(name, getattr(disk, name)))
    return done


def _killed_everywhere(rank: int, folder: str, before: int, after: int, background: bool) -> int:
    path = Path(folder, "model.safetensors")
    number, ended = 0, False
    while not ended:
        number += 1
        assert number < 200
        save(1.0, path, before)
        child = os.fork()
        if not child:
            signal.alarm(30)
            on_operation(number, lambda: os._exit(9))
            save(2.0, path, after, background=background)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, 9)
        ended = code == 0
        assert held(path) in ((2.0,) if ended else (1.0, 2.0))
        save(3.0, path, after)
        assert held(path) == 3.0
        assert {file.name for file in Path(folder).iterdir()} == files_of(path), "what the killed save left is gone"
    return number


@pytest.mark.parametrize("background", [False, True], ids=["foreground", "background"])
@pytest.mark.parametrize(("before", "after"), [(SINGLE, SINGLE), (SINGLE, SHARDS), (SHARDS, SINGLE), (SHARDS, SHARDS)])
def test_a_save_killed_at_any_operation(tmp_path: Path, before: int, after: int, background: bool) -> None:
    (operations,) = run_ranks(_killed_everywhere, 1, str(tmp_path), before, after, background, init=False)
    assert operations > 15


def _failing(rank: int, folder: str, background: bool) -> list[tuple[str, str] | None]:
    """Every operation of the rank that writes fails once."""
    path = Path(folder, "model.safetensors")
    told = []
    for number in range(1, 100):
        for name, function in ORIGINAL.items():
            setattr(disk, name, function)
        save_full(model_of(1.0), path, max_shard_bytes=SHARDS)
        if rank == 0:
            on_operation(number, _no_space)
        told.append(raised(lambda: _save(path, background)))
        if rank == 0:
            assert held(path) == 2.0 if told[-1] is None else held(path) in (1.0, 2.0)
        if told[-1] is None:
            break
    return told


def _no_space() -> None:
    raise OSError(28, "No space left on device")


def _save(path: Path, background: bool) -> None:
    saving = save_full(model_of(2.0), path, max_shard_bytes=SHARDS, background=background)
    if saving is not None:
        saving.wait()


@pytest.mark.parametrize("background", [False, True], ids=["foreground", "background"])
def test_an_operation_that_fails_is_everybodys_error(tmp_path: Path, background: bool) -> None:
    zero, one = run_ranks(_failing, 2, str(tmp_path), background)
    assert zero == one
    assert len(zero) > 15
    assert zero[-1] is None
    for kind, text in zero[:-1]:
        assert kind == "FragmentError"
        assert "rank 0: OSError: [Errno 28] No space left on device" in text


def _full_disk(rank: int, folder: str) -> tuple[str, str] | None:
    path = Path(folder, "model.safetensors")
    save_full(model_of(1.0), path)
    if rank == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size // 2, resource.RLIM_INFINITY))
    told = raised(lambda: save_full(model_of(2.0), path))
    if rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert held(path) == 1.0
        assert [file.name for file in Path(folder).iterdir()] == ["model.safetensors"]
    save_full(model_of(3.0), path)
    assert held(path) == 3.0
    return told


def test_the_system_refuses_to_write_more(tmp_path: Path) -> None:
    zero, one = run_ranks(_full_disk, 2, str(tmp_path))
    assert zero == one is not None
    assert "File too large" in zero[1]


def _lost(rank: int, folder: str, at: int, background: bool) -> str | None:
    """Rank 0, which writes, is killed at an operation; the others hear of it."""
    path = Path(folder, "model.safetensors")
    save_full(model_of(1.0), path, max_shard_bytes=SHARDS)
    if rank == 0:
        on_operation(at, lambda: os._exit(9))
    told = raised(lambda: _save(path, background))
    return None if told is None else told[0]


@pytest.mark.parametrize("background", [False, True], ids=["foreground", "background"])
@pytest.mark.parametrize("at", [1, 5, 20])
def test_the_rank_that_writes_is_lost(tmp_path: Path, at: int, background: bool) -> None:
    told = run_ranks(_lost, 3, str(tmp_path), at, background, killed=(0,), timeout=40)
    assert told[0] is None
    assert all(told[1:])
    assert held(tmp_path / "model.safetensors") == 1.0
    save_full(model_of(2.0), tmp_path / "model.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def _at_once(rank: int, folder: str) -> None:
    """Two programs save to one path, again and again."""
    for turn in range(30):
        save(100.0 * rank + turn, Path(folder, "model.safetensors"), SHARDS if (turn + rank) % 3 else SINGLE)


def test_two_programs_save_to_one_path_at_once(tmp_path: Path) -> None:
    run_ranks(_at_once, 2, str(tmp_path), init=False)
    path = tmp_path / "model.safetensors"
    assert held(path) in (29.0, 129.0)
    assert {file.name for file in tmp_path.iterdir()} == files_of(path)


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    others = ["model-20261129.safetensors", "other.safetensors", ".model.safetensors.swp", "model-notes.txt"]
    for name in others:
        (tmp_path / name).write_bytes(b"mine")
    save_full(model_of(1.0), tmp_path / "model.safetensors", max_shard_bytes=SHARDS)
    save_full(model_of(2.0), tmp_path / "model.safetensors")
    assert {file.name for file in tmp_path.iterdir()} == {*others, "model.safetensors"}
