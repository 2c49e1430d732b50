"""The one file that touches PyTorch's internals: how a process group is made, found and recognised as dead.

[Note: making a group by its members only] `torch.distributed.new_group` wants every rank of the world to call it
for every group, because it names groups by a counter. With ``use_local_synchronization=True`` only members call,
but the name then depends on how many groups *this rank* happens to be in. After any earlier group that left some
ranks out, members compute different names, look for each other under different store keys, and wait for ever; and a
group that is destroyed and made again gets its old name, with the old addresses still in the store. So groups are
made here one level below `new_group`. The name is a digest of what the group is, the same on all members and every
time, because compiled collectives and the caches of DTensor hold on to names. The store that it is given has a prefix
of its own every time, which the members agree on before (see `_meeting`), so that nothing old is read.

[Note: modes] How much of the world has to take part, decided by the default process group:

``members``
    Gloo, NCCL that is not bound to a device, and PyTorch's fake backend: the members, nobody else.
``split``
    NCCL bound to a device (``init_process_group(device_id=...)``): PyTorch splits the default communicator, which
    is collective over the world. Groups of one axis are disjoint and cover the world, so each rank makes its own
    group at the same time and one split serves all: the cost does not grow with the number of groups.
``everyone``
    Anything else (MPI, other vendors' backends, the TorchComms switch, a PyTorch without the lower level): every
    rank calls `new_group` for every group of the axis, in the same order. PyTorch gives the names.

A group of one rank is made by that rank, in every mode where the lower level is there.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed import distributed_c10d as c10d

from .errors import GroupCreationError, NotInitializedError, TopologyError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

    from ._options import Settings

Mode = Literal["members", "split", "everyone"]

_NEEDED = {"backend_options", "timeout", "device_id", "group_desc"}
_MAKE: Any = getattr(c10d, "_new_process_group_helper", None)


def default_group() -> dist.ProcessGroup:
    """The default process group.

    Raises:
        NotInitializedError: there is none.
    """
    group = current_world()
    if group is None:
        raise NotInitializedError("there is no process group: call torch.distributed.init_process_group() first")
    return group


def is_initialized() -> bool:
    """Whether there is a default process group now."""
    return dist.is_available() and dist.is_initialized()


def current_world() -> dist.ProcessGroup | None:
    """The default process group; None where there is none."""
    return dist.group.WORLD if is_initialized() else None


def default_store() -> Store | None:
    """The key-value store of the default process group; None where the backend (MPI) has none."""
    store: Store | None = _world_entry()[1]
    return store


def is_alone() -> bool:
    """Whether the default process group has no other processes, whatever its size: PyTorch's fake backend."""
    return _kinds(_world_entry()[0]) == {"fake"}


def is_alive(group: object) -> bool:
    """Whether ``group`` is a process group that has not been destroyed."""
    return is_initialized() and group in c10d._world.pg_map


def mode_of(backend: str | None) -> Mode:
    """How groups of this backend are made; see [Note: modes]."""
    default = default_group()
    kinds = _kinds(_name_of(backend))
    torchcomms: Any = getattr(c10d, "_use_torchcomms_enabled", None)
    replaced = callable(getattr(default, "new_group", None)) or (torchcomms is not None and torchcomms())
    if replaced or not kinds <= {"gloo", "nccl", "fake"} or not _can_make():
        return "everyone"
    return "split" if "nccl" in kinds and default.bound_device_id is not None else "members"


def check_settings(settings: Settings, where: str = "") -> None:
    """Raise `TopologyError` where this PyTorch has no such backend, or the backend takes no such options."""
    if settings.backend is not None:
        known = [kind for kind in c10d.Backend.backend_list if kind != "undefined"]
        unknown = [kind for pair in settings.backend.split(",") if (kind := pair.rpartition(":")[2]) not in known]
        if unknown:
            raise TopologyError(
                f"{where}backend={settings.backend!r}: {unknown[0]!r} is not known to PyTorch, "
                f"which has {', '.join(known)}"
            )
    try:
        kinds = _kinds(_name_of(settings.backend))
    except ValueError as error:
        raise TopologyError(f"{where}backend={settings.backend!r} is malformed: {error}") from error
    if settings.make_pg_options is None:
        return
    if kinds == {"gloo"}:
        raise TopologyError(f"{where}pg_options: PyTorch ignores them for the gloo backend; leave them out")
    nccl: Any = getattr(dist, "ProcessGroupNCCL", None)
    made = settings.make_pg_options()
    if "nccl" in kinds and (nccl is None or not isinstance(made, nccl.Options)):
        raise TopologyError(
            f"{where}pg_options must be a torch.distributed.ProcessGroupNCCL.Options for the nccl backend, "
            f"got {type(made).__name__}"
        )


def timeout_of(settings: Settings) -> timedelta:
    """How long collectives of such groups may take, and how long ranks wait for each other to make them."""
    if settings.timeout is not None:
        return settings.timeout
    default: timedelta = c10d._get_default_timeout(c10d.Backend(_name_of(settings.backend)))
    return default


