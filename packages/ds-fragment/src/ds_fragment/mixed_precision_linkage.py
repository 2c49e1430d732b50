"""Link low-precision parameters to a flat fp32 partition, with DeepSpeed's signatures and attributes."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from ds_fragment import _api
from ds_fragment._fragment import get_hp_fragment_mapping
from ds_fragment._layout import flat_layout, overlap
from ds_fragment._links import FlatLink, set_link
from ds_fragment._registry import registry
from ds_fragment.errors import InvalidValueError, UnlinkedParameterError

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
) -> None:
    """Tell each lp parameter which part of this rank's flat fp32 partition is its own.

    Every rank of the group links the same parameters in the same order; no communication. Afterwards each parameter
    has ``_hp_mapping`` (a `tensor_fragment`, None where this rank holds no part), ``_dp_group``,
    ``_index_in_param_group`` (its place among the parameters in this partition) and the methods ``get_full_hp_param``,
    ``get_full_hp_grad``, ``set_full_hp_param`` and ``set_full_hp_grad``. The partition and the gradient table are held
    weakly where Python allows.

    Args:
        lp_param_list: the parameters, contiguous, in the order in which the partition concatenates them.
        flat_hp_partition: this rank's slice of the concatenation, fp32, 1-D, at least as long as its part.
        gradient_dict: reduced gradients, ``gradient_dict[param_group_index][index_in_param_group]``, 1-D.
        offload_gradient_dict: the same for an offloaded optimizer.
        use_offload: which of the two is read.
        param_group_index: the key into the gradient table.
        partition_start: where this rank's slice begins, in elements: its group rank times ``partition_size``.
        partition_size: elements in each rank's slice, padding included.
        dp_group: the ranks that the concatenation is cut over; None for one rank alone.

    Raises:
        InvalidValueError: a parameter is not contiguous, or the partition is not where ``partition_start`` says or too
            short; nothing was linked.
    """
    world_size, rank = (1, 0) if dp_group is None else (dp_group.size(), dp_group.rank())
    _check(lp_param_list, flat_hp_partition, partition_start, partition_size, world_size, rank)
    index, offset = 0, 0
    flat = weakref.ref(flat_hp_partition)
    for param in lp_param_list:
        unlink_hp_params([param])
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
        if mapping is not None or (not param.numel() and partition_start <= offset < partition_start + partition_size):
            attributes["_index_in_param_group"] = index
            index += 1
        for method in _METHODS:
            attributes[method] = _Bound(param, method)
        for name, value in attributes.items():
            setattr(param, name, value)
        layout = flat_layout(offset, param.numel(), partition_size, world_size)
        set_link(param, FlatLink(layout, dp_group, flat, flat_hp_partition.dtype, flat_hp_partition.device))
        offset += param.numel()


def _check(
    lp_param_list: Sequence[torch.Tensor],
    flat_hp_partition: torch.Tensor,
    partition_start: int,
    partition_size: int,
    world_size: int,
    rank: int,
) -> None:
    """Raise unless the parameters can be linked to this rank's partition; see `link_hp_params`."""
    total = sum(param.numel() for param in lp_param_list)
    if partition_start != rank * partition_size:
        raise InvalidValueError(
            f"partition_start is {partition_start} on group rank {rank}, expected rank * partition_size = {rank} * "
            f"{partition_size} = {rank * partition_size}: partitions are equal slices in rank order"
        )
    if partition_size * world_size < total:
        raise InvalidValueError(
            f"partition_size {partition_size} * {world_size} ranks = {partition_size * world_size} elements cannot "
            f"hold the {total} of lp_param_list: pass at least {-(-total // world_size)}"
        )
    needed = overlap(0, total, partition_start, partition_size)[1]
    if flat_hp_partition.dim() != 1 or flat_hp_partition.numel() < needed:
        raise InvalidValueError(
            f"flat_hp_partition has shape {tuple(flat_hp_partition.shape)}, expected 1-D with at least {needed} "
            f"elements on group rank {rank}"
        )
    for i, param in enumerate(lp_param_list):
        if not param.is_contiguous():
            raise InvalidValueError(
                f"lp_param_list[{i}] of shape {tuple(param.shape)} is not contiguous: make it so before linking"
            )


def unlink_hp_params(lp_param_list: Sequence[torch.Tensor]) -> None:
    """Take away what `link_hp_params` set on the parameters; harmless on one that was never linked."""
    for param in lp_param_list:
        for name in _ATTRIBUTES:
            param.__dict__.pop(name, None)
        set_link(param, None)
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
        return getattr(_api, self._name)(self._param(), *args, **kwargs)
