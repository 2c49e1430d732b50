"""Link low-precision parameters to a flat fp32 partition, with DeepSpeed's signatures and attributes."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist

from ds_fragment.api import single
from ds_fragment.engines.flat import FlatLink, Slices
from ds_fragment.engines.fragment import get_hp_fragment_mapping
from ds_fragment.errors import InvalidValueError, UnlinkedParameterError
from ds_fragment.layout import overlap
from ds_fragment.record import forget, note, record_of, registry

__all__ = ["lazy_init_hp_params_optimizer_state", "link_hp_params", "unlink_hp_params"]

_METHODS = ("get_full_hp_param", "get_full_hp_grad", "set_full_hp_param", "set_full_hp_grad")
_ATTRIBUTES = ("_hp_mapping", "_dp_group", "_index_in_param_group", *_METHODS)


def link_hp_params(
    lp_param_list: Sequence[torch.Tensor],
    flat_hp_partition: torch.Tensor,
    gradient_dict: Any,
    offload_gradient_dict: Any,
    use_offload: bool,
    param_group_index: int,
    partition_start: int,
    partition_size: int,
    dp_group: dist.ProcessGroup | None,
    param_offsets: Sequence[int] | None = None,
) -> None:
    """Tell each lp parameter which part of this rank's flat fp32 partition is its own.

    Every rank of the group links the same parameters in the same order; no communication. Where the other ranks' slices
    are, the first collective read or write asks them, once. Afterwards each parameter has ``_hp_mapping`` (a
    `tensor_fragment`, None where this rank holds no part), ``_dp_group``, ``_index_in_param_group`` (its place in the
    list of gradients of this partition) and the methods ``get_full_hp_param``, ``get_full_hp_grad``,
    ``set_full_hp_param`` and ``set_full_hp_grad``. The partition and the gradient table are held weakly where Python
    allows.

    Args:
        lp_param_list: the parameters, contiguous, in the order in which the partition concatenates them unless
            ``param_offsets`` says otherwise.
        flat_hp_partition: this rank's slice of the concatenation, fp32, 1-D, at least as long as its part.
        gradient_dict: reduced gradients, ``gradient_dict[param_group_index][index_in_param_group]``, 1-D. Where there
            is a gap before a parameter in this partition, the list has an entry for the gap.
        offload_gradient_dict: the same for an offloaded optimizer, without entries for gaps.
        use_offload: which of the two is read.
        param_group_index: the key into the gradient table.
        partition_start: where this rank's slice begins, in elements.
        partition_size: elements in this rank's slice, padding included. Slices may differ in size; together they hold
            every element of every parameter once.
        dp_group: the ranks that the concatenation is cut over; None for one rank alone.
        param_offsets: where each parameter begins in the concatenation, in elements; in any order and with gaps, the
            same on every rank. One behind the other unless told.

    Raises:
        InvalidValueError: a parameter is not contiguous, offsets are negative, too few or overlap, or the partition is
            too short; nothing was linked. That the slices overlap, or that none holds some elements, is raised by the
            first collective call, on every rank; on one rank alone at once.
    """
    offsets = _offsets(lp_param_list, param_offsets)
    spans = [(offset, param.numel()) for offset, param in zip(offsets, lp_param_list, strict=True)]
    _check(lp_param_list, flat_hp_partition, spans, partition_start, partition_size)
    slices = Slices(dp_group, (partition_start, partition_size), spans, flat_hp_partition.device)
    if dp_group is None or dp_group.size() == 1:
        slices.gather()
    indices = _indices(spans, partition_start, partition_size, gaps=not use_offload)
    flat = weakref.ref(flat_hp_partition)
    unlink_hp_params(lp_param_list)
    for position, (param, (offset, numel)) in enumerate(zip(lp_param_list, spans, strict=True)):
        mapping = get_hp_fragment_mapping(
            param,
            offset,
            flat_hp_partition,
            gradient_dict,
            offload_gradient_dict,
            use_offload,
            param_group_index,
            partition_start,
            partition_size,
        )
        attributes: dict[str, Any] = {"_hp_mapping": mapping, "_dp_group": dp_group}
        if position in indices:
            attributes["_index_in_param_group"] = indices[position]
        for method in _METHODS:
            attributes[method] = _Bound(param, method)
        for name, value in attributes.items():
            setattr(param, name, value)
        note(param, FlatLink(slices, offset, numel, dp_group, flat, flat_hp_partition.dtype, flat_hp_partition.device))


def _offsets(params: Sequence[torch.Tensor], given: Sequence[int] | None) -> list[int]:
    """Where each parameter begins in the concatenation."""
    if given is None:
        return list(accumulate((param.numel() for param in params), initial=0))[:-1]
    offsets = [int(offset) for offset in given]
    if len(offsets) != len(params) or min(offsets, default=0) < 0:
        raise InvalidValueError(
            f"param_offsets is {offsets} for {len(params)} parameters: give each the element at which it begins, 0 or "
            "more"
        )
    taken = sorted((offset, offset + param.numel()) for offset, param in zip(offsets, params, strict=True))
    for (first, end), (begin, last) in pairwise(span for span in taken if span[0] < span[1]):
        if begin < end:
            raise InvalidValueError(
                f"param_offsets overlap: one parameter has the elements {first} to {end}, another {begin} to {last}"
            )
    return offsets


def _check(
    lp_param_list: Sequence[torch.Tensor],
    flat_hp_partition: torch.Tensor,
    spans: Sequence[tuple[int, int]],
    partition_start: int,
    partition_size: int,
) -> None:
    """Raise unless the parameters can be linked to this rank's partition; see `link_hp_params`."""
    if partition_start < 0 or partition_size < 0:
        raise InvalidValueError(
            f"partition_start is {partition_start} and partition_size {partition_size}, expected 0 or more elements"
        )
    parts = (overlap(start, numel, partition_start, partition_size) for start, numel in spans)
    needed = max((first + count - partition_start for first, count in parts if count), default=0)
    if flat_hp_partition.dim() != 1 or flat_hp_partition.numel() < needed:
        raise InvalidValueError(
            f"flat_hp_partition has shape {tuple(flat_hp_partition.shape)}, expected 1-D with at least {needed} "
            f"elements: the parameters' part of elements {partition_start} to {partition_start + partition_size}"
        )
    for i, param in enumerate(lp_param_list):
        if not param.is_contiguous():
            raise InvalidValueError(
                f"lp_param_list[{i}] of shape {tuple(param.shape)} is not contiguous: make it so before linking"
            )