def make_own(
    ranks: Sequence[int], *, settings: Settings, name: str, prefix: str, description: str
) -> dist.ProcessGroup | None:
    """Make the group of ``ranks``, called by its members (mode ``members``) or by the world (mode ``split``).

    Args:
        ranks: in the order in which the group numbers them.
        settings: of the group.
        name: of the group; no living group has it.
        prefix: of its keys in the store, which nobody has used before; the same on all members.
        description: what the group is for, shown by PyTorch's tools.

    Returns:
        The group; None on a rank of the world that is not in it.
    """
    default = default_group()
    store = c10d.PrefixStore(prefix, _world_entry()[1])
    device = default.bound_device_id if "nccl" in _kinds(_name_of(settings.backend)) else None
    return _make(ranks, settings, name, store, description, device)


def make_single(*, settings: Settings, name: str, description: str) -> dist.ProcessGroup:
    """Make a group of this rank alone. No other rank takes part; nothing is connected until it is used."""
    default = default_group()
    with _unbound(default):  # a group of a bound world is split from it, which takes every rank
        group = _make([default.rank()], settings, name, HashStore(), description, None)
    assert group is not None
    return group


def can_make_single() -> bool:
    """Whether `make_single` works with this PyTorch and this default group."""
    return _can_make() and not callable(getattr(default_group(), "new_group", None))


def make_every(groups: Iterable[Sequence[int]], *, settings: Settings, description: str) -> dist.ProcessGroup | None:
    """Make all groups, called by every rank of the world (mode ``everyone``); returns this rank's."""
    mine = None
    rank = default_group().rank()
    for ranks in groups:
        group = dist.new_group(
            list(ranks),
            backend=settings.backend,
            timeout=settings.timeout,
            pg_options=_pg_options(settings, timeout_of(settings)),
            group_desc=description,
        )
        if rank in ranks:
            mine = group
    return mine


def destroy(group: dist.ProcessGroup) -> None:
    """Destroy a group, unless somebody else did."""
    if is_alive(group):
        dist.destroy_process_group(group)


def abort(groups: Iterable[dist.ProcessGroup]) -> None:
    """Break off what runs in these groups and forget them, waiting for no other rank."""
    alive = [group for group in groups if is_alive(group)]
    nccl = [backend for group in alive if hasattr(backend := _nccl_backend(group), "_group_start")]
    # NCCL can block in one abort while another rank is in the abort of another communicator, unless both are one call.
    if nccl:
        nccl[0]._group_start()
    for group in alive:
        try:
            c10d._abort_process_group(group)
        except RuntimeError:  # a backend that cannot break off
            destroy(group)
    if nccl:
        nccl[0]._group_end()


def warm_up(group: dist.ProcessGroup, description: str) -> None:
    """Reduce one small tensor on every kind of device that the group serves. Every member must call.

    Raises:
        GroupCreationError: the sum is wrong.
    """
    for device in group._device_types:
        kind = group._get_backend(device).name()
        if kind == "fake" or (device.type == "cuda" and not torch.cuda.is_available()):
            continue
        value = torch.ones(1, device=_device(device.type) if kind == "nccl" else device)  # [1], float32
        dist.all_reduce(value, group=group)
        total = value.item()
        if total != group.size():
            raise GroupCreationError(
                f"the {description} group of {group.size()} ranks reduces wrongly on {value.device}: "
                f"the sum of a one from every rank is {total:g}"
            )


def _make(
    ranks: Sequence[int], settings: Settings, name: str, store: Store, description: str, device: torch.device | None
) -> dist.ProcessGroup | None:
    rank = default_group().rank()
    limit = timeout_of(settings)
    group, _ = _MAKE(
        len(ranks),
        ranks.index(rank) if rank in ranks else None,
        list(ranks),
        c10d.Backend(_name_of(settings.backend)),
        store,
        name,
        backend_options=_pg_options(settings, limit),
        timeout=limit,
        device_id=device,
        group_desc=description,
    )
    if rank not in ranks:
        return None
    c10d._world.pg_group_ranks[group] = {member: place for place, member in enumerate(ranks)}
    made: dist.ProcessGroup = group
    return made


def _pg_options(settings: Settings, limit: timedelta) -> Any:
    if settings.make_pg_options is None:
        return None
    options = settings.make_pg_options()
    if hasattr(options, "_timeout"):
        options._timeout = limit  # PyTorch would, and warns where it was another
    return options


@contextlib.contextmanager
def _unbound(default: dist.ProcessGroup) -> Iterator[None]:
    device = default.bound_device_id
    if device is None:
        yield
        return
    default.bound_device_id = None
    try:
        yield
    finally:
        default.bound_device_id = device


def _nccl_backend(group: dist.ProcessGroup) -> Any:
    try:
        return group._get_backend(torch.device("cuda"))
    except RuntimeError:
        return None


def _device(kind: str) -> torch.device:
    bound = default_group().bound_device_id
    return bound if bound is not None else torch.device(kind, torch.cuda.current_device())


def _world_entry() -> tuple[str, Any]:
    entry: tuple[str, Any] = c10d._world.pg_map[default_group()]
    return entry


def _name_of(backend: str | None) -> str:
    return backend if backend is not None else _world_entry()[0]


def _kinds(backend: str) -> set[str]:
    return set(c10d.BackendConfig(c10d.Backend(backend)).get_device_backend_map().values())


@cache
def _can_make() -> bool:
    return _MAKE is not None and set(inspect.signature(_MAKE).parameters) >= _NEEDED
