"""Run a recording again, on a real device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from ds_ondevice._ops import Blank, Given, Op, Recording, View, leaves, mapped, mark_of, view_of
from ds_ondevice._random import Positions
from ds_ondevice.errors import MetaValueError, ReplayError


@dataclass(frozen=True)
class History:
    """The operators of some recordings, in the order they came.

    Attributes:
        recordings: those recordings, and all that they build on.
        broken: storages whose values cannot be computed again, and why.
    """

    recordings: tuple[Recording, ...]
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
        ops = sorted((op for recording in found.values() for op in recording.ops), key=lambda op: op.order)
        sound, broken = _sift(ops)
        return cls(tuple(found.values()), sound, broken)

    def needed(self, keys: Iterable[int], *, draws: bool) -> list[Op]:
        """The operators that make storages ``keys``; with ``draws`` every one that draws random numbers as well."""
        wanted = set(keys)
        ops = []
        for op in reversed(self.ops):
            if (draws and op.draws) or not (wanted.isdisjoint(op.creates) and wanted.isdisjoint(op.writes)):
                ops.append(op)
                wanted.update(op.reads)
        return ops[::-1]


def _sift(ops: Iterable[Op]) -> tuple[tuple[Op, ...], dict[int, str]]:
    """The operators that can be replayed; and the storages that the others wrote to last, with the reason."""
    sound: list[Op] = []
    known: set[int] = set()
    broken: dict[int, str] = {}
    for op in ops:
        for key in op.reads:
            if key not in known:
                broken[key] = "it, or what it is computed from, was made outside `with OnDevice(...)`"
        known.update(op.creates)
        known.update(op.reads)
        reason = next((broken[key] for key in op.reads if key in broken), None) if broken else None
        if reason is None and op.obstacle:
            reason = f"{op.name} {op.obstacle}"
        elif reason is None and op.givens and any(given.changed() for given in op.givens):
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
        cast: those among them that have the dtype that was asked for, not the one they were made in.
        unwritten: those among them that no operator gave a value; they are filled.
    """

    storages: dict[int, torch.UntypedStorage]
    cast: frozenset[int]
    unwritten: frozenset[int]


def replay(
    history: History,
    keys: Iterable[int],
    device: torch.device,
    *,
    draws: bool,
    casts: Mapping[int, tuple[torch.dtype, torch.dtype]] | None = None,
    report: Callable[[int], None] = lambda nbytes: None,
) -> Replayed:
    """Compute storages ``keys`` on ``device``, holding what else is needed no longer than needed.

    Args:
        history: where the operators come from; none of ``keys`` is broken in it.
        keys: the storages wanted.
        device: a real device.
        draws: run every operator that draws random numbers, in its order, whether or not its result is wanted:
            the generator then gives each tensor the numbers that it would have got without meta.
        casts: for some of ``keys`` a dtype and the one to cast it to, once its value is there.
        report: called with the number of bytes of each of ``keys`` whose value is there.

    Raises:
        ReplayError: an operator failed.
    """
    wanted = set(keys)
    ops = history.needed(wanted, draws=draws)
    sources = {key: op for op in ops if op.is_source for key in op.creates}
    steps = _schedule([op for op in ops if not op.is_source], sources)
    positions = Positions(device, [op.draws for op in ops if op.draws])
    run = _Run(sources, positions, device)
    storages: dict[int, torch.UntypedStorage] = {}
    cast: set[int] = set()

    def finish(key: int) -> None:
        view, tensor = run.made.pop(key)
        before, dtype = (casts or {}).get(key, (None, None))
        if dtype is not None and tensor.dtype is before:
            tensor = _laid_out(replace(view, dtype=dtype), tensor.to(dtype))
            cast.add(key)
        storages[key] = tensor.untyped_storage()
        report(storages[key].nbytes())

    with plain_torch():
        for step in steps:
            if step.op.drawn_on in ("", device.type):
                run.op(step.op, anew=step.anew)
            else:
                positions.move(step.op.order, step.op.draws)
            for key in step.last:
                if key not in wanted or key in step.overwritten:
                    del run.made[key]
                else:
                    finish(key)
        for key in wanted - storages.keys():
            run.base(key)
            finish(key)
    return Replayed(storages, frozenset(cast), frozenset(_unwritten(ops) & wanted))


def _unwritten(ops: Iterable[Op]) -> set[int]:
    """The storages that hold no value, or one that was computed of such."""
    found: set[int] = set()
    for op in ops:
        made = {*op.creates, *op.writes}
        if op.unwritten or not found.isdisjoint(key for key in op.reads if key not in op.writes):
            found |= made
        else:
            found -= made
    return found


@dataclass(eq=False, slots=True)
class _Step:
    """An operator, and what becomes of storages around it.

    Attributes:
        op: the operator.
        time: when it runs.
        anew: it fills a whole storage, whatever that held.
        last: the storages that are not used after it, or not before they are filled anew.
        overwritten: those that are filled anew.
    """

    op: Op
    time: int
    anew: bool
    last: list[int] = field(default_factory=list)
    overwritten: set[int] = field(default_factory=set)


