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
from torch.distributed.device_mesh import DeviceMesh

from ds_fragment._adapters._base import Adapter, entries_of, missing_gradient, state_entry, state_of, value_kind
from ds_fragment._gradient import require_current
from ds_fragment._layout import Layout, mesh_layout, whole
from ds_fragment._loaded import are_dtensors, is_dtensor
from ds_fragment._place import Place
from ds_fragment._registry import record_of, registry
from ds_fragment._state import about, are_dense, dense, is_piece
from ds_fragment.errors import GradientUnavailableError, InvalidValueError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement

_spec, _local, _grad = attrgetter("_spec"), attrgetter("_local_tensor"), attrgetter("grad")
_placements = attrgetter("_spec.placements")


class DTensorAdapter(Adapter):
    """Claims every DTensor."""

    name = "dtensor"

    def claims(self, param: torch.Tensor) -> bool:
        """Whether it is a DTensor."""
        return is_dtensor(param)

    def place(self, param: torch.Tensor, what: str) -> Place:
        """Computed from the placements of the parameter, or of state that is placed otherwise: see [Note: kinds]."""
        assert is_dtensor(param)
        if what in ("value", "grad"):
            return _place_like(param, param, ("like", param.dtype))
        entry = state_entry(state_of(param, param), param, what, quantised=True)
        home = _place_like(param, param, ("like", param.dtype))
        if is_dtensor(entry):
            mesh = entry.device_mesh == param.device_mesh
            alike = mesh and entry.placements == param.placements and entry.shape == param.shape
            tensor, kind = (param, "like") if alike else (entry, what)
            try:
                return _place_like(param, tensor, (kind, entry.dtype))
            except InvalidValueError as error:
                raise InvalidValueError(f"{about(param, what)}: {error}") from None
        if home.group is not None and is_piece(entry, param, what):
            return _place_like(param, param, ("like", entry.dtype))
        return Place(entry.shape, entry.dtype, entry.device, whole(entry.shape), None)

    def stamps(self, params: Sequence[torch.Tensor], what: str) -> Sequence[object]:
        """What DTensors say of how they are placed, and who updates them."""
        specs = list(map(_spec, params))
        if what in ("value", "grad"):
            return specs
        entries = entries_of(params, what)
        if are_dtensors(entries):
            return [specs, list(map(_spec, entries))]
        kinds = [e._spec if is_dtensor(e) else (e.shape, e.dtype, e.device) for e in entries]
        return [specs, kinds]

    def pieces(self, params: Sequence[torch.Tensor], what: str) -> list[torch.Tensor | None]:
        """The local tensors."""
        if what == "value":
            return list(map(_local, params))
        if what == "grad":
            with torch._C.DisableTorchFunctionSubclass():  # twice as fast
                grads: list[Any] = list(map(_grad, params))
            if are_dtensors(grads) and (
                all(map(is_, map(_spec, grads), map(_spec, params)))  # as FSDP2 has them, and told fast
                or list(map(_placements, grads)) == list(map(_placements, params))
            ):
                for param in params:
                    require_current(param, param)
                return list(map(_local, grads))
            return [DTensorAdapter.local(self, param, what) for param in params]
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
        if what == "value":
            return param._local_tensor.detach()
        if what == "grad":
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
        entry = state_entry(state_of(param, param), param, what, quantised=True)
        return dense(entry._local_tensor.detach(), param, what) if is_dtensor(entry) else entry

    def state_keys(self, param: torch.Tensor) -> list[str]:
        """The keys of the optimizer's state."""
        return list(state_of(param, param))

    def master(self, param: torch.Tensor) -> str:
        """``"upcast"`` for a low-precision parameter."""
        return value_kind(param.dtype)


def _place_like(param: DTensor, tensor: DTensor, kind: tuple[str, torch.dtype]) -> Place:
    """Where a quantity of the parameter is that is placed like ``tensor``; a kind is placed alike, of one dtype."""

    def make() -> Place:
        layout, group, replicas = mesh_place(tensor)
        return Place(tensor.shape, kind[1], tensor.device, layout, group, replicas)

    return record_of(param).place(kind, tensor._spec, make)


def mesh_place(tensor: DTensor) -> tuple[Layout, dist.ProcessGroup | None, tuple[dist.ProcessGroup, ...]]:
    """The layout of a DTensor, the group whose ranks it runs over (None where all is replicated), and the replicas'.

    Raises:
        InvalidValueError: a placement is a partial sum, which no rank holds the value of.
    """
    mesh, placements = tensor.device_mesh, tensor.placements
    if any(placement.is_partial() for placement in placements):
        raise InvalidValueError(
            f"a DTensor placed {placements} is a partial sum: redistribute it to Shard or Replicate first"
        )
    dims = [_dim_of(placement, tensor.dim()) for placement in placements]
    sizes = [mesh.size(axis) for axis in range(mesh.ndim)]
    sharding = [axis for axis, dim in enumerate(dims) if dim is not None and sizes[axis] > 1]
    replicas = tuple(mesh.get_group(axis) for axis, dim in enumerate(dims) if dim is None and sizes[axis] > 1)
    if not sharding:
        return whole(tensor.shape), None, replicas
    if len(sharding) == 1:
        axis = sharding[0]
        return mesh_layout(tensor.shape, [sizes[axis]], [dims[axis]]), mesh.get_group(axis), replicas
    # An axis that shards what the axes to its right have sharded already cuts after them.
    strided = [axis for axis in sharding if type(placements[axis]).__name__ == "_StridedShard"]
    if mesh.size() == dist.get_world_size():
        order = [axis for axis in range(mesh.ndim) if axis not in strided] + strided[::-1]
        layout = mesh_layout(tensor.shape, sizes, dims, order)
        ranks = mesh.mesh.flatten().tolist()  # by position in the mesh
        fragments = [layout.fragments[ranks.index(rank)] for rank in range(len(ranks))]
        copies = frozenset(ranks[position] for position in layout.copies)
        return Layout(layout.shape, tuple(fragments), copies), dist.group.WORLD, ()
    order = [i for i, axis in enumerate(sharding) if axis not in strided]
    order += [i for i, axis in reversed(list(enumerate(sharding))) if axis in strided]
    layout = mesh_layout(tensor.shape, [sizes[axis] for axis in sharding], [dims[axis] for axis in sharding], order)
    return layout, _group_over(mesh, sharding), replicas


def _dim_of(placement: Placement, ndim: int) -> int | None:
    if not (placement.is_shard() or type(placement).__name__ == "_StridedShard"):
        return None
    dim: int = placement.dim  # type: ignore[attr-defined]
    return dim % ndim


def _group_over(mesh: DeviceMesh, axes: list[int]) -> dist.ProcessGroup:
    names = mesh.mesh_dim_names
    if names is None:
        raise InvalidValueError(
            f"a parameter is sharded over {len(axes)} axes of a device mesh without names: pass mesh_dim_names to "
            "init_device_mesh"
        )
    part = mesh[tuple(names[axis] for axis in axes)]
    return part._flatten().get_group()
