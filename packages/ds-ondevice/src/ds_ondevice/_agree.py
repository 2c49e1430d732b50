"""Whether the ranks that share a sharded module recorded the same model and have the same seed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ds_ondevice._ops import Given, Op, View, mapped
from ds_ondevice._plan import Plan, is_dtensor
from ds_ondevice._slots import Slot
from ds_ondevice.errors import RecordingMismatchError


def check_ranks(slots: list[Slot], plan: Plan, device: torch.device) -> None:
    """Compare digests of the random numbers that are going to be drawn over every mesh of the module.

    All ranks of the meshes must call it. A digest has the names, shapes and dtypes of the tensors, the operators that
    draw, with their arguments, and the state of the generator that they begin with.

    Raises:
        RecordingMismatchError: on all ranks, if some differ.
    """
    meshes: dict[DeviceMesh, None] = {}
    for slot in slots:
        for tensor in slot.held:
            if is_dtensor(tensor) and tensor.is_meta:
                meshes[tensor.device_mesh] = None
    if not meshes:
        return
    model = [(slot.name, slot.kind, tuple(t.shape), t.dtype) for slot in slots for t in slot.held]
    drawing = [op for op in plan.history.ops if op.draws] if plan.draws else []
    mine = {"tensors": _digest(model), "recording": _digest(map(_drawn, drawing))}
    if drawing:
        mine["seed"] = _digest([_state(device)])
    for mesh in meshes:
        _compare(mesh, mine)


def _compare(mesh: DeviceMesh, mine: dict[str, str]) -> None:
    if mesh.get_coordinate() is None:
        return
    known = {dist.get_rank(): mine}
    for dim in range(mesh.ndim):  # along one dimension after the other, so that all ranks know all
        group = mesh.get_group(dim)
        if dist.get_backend(group) == "fake":
            return
        found: list[dict[int, dict[str, str]]] = [{} for _ in range(dist.get_world_size(group))]
        dist.all_gather_object(found, known, group=group)
        known = {rank: digests for each in found for rank, digests in each.items()}
    first, expected = min(known.items())
    others = {
        rank: [what for what in expected if digests.get(what) != expected[what]]
        for rank, digests in sorted(known.items())
        if digests != expected
    }
    if others:
        raise RecordingMismatchError(first, others)


def _drawn(op: Op) -> object:
    def comparable(leaf: object) -> object:
        if isinstance(leaf, View):
            return leaf.dtype, leaf.size
        if isinstance(leaf, Given):
            return leaf.tensor.dtype, tuple(leaf.tensor.shape)
        return type(leaf).__name__ if isinstance(leaf, (torch.Generator, torch.Tensor)) else leaf

    return op.name, mapped(comparable, op.args), mapped(comparable, op.kwargs), [draw.seed for draw in op.draws]


def _digest(items: Iterable[object]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for item in items:
        digest.update(repr(item).encode())
    return digest.hexdigest()


def _state(device: torch.device) -> list[int]:
    module = torch if device.type == "cpu" else torch.get_device_module(device)
    state: torch.Tensor = module.get_rng_state() if device.type == "cpu" else module.get_rng_state(device)
    return state.tolist()
