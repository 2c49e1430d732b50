"""Hand groups over to PyTorch's `DeviceMesh`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ._grid import RankGrid
from .errors import TopologyError

if TYPE_CHECKING:
    from ._bound import BoundTopology


def build_mesh(
    bound: BoundTopology, axes: tuple[str, ...], names: tuple[str, ...] | None, device_type: str | None
) -> DeviceMesh:
    """The mesh that `BoundTopology.to_device_mesh` returns."""
    topology = bound.topology
    if not axes:
        axes = topology.default_axes() or ("dp",)
    names = axes if names is None else tuple(names)
    if len(names) != len(axes):
        raise TopologyError(f"names={names} must name each of the axes {axes}")
    grid = rank_grid(topology, axes, bound.rank)  # all input is checked before any group is made
    groups = [bound.group(axis) for axis in axes]
    return DeviceMesh.from_group(groups, device_type or _device_type(), mesh=grid, mesh_dim_names=names)


def rank_grid(topology: RankGrid, axes: tuple[str, ...], rank: int) -> torch.Tensor:
    """Global ranks around ``rank``: one tensor dimension an axis, int64, contiguous.

    Raises:
        TopologyError: the axes overlap, or do not span a grid.
    """
    try:
        topology.axis(tuple(axes))  # refuses axes that cannot be mixed
    except TopologyError as error:
        raise TopologyError(f"axes {axes} overlap; each may vary in one dimension only: {error}") from None
    corner = rank
    for axis in axes:
        corner = topology.ranks(axis, corner)[0]
    flat = [corner]
    for axis in axes:
        flat = [member for start in flat for member in topology.ranks(axis, start)]
    grid = torch.tensor(flat, dtype=torch.int64).reshape([topology.size(axis) for axis in axes])
    return grid.contiguous()


def _device_type() -> str:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return "cpu"
    backends = dict(pair.split(":") for pair in dist.get_backend_config().split(","))
    return accelerator.type if backends.get(accelerator.type, "gloo") != "gloo" else "cpu"
