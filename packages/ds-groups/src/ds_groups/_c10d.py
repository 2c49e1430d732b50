"""The one file that touches PyTorch's internals: how a process group is made, found and recognised as dead.

[Note: making a group by its members only] `torch.distributed.new_group` wants every rank of the world to call it
for every group, because it names groups by a counter. With ``use_local_synchronization=True`` only members call,
but the name then depends on how many groups *this rank* happens to be in. After any earlier group that left some
ranks out, members compute different names, look for each other under different store keys, and wait for ever; and a
group that is destroyed and made again gets its old name, with the old addresses still in the store. So groups are
made here one level below `new_group`, under a name that members cannot disagree on: a digest of the rank set, and how
many times this rank has made that set before. The count lives in the store, beside the keys that it keeps apart, and
every member makes the set equally often because making it takes all of them.

[Note: modes] How much of the world has to take part, decided by the default process group:

``members``
    Gloo, and NCCL that is not bound to a device: the members, nobody else.
``split``
    NCCL bound to a device (``init_process_group(device_id=...)``): PyTorch splits the default communicator, which
    is collective over the world. Groups of one axis are disjoint and cover the world, so each rank makes its own
    group at the same time and one split serves all: the cost does not grow with the number of groups.
``everyone``
    Anything else (MPI, other vendors' backends, the TorchComms switch, a PyTorch without the lower level): every
    rank calls `new_group` for every group of the axis, in the same order.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Sequence
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from .errors import NotInitializedError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

Mode = Literal["members", "split", "everyone"]

_NEEDED = {"backend_options", "timeout", "device_id", "group_desc"}
_MAKE: Any = getattr(c10d, "_new_process_group_helper", None)


def default_group() -> dist.ProcessGroup:
    """The default process group.

    Raises:
        NotInitializedError: there is none.
    """
    group = dist.group.WORLD if is_initialized() else None
    if group is None:
        raise NotInitializedError("there is no process group: call torch.distributed.init_process_group() first")
    return group


def is_initialized() -> bool:
    """Whether there is a default process group now."""
    return dist.is_available() and dist.is_initialized()


def current_world() -> dist.ProcessGroup | None:
    """The default process group; None where there is none."""
    return dist.group.WORLD if is_initialized() else None


def default_store() -> Store:
    """The key-value store of the default process group."""
    backend, found = _world_entry()
    store: Store | None = found
    if store is None:
        raise NotInitializedError(f"the {backend} backend has no store to exchange plans through")
    return store


def is_alive(group: object) -> bool:
    """Whether ``group`` is a process group that has not been destroyed."""
    return is_initialized() and group in c10d._world.pg_map


def mode_of(backend: str | None) -> Mode:
    """How groups of this backend are made; see [Note: modes]."""
    default = default_group()
    kinds = _kinds(backend if backend is not None else _world_entry()[0])
    torchcomms: Any = getattr(c10d, "_use_torchcomms_enabled", None)
    replaced = callable(getattr(default, "new_group", None)) or (torchcomms is not None and torchcomms())
    if replaced or not kinds <= {"gloo", "nccl"} or not _can_make():
        return "everyone"
    return "split" if "nccl" in kinds and default.bound_device_id is not None else "members"


def make_own(
    ranks: Sequence[int], *, backend: str | None, timeout: timedelta | None, description: str
) -> dist.ProcessGroup:
    """Make the group of ``ranks``, called by its members (mode ``members``) or by the world (mode ``split``)."""
    default = default_group()
    default_backend, store = _world_entry()
    chosen = c10d.Backend(backend if backend is not None else default_backend)
    rank = default.rank()
    digest = hashlib.sha256("_".join(map(str, ranks)).encode()).hexdigest()[:16]
    name = f"ds-{digest}-{store.add(f'ds-groups/made/{digest}/{rank}', 1)}"
    kinds = _kinds(chosen)
    limit = timeout if timeout is not None else c10d._get_default_timeout(chosen)
    group, _ = _MAKE(
        len(ranks),
        ranks.index(rank),
        list(ranks),
        chosen,
        store,
        name,
        timeout=limit,
        device_id=default.bound_device_id if "nccl" in kinds else None,
        group_desc=description,
    )
    c10d._world.pg_group_ranks[group] = {member: place for place, member in enumerate(ranks)}
    if "gloo" in kinds:
        _meet(store, name, len(ranks), limit)
    made: dist.ProcessGroup = group
    return made


def make_every(
    groups: Iterable[Sequence[int]], *, backend: str | None, timeout: timedelta | None, description: str
) -> dist.ProcessGroup | None:
    """Make all groups, called by every rank of the world (mode ``everyone``); returns this rank's."""
    mine = None
    rank = default_group().rank()
    for ranks in groups:
        group = dist.new_group(list(ranks), backend=backend, timeout=timeout, group_desc=description)
        if rank in ranks:
            mine = group
    return mine


def _meet(store: Store, name: str, count: int, timeout: timedelta) -> None:
    """Wait until all members are connected: Gloo fails where one closes a group while another still connects to it."""
    if store.add(f"ds-groups/met/{name}", 1) == count:
        store.set(f"ds-groups/met/{name}/all", "1")
    store.wait([f"ds-groups/met/{name}/all"], timeout)


def _world_entry() -> tuple[str, Any]:
    entry: tuple[str, Any] = c10d._world.pg_map[default_group()]
    return entry


def _kinds(backend: str) -> set[str]:
    return set(c10d.BackendConfig(c10d.Backend(backend)).get_device_backend_map().values())


@cache
def _can_make() -> bool:
    return _MAKE is not None and set(inspect.signature(_MAKE).parameters) >= _NEEDED