def _schedule(ops: list[Op], sources: dict[int, Op]) -> list[_Step]:
    """Put every operator right behind the last one that it has to wait for; those that draw keep their order.

    So what is computed from a tensor comes before the next tensor is begun. Of a model that was sharded after it was
    built, one whole parameter at a time is in memory, not all of them. A storage that is filled as a whole begins
    anew there: what it held is given back when it was used last, not kept until then.
    """
    written: dict[int, int] = {}  # when each storage was written to last, in the new order
    read: dict[int, int] = {}
    steps: list[_Step] = []
    for op in ops:
        waits = [written.get(key, 0) for key in op.reads] + [read.get(key, 0) for key in op.writes]
        time = op.order if op.draws else max(waits, default=0)
        for key in (*op.creates, *op.writes):
            written[key] = time
        for key in op.reads:
            read[key] = max(time, read.get(key, 0))
        steps.append(_Step(op, time, _begins_anew(op, sources)))
    steps.sort(key=lambda step: (step.time, step.op.order))
    users: dict[int, _Step] = {}  # by storage, the step that used it last so far
    for step in steps:
        op = step.op
        for key in dict.fromkeys((*op.reads, *op.creates)):
            before = users.get(key)
            if before is not None and step.anew and key in op.writes:
                before.last.append(key)
                before.overwritten.add(key)
            users[key] = step
    for key, step in users.items():
        step.last.append(key)
    return steps


def _begins_anew(op: Op, sources: dict[int, Op]) -> bool:
    """Whether an operator fills a whole storage, whatever that held."""
    if not op.fills or len(op.writes) != 1 or op.writes[0] not in sources:
        return False
    key = op.writes[0]
    views = [leaf for leaf in leaves((op.args, op.kwargs)) if isinstance(leaf, View) and leaf.key == key]
    return len(views) == 1 and views[0] in sources[key].outputs


class _Run:
    """The tensors that a replay holds, by storage: each as it was made, over the whole of its memory."""

    def __init__(self, sources: dict[int, Op], positions: Positions, device: torch.device) -> None:
        self._sources, self._positions, self._device = sources, positions, device
        self.made: dict[int, tuple[View, torch.Tensor]] = {}

    def base(self, key: int) -> torch.Tensor:
        """The tensor that a storage was made with; a storage that depends on nothing is made when asked for."""
        if key not in self.made:
            self.op(self._sources[key])
        return self.made[key][1]

    def op(self, op: Op, *, anew: bool = False, blank: bool = False) -> None:
        """Run one operator.

        Args:
            op: the operator.
            anew: it fills what it writes to.
            blank: what it makes will be filled at once.
        """
        try:
            if anew and op.writes[0] not in self.made:
                self.op(self._sources[op.writes[0]], blank=True)
            generator = self._positions.move(op.order, op.draws) if op.draws else None
            args, kwargs = mapped(self._real, op.args), mapped(self._real, op.kwargs)
            if generator is not None:
                kwargs["generator"] = generator
            result = op.func(*args, **kwargs)
        except Exception as error:
            raise ReplayError(
                f"{op.name} was recorded on meta and failed on {self._device}: {type(error).__name__}: {error}. "
                "Nothing was changed."
            ) from error
        if not op.creates:
            return
        for view, made in zip(op.outputs, leaves(result), strict=True):
            if view is not None and view.key in op.creates:
                if op.unwritten and not blank:
                    fill(made)
                self.made[view.key] = (view, _laid_out(view, made))

    def _real(self, leaf: Any) -> Any:
        if isinstance(leaf, View):
            base = self.base(leaf.key)
            whole = self.made[leaf.key][0]
            return base if leaf == whole else as_tensor(leaf, base.untyped_storage())
        if isinstance(leaf, Given):
            return leaf.tensor
        if isinstance(leaf, Blank):
            return torch.ones(leaf.size, dtype=leaf.dtype, device=self._device)
        return self._device if isinstance(leaf, torch.device) and leaf.type == "meta" else leaf


def _laid_out(view: View, made: torch.Tensor) -> torch.Tensor:
    """``made``, laid out as ``view`` says: kernels on a device may choose other strides than meta."""
    if made.stride() == view.stride and made.storage_offset() == view.offset:
        return made
    storage = torch.UntypedStorage(view.extent * made.element_size(), device=made.device)  # type: ignore[no-untyped-call]
    return as_tensor(view, storage).copy_(made)


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
def plain_torch() -> Iterator[None]:
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
    seeded = _seeded(history, mark.key)
    random = [op for op in history.needed([mark.key], draws=False) if op.draws and op not in seeded]
    if random:
        raise MetaValueError(_no_value(tensor, f"{random[0].name} draws its random numbers in `materialize` only"))
    known = History(history.recordings, tuple(op for op in history.ops if not op.draws or op in seeded), {})
    storage = replay(known, [mark.key], torch.device("cpu"), draws=bool(seeded)).storages[mark.key]
    return as_tensor(view_of(tensor, mark.key), storage)


def _seeded(history: History, key: int) -> set[Op]:
    """The operators that draw from generators that constructors brought, if storage ``key`` needs such numbers.

    Their states are known, and so are their numbers.
    """
    needed = history.needed([key], draws=False)
    brought = {id(draw.generator) for op in needed for draw in op.draws if draw.generator is not None}
    if not brought:
        return set()
    return {op for op in history.ops if any(id(draw.generator) in brought for draw in op.draws)}


def _no_value(tensor: torch.Tensor, reason: str) -> str:
    return (
        f"the value of a tensor on meta (shape {tuple(tensor.shape)}, {tensor.dtype}) was asked for, but {reason}. "
        "Make the tensor with device='cpu' where its value is needed during construction."
    )
