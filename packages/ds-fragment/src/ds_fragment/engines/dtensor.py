"""DTensor parameters: FSDP2, tensor parallelism, both at once, and hybrid sharding.

The layout comes from the placements alone. Where one mesh axis shards, its group exchanges the pieces; where several
do, the ranks of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from ds_fragment.engines.base import (
    Adapter,
    entries_of,
    is_state,
    is_weight,
    missing_gradient,
    state_entry,
    state_of,
    value_kind,
)
from ds_fragment.engines.gradient import require_current
from ds_fragment.engines.loaded import are_dtensors, is_dtensor
from ds_fragment.engines.state import about, are_dense, dense, require_whole
from ds_fragment.errors import GradientUnavailableError, InvalidValueError
from ds_fragment.layout import Layout, chunk, mesh_layout, whole
from ds_fragment.record import record_of, registry
from ds_fragment.sharding import Sharding

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement

_spec, _local, _grad = attrgetter("_spec"), attrgetter("_local_tensor"), attrgetter("grad")
_placements, _mesh = attrgetter("_spec.placements"), attrgetter("_spec.mesh")
_dtype, _shape = attrgetter("dtype"), attrgetter("shape")


class DTensorAdapter(Adapter):
    """Claims every DTensor."""

    name = "dtensor"

    def claims(self, param: torch.Tensor) -> bool:
        """Whether it is a DTensor."""
        return is_dtensor(param)

    def sharding(self, param: torch.Tensor, what: str) -> Sharding:
        """Computed from the placements of the parameter, or of state that is placed otherwise: see [Note: kinds]."""
        assert is_dtensor(param)
        if not is_state(what):
            return _sharding_like(param, param, ("like", param.dtype))
        entry = state_entry(state_of(param, param), param, what, quantised=True)
        home = _sharding_like(param, param, ("like", param.dtype))
        if is_dtensor(entry):
            mesh = entry.device_mesh == param.device_mesh
            alike = mesh and entry.placements == param.placements and entry.shape == param.shape
            tensor, kind = (param, "like") if alike else (entry, what)
            try:
                return _sharding_like(param, tensor, (kind, entry.dtype))
            except InvalidValueError as error:
                raise InvalidValueError(f"{about(param, what)}: {error}") from None
        if home.shards:
            require_whole(entry, param, what)
        return Sharding(entry.shape, entry.dtype, entry.device, whole(entry.shape), None)

    def versions(self, params: Sequence[torch.Tensor]) -> Sequence[object]:
        """The specs."""
        return list(map(_spec, params))

    def like_values(self, params: Sequence[torch.Tensor], what: str) -> bool:
        """Gradients, and state that is placed like its parameter."""
        if not is_state(what):
            return what == "grad"
        entries = entries_of(params, what)
        alike = (_dtype, _shape, _placements, _mesh)
        return are_dtensors(entries) and all(list(map(of, entries)) == list(map(of, params)) for of in alike)

    def pieces(self, params: Sequence[torch.Tensor], what: str) -> list[torch.Tensor | None]:
        """The local tensors."""
        if is_weight(what):
            return list(map(_local, params))
        if what == "grad":
            self._require_reduced(params)
            with torch._C.DisableTorchFunctionSubclass():  # twice as fast
                grads: list[Any] = list(map(_grad, params))
            if are_dtensors(grads) and (
                all(map(is_, map(_spec, grads), map(_spec, params)))  # as FSDP2 has them, and told fast
                or list(map(_placements, grads)) == list(map(_placements, params))
            ):
                for param in params:
                    require_current(param, param)
                return list(map(_local, grads))
            return list(map(_local_gradient, params))
        entries = entries_of(params, what)
        if are_dtensors(entries):
            locals_ = list(map(_local, entries))
        else:
            locals_ = [entry._local_tensor if is_dtensor(entry) else entry for entry in entries]
        if are_dense(locals_):
            return locals_
        return [dense(local, param, what) for local, param in zip(locals_, params, strict=True)]

    def local(self, param: torch.Tensor, what: str) -> torch.Tensor:
        """The local tensor, of the fragment's box."""
        assert is_dtensor(param)
        if is_weight(what):
            return param._local_tensor.detach()
        if what == "grad":
            self._require_reduced([param])
            return _local_gradient(param)
        entry = state_entry(state_of(param, param), param, what, quantised=True)
        return dense(entry._local_tensor.detach(), param, what) if is_dtensor(entry) else entry

    def _require_reduced(self, params: Sequence[torch.Tensor]) -> None:
        """Raise `GradientUnavailableError` if the engine has not reduced a gradient of the parameters yet."""

    def state_keys(self, param: torch.Tensor) -> list[str]:
        """The keys of the optimizer's state."""
        return list(state_of(param, param))

    def master(self, param: torch.Tensor) -> str:
        """``"upcast"`` for a low-precision parameter."""
        return value_kind(param.dtype)


