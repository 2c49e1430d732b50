"""The one file that touches the private parts of PyTorch's `DeviceMesh`: meshes over groups that exist already.

[Note: root mesh] PyTorch answers questions about a mesh from its *root*: which ranks flattening joins, whether two
meshes belong together (FSDP2 with tensor parallelism), what ``root["tp"]`` is. A mesh that is made of some of the
world's ranks is its own root, and PyTorch then takes the ranks of other pipeline stages for nobody's: flattening it
joins ranks of different stages. So every mesh here is a slice of one root that holds all ranks of the plan.

[Note: bound mesh] Slices of a plain mesh that flatten or slice further have PyTorch make groups, by all ranks of the
world in one order. `BoundMesh` asks the topology for them instead. It is pickled and copied as a plain `DeviceMesh`.
`torch.compile` takes no subclass of it before PyTorch 2.12, where a mesh of one dimension, which is what compiled
tensor parallel code holds, is therefore a plain one.

[Note: two kinds] PyTorch 2.6 to 2.9 keeps a tensor of ranks in each mesh and its root in a table beside it. From 2.10
on, a mesh is a layout, sizes and strides over the ranks of the root, and holds its root. Both are tried after
every construction: a mesh that does not answer as it should is an error, whatever PyTorch changed.
"""

from __future__ import annotations

import copyreg
import inspect
from collections.abc import Sequence
from functools import cache
from itertools import chain
from math import prod
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, SupportsIndex

import torch
import torch.distributed as dist
from torch.distributed import device_mesh
from torch.distributed.device_mesh import DeviceMesh

from ._digits import Factor, offsets
from .errors import TopologyError, UnsupportedTorchError

if TYPE_CHECKING:
    from ._bound import BoundTopology

try:
    from torch.distributed import _mesh_layout
except ImportError:  # PyTorch 2.9 and older
    _mesh_layout = None  # type: ignore[assignment]

Kind = Literal["tensor", "layout"]

_LAYOUT_ARGUMENTS = {"_layout", "_rank_map", "_root_mesh", "_init_backend"}
_OURS = ("_bound", "_dims", "_known")


class MeshDim(NamedTuple):
    """One dimension of a mesh.

    Attributes:
        name: in the mesh.
        axis: names of the topology's digits, the slowest varying first.
        factors: the strides that its positions take in the span of the plan, the fastest first.
    """

    name: str
    axis: tuple[str, ...]
    factors: tuple[Factor, ...]


class BoundMesh(DeviceMesh):
    """A slice of a `RootMesh`; see [Note: bound mesh]."""

    _bound: BoundTopology
    _dims: tuple[MeshDim, ...]

    # Pickles, and whoever asks for the class by this name, see the class that they know how to handle.
    __class__ = property(lambda self: DeviceMesh)

    def __getitem__(self, mesh_dim_names: str | tuple[str, ...]) -> DeviceMesh:
        """The slice with these dimensions; the members of their groups must call where a group is not made yet.

        Raises:
            KeyError: no such dimension, or another order than this mesh has.
        """
        names = (mesh_dim_names,) if isinstance(mesh_dim_names, str) else tuple(mesh_dim_names)
        own = [dim.name for dim in self._dims]
        if list(names) == own:
            return self
        known = self._choices()
        unknown = [name for name in names if name not in known]
        if unknown:
            raise KeyError(f"{unknown[0]!r} is no dimension of this mesh: {', '.join(known)}")
        places = [own.index(name) for name in names if name in own]
        if places != sorted(set(places)):
            raise KeyError(f"{names}: dimensions must be asked for in the order of the mesh, {tuple(own)}")
        return make_slice(_root_of(self), [known[name] for name in names])

    def _choices(self) -> dict[str, MeshDim]:
        return {dim.name: dim for dim in self._dims}

    def _flatten(self, mesh_dim_name: str | None = None, backend_override: Any = None) -> DeviceMesh:
        """The mesh with all dimensions of this one joined; the members of its group must call.

        Args:
            mesh_dim_name: default the names of the dimensions, joined with underscores.
            backend_override: not supported; groups have the options that `bind` was given.

        Raises:
            TopologyError: the name is taken, or the group numbers these ranks in another order.
        """
        if backend_override is not None:
            raise TopologyError("backend_override: groups have the options of bind(); give them there")
        name = mesh_dim_name or "_".join(dim.name for dim in self._dims)
        if len(self._dims) == 1 and name == self._dims[0].name:
            return self
        axis = tuple(chain.from_iterable(dim.axis for dim in self._dims))
        factors = tuple(chain.from_iterable(dim.factors for dim in reversed(self._dims)))
        root = _root_of(self)
        mesh = make_slice(root, [MeshDim(name, axis, factors)])
        if hasattr(root, "_flatten_mapping") and name not in {dim.name for dim in root._dims}:
            root._flatten_mapping[name] = mesh  # DTensor looks here for one group over several dimensions
        return mesh

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        state = {key: value for key, value in self.__dict__.items() if key not in (*_OURS, "_pg_registry")}
        return copyreg.__newobj__, (DeviceMesh,), state  # type: ignore[attr-defined]


