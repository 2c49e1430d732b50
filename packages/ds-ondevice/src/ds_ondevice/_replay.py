"""Run a recording again, on a real device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from ds_ondevice._recording import Given, Op, Recording, View, mark_of, view_of
from ds_ondevice.errors import MetaValueError, ReplayError


@dataclass(frozen=True)
class History:
    """The operators of some recordings, in the order they came.

    Attributes:
        broken: storages whose values cannot be computed again, and why.
    """

    ops: tuple[Op, ...]  # without those that cannot be replayed
    broken: dict[int, str]

    @classmethod
    def of(cls, recordings: Iterable[Recording]) -> History:
        """Everything that these recordings, and those that they build on, know."""
        found: dict[int, Recording] = {}
        pending = list(recordings)
        while pending:
            recording = pending.pop()
            if id(recording) not in found:
                found[id(recording)] = recording
                pending.extend(recording.parents)
        ops = tuple(sorted((op for recording in found.values() for op in recording.ops), key=lambda op: op.order))
        sound, broken = _sift(ops)
        return cls(sound, broken)

    def needed(self, keys: Iterable[int], *, draws: bool) -> list[Op]:
        """The operators that make storages ``keys``; with ``draws`` every one that draws random numbers as well."""
        wanted = set(keys)
        ops = []
        for op in reversed(self.ops):
            if (draws and op.random) or not wanted.isdisjoint((*op.creates, *op.writes)):
                ops.append(op)
                wanted |= op.reads
        return ops[::-1]


def _sift(ops: Iterable[Op]) -> tuple[tuple[Op, ...], dict[int, str]]:
    """The operators that can be replayed; and the storages that the others wrote to last, with the reason."""
    sound: list[Op] = []
    known: set[int] = set()
    broken: dict[int, str] = {}
    for op in ops:
        for key in op.reads - known:
            broken[key] = "it, or what it is computed from, was made outside `with OnDevice(...)`"
        known |= op.creates | op.reads
        reason = next((broken[key] for key in op.reads if key in broken), None)
        if reason is None and op.obstacle:
            reason = f"{op.name} {op.obstacle}"
        elif reason is None and op.stale():
            reason = f"{op.name} was given a real tensor that has been changed in place since"
        if reason is None:
            sound.append(op)
        else:
            broken.update(dict.fromkeys((*op.creates, *op.writes), reason))
    return tuple(sound), broken


@dataclass(frozen=True)
class Replayed:
    """What a replay made.

    Attributes:
        storages: the real storages, by key.
        unwritten: those among them that no operator gave a value; they are filled.
    """

    storages: dict[int, torch.UntypedStorage]
    unwritten: frozenset[int]


def replay(history: History, keys: Iterable[int], device: torch.device, *, draws: bool) -> Replayed:
    """Compute storages ``keys`` on ``device``, holding what else is needed no longer than needed.

    Args:
        history: where the operators come from; none of ``keys`` is broken in it.
        keys: the storages wanted.
        device: a real device.
        draws: run every operator that draws random numbers, in its order, whether or not its result is wanted:
            the generator then gives each tensor the numbers that it would have got without meta.

    Raises:
        ReplayError: an operator failed.
    """
    wanted = set(keys)
    ops = history.needed(wanted, draws=draws)
    schedule = _schedule(op for op in ops if not op.is_source)
    sources = {key: op for op in ops if op.is_source for key in op.creates}
    last_use = {key: index for index, op in enumerate(schedule) for key in (*op.reads, *op.creates)}
    storages: dict[int, torch.UntypedStorage] = {}
    with _plain_torch():
        for index, op in enumerate(schedule):
            for key in op.reads - storages.keys():
                _run(sources[key], storages, device)
            _run(op, storages, device)
            for key in op.reads | op.creates:
                if last_use[key] == index and key not in wanted:
                    del storages[key]
        for key in wanted - storages.keys():
            _run(sources[key], storages, device)
    written = {key for op in ops for key in op.writes}
    unwritten = {key for op in ops if op.unwritten for key in op.creates}
    return Replayed(storages, frozenset((unwritten - written) & wanted))


def _schedule(ops: Iterable[Op]) -> list[Op]:
    """Put every operator right behind the last one that it has to wait for; those that draw keep their order.

    So what is computed from a tensor comes before the next tensor is begun. Of a model that was sharded after it was
    built, one whole parameter at a time is in memory, not all of them.
    """
    written: dict[int, int] = {}  # when each storage was written to last, in the new order
    read: dict[int, int] = {}
    timed: list[tuple[int, int, Op]] = []
    for op in ops:
        waits = [written.get(key, 0) for key in op.reads] + [read.get(key, 0) for key in op.writes]
        time = op.order if op.random else max(waits, default=0)
        written.update(dict.fromkeys((*op.creates, *op.writes), time))
        read.update({key: max(time, read.get(key, 0)) for key in op.reads})
        timed.append((time, op.order, op))
    return [op for _, _, op in sorted(timed, key=lambda item: item[:2])]


def _run(op: Op, storages: dict[int, torch.UntypedStorage], device: torch.device) -> None:
    def real(leaf: Any) -> Any:
        if isinstance(leaf, View):
            return as_tensor(leaf, storages[leaf.key])
        if isinstance(leaf, Given):
            return leaf.tensor
        return device if isinstance(leaf, torch.device) and leaf.type == "meta" else leaf

    try:
        result = op.func(*tree_map(real, op.args), **tree_map(real, op.kwargs))
    except Exception as error:
        raise ReplayError(
            f"{op.name} was recorded on meta and failed on {device}: {type(error).__name__}: {error}. "
            "Nothing was changed."
        ) from error
    if not op.creates:
        return
    for view, made in zip(op.outputs, tree_leaves(result), strict=True):
        if view is not None and view.key not in storages:
            if op.unwritten:
                fill(made)
            storages[view.key] = _storage_like(view, made)


def _storage_like(view: View, made: torch.Tensor) -> torch.UntypedStorage:
    """The storage of ``made``, laid out as ``view`` says: kernels on a device may choose other strides than meta."""
    if view_of(made, view.key) == view:
        return made.untyped_storage()
    extent = view.offset + 1 + sum((size - 1) * stride for size, stride in zip(view.size, view.stride, strict=True))
    nbytes = max(extent, 0) * made.element_size()
    storage = torch.UntypedStorage(nbytes, device=made.device)  # type: ignore[no-untyped-call]
    as_tensor(view, storage).copy_(made)
    return storage


def as_tensor(view: View, storage: torch.UntypedStorage) -> torch.Tensor:
    """The tensor that ``view`` describes, over ``storage``."""
    empty = torch.empty(0, dtype=view.dtype, device=storage.device)
    return empty.set_(storage, view.offset, view.size, view.stride)


def fill(tensor: torch.Tensor) -> None:
    """Fill with NaN, or 0 where the dtype has none, so that a forgotten value is seen."""
    if tensor.is_floating_point() or tensor.is_complex():
        tensor.fill_(float("nan"))
    else:
        tensor.zero_()


@contextlib.contextmanager
def _plain_torch() -> Iterator[None]:
    """No gradients, and no mode of an enclosing block."""
    with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
        yield


def value_of(tensor: torch.Tensor) -> torch.Tensor:
    """The value, on the CPU, that a recorded tensor on meta would have.

    Raises:
        MetaValueError: it is not known: it depends on random numbers, which are drawn by ``materialize`` only, or
            on tensors made elsewhere.
    """
    mark = mark_of(tensor)
    if mark is None:
        raise MetaValueError(_no_value(tensor, "it was made outside `with OnDevice(...)`"))
    history = History.of(mark.recordings)
    if mark.key in history.broken:
        raise MetaValueError(_no_value(tensor, history.broken[mark.key]))
    random = [op for op in history.needed([mark.key], draws=False) if op.random]
    if random:
        raise MetaValueError(_no_value(tensor, f"{random[0].name} draws its random numbers in `materialize` only"))
    storage = replay(history, [mark.key], torch.device("cpu"), draws=False).storages[mark.key]
    return as_tensor(view_of(tensor, mark.key), storage)


def _no_value(tensor: torch.Tensor, reason: str) -> str:
    return (
        f"the value of a tensor on meta (shape {tuple(tensor.shape)}, {tensor.dtype}) was asked for, but {reason}. "
        "Make the tensor with device='cpu' where its value is needed during construction."
    )
