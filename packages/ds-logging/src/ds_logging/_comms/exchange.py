"""Bytes from every rank to every rank, as tensors: no pickle, no numpy.

[Note: exit] A thread of gloo's lets go of the tensors of a collective a moment after the caller has them. If it is the
last to do so it needs the interpreter's lock, and where the interpreter has begun to end by then, the process aborts.
FSDP2 keeps process groups, and so their threads, past ``destroy_process_group``. Reports are what a program does last,
so one that exchanged on a CPU takes a tenth of a second longer to exit, in which the threads get their turn.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import json
import sys
import time
import zlib
from typing import Any


def encode(data: object) -> bytes:
    """Return JSON, compressed."""
    return zlib.compress(json.dumps(data, separators=(",", ":")).encode(), 1)


def decode(data: bytes) -> Any:
    """Return what `encode` was given; tuples come back as lists."""
    return json.loads(zlib.decompress(data))


def gather_bytes(data: bytes, group: Any = None, *, dst: int | None = None) -> list[bytes]:
    """Return the bytes of every rank, in order of group rank, on every rank or on one.

    **All ranks of the group must call it.** It makes an all-gather of the lengths, and one of the bytes, padded to the
    longest; with ``dst`` a gather instead.

    Args:
        data: of this rank; lengths may differ.
        group: the process group, the default one unless given. Where no process group was made, this rank is alone.
        dst: the global rank that gets them; the others get an empty list. ``None``: every rank.
    """
    dist: Any = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available() or not dist.is_initialized():
        return [data]
    torch: Any = sys.modules["torch"]
    device = _device(torch, dist, group)
    if device.type == "cpu":
        _wait_at_exit()
    count = dist.get_world_size(group)
    own = torch.tensor([len(data)], dtype=torch.int64, device=device)
    lengths = [torch.zeros_like(own) for _ in range(count)]
    dist.all_gather(lengths, own, group=group)
    sizes = [int(length.item()) for length in lengths]
    longest = max(sizes)
    if not longest:
        return [b""] * count
    # bytearray: a tensor over read-only memory warns.
    padded = torch.frombuffer(bytearray(data.ljust(longest, b"\0")), dtype=torch.uint8).to(device)
    if dst is not None and dist.get_rank() != dst:
        dist.gather(padded, dst=dst, group=group)
        return []
    gathered = [torch.empty_like(padded) for _ in range(count)]
    if dst is None:
        dist.all_gather(gathered, padded, group=group)
    else:
        dist.gather(padded, gathered, dst=dst, group=group)
    return [_read(tensor, size) for tensor, size in zip(gathered, sizes, strict=True)]


@functools.cache
def _wait_at_exit() -> None:
    """Let threads of gloo's end first; see [Note: exit]."""
    atexit.register(time.sleep, 0.1)


def _read(tensor: Any, size: int) -> bytes:
    on_host = tensor.cpu().contiguous()  # kept alive while its memory is read
    return ctypes.string_at(on_host.data_ptr(), size) if size else b""


def _device(torch: Any, dist: Any, group: Any) -> Any:
    """Return a device that the group's backend takes: the host where it can, for example of "cpu:gloo,cuda:nccl"."""
    whole = dist.group.WORLD if group is None else group
    types = [device.type for device in getattr(whole, "_device_types", ())]
    if not types:
        types = ["cuda" if dist.get_backend(group) == "nccl" else "cpu"]
    if "cpu" in types:
        return torch.device("cpu")
    return torch.device(types[0], getattr(torch, types[0]).current_device())
