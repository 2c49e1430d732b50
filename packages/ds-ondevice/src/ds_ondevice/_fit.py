"""Whether safetensors files fit a module, and what is to be read of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ds_ondevice._modules import plain_type
from ds_ondevice._ops import address_of, is_plain
from ds_ondevice._plan import is_dtensor, local_of
from ds_ondevice._safetensors import Region, Span, Stored
from ds_ondevice._shards import region_of, unsupported_placement
from ds_ondevice._slots import Slot
from ds_ondevice.errors import LoadError


@dataclass(frozen=True)
class Fit:
    """What to read, and what that gives the module.

    Attributes:
        reads: the part of each tensor that this rank holds, in the order in which the files have them.
        tied: names of the state dict that need no reading, since they share memory with one that is read.
        provided: names of slots that get their values so.
        missing: as in `LoadReport`.
        unexpected: as in `LoadReport`.
        draws: whether a missing tensor is to be computed, which takes every random number of the recording.
    """

    reads: dict[str, Region]
    tied: tuple[str, ...]
    provided: frozenset[str]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    draws: bool


def check_fit(
    state: Mapping[str, torch.Tensor],
    slots: list[Slot],
    stored: Mapping[str, Stored],
    dtype: torch.dtype | None,
    *,
    strict: bool,
) -> Fit:
    """Check that files and module fit, from what the files' headers say.

    Raises:
        LoadError: they do not.
    """
    owned = {id(tensor) for slot in slots if slot.kind != "attribute" for tensor in slot.held}
    found = [name for name in state if name in stored]
    unsupported, mismatched, regions = {}, {}, {}
    for name in found:
        tensor, problem = state[name], _unsupported(state[name], dtype)
        if id(tensor) not in owned:
            unsupported[name] = "it is no parameter or buffer of the module, but made for its state dict"
        elif problem:
            unsupported[name] = problem
        elif difference := _difference(stored[name], tensor, dtype):
            mismatched[name] = difference
        else:
            regions[name] = region_of(tensor)
    given = _Memory(state[name] for name in found if name not in unsupported)
    absent = {name: tensor for name, tensor in state.items() if name not in stored and tensor not in given}
    unexpected = tuple(name for name in stored if name not in state)
    if mismatched or unsupported or (strict and (absent or unexpected)):
        raise LoadError(absent if strict else (), unexpected if strict else (), mismatched, unsupported)
    last = set({_place(state[name]): name for name in found}.values())  # of each tie, as load_state_dict has it
    return Fit(
        reads={name: regions[name] for name in stored if name in last},
        tied=tuple(name for name in state if name not in absent and name not in last),
        provided=frozenset(slot.name for slot in slots if all(tensor in given for tensor in slot.held)),
        missing=tuple(absent),
        unexpected=unexpected,
        draws=any(tensor.is_meta for tensor in absent.values()),
    )


def state_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers themselves, by the names that a checkpoint has for them."""
    state = module.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def _unsupported(tensor: torch.Tensor, dtype: torch.dtype | None) -> str:
    """Why no file can be read into a tensor; "" if one can."""
    if torch.nn.parameter.is_lazy(tensor):
        return "it is a lazy parameter without a shape; run one forward pass first"
    if is_dtensor(tensor):
        if not tensor.is_meta and tensor.is_floating_point() and dtype not in (None, tensor.dtype):
            return f"it is sharded and real already, so that its engine relies on {tensor.dtype}; pass no other dtype"
        return unsupported_placement(tensor) or _unsupported(tensor._local_tensor, None)
    if is_traceable_wrapper_subclass(tensor) or _is_custom(plain_type(tensor)):
        return f"{type(tensor).__name__} tensors are not supported"
    return "" if is_plain(tensor) else f"its layout is {tensor.layout}, or it is quantized or conjugated: not supported"


def _is_custom(kind: type[torch.Tensor]) -> bool:
    """Whether a class has ideas of its own about its memory, as those of quantized weights have."""
    inert = torch._C._disabled_torch_function_impl
    own = [vars(base) for base in kind.__mro__ if not issubclass(torch.nn.Parameter, base)]
    return any("__torch_dispatch__" in v or "to" in v or v.get("__torch_function__", inert) is not inert for v in own)


def _difference(stored: Stored, tensor: torch.Tensor, dtype: torch.dtype | None) -> str:
    """How a stored tensor differs from the one of the module so that it cannot be loaded; "" if it does not."""
    shape = tuple(tensor.shape)
    if stored.shape != shape:
        return f"shape {stored.shape} in the file, {shape} in the module"
    wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    if stored.dtype is None or not _converts(stored.dtype, wanted):
        return f"{stored.dtype or stored.kind} in the file, {wanted} in the module"
    return ""


def _converts(stored: torch.dtype, wanted: torch.dtype) -> bool:
    """Whether one may become the other: it is of the same kind, and no integer is lost."""
    if stored == wanted:
        return True
    if any(dtype.is_floating_point or dtype.is_complex for dtype in (stored, wanted)):
        return stored.is_floating_point is wanted.is_floating_point and stored.is_complex is wanted.is_complex
    if wanted is torch.bool:
        return False
    old, new = torch.iinfo(torch.uint8 if stored is torch.bool else stored), torch.iinfo(wanted)
    return stored is torch.bool or (new.min <= old.min and old.max <= new.max)


def _place(tensor: torch.Tensor) -> tuple[object, ...]:
    """The same for two tensors if they are the same memory seen in the same way."""
    local = local_of(tensor)
    return address_of(local), local.storage_offset(), local.size(), local.stride(), tensor.shape, tensor.dtype


class _Memory:
    """The memory of some tensors; ``tensor in memory`` tells whether a tensor lies in one of theirs."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self._places: set[tuple[object, ...]] = set()
        self._dense: dict[int, list[Span]] = {}  # bytes of a storage, by its address
        for tensor in tensors:
            self._places.add(_place(tensor))
            start, stop = _extent(tensor)
            if not is_dtensor(tensor) and stop - start == tensor.numel() * tensor.itemsize:
                self._dense.setdefault(address_of(tensor), []).append((start, stop))

    def __contains__(self, tensor: torch.Tensor) -> bool:
        wraps = is_traceable_wrapper_subclass(tensor) and not is_dtensor(tensor)
        if torch.nn.parameter.is_lazy(tensor) or wraps or not is_plain(local_of(tensor)):
            return False
        if is_dtensor(tensor) or _place(tensor) in self._places:
            return _place(tensor) in self._places
        start, stop = _extent(tensor)
        return any(first <= start and stop <= last for first, last in self._dense.get(address_of(tensor), ()))


def _extent(tensor: torch.Tensor) -> Span:
    """From which byte of its storage to which a tensor reaches."""
    start = int(tensor.storage_offset())
    last = sum((size - 1) * stride for size, stride in zip(tensor.size(), tensor.stride(), strict=True))
    stop = start + last + 1 if tensor.numel() else start
    return start * tensor.itemsize, stop * tensor.itemsize
