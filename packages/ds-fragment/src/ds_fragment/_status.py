"""How an error on one rank becomes the same error on every rank.

[Note: status] A collective that one rank does not join hangs the others. So a rank whose input is bad joins all the
same, and sends its error in the place of its data: every contribution to an exchange begins with a *status* of
`STATUS_BYTES` bytes, zero when all is well. After the exchange each rank reads all of them, and if any is set, all
ranks raise the error of the lowest failing rank, by type and by text. It costs no round trip of its own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from ds_fragment import errors

STATUS_BYTES = 512  # a multiple of the alignment that the data behind it needs
_SUMS_AT = 8  # bytes before the sums that `encode_sums` writes
_SUMS = (STATUS_BYTES - _SUMS_AT) // 4

# The place in this table is the code on the wire; 0 is "no error", and the last entry stands for any other exception.
_TYPES: tuple[type[errors.FragmentError], ...] = (
    errors.UnlinkedParameterError,
    errors.InvalidValueError,
    errors.StateKeyError,
    errors.StateNotReadyError,
    errors.GradientUnavailableError,
    errors.RankMismatchError,
    errors.FragmentError,
)


def encode(error: Exception) -> torch.Tensor:
    """The status for an error: uint8, (STATUS_BYTES,): a code, a length, the text in UTF-8, cut to what fits."""
    kind = next((i for i, t in enumerate(_TYPES) if isinstance(error, t)), len(_TYPES) - 1)
    text = str(error) if isinstance(error, errors.FragmentError) else f"{type(error).__name__}: {error}"
    text = re.sub(r"^rank \d+( \(and \d+ more of \d+ ranks\))?: ", "", text)  # of an error that was passed on
    data = text.encode()[: STATUS_BYTES - 3]
    while data and data[-1] & 0xC0 == 0x80:  # do not cut a character in two
        data = data[:-1]
    if data and data[-1] >= 0xC0:
        data = data[:-1]
    blob = bytes((kind + 1,)) + len(data).to_bytes(2, "little") + data
    return torch.frombuffer(bytearray(blob.ljust(STATUS_BYTES, b"\0")), dtype=torch.uint8)


def encode_sums(sums: Sequence[int]) -> torch.Tensor:
    """A status without an error that carries sums to compare: uint8, (STATUS_BYTES,); see `differing`."""
    folded = [0] * _SUMS
    for i, total in enumerate(sums):
        folded[i % _SUMS] = hash((folded[i % _SUMS], total)) & 0xFFFFFFFF
    blob = bytes(_SUMS_AT) + b"".join(fold.to_bytes(4, "little") for fold in folded)
    return torch.frombuffer(bytearray(blob), dtype=torch.uint8)


def differing(mine: torch.Tensor, statuses: torch.Tensor, count: int) -> list[int]:
    """Which of ``count`` sums may not be the same in every status: the folded ones that differ, spread out again."""
    unequal = (statuses[:, _SUMS_AT:] != mine[_SUMS_AT:]).any(dim=0).view(_SUMS, 4).any(dim=1)
    folds = set(unequal.nonzero().flatten().tolist())
    return [i for i in range(max(count, _SUMS)) if i % _SUMS in folds]


def check(statuses: torch.Tensor, *, cause: Exception | None = None) -> None:
    """Raise the error of the lowest failing rank, if any.

    Args:
        statuses: uint8, (ranks, STATUS_BYTES), on the CPU.
        cause: this rank's own exception, shown behind the error as its cause.

    Raises:
        FragmentError: the one that the lowest failing rank encoded; its text begins with ``rank N:``.
    """
    codes = statuses[:, 0]
    if not bool(codes.any()):
        return
    rank = int(codes.nonzero()[0])
    blob = bytes(statuses[rank].tolist())
    length = int.from_bytes(blob[1:3], "little")
    failing = codes.nonzero().flatten().tolist()
    others = f" (and {len(failing) - 1} more of {len(codes)} ranks)" if len(failing) > 1 else ""
    text = f"rank {rank}{others}: {blob[3 : 3 + length].decode(errors='replace')}"
    raise _TYPES[blob[0] - 1](text) from cause
