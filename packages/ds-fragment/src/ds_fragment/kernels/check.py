"""What may be given to the operations; checked before anything is written."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ds_fragment.errors import InvalidValueError
from ds_fragment.kernels.plan import Op

_LOW = (torch.bfloat16, torch.float16)


def check(op: Op, dsts: Sequence[torch.Tensor], srcs: Sequence[torch.Tensor]) -> None:
    """Raise for the first pair that an operation is not for.

    Raises:
        InvalidValueError: it says which, what it is, and what is expected.
    """
    if len(dsts) != len(srcs):
        raise InvalidValueError(f"there are {len(dsts)} dsts for {len(srcs)} srcs, expected one for each")
    if op == "copy" and list(map(torch.Tensor.numel, dsts)) == list(map(torch.Tensor.numel, srcs)):
        return
    for i, (dst, src) in enumerate(zip(dsts, srcs, strict=True)):
        if dst.numel() != src.numel():
            raise InvalidValueError(
                f"dsts[{i}] has {dst.numel()} elements and srcs[{i}] {src.numel()}, expected as many"
            )
        if op != "copy" and not src.dtype.is_floating_point:
            raise InvalidValueError(f"srcs[{i}] has dtype {src.dtype}, expected a floating-point one")
        if op == "gather_grads" and dst.dtype != torch.float32:
            raise InvalidValueError(
                f"dsts[{i}] has dtype {dst.dtype}, expected torch.float32: gradients add up in fp32"
            )
        if op == "publish" and dst.dtype != src.dtype and (src.dtype != torch.float32 or dst.dtype not in _LOW):
            raise InvalidValueError(
                f"dsts[{i}] has dtype {dst.dtype} and srcs[{i}] {src.dtype}: stochastic rounding goes from "
                "torch.float32 to torch.bfloat16 or torch.float16"
            )


def check_scalar(name: str, value: torch.Tensor, dtype: torch.dtype, device: torch.device) -> None:
    """Raise unless a tensor is one number of the dtype on the device.

    Raises:
        InvalidValueError: it is not.
    """
    if value.numel() != 1 or value.dtype != dtype or value.device != device:
        raise InvalidValueError(
            f"{name} is a tensor of shape {tuple(value.shape)}, {value.dtype} on {value.device}, expected one element "
            f"of {dtype} on {device}"
        )
