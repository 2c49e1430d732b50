"""Reading: a module's or a caller's parameters, and their whole values, gradients and state, one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from ds_fragment.engines.base import is_weight
from ds_fragment.engines.counts import count_over_ranks, is_absent
from ds_fragment.engines.model import Named, check_what, named
from ds_fragment.engines.shards import Shards

K = TypeVar("K")


def iter_full(
    params: nn.Module | Iterable[torch.Tensor] | Iterable[Named],
    what: str = "value",
    *,
    bucket_bytes: int | None = None,
    dst: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    missing: Literal["raise", "skip"] = "raise",
) -> Iterator[tuple[str | torch.Tensor, torch.Tensor]]:
    """Yield the whole weight, gradient or optimizer state of many sharded parameters, one after the other.

    They travel in buckets, one collective for each group and bucket; the next bucket is under way while the caller
    works on this one. All ranks of the parameters' groups must call it, with the same parameters in the same order,
    and iterate to the end. On gloo do not call `DTensor.full_tensor` meanwhile: torch may crash (see the README).

    Args:
        params: a module, parameters, or (name, parameter) pairs.
        what: ``"value"``, ``"grad"``, the key of an optimizer state, or ``"lp"``: the weights that the model computes
            with. They are in the dtype of the parameter, or of the ``param_dtype`` of FSDP's mixed precision, and have
            the bits that the engine itself gathers. Where each rank holds them whole (DDP, DeepSpeed ZeRO-1 and ZeRO-2,
            a flat partition) nothing is communicated. They are only read; write ``"value"``, and they follow.
        bucket_bytes: how much travels at once; unless told, 64 MiB on a CPU, and on a GPU 1 GiB or the largest
            parameter where that is more. The memory taken is about two buckets, or two of the largest parameter, beside
            what the caller still holds.
        dst: the global rank to deliver to; the others take part and are yielded nothing. What other ranks share without
            it, as experts of another expert-parallel rank, is delivered nowhere then. All ranks unless told.
        device: where the tensors are wanted; the parameter's device unless told.
        dtype: what they are cast to; the master's dtype unless told. A dtype of fewer bytes is cast before it travels.
        missing: ``"skip"`` leaves out, on every rank, the parameters for which ``safe_get_full_grad`` and
            ``safe_get_full_optimizer_state`` return None: those that are not trained, and gradients that this backward
            pass did not use. The ranks ask each other first, in one small collective for each group.

    Yields:
        (name, tensor) where names were given, else (parameter, tensor): fresh tensors of the whole shape, in order. On
        a GPU those below 32 MiB share storages of up to a bucket: clone a small one that is to be kept by itself.

    Raises:
        FragmentError: a rank could not deliver its piece (no such state, no gradient); the same on every rank.
        ValueError: ``bucket_bytes`` is not positive, ``dst`` is no rank, or ``missing`` neither word.
    """
    if missing not in ("raise", "skip"):
        raise ValueError(f"missing is {missing!r}, expected 'raise' or 'skip'")
    if bucket_bytes is not None and bucket_bytes <= 0:
        raise ValueError(f"bucket_bytes is {bucket_bytes}, expected a positive number of bytes")
    if dst is not None:
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        if not 0 <= dst < world_size:
            raise ValueError(f"dst is {dst}, expected a global rank in [0, {world_size})")
    names, tensors = named(params)
    if missing == "skip" and not is_weight(check_what(what)):
        kept = _present(tensors, what)
        names = None if names is None else [names[i] for i in kept]
        tensors = [tensors[i] for i in kept]
    shards = Shards(tensors, check_what(what), "iter_full")
    keys: Sequence[str | torch.Tensor] = tensors if names is None else names
    found = shards.full(keys, bucket_bytes, dst, dtype=dtype)
    return found if device is None and dtype is None else _converted(found, device, dtype)


def _present(tensors: Sequence[torch.Tensor], what: str) -> list[int]:
    """Which of them have the quantity, or have an error to raise that is more than its absence; alike on every rank."""
    error = 1 << 32  # more than there are ranks
    counts = count_over_ranks(
        Shards(tensors, "value", "iter_full"), what, lambda param, why: 1 if is_absent(param, why) else error
    )
    return [item for item, count in enumerate(counts) if not 0 < count < error]


def _converted(
    found: Iterator[tuple[K, torch.Tensor]], device: torch.device | str | None, dtype: torch.dtype | None
) -> Iterator[tuple[K, torch.Tensor]]:
    for key, tensor in found:
        yield key, tensor.to(device=device, dtype=dtype)
        del tensor  # not to be held while the next bucket is received