def _local_gradient(param: Any) -> torch.Tensor:
    grad = param.grad
    if grad is None:
        raise missing_gradient(param, hidden=True)
    if not is_dtensor(grad) or grad.placements != param.placements:
        raise GradientUnavailableError(
            f"{registry.name_of(param)} has a gradient placed {getattr(grad, 'placements', None)} where the "
            f"parameter is placed {param.placements}: redistribute it first"
        )
    require_current(param, param)
    return grad._local_tensor.detach()


def _sharding_like(param: DTensor, tensor: DTensor, kind: tuple[str, torch.dtype]) -> Sharding:
    """The sharding of a quantity that is placed like ``tensor``; ``kind`` has its key and dtype."""
    return record_of(param).sharding(kind, tensor._spec, lambda: mesh_sharding(tensor, kind[1]))


def mesh_sharding(tensor: DTensor, dtype: torch.dtype) -> Sharding:
    """Where a quantity of a dtype is that is placed like ``tensor``.

    Raises:
        InvalidValueError: a placement is a partial sum, which no rank holds the value of.
    """
    mesh, placements, shape, device = tensor.device_mesh, tensor.placements, tensor.shape, tensor.device
    if any(placement.is_partial() for placement in placements):
        raise InvalidValueError(
            f"a DTensor placed {placements} is a partial sum: redistribute it to Shard or Replicate first"
        )
    dims = [_dim_of(placement, tensor.dim()) for placement in placements]
    sizes = [mesh.size(axis) for axis in range(mesh.ndim)]
    sharding = [axis for axis, dim in enumerate(dims) if dim is not None and sizes[axis] > 1]
    replicas = tuple(mesh.get_group(axis) for axis, dim in enumerate(dims) if dim is None and sizes[axis] > 1)
    if not sharding:
        return Sharding(shape, dtype, device, whole(shape), None, replicas)
    if len(sharding) == 1:
        axis = sharding[0]
        layout = mesh_layout(shape, [sizes[axis]], [dims[axis]])
        return Sharding(shape, dtype, device, layout, mesh.get_group(axis), replicas)
    # An axis that shards what the axes to its right have sharded already cuts after them.
    strided = [axis for axis in sharding if type(placements[axis]).__name__ == "_StridedShard"]
    order = [axis for axis in range(mesh.ndim) if axis not in strided] + strided[::-1]
    if mesh.size() == dist.get_world_size():
        layout = mesh_layout(shape, sizes, dims, order)
        there = mesh.mesh.flatten().tolist()  # the rank at each position in the mesh
        fragments = tuple(layout.fragments[there.index(rank)] for rank in range(len(there)))
        copies = frozenset(there[position] for position in layout.copies)
        return Sharding(shape, dtype, device, Layout(layout.shape, fragments, copies), dist.group.WORLD)
    cuts = [(axis, dim) for axis in order if axis in sharding and (dim := dims[axis]) is not None]
    layout, ranks = _over_axes(tensor, sharding, order)
    return Sharding(shape, dtype, device, layout, None, replicas, _stages(tensor, dtype, cuts), ranks)


def _over_axes(tensor: DTensor, axes: Sequence[int], order: Sequence[int]) -> tuple[Layout, tuple[int, ...]]:
    """The layout over some axes of the mesh, in which they cut, and its global ranks: those around this rank."""
    mesh, placements = tensor.device_mesh, tensor.placements
    dims = [_dim_of(placements[axis], tensor.dim()) for axis in axes]
    turns = [axes.index(axis) for axis in order if axis in axes]
    layout = mesh_layout(tensor.shape, [mesh.size(axis) for axis in axes], dims, turns)
    at = tuple(slice(None) if axis in axes else mesh.get_local_rank(axis) for axis in range(mesh.ndim))
    return layout, tuple(mesh.mesh[at].flatten().tolist())


def _stages(tensor: DTensor, dtype: torch.dtype, cuts: Sequence[tuple[int, int]]) -> tuple[Sharding, ...]:
    """See [Note: stages] of `Sharding`; the cuts are (mesh axis, dimension) in the order in which they were made."""
    mesh, shape, stages = tensor.device_mesh, torch.Size(tensor.shape), list[Sharding]()
    for axis, dim in cuts:
        group, size = mesh.get_group(axis), mesh.size(axis)
        stages.append(Sharding(shape, dtype, tensor.device, mesh_layout(shape, [size], [dim]), group))
        _, length = chunk(shape[dim], size, mesh.get_local_rank(axis))
        shape = torch.Size([length if other == dim else numel for other, numel in enumerate(shape)])
    return tuple(reversed(stages))


def _dim_of(placement: Placement, ndim: int) -> int | None:
    if not (placement.is_shard() or type(placement).__name__ == "_StridedShard"):
        return None
    dim: int = placement.dim  # type: ignore[attr-defined]
    return dim % ndim
