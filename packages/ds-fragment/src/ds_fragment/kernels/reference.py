"""The kernels in plain torch: they run everywhere, and are the oracle of the CUDA ones.

Casts are torch's own, to nearest even. Statistics are the same quantities as the kernels', added in another order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ds_fragment.kernels.philox import dither, words
from ds_fragment.kernels.stats import Stats

Tensors = Sequence[torch.Tensor]

_HALF = (torch.bfloat16, torch.float16)


def copy(dsts: Tensors, srcs: Tensors) -> None:
    """``dsts[i] = srcs[i]``, cast; where the dtypes agree, bit for bit."""
    pairs = [_same_bits(dst, src) for dst, src in zip(dsts, srcs, strict=True) if dst.numel()]
    if pairs:
        with torch.no_grad():
            torch._foreach_copy_([dst for dst, _ in pairs], [src for _, src in pairs])


def _same_bits(dst: torch.Tensor, src: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The pair, of one shape. On a GPU torch's foreach copy changes NaN payloads of half precision, integers' never."""
    if src.shape != dst.shape:
        src = src.reshape(dst.shape)
    if dst.dtype == src.dtype and dst.dtype in _HALF and not (dst.is_neg() or src.is_neg()):
        return dst.detach().view(torch.int16), src.detach().view(torch.int16)
    return dst, src


def gather_grads(
    dsts: Tensors,
    srcs: Tensors,
    *,
    scale: float | torch.Tensor = 1.0,
    accumulate: bool = False,
    found_inf: torch.Tensor | None = None,
) -> Stats:
    """``dsts[i] (+)= scale * srcs[i]`` in fp32, and the statistics of what was written."""
    with torch.no_grad():
        if not accumulate:
            copy(dsts, srcs)
        for dst, src in zip(dsts, srcs, strict=True):
            by = scale.to(dst.device) if isinstance(scale, torch.Tensor) else scale
            if accumulate:
                dst += src.detach().reshape(dst.shape).to(torch.float32) * by
            else:
                dst *= by
        stats = norm(dsts, found_inf.device if not dsts and found_inf is not None else None)
        if found_inf is not None:
            found_inf.masked_fill_((stats.nonfinite > 0).to(found_inf.device), 1.0)
    return stats


def norm(tensors: Tensors, device: torch.device | None = None) -> Stats:
    """The statistics of the tensors together."""
    device = tensors[0].device if tensors else device or torch.device("cpu")
    values = torch.zeros(3, dtype=torch.float64, device=device)
    with torch.no_grad():
        for tensor in tensors:
            if not tensor.numel():
                continue
            x = tensor.detach()
            norm: torch.Tensor = torch.linalg.vector_norm(x, dtype=torch.float64)
            values[0] += norm.square().to(device)
            largest: torch.Tensor = torch.linalg.vector_norm(x, float("inf"))
            values[1] = torch.maximum(values[1], largest.to(device, torch.float64))
            values[2] += (x - x).count_nonzero().to(device)  # 0 where x is finite, NaN elsewhere
    return Stats(values)


def publish(dsts: Tensors, srcs: Tensors, *, seed: int | torch.Tensor, only: Sequence[int] | None = None) -> None:
    """``dsts[i] = srcs[i]``, rounded at random; of all pairs, or some."""
    with torch.no_grad():
        for piece in range(len(dsts)) if only is None else only:
            dst, src = dsts[piece], srcs[piece]
            if dst.dtype == src.dtype:
                dst.copy_(src.reshape(dst.shape))
            elif dst.numel():
                random = words(seed, piece, src.numel(), src.device)
                dst.copy_(dither(src.detach().reshape(-1), random, dst.dtype).view(dst.shape))
