"""`BoundTopology`: the process groups of a topology, made on first use."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from . import _c10d
from ._collection import ProcessGroupCollection
from ._grid import AxisName, RankGrid
from ._mesh import build_mesh, take_mesh
from ._mpu_view import ModelParallelUnit
from ._options import GroupOptions, Settings, seconds, settings_of
from ._pool import GroupPool
from .errors import RankRangeError, StaleGroupsError, TopologyError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from ._axis import Partition
    from ._torch_mesh import RootMesh


_VERIFY_TIMEOUT = 300.0  # seconds


class BoundTopology:
    """A topology together with this process's rank and process groups; made by `ParallelTopology.bind`.

    Sizes, ranks and positions are arithmetic and never make a group. ``group(axis)`` makes one the first time:
    every member must then call it, in the same order as its other groups (``mode == "members"``), or every rank of
    the world (the other modes). Groups of the same ranks and options are one group, also in another bound topology
    of the same world and in ``ds_groups.parallel_state``; the last holder to close destroys it. Usable as a context
    manager that closes.

    Args:
        topology: the plan.
        backend: as for `GroupOptions`, for the groups of every axis.
        timeout: likewise.
        pg_options: likewise.
        warm_up: likewise.
        axes: axis -> what is different for it. The name is that of the axis as a whole: ``"dp"`` says nothing about
            ``"dp_shard"``.

    Attributes:
        topology: the plan.
        rank: of this process in the world.
        mode: who has to take part when a group is made: ``members``, ``split`` (all ranks, one split) or
            ``everyone`` (all ranks make all groups).

    Raises:
        TopologyError: the plan is for another world size, or an option is of a wrong type or for an unknown axis.
    """

    def __init__(
        self,
        topology: RankGrid,
        *,
        backend: str | None = None,
        timeout: timedelta | float | None = None,
        pg_options: Any = None,
        warm_up: bool = False,
        axes: Mapping[AxisName, GroupOptions] | None = None,
    ) -> None:
        _c10d.default_group()
        base = GroupOptions(backend, timeout, pg_options, warm_up)
        pool = GroupPool(_checked(base, ""))
        if topology.world_size != pool.world_size:
            raise TopologyError(
                f"world_size={topology.world_size} of the topology is not the {pool.world_size} ranks of the process "
                "group; use torch.distributed.get_world_size()"
            )
        self.topology = topology
        self.rank = pool.rank
        self.mode = pool.mode
        self._pool = pool
        self._settings: dict[frozenset[str], Settings] = {}  # by the digits of the axis
        plan: dict[str, object] = {**_plan_of(topology), **pool.settings.as_dict(), "mode": pool.mode}
        for name, options in (axes or {}).items():
            if not isinstance(options, GroupOptions):
                raise TopologyError(f"axes[{name!r}] must be a GroupOptions, got {options!r}")
            atoms = topology.axis(name).digits
            if atoms in self._settings:
                raise TopologyError(f"axes[{name!r}] names an axis a second time, in another spelling")
            self._settings[atoms] = settings = _checked(options.over(base), f"axes[{name!r}]: ")
            plan[f"options of {'_'.join(sorted(atoms))}"] = settings.as_dict()
        self._with_options = tuple(axes or ())  # may have the ranks of another axis, but not its groups
        self._plan = plan
        self.roots: dict[tuple[object, ...], RootMesh] = {}  # by device type and dimensions
        self._by_axis: dict[frozenset[str], dist.ProcessGroup] = {}
        self._lock = threading.RLock()
        self._closed = ""

    def size(self, axis: AxisName) -> int:
        """How many ranks this rank's group along ``axis`` has."""
        return self.topology.size(axis)

    def ranks(self, axis: AxisName) -> tuple[int, ...]:
        """The global ranks of this rank's group along ``axis``, as it numbers them."""
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
            GroupCreationError: the backend could not make it, or others did not take part in time; names them. They
                can all ask again.
            DeadlockError: ranks wait for each other in a cycle, because they ask in different orders.
            PlanMismatchError: other members ask for it with other options.
            RankRangeError: the plan leaves this rank out.
            TopologyError: no such axis.
        """
        found = self.topology.axis(axis)
        return self._get(found, found.name, found.digits)

    def group_of(self, partition: Partition, name: str) -> dist.ProcessGroup:
        """The process group of this rank in groups that are no axis of the plan, made on first use.

        Args:
            partition: the groups.
            name: what they are for, shown by PyTorch's tools and in errors.

        Raises:
            RankRangeError: this rank is in none of them; others as for `group`.
        """
        return self._get(partition, name, frozenset({f"partition {partition.key}"}))

    def create(self, *axes: AxisName, verify: bool = True) -> None:
        """Make groups now, in one canonical order whatever the order of ``axes``. Every rank must call.

        Args:
            axes: None of them means all that the plan uses. Groups of one rank are made when they are asked for.
            verify: compare the plans of all ranks first, and which axes they make, as `verify` does.

        Raises:
            PlanMismatchError: ranks hold different plans, or make other axes. Nothing has been made.
            PlanTimeoutError: some ranks did not call. Nothing has been made.
            GroupCreationError: as for `group`.
        """
        names: dict[tuple[str, str], AxisName] = {}  # (groups, options) -> the first name for them
        for name in axes or (*self.topology.axes_in_use(), *self._with_options):
            settings = self._settings.get(self.topology.axis(name).digits, self._pool.settings)
            options = json.dumps(settings.as_dict(), sort_keys=True)  # in the same order on every rank
            if self.topology.size(name) > 1:
                names.setdefault((self.topology.axis(name).key, options), name)
        with self._lock:
            self._check()
            if verify and self._pool.can_agree:
                limit = self._pool.settings.timeout or timedelta(seconds=_VERIFY_TIMEOUT)
                common = {self.topology.axis(name).key: name for name in self.topology.axes_in_use()}
                makes = sorted(str(common.get(key, name)) for (key, _), name in names.items())
                self._pool.agree("topology", {**self._plan, "create": makes}, limit)
            for _, name in sorted(names.items()):
                try:
                    self.group(name)
                except RankRangeError:  # the plan leaves this rank out
                    continue

    def verify(self, *, timeout: timedelta | float = _VERIFY_TIMEOUT) -> None:
        """Check that all ranks hold the same plan. Every rank must call; no group is needed or made.

        Args:
            timeout: how long to wait for the other ranks, in seconds or as a timedelta.

        Raises:
            PlanMismatchError: on every rank, naming the fields that differ and the ranks that hold each value.
            PlanTimeoutError: some ranks did not call; names them. They can all call again.
            StoreError: there is no store to compare plans in.
        """
        self._check()
        limit = seconds(timeout)
        assert limit is not None
        self._pool.agree("topology", self._plan, limit)

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

        Meshes that leave axes out are slices of one root, which holds all ranks of the plan: they can be sliced and
        flattened further, joined by FSDP2 and tensor parallelism, and left without ``"pp"`` in a pipeline stage. A
        mesh of all ranks is its own root, as PyTorch's is.
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

    def as_mpu(self) -> ModelParallelUnit:
        """These groups with the functions of Megatron's ``mpu``, for ``deepspeed.initialize(mpu=...)``."""
        return ModelParallelUnit(self)

    def as_process_group_collection(self) -> ProcessGroupCollection:
        """These groups by the names of Megatron-Core's ``ProcessGroupCollection``; made when an attribute is read."""
        return ProcessGroupCollection(self)

    def close(self) -> None:
        """Let go of the groups; the default process group stays. Every rank must call. Safe to repeat.

        Groups that nobody else holds are destroyed.
        """
        with self._lock:
            self._closed = self._closed or "closed"
            self._by_axis.clear()
            self._pool.close()

    def abort(self) -> None:
        """Break off whatever runs in the groups, and forget them; no other rank is waited for. Safe to repeat.

        For the rank that finds another one lost. Groups that others share are gone for them too. ``bind()`` works
        again afterwards, where the default process group still does.
        """
        self._closed = self._closed or "aborted"
        self._by_axis.clear()
        self._pool.abort()

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
        state = self._closed or ("stale" if self._pool.is_stale() else f"{len(self)} groups")
        return f"BoundTopology({self.topology}, rank={self.rank}, mode={self.mode!r}, {state})"

    def _get(self, partition: Partition, name: str, key: frozenset[str]) -> dist.ProcessGroup:
        with self._lock:
            self._check()
            group = self._by_axis.get(key)
            if group is None:
                group = self._by_axis[key] = self._pool.get(partition, name, self._settings.get(key))
            elif not _c10d.is_alive(group):
                raise StaleGroupsError(f"the {name} group was destroyed by somebody else; close() and bind() again")
            return group

    def _adopt(self, axis: str, group: dist.ProcessGroup) -> None:
        self._pool.adopt(self.topology.ranks(axis, self.rank), group)

    def _check(self) -> None:
        if self._closed:
            raise StaleGroupsError(f"this topology was {self._closed}; call bind() again")
        self._pool.check()


def _checked(options: GroupOptions, where: str) -> Settings:
    settings = settings_of(options, where)
    _c10d.check_settings(settings, where)
    return settings


def _plan_of(topology: RankGrid) -> dict[str, object]:
    """What ranks compare."""
    plan = topology.as_dict()
    if "order" in plan:  # the sizes have names of their own, by which a difference is told
        del plan["digits"]
    if not isinstance(topology.span, range):  # as long as the world
        plan["span"] = hashlib.sha256(str(topology.span).encode()).hexdigest()[:16]
    return plan
