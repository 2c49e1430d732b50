"""How an error on one rank becomes the same error on every rank.

[Note: status] A collective that one rank does not join hangs the others. So a rank whose input is bad joins all the
same, and sends its error instead of its data. All ranks read the same errors and raise the one of the lowest failing
rank, by type and by text. An `UnusedGradientError`, which callers take for None, comes after all other errors. An error
that came from another rank is passed on as it came, so that its rank stays known. The encoded error is its *status*,
`STATUS_BYTES` bytes.

[Note: mark] Beside shards there is room for 16 bytes only: zeros, or a *mark*. The failing rank puts its status into
the store of the default process group and sends the mark, which says under which key the status is there. So an
exchange without an error costs nothing more. The 16-bit words of a mark are NaN, in fp16, bf16, fp32 and fp64: a rank
that has to send data, and fails, sends a mark and NaN behind it. Data that looks like a mark and has no status in the
store is data.
"""

from __future__ import annotations

import hashlib
import logging
import zlib
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from ds_fragment import errors

MARK_BYTES = 16
_NAN = 0x7FF0  # the upper twelve bits of each word of a mark
MAGIC = sum((_NAN | bits) << 16 * word for word, bits in enumerate((0xD, 0x5, 0xA, 0x1)))  # its first eight bytes
STATUS_BYTES = 512  # a multiple of the alignment that the data behind it needs
_TEXT_AT = 7  # after the code, the global rank (4 bytes) and the length of the text (2)
_SUMS_AT = 8  # bytes before what `encode_sums` writes: a count (8 bytes) and a digest

# The place in this table is the code on the wire; 0 is "no error", and the last entry stands for any other exception.
_TYPES: tuple[type[errors.FragmentError], ...] = (
    errors.UnlinkedParameterError,
    errors.InvalidValueError,
    errors.StateKeyError,
    errors.StateNotReadyError,
    errors.UnusedGradientError,  # before its base
    errors.GradientUnavailableError,
    errors.CheckpointError,
    errors.RankMismatchError,
    errors.EngineChangedError,
    errors.FragmentError,
)
_MISMATCH = 1 + _TYPES.index(errors.RankMismatchError)
_UNUSED = 1 + _TYPES.index(errors.UnusedGradientError)
_UNAVAILABLE = 1 + _TYPES.index(errors.GradientUnavailableError)


def encode(error: Exception, *, of_all: bool = False) -> torch.Tensor:
    """The status for an error: uint8, (STATUS_BYTES,): a code, the rank, a length, text in UTF-8, as it fits.

    ``of_all`` says that the error is about all ranks of a group, which each encode the same.
    """
    if isinstance(error, errors.FragmentError) and error.status:
        return torch.frombuffer(bytearray(error.status), dtype=torch.uint8)
    kind = next((i for i, t in enumerate(_TYPES) if isinstance(error, t)), len(_TYPES) - 1)
    text = str(error) if isinstance(error, errors.FragmentError) else f"{type(error).__name__}: {error}"
    data = text.encode()[: STATUS_BYTES - _TEXT_AT].decode(errors="ignore").encode()  # no character is cut in two
    rank = dist.get_rank() if dist.is_initialized() and not of_all else -1
    blob = bytes((kind + 1,)) + rank.to_bytes(4, "little", signed=True) + len(data).to_bytes(2, "little") + data
    return torch.frombuffer(bytearray(blob.ljust(STATUS_BYTES, b"\0")), dtype=torch.uint8)


def mark(error: Exception) -> list[int]:
    """Put the status of this rank's error into the store; the mark of it, as two 64-bit integers."""
    blob = bytes(encode(error).tolist())
    key = zlib.crc32(blob) & 0xFFF
    try:
        store = distributed_c10d._get_default_store()
        name = _name(dist.get_rank(), key)
        store.set(name, blob)  # type: ignore[arg-type]
        store.check([name])  # comes back when the store has it
    except (RuntimeError, ValueError):  # a store that is gone: the other ranks know the type alone
        logging.getLogger("ds.fragment").warning("the other ranks could not be told of: %s", error)
    return [MAGIC, _NAN | blob[0] | sum((_NAN | key >> 4 * i & 0xF) << 16 * (i + 1) for i in range(3))]