class RootMesh(BoundMesh):
    """All ranks of a plan in the order of its span. Its groups are made when they are asked for.

    Args:
        bound: whose groups it has.
        device_type: of the mesh.
        dims: its dimensions, which hold every rank, the slowest varying first.
    """

    def __init__(self, bound: BoundTopology, device_type: str, dims: Sequence[MeshDim]) -> None:
        ranks = torch.tensor(list(bound.topology.span), dtype=torch.int, device="cpu")
        super().__init__(
            device_type,
            ranks.reshape([prod(factor.size for factor in dim.factors) for dim in dims]),
            mesh_dim_names=tuple(dim.name for dim in dims),
            _init_backend=False,
        )
        self._bound = bound
        self._dims = tuple(dims)
        self._known = {dim.name: dim for dim in self._dims}

    def get_group(self, mesh_dim: int | str | None = None) -> dist.ProcessGroup:
        """The group along one dimension, made now unless it exists; its members must call."""
        if mesh_dim is None and len(self._dims) > 1:
            raise RuntimeError(f"mesh_dim is needed: this mesh has the dimensions {tuple(self._known)}")
        dim = self._dims[mesh_dim or 0] if not isinstance(mesh_dim, str) else self._known[mesh_dim]
        return self[dim.name].get_group() if len(self._dims) > 1 else self._bound.group(dim.axis)

    @property
    def _dim_group_names(self) -> Any:  # type: ignore[override]
        return [self.get_group(place).group_name for place in range(len(self._dims))]

    @property
    def _dim_group_infos(self) -> Any:
        return [_group_info(self.get_group(place)) for place in range(len(self._dims))]

    def _choices(self) -> dict[str, MeshDim]:
        return self._known

    def learn(self, dim: MeshDim) -> None:
        """Take a name for good, so that ``root[name]`` has one meaning.

        Raises:
            TopologyError: the name means something else.
        """
        topology = self._bound.topology
        known = self._known[dim.name].axis if dim.name in self._known else dim.axis
        if dim.name not in self._known and dim.name in topology.names:
            known = (dim.name,)
        if topology.axis(known).key != topology.axis(dim.axis).key:
            raise TopologyError(
                f"names: {dim.name!r} is the axis {'_'.join(known)} in the meshes of this topology and cannot be "
                f"{'_'.join(dim.axis)} too; choose another name"
            )
        self._known.setdefault(dim.name, dim)


def make_slice(root: RootMesh, dims: Sequence[MeshDim]) -> DeviceMesh:
    """The mesh of these dimensions around this rank. The members of its groups must call.

    Raises:
        TopologyError: dimensions overlap, a name is taken, or a group numbers its ranks unlike the mesh.
        UnsupportedTorchError: PyTorch's mesh does not answer as it should.
    """
    kept = mesh_kind()  # all that can be wrong is known before any group is made
    bound = root._bound
    grid = rank_grid(bound, dims)
    for dim in dims:
        _check_order(bound, dim)
        root.learn(dim)
    groups = [bound.group(dim.axis) for dim in dims]
    kind = BoundMesh if len(dims) > 1 or _compiles_subclasses() else DeviceMesh
    mesh: DeviceMesh = kind.__new__(kind)
    names = tuple(dim.name for dim in dims)
    if kept == "layout":
        DeviceMesh.__init__(
            mesh,
            root.device_type,
            _layout=_make_layout([dim.factors for dim in dims]),
            _rank_map=root._rank_map,
            mesh_dim_names=names,
            _root_mesh=root,
            _init_backend=False,
        )
    else:
        DeviceMesh.__init__(mesh, root.device_type, grid, mesh_dim_names=names, _init_backend=False)
        tables: Any = device_mesh._mesh_resources
        tables.child_to_root_mapping[mesh] = root
    if isinstance(mesh, BoundMesh):
        mesh._bound, mesh._dims = bound, tuple(dims)
    if hasattr(root, "_pg_registry"):
        root._pg_registry.update({group.group_name: group for group in groups})
    if _keeps_infos():
        vars(mesh)["_dim_group_infos"] = [_group_info(group) for group in groups]
    else:
        vars(mesh)["_dim_group_names"] = [group.group_name for group in groups]
    _check(mesh, root, grid, names, groups)
    return mesh


