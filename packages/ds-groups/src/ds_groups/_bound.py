"""`BoundTopology`: the process groups of a topology, made on first use."""

from __future__ import annotations

import threading
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING

import torch.distributed as dist

from . import _c10d
from ._grid import AxisName, RankGrid
from ._mesh import build_mesh, take_mesh
from ._pool import GroupPool
from ._verify import agree
from .errors import StaleGroupsError, TopologyError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from ._torch_mesh import RootMesh


class BoundTopology:
    """A topology together with this process's rank and process groups; made by `ParallelTopology.bind`.

    Sizes, ranks and positions are arithmetic and never make a group. ``group(axis)`` makes one the first time:
    every member must then call it, in the same order as its other groups (``mode == "members"``), or every rank of
    the world (the other modes). Groups of the same ranks are one group. Usable as a context manager that closes.

    Attributes:
        topology: the plan.
        rank: of this process in the world.
        mode: who has to take part when a group is made: ``members``, ``split`` (all ranks, one split) or
            ``everyone`` (all ranks make all groups).
    """

    def __init__(
        self, topology: RankGrid, *, backend: str | None = None, timeout: timedelta | float | None = None
    ) -> None:
        pool = GroupPool(backend=backend, timeout=timeout)
        if topology.world_size != pool.world_size:
            raise TopologyError(
                f"world_size={topology.world_size} of the topology is not the {pool.world_size} ranks of the process "
                "group; use torch.distributed.get_world_size()"
            )
        self.topology = topology
        self.rank = pool.rank
        self.mode = pool.mode
        self._pool = pool
        options = {"backend": backend, "timeout": str(pool.timeout), "mode": pool.mode}
        self._plan = {**topology.as_dict(), **options}
        self.roots: dict[str, RootMesh] = {}
        self._by_axis: dict[str, dist.ProcessGroup] = {}
        self._lock = threading.Lock()
        self._closed = False

    def size(self, axis: AxisName) -> int:
        """How many ranks this rank's group along ``axis`` has."""
        return self.topology.size(axis)

    def ranks(self, axis: AxisName) -> tuple[int, ...]:
        """The global ranks of this rank's group along ``axis``, ascending."""
        return self.topology.ranks(axis, self.rank)

    def index(self, axis: AxisName) -> int:
        """This rank's position in its group along ``axis``: the rank inside that process group."""
        return self.ranks(axis).index(self.rank)

    def group(self, axis: AxisName) -> dist.ProcessGroup:
        """The process group of this rank along ``axis``, made on first use.

        Args:
            axis: as for `ParallelTopology.ranks`: ``"tp"``, ``"dp_cp"``, ``("dp", "cp")``, ``"ep"``.

        Raises:
            StaleGroupsError: closed, or the process group was destroyed since.
            GroupCreationError: the backend could not make it, or others did not take part in time.
            TopologyError: no such axis.
        """
        found = self.topology.axis(axis)
        with self._lock:
            self._check()
            group = self._by_axis.get(found.key)
            if group is None:
                group = self._pool.get(found.groups, found.ranks(self.rank), found.name)
                self._by_axis[found.key] = group
            elif not _c10d.is_alive(group):
                raise StaleGroupsError(f"the {axis} group was destroyed by somebody else; close() and bind() again")
            return group

    def create(self, *axes: str) -> None:
        """Make groups now, in one canonical order whatever the order of ``axes``. Every rank must call.

        Args:
            axes: None of them means every single axis with more than one rank.
        """
        for axis in sorted(axes or self.topology.axes_in_use(), key=lambda axis: self.topology.axis(axis).key):
            self.group(axis)

    def verify(self, *, timeout: timedelta | float = 300.0) -> None:
        """Check that all ranks hold the same plan. Every rank must call; no group is needed or made.

        Args:
            timeout: how long to wait for the other ranks, in seconds or as a timedelta.

        Raises:
            PlanMismatchError: on every rank, naming the fields that differ and the ranks that hold each value.
            PlanTimeoutError: some ranks did not call; names them.
        """
        self._check()
        limit = timeout if isinstance(timeout, timedelta) else timedelta(seconds=timeout)
        agree(_c10d.default_store(), self.rank, self.topology.world_size, "topology", self._plan, limit)

    @classmethod
    def from_mesh(cls, mesh: DeviceMesh) -> BoundTopology:
        """The topology that a PyTorch `DeviceMesh` was cut from, with the groups that the mesh has.

        Axes are the dimensions of the mesh's root, by name, and its flattened dimensions. ``close()`` leaves the
        mesh's groups alone. Makes no group; no rank waits for another.

        Args:
            mesh: a mesh or a slice of one, of the whole world or some of its ranks, in any order.

        Raises:
            TopologyError: a process group numbers its ranks in another order than the mesh.
        """
        topology, groups = take_mesh(mesh)
        bound = cls(topology)
        for axis, group in groups.items():
            bound._adopt(axis, group)
        return bound

    def to_device_mesh(
        self, *axes: AxisName, names: tuple[str, ...] | None = None, device_type: str | None = None
    ) -> DeviceMesh:
        """A PyTorch `DeviceMesh` over these groups, with none of its own. The members of its groups must call.

        All meshes of one topology are slices of one root, which holds all ranks of the plan: they can be sliced and
        flattened further, joined by FSDP2 and tensor parallelism, and left without ``"pp"`` in a pipeline stage.
        What is flattened has the topology's groups too, so only the members of such a group must call.

        Args:
            axes: its dimensions, the slowest varying first; ``"dp_cp"`` or ``("dp", "cp")`` is one dimension.
                Default: every dense axis with more than one rank. Axes that are left out keep this rank's coordinate.
            names: of the dimensions; default ``axes``. A name means one axis in all meshes of a topology.
            device_type: default the accelerator of the backend, else ``"cpu"``.

        Raises:
            RankRangeError: the plan leaves this rank out.
            TopologyError: axes overlap or have no strides, ``names`` does not fit, or a process group numbers its
                ranks in another order than the mesh.
            UnsupportedTorchError: the meshes of this PyTorch are not known.
        """
        return build_mesh(self, axes, names, device_type)

    def close(self) -> None:
        """Destroy the groups made here; the default process group stays. Every rank must call. Safe to repeat."""
        with self._lock:
            self._closed = True
            self._by_axis.clear()
            self._pool.close()

    def __len__(self) -> int:
        """How many process groups this rank has made here."""
        return len(self._pool)

    def __bool__(self) -> bool:
        return True

    def __enter__(self) -> BoundTopology:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "stale" if self._pool.is_stale() else f"{len(self)} groups"
        return f"BoundTopology({self.topology}, rank={self.rank}, mode={self.mode!r}, {state})"

    def _adopt(self, axis: str, group: dist.ProcessGroup) -> None:
        self._by_axis[self.topology.axis(axis).key] = group

    def _check(self) -> None:
        if self._closed:
            raise StaleGroupsError("this topology was closed; call bind() again")
        self._pool.check()
