"""What is measured of many pieces of this rank: fp64 sums of squares, largest magnitudes, counts of what is not finite.

[Note: batches] Pieces of a dtype that torch computes with are measured by one call of torch for all of a kind. Every
other kind is first turned into one of those, piece by piece: see `_magnitudes`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from operator import attrgetter

import torch

from ds_fragment import kernels

Pieces = Sequence[torch.Tensor]
Measure = Callable[[Pieces], torch.Tensor]

_FLOATS = {torch.float64, torch.float32, torch.bfloat16, torch.float16}  # what torch computes with as they are
_kind = attrgetter("dtype", "device", "layout")


def squares(pieces: Pieces) -> torch.Tensor:
    """The sum of squares of each: fp64, (pieces,), on the device of the first."""
    return _by_kind(
        pieces, lambda some: _stacked(torch._foreach_norm(some, 2, dtype=torch.float64)).square(), _magnitudes
    )


def largest(pieces: Pieces) -> torch.Tensor:
    """The largest magnitude of each, 0 of no elements: fp64, (pieces,)."""
    return _by_kind(pieces, _largest, _magnitudes)


def nonfinite(pieces: Pieces) -> torch.Tensor:
    """How many elements of each are NaN or infinite: fp64, (pieces,)."""
    return _by_kind(pieces, _nonfinite, _elements)


def total(pieces: Pieces, ord: float) -> torch.Tensor:
    """The sum of squares of all together, or their largest magnitude for ``inf``: fp64, (1,)."""
    device = pieces[0].device
    plain = {piece.dtype for piece in pieces} <= _FLOATS and {piece.layout for piece in pieces} == {torch.strided}
    if plain and not pieces[0].is_meta and kernels.usable(device):
        stats = kernels.norm(pieces)
        return (stats.sum_squares if ord == 2 else stats.largest).view(1)
    return squares(pieces).sum().view(1) if ord == 2 else largest(pieces).amax().view(1)


def _by_kind(
    pieces: Pieces,
    measure: Callable[[list[torch.Tensor]], torch.Tensor],
    plain: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """One number for each piece, measured for all of a kind at once; see [Note: batches].

    Args:
        pieces: of any kinds; at least one.
        measure: makes fp64, (some,), of some real pieces of one dtype in `_FLOATS` on one device.
        plain: what makes such a piece of one of another kind.
    """
    kinds = dict.fromkeys(map(_kind, pieces))
    if len(kinds) == 1:
        return measure(_as_floats(list(pieces), kinds.popitem()[0], plain))
    found = torch.zeros(len(pieces), dtype=torch.float64, device=pieces[0].device)
    for kind in kinds:
        chosen = [at for at, piece in enumerate(pieces) if _kind(piece) == kind]
        measured = measure(_as_floats([pieces[at] for at in chosen], kind, plain))
        found[torch.tensor(chosen, device=found.device)] = measured.to(found.device)
    return found


def _as_floats(
    pieces: list[torch.Tensor],
    kind: tuple[torch.dtype, torch.device, torch.layout],
    plain: Callable[[torch.Tensor], torch.Tensor],
) -> list[torch.Tensor]:
    dtype, device, layout = kind
    if dtype in _FLOATS and layout == torch.strided and device.type != "meta":
        return pieces
    return list(map(plain, pieces))


def _stacked(numbers: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack(tuple(numbers)).to(torch.float64)


def _largest(pieces: list[torch.Tensor]) -> torch.Tensor:
    full = [at for at, piece in enumerate(pieces) if piece.numel()]
    found = torch.zeros(len(pieces), dtype=torch.float64, device=pieces[0].device)
    if not full:
        return found
    some = [pieces[at] for at in full]
    if found.is_cuda:
        measured = _stacked(torch._foreach_norm(some, math.inf))
    else:  # several times as fast on a CPU
        least, most = zip(*map(torch.aminmax, some), strict=True)
        measured = torch.maximum(_stacked(least).abs(), _stacked(most).abs())
    found[torch.tensor(full, device=found.device)] = measured
    return found


def _nonfinite(pieces: list[torch.Tensor]) -> torch.Tensor:
    """Counted where the norm is not finite, which it also is where it is too large for its dtype."""
    real = [torch.view_as_real(piece.resolve_conj()) if piece.is_complex() else piece for piece in pieces]
    wide = torch.float32 if real[0].dtype == torch.float16 else None
    finite = _stacked(torch._foreach_norm(real, 2, dtype=wide)).isfinite().tolist()
    counts = [0 if fine else int((~piece.isfinite()).sum()) for fine, piece in zip(finite, pieces, strict=True)]
    return torch.tensor(counts, dtype=torch.float64, device=pieces[0].device)


def _magnitudes(piece: torch.Tensor) -> torch.Tensor:
    """The elements but for their signs, of a kind that torch computes with."""
    found = _elements(piece)
    return found.to(torch.complex128).abs() if found.is_complex() else found


def _elements(piece: torch.Tensor) -> torch.Tensor:
    """The elements as a dense tensor of a kind that torch computes with, or complex; of a sparse one those it has.

    Raises:
        RuntimeError: there are none to be had.
    """
    if piece.is_meta:
        raise RuntimeError("it is on the meta device and has no data")
    if piece.layout != torch.strided:
        piece = piece.coalesce().values() if piece.layout == torch.sparse_coo else piece.to_dense()
    if piece.is_complex() or piece.dtype in _FLOATS:
        return piece
    return piece.to(torch.float64)  # which holds all of the others