def _indices(
    spans: Sequence[tuple[int, int]], partition_start: int, partition_size: int, *, gaps: bool
) -> dict[int, int]:
    """By position in ``spans``, the place in the list of gradients of what begins in the partition or reaches into it.

    Args:
        spans: (start, numel) of each parameter in the concatenation.
        partition_start: where the partition begins.
        partition_size: its elements.
        gaps: whether the list has an entry for each gap before a parameter.
    """
    found: dict[int, int] = {}
    index, end_of_last = 0, partition_start
    for position in sorted(range(len(spans)), key=lambda i: spans[i][0]):
        start, numel = spans[position]
        begins = partition_start <= start < partition_start + partition_size
        if not begins and not start < partition_start < start + numel:
            continue
        index += gaps and max(start, partition_start) > end_of_last
        found[position] = index
        index, end_of_last = index + 1, start + numel
    return found


def unlink_hp_params(lp_param_list: Sequence[torch.Tensor]) -> None:
    """Take away what `link_hp_params` set on the parameters; harmless on one that was never linked."""
    for param in lp_param_list:
        for name in _ATTRIBUTES:
            param.__dict__.pop(name, None)
        if forget(param, FlatLink) is not None:
            record_of(param).shardings.clear()
    registry.changed()  # another engine may hold them


def lazy_init_hp_params_optimizer_state(
    lp_param_list: Sequence[torch.Tensor],
    flat_hp_partition: torch.Tensor,
    optimizer_state: Mapping[Any, Mapping[str, Any]],
) -> None:
    """Link the optimizer's state to the parameters' fragments, after the optimizer has made it. No communication.

    Where the optimizer has no state for the partition (yet, or ever: SGD without momentum) nothing is linked, and
    reading state raises `StateNotReadyError`.

    Args:
        lp_param_list: parameters that were linked with `link_hp_params`.
        flat_hp_partition: this rank's flat partition, the key into ``optimizer_state``.
        optimizer_state: the optimizer's ``state``.

    Raises:
        UnlinkedParameterError: a parameter was never linked; nothing was written.
    """
    for param in lp_param_list:
        if not hasattr(param, "_hp_mapping"):
            raise UnlinkedParameterError(
                f"lp_param_list: a parameter of shape {tuple(param.shape)} is not linked: call link_hp_params first"
            )
    state = optimizer_state.get(flat_hp_partition)  # [] would make an entry: torch's `state` is a defaultdict
    for param in lp_param_list:
        mapping = param._hp_mapping  # type: ignore[attr-defined]
        if mapping is not None and state:
            mapping.set_optim_state_fragment(flat_hp_partition, state)


class _Bound:
    """A method on a parameter that holds the parameter weakly, so that it makes no reference cycle."""

    def __init__(self, param: torch.Tensor, name: str) -> None:
        self._param, self._name = weakref.ref(param), name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(single, self._name)(self._param(), *args, **kwargs)