def statuses(heads: Sequence[Sequence[int]], ranks: Sequence[int], *, certain: bool = True) -> torch.Tensor | None:
    """The statuses behind the marks that the ranks of a group sent; None where there is no mark.

    Args:
        heads: by group rank, what it sent as two 64-bit integers.
        ranks: the global ranks.
        certain: whether what looks like a mark is one; else only if the store has its status.

    Returns:
        uint8, (ranks, STATUS_BYTES).
    """
    found = torch.zeros(len(ranks), STATUS_BYTES, dtype=torch.uint8)
    failing = False
    for row, (head, rank) in enumerate(zip(heads, ranks, strict=True)):
        blob = _stored(head[1], rank, certain) if head[0] == MAGIC else b""
        if blob:
            failing = True
            found[row] = torch.frombuffer(bytearray(blob), dtype=torch.uint8)
    return found if failing else None


def _stored(word: int, rank: int, certain: bool) -> bytes:
    """The status that a rank put into the store, given the second half of its mark; empty if there is none."""
    code = word & 0xF
    key = sum((word >> 16 * (i + 1) & 0xF) << 4 * i for i in range(3))
    try:
        store = distributed_c10d._get_default_store()
        if store.check([_name(rank, key)]):
            return bytes(store.get(_name(rank, key)))
    except (RuntimeError, ValueError):
        pass
    if not certain:
        return b""
    kind = _TYPES[code - 1] if 0 < code <= len(_TYPES) else errors.FragmentError
    blob = bytes(encode(kind("it failed, and its own error says why")).tolist())
    return blob[:1] + rank.to_bytes(4, "little", signed=True) + blob[5:]


def _name(rank: int, key: int) -> str:
    return f"ds_fragment/error/{rank}/{key}"


def encode_sums(sums: Sequence[int]) -> torch.Tensor:
    """A status without an error that stands for 64-bit sums: the same bytes for the same sums."""
    data = b"".join(total.to_bytes(8, "little", signed=True) for total in sums)
    blob = bytes(_SUMS_AT) + len(sums).to_bytes(8, "little") + hashlib.sha256(data).digest()
    return torch.frombuffer(bytearray(blob.ljust(STATUS_BYTES, b"\0")), dtype=torch.uint8)


def counts(statuses: torch.Tensor) -> list[int]:
    """How many sums each status without an error stands for."""
    return [int.from_bytes(bytes(row), "little") for row in statuses[:, _SUMS_AT : _SUMS_AT + 8].tolist()]


def rank_of(status: torch.Tensor) -> int:
    """The global rank that encoded an error; -1 without torch.distributed, and for an error of all."""
    return int.from_bytes(bytes(status[1:5].tolist()), "little", signed=True)


def first_of(failing: Iterable[torch.Tensor]) -> torch.Tensor:
    """Of some statuses with an error, the one that all ranks raise."""
    return min(failing, key=lambda status: (int(status[0]) == _UNUSED, rank_of(status)))


def check(statuses: torch.Tensor, *, holders: Sequence[bool] | None = None, cause: BaseException | None = None) -> None:
    """Raise the error of the lowest failing rank, if any.

    Args:
        statuses: uint8, (ranks, STATUS_BYTES), on the CPU.
        holders: whether each rank has a piece to send; all have unless told. Where one of them has its gradient, an
            `UnusedGradientError` of another is a plain `GradientUnavailableError`: somebody used the parameter.
        cause: this rank's own exception, shown behind the error as its cause.

    Raises:
        FragmentError: the one that the lowest failing rank encoded; its text begins with ``rank N:``, by global rank,
            unless it is about all ranks.
    """
    failing = statuses[statuses[:, 0] != 0]
    if not len(failing):
        return
    lowest = first_of(failing)
    fine = statuses[:, 0] == 0
    if int(lowest[0]) == _UNUSED and any(fine if holders is None else fine & torch.tensor(holders)):
        lowest = lowest.clone()
        lowest[0] = _UNAVAILABLE
    rank, blob = rank_of(lowest), bytes(lowest.tolist())
    text = blob[_TEXT_AT : _TEXT_AT + int.from_bytes(blob[5:_TEXT_AT], "little")].decode(errors="replace")
    if rank >= 0 and blob[0] != _MISMATCH:
        text = f"rank {rank}: {text}"
    error = _TYPES[blob[0] - 1](text)
    error.status = blob
    raise error from cause
