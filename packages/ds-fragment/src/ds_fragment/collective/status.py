"""How an error on one rank becomes the same error on every rank.

[Note: status] A collective that one rank does not join hangs the others. So a rank whose input is bad joins all the
same, and sends its error in the place of its data: every contribution to an exchange begins with a *status* of
`STATUS_BYTES` bytes, zero when all is well. After the exchange each rank reads all of them, and if any is set, all
ranks raise the error of the lowest failing rank, by type and by text. An `UnusedGradientError`, which callers take for
None, comes after all other errors. It costs no round trip of its own. An error that came from another rank is passed on
as it came, so that its rank stays known.

[Note: mark] Where large data travels in place, out of the piece and into the whole, there is no room before it, and a
status beside it would be a collective more. There the failing rank sends `MARK` at the beginning of its piece of an
item of which every rank sends a piece. All ranks receive the same bytes and look there; where any of them finds a
mark, all do, and exchange the statuses then. A mark that is data, by a chance of one in 2**128, costs a round trip
and no more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist

from ds_fragment import errors

MARK = hashlib.sha256(b"ds-fragment: an error").digest()[:16]
_MARK = list(MARK)
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


def mark(piece: torch.Tensor) -> None:
    """Mark a piece, uint8 and 1-D, as that of a rank that has an error."""
    piece[: len(MARK)].copy_(torch.frombuffer(bytearray(MARK), dtype=torch.uint8))


def is_marked(pieces: torch.Tensor) -> bool:
    """Whether any rank's piece, of which a row has the first bytes, begins with the mark."""
    return _MARK in pieces.tolist()


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
