"""Hand groups over to PyTorch's `DeviceMesh`, and take a topology from one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, combinations
from math import prod
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ._digits import Factor
from ._grid import AxisName, RankGrid
from ._names import parse_axis
from ._torch_mesh import MeshDim, RootMesh, find_root, make_slice, rank_grid
from .errors import TopologyError

if TYPE_CHECKING:
    from ._bound import BoundTopology


def build_mesh(
    bound: BoundTopology, axes: tuple[AxisName, ...], names: tuple[str, ...] | None, device_type: str | None
) -> DeviceMesh:
    """The mesh that `BoundTopology.to_device_mesh` returns."""
    dims = mesh_dims(bound, axes, names)
    grid = rank_grid(bound, dims)  # all input is checked before any group is made
    kind = device_type or _device_type()
    # FSDP1 treats a mesh of all ranks as one only where it is its own root.
    whole = grid.numel() == len(bound.topology.span) and grid.flatten().tolist() == list(bound.topology.span)
    of_root = dims if whole else root_dims(bound.topology)
    key = (kind, *of_root)
    root = bound.roots.get(key)
    if root is None:
        root = bound.roots[key] = RootMesh(bound, kind, of_root)
    return make_slice(root, dims)


def root_dims(topology: RankGrid) -> list[MeshDim]:
    """One dimension a digit with more than one rank, the slowest varying first."""
    digits = [digit for digit in reversed(topology.digits) if digit.size > 1] or [topology.digits[0]]
    return [MeshDim(digit.name, (digit.name,), (Factor(digit.size, digit.stride),)) for digit in digits]


def mesh_dims(bound: BoundTopology, axes: Sequence[AxisName], names: Sequence[str] | None) -> list[MeshDim]:
    """The dimensions of a mesh of ``axes``; without any, those of the plan's digits with more than one rank.

    Raises:
        TopologyError: an axis is not known, two overlap, they have no strides, or ``names`` does not fit.
    """
    topology = bound.topology
    if not axes:
        axes = _default_axes(topology)
    spelled = [axis if isinstance(axis, str) else "_".join(axis) for axis in axes]
    chosen = spelled if names is None else list(names)
    if len(chosen) != len(axes) or len(set(chosen)) != len(chosen):
        raise TopologyError(f"names={names} must name each of the axes {tuple(spelled)} once")
    parts = [parse_axis(axis, topology.names) for axis in axes]
    topology.axis(tuple(chain.from_iterable(parts)))  # refuses axes that overlap or cannot be mixed
    return [MeshDim(name, axis, axis_factors(topology, axis)) for name, axis in zip(chosen, parts, strict=True)]


def axis_factors(topology: RankGrid, axis: tuple[str, ...]) -> tuple[Factor, ...]:
    """The strides that the positions of the ranks along ``axis`` take, the fastest first.

    Raises:
        TopologyError: they take none, as where experts cut into several axes unevenly.
    """
    found = topology.axis(axis)
    if found.factors is None:
        raise TopologyError(
            f"the ranks along {found.name!r} are no strides of the plan, which is all that a DeviceMesh can hold; "
            "use group() for this axis"
        )
    return found.factors


def take_mesh(mesh: DeviceMesh) -> tuple[RankGrid, dict[str, dist.ProcessGroup]]:
    """The topology that a mesh was cut from, and the mesh's groups by axis.

    Raises:
        TopologyError: the mesh has no names where it needs them, or numbers ranks unlike its groups.
    """
    root = find_root(mesh)
    names = root.mesh_dim_names or tuple(f"dim_{place}" for place in range(root.ndim))
    grid = _grid_of(root.mesh, names, {})
    aliases: dict[str, tuple[str, ...]] = {}
    if {"dp_shard", "dp_replicate"} <= set(names) and "dp" not in names:
        aliases["dp"] = ("dp_shard", "dp_replicate")
    rank = dist.get_rank()
    inside = mesh.get_coordinate() is not None
    for place, name in enumerate(mesh.mesh_dim_names or ()):
        if inside and name not in names:
            aliases[name] = _joined(grid, names, _along(mesh, place), name, rank)
    grid = _grid_of(root.mesh, names, aliases)
    groups: dict[str, dist.ProcessGroup] = {}
    for part in (mesh, root):
        filled = "_dim_group_names" in vars(part) or "_dim_group_infos" in vars(part)
        for place, name in enumerate(part.mesh_dim_names or names):
            if inside and filled and name not in groups:
                groups[name] = _adopted(part, place, name)
    return grid, groups


def _grid_of(ranks: torch.Tensor, names: Sequence[str], aliases: dict[str, tuple[str, ...]]) -> RankGrid:
    flat = ranks.flatten().tolist()
    consecutive = range(flat[0], flat[0] + len(flat))
    return RankGrid(
        dict(reversed(list(zip(names, ranks.shape, strict=True)))),
        span=consecutive if flat == list(consecutive) else flat,
        world_size=dist.get_world_size(),
        aliases=aliases,
    )


def _joined(grid: RankGrid, names: Sequence[str], ranks: list[int], name: str, rank: int) -> tuple[str, ...]:
    """The dimensions of the root that a flattened one joins."""
    for count in range(1, len(names) + 1):
        for choice in combinations(reversed(names), count):
            if prod(grid.size(part) for part in choice) == len(ranks) and list(grid.ranks(choice, rank)) == ranks:
                return choice
    raise TopologyError(f"dimension {name!r} with the ranks {ranks} is no union of the dimensions {tuple(names)}")


def _along(mesh: DeviceMesh, place: int) -> list[int]:
    here = mesh.get_coordinate() or ()
    where = tuple(slice(None) if at == place else step for at, step in enumerate(here))
    ranks: list[int] = mesh.mesh[where].tolist()
    return ranks


def _adopted(mesh: DeviceMesh, place: int, name: str) -> dist.ProcessGroup:
    group = mesh.get_group(place)
    ranks, numbered = _along(mesh, place), dist.get_process_group_ranks(group)
    if ranks != numbered:
        raise TopologyError(
            f"dimension {name!r} of the mesh has the ranks {ranks} in this order, and its process group numbers them "
            f"{numbered}; make the mesh with ascending ranks along each dimension"
        )
    return group


def _default_axes(topology: RankGrid) -> tuple[str, ...]:
    """The digits with more than one rank, the slowest first; an alias of several stands for them where it can."""
    names = [digit.name for digit in reversed(topology.digits)]
    whole = topology.aliases.get("dp", ())
    axes: list[str] = []
    for name in names:
        axis = "dp" if name in whole else name
        if axis not in axes and topology.size(axis) > 1:
            axes.append(axis)
    return tuple(axes) or ("dp" if whole else names[-1],)


def _device_type() -> str:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return "cpu"
    backends = dict(pair.split(":") for pair in dist.get_backend_config().split(","))
    return accelerator.type if backends.get(accelerator.type, "gloo") != "gloo" else "cpu"