def rank_grid(bound: BoundTopology, dims: Sequence[MeshDim]) -> torch.Tensor:
    """Ranks around this one: int64, one tensor dimension a dimension of the mesh, contiguous.

    Raises:
        RankRangeError: the plan leaves this rank out.
        TopologyError: the dimensions overlap.
    """
    position = bound.topology.position(bound.rank)
    factors = [factor for dim in dims for factor in dim.factors]
    corner = position - sum(position // stride % size * stride for size, stride in factors)
    grid = torch.tensor(corner)
    for dim in dims:
        grid = grid.unsqueeze(-1) + torch.tensor(offsets(dim.factors))
    shape = [dim.name for dim in dims]
    if len(set(grid.flatten().tolist())) != grid.numel():
        raise TopologyError(f"axes {shape} overlap; each digit may vary in one dimension only")
    return torch.tensor(list(bound.topology.span))[grid].contiguous()


def find_root(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh that ``mesh`` was sliced from, or itself."""
    if mesh_kind() == "layout":
        return mesh._get_root_mesh()
    tables: Any = device_mesh._mesh_resources
    root: DeviceMesh = tables.get_root_mesh(mesh)
    return root


@cache
def mesh_kind() -> Kind:
    """How this PyTorch keeps its meshes; see [Note: two kinds].

    Raises:
        UnsupportedTorchError: in neither way.
    """
    arguments = set(inspect.signature(DeviceMesh.__init__).parameters)
    if arguments >= _LAYOUT_ARGUMENTS and hasattr(_mesh_layout, "_MeshLayout"):
        return "layout"
    tables = getattr(device_mesh, "_mesh_resources", None)
    if "_init_backend" in arguments and hasattr(tables, "child_to_root_mapping") and hasattr(tables, "get_root_mesh"):
        return "tensor"
    raise UnsupportedTorchError(
        f"the meshes of PyTorch {torch.__version__} are not known here (2.6 to 2.13 are); make one with "
        "torch.distributed.device_mesh.init_device_mesh(), and use the groups of bind() beside it"
    )


def _root_of(mesh: BoundMesh) -> RootMesh:
    root = mesh if isinstance(mesh, RootMesh) else find_root(mesh)
    if not isinstance(root, RootMesh):
        raise _unsupported(mesh, f"has the root {root!r}")
    return root


def _check_order(bound: BoundTopology, dim: MeshDim) -> None:
    """Raise `TopologyError` unless the group numbers the ranks of a dimension as the mesh does."""
    members = tuple(rank_grid(bound, [dim]).tolist())
    numbered = bound.topology.axis(dim.axis).ranks(bound.rank)
    if members != numbered:
        raise TopologyError(
            f"dimension {dim.name!r} of the mesh has the ranks {list(members)} in this order, and the group along "
            f"{'_'.join(dim.axis)} {list(numbered)}; join its axes with the slowest varying first"
        )


def _check(
    mesh: DeviceMesh, root: RootMesh, grid: torch.Tensor, names: Sequence[str], groups: Sequence[dist.ProcessGroup]
) -> None:
    """Raise unless the mesh answers what it was made of."""
    if mesh.mesh.tolist() != grid.tolist():
        raise _unsupported(mesh, f"holds the ranks {mesh.mesh.tolist()} instead of {grid.tolist()}")
    if find_root(mesh) is not root:
        raise _unsupported(mesh, "has lost its root")
    for place, group in enumerate(groups):
        if mesh.get_group(place) is not group:
            raise _unsupported(mesh, f"has another group in dimension {names[place]}")
        numbered = dist.get_process_group_ranks(group)
        along = grid[tuple(slice(None) if at == place else step for at, step in enumerate(_here(mesh)))].tolist()
        if list(numbered) != along:
            raise TopologyError(
                f"dimension {names[place]!r} of the mesh has the ranks {along} in this order, and its "
                f"process group numbers {list(numbered)}: a collective along it would mix them up; bind() the plan "
                "with groups of its own (a backend, a time-out) or give the span in ascending order"
            )


def _here(mesh: DeviceMesh) -> Sequence[int]:
    here = mesh.get_coordinate()
    if here is None:
        raise _unsupported(mesh, "does not hold this rank")
    return here


def _unsupported(mesh: DeviceMesh, what: str) -> UnsupportedTorchError:
    return UnsupportedTorchError(f"PyTorch {torch.__version__}: the mesh {mesh.mesh_dim_names} {what}")


def _make_layout(dims: Sequence[Sequence[Factor]]) -> Any:
    shapes = [tuple(size for size, _ in reversed(factors)) or (1,) for factors in dims]
    strides: list[tuple[int, ...]] = []
    below = 1  # a dimension of one rank has the stride that a tensor's would have, by which PyTorch compares meshes
    for factors in reversed(dims):
        strides.insert(0, tuple(stride for _, stride in reversed(factors)) or (below,))
        below = factors[-1].size * factors[-1].stride if factors else below
    layouts: Any = _mesh_layout
    if hasattr(layouts, "_FlatLayout"):
        return layouts._MeshLayout([layouts._FlatLayout(*pair) for pair in zip(shapes, strides, strict=True)])
    flat = [tuple(part[0] if len(part) == 1 else part for part in parts) for parts in (shapes, strides)]
    return layouts._MeshLayout(*flat)


def _compiles_subclasses() -> bool:
    """Whether `torch.compile` treats a subclass of `DeviceMesh` as one, as PyTorch 2.12 began to."""
    return any(base.__name__ == "OpaqueBase" for base in DeviceMesh.__mro__)


def _keeps_infos() -> bool:
    """Whether meshes keep tags and ranks of their groups beside the names, as PyTorch 2.6 and 2.7 do."""
    return hasattr(device_mesh, "_get_group_tag")


def _group_info(group: dist.ProcessGroup) -> tuple[str, list[int], str]:
    tag = dist.distributed_c10d._get_group_tag(group)
    return tag, dist.get_process_group_ranks(group), group.group_name
