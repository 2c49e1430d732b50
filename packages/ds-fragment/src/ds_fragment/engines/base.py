"""The interface of an adapter, the list of adapters, and functions that several of them use."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ds_fragment.collective.exchange import Locate, Shards, gather
from ds_fragment.collective.plan import Plan, bucket_bytes_for
from ds_fragment.engines.optimized import Optimized, optimized_by
from ds_fragment.engines.state import readable
from ds_fragment.errors import (
    GradientUnavailableError,
    StateKeyError,
    StateNotReadyError,
    UnlinkedParameterError,
    UnusedGradientError,
)
from ds_fragment.layout import Fragment, Layout
from ds_fragment.record import record_of, registry
from ds_fragment.sharding import Sharding


def is_weight(what: str) -> bool:
    """Whether a quantity is the weights: the fp32 value, or ``"lp"``, those that the model computes with."""
    return what in ("value", "lp")


def is_state(what: str) -> bool:
    """Whether a quantity is optimizer state, given by its key."""
    return what != "grad" and not is_weight(what)


class Adapter(ABC):
    """Reads and writes the pieces of one engine's parameters.

    Attributes:
        name: of the engine, for messages and reports.
        marks: a parameter without any of these is not this engine's, and `claims` is not called for it. A name is that
            of an attribute which was set on the parameter, or ``"_base"`` for a view; a class is that of a note in its
            record. None if `claims` has to be called for every parameter.
    """

    name: str
    marks: tuple[str | type, ...] | None = None

    @abstractmethod
    def claims(self, param: torch.Tensor) -> bool:
        """Whether the parameter is held by this engine."""

    def own(self, param: torch.Tensor) -> torch.Tensor:
        """The parameter that ``param``, which this adapter claims, is a gathered copy of; itself where it is none.

        All further questions are about that one.
        """
        return param

    @abstractmethod
    def sharding(self, param: torch.Tensor, what: str) -> Sharding:
        """Where a quantity is: an equal `Sharding` on every rank of its group.

        Reads are faster if it is the same object as long as the quantity does not move: see `Record.sharding`.
        """

    @abstractmethod
    def local(self, param: torch.Tensor, what: str) -> torch.Tensor | None:
        """This rank's piece of a quantity, of its fragment's size; None where this rank holds nothing.

        A view of what the engine holds, or, where the engine keeps something else (a scaled gradient), a fresh tensor.

        Raises:
            FragmentError: this rank cannot read it now; the exchange sends the error to every rank.
        """

    def versions(self, params: Sequence[torch.Tensor]) -> Sequence[object] | None:
        """Of each parameter something that is equal for as long as this engine holds it and its value is sharded alike.

        None where the engine cannot say so fast: it is asked for the sharding each time.
        """
        return None

    def like_values(self, params: Sequence[torch.Tensor], what: str) -> bool:
        """Whether a quantity of all of them is sharded as their values are, in the same dtype; False unless told fast.

        May raise what `sharding` raises.
        """
        return False

    def prepare(self, params: Sequence[torch.Tensor]) -> None:
        """Exchange what `sharding` needs of the other ranks; all ranks of the groups must call it."""
        return

    def empty(self, param: torch.Tensor, what: str) -> torch.Tensor:
        """The piece of a rank that holds nothing."""
        sharding = self.sharding(param, what)
        return torch.empty(0, dtype=sharding.dtype, device=sharding.device)

    @abstractmethod
    def state_keys(self, param: torch.Tensor) -> list[str]:
        """The keys of the optimizer states that this rank has of the parameter."""

    def optimized(self, params: Sequence[torch.Tensor]) -> list[Optimized | None]:
        """What the optimizer keeps of each parameter on this rank; None where no optimizer updates it.

        To be overridden where an engine optimizes something else in the place of the parameter. Without it optimizer
        state can be read and written, but neither saved nor loaded with the model.
        """
        return optimized_by(list(map(registry.optimizer_of, params)), params)

    def forget_state(self, params: Sequence[torch.Tensor]) -> None:
        """Find out anew what state there is of the parameters: it was made, or taken away."""
        for param in params:
            record_of(param).agreed.clear()

    @abstractmethod
    def master(self, param: torch.Tensor) -> str:
        """Where the fp32 value comes from: ``"fp32"``, or ``"upcast"`` where only a low-precision one exists."""

    def pieces(self, params: Sequence[torch.Tensor], what: str) -> list[torch.Tensor | None]:
        """`local` of each."""
        return [self.local(param, what) for param in params]

    def writers(self, param: torch.Tensor) -> tuple[dist.ProcessGroup, ...]:
        """Groups whose ranks each hold the whole parameter, and so must write the same."""
        return ()

    def learn(self, model: nn.Module) -> None:
        """Note, weakly, what follows from the model alone about its parameters; called by `attach`."""
        return

    def require_writable(self, param: torch.Tensor) -> None:
        """Raise a `FragmentError` if a write would be lost now; the exchange sends the error to every rank."""
        return

    def write(self, param: torch.Tensor, what: str, piece: torch.Tensor) -> None:
        """Replace this rank's piece of a quantity; the input of every rank was checked before."""
        target = self.local(param, what)
        assert target is not None
        target.copy_(piece.view(target.shape))

    def writes_through(self, what: str) -> bool:
        """Whether a change of what `local` returns, in place, is all that `write` does."""
        return type(self).write is Adapter.write

    def refresh_lp(self, params: Sequence[torch.Tensor], values: Sequence[torch.Tensor] | None) -> None:
        """Update the low-precision weights from the fp32 pieces, where the engine does not do so itself.

        Args:
            params: all of this engine's.
            values: the whole values where the caller has them, the same on every rank; without them the ranks
                exchange the pieces, and all must call.
        """
        return


_adapters: list[Adapter] = []


def register_adapter(adapter: Adapter) -> None:
    """Ask ``adapter`` about parameters from now on, before the adapters that were registered earlier."""
    _adapters.insert(0, adapter)
    registry.changed()


def adapters() -> Sequence[Adapter]:
    """All adapters, in the order in which they are asked."""
    return tuple(_adapters)


def adapter_of(param: Any) -> Adapter:
    """The adapter that claims the parameter.

    Raises:
        TypeError: it is not a tensor.
    """
    if not isinstance(param, torch.Tensor):
        raise TypeError(f"param is a {type(param).__name__}, expected a parameter of the model (a torch.Tensor)")
    marks = {*vars(param), *record_of(param).notes, *(() if param._base is None else ("_base",))}
    for adapter in _adapters:
        if (adapter.marks is None or not marks.isdisjoint(adapter.marks)) and adapter.claims(param):
            return adapter
    raise LookupError("no adapter claims the parameter, not even the one that claims every tensor: keep it in the list")


def held_by(param: Any) -> tuple[Adapter, torch.Tensor]:
    """The adapter that claims the parameter, and the parameter itself; for a gathered copy the parameter it is of.

    Raises:
        TypeError: it is not a tensor.
    """
    adapter = adapter_of(param)
    return adapter, adapter.own(param)


def state_of(owned: torch.Tensor, param: torch.Tensor) -> dict[str, Any]:
    """The optimizer's state for the tensor that it optimizes on behalf of a parameter.

    Raises:
        UnlinkedParameterError: no optimizer was attached for it.
        StateNotReadyError: the optimizer has not stepped yet.
    """
    optimizer = registry.optimizer_of(owned)
    if optimizer is None:
        raise UnlinkedParameterError(
            f"{registry.name_of(param)} has no optimizer: call attach(model, optimizer) on every rank first"
        )
    return ready_state(optimizer, owned, param)


def entries_of(params: Sequence[torch.Tensor], key: str) -> list[torch.Tensor]:
    """One optimizer state of many parameters that are optimized themselves.

    Raises:
        FragmentError: as `state_of` and `state_entry`, for the first that has none.
    """
    pairs = zip(map(registry.optimizer_of, params), params, strict=True)
    states = [{} if optimizer is None else optimizer.state.get(param, {}) for optimizer, param in pairs]
    with contextlib.suppress(KeyError):
        found = list(map(itemgetter(key), states))
        if all(issubclass(kind, torch.Tensor) for kind in set(map(type, found))):
            return found
    return [state_entry(state_of(param, param), param, key, quantised=True) for param in params]


def missing_gradient(param: torch.Tensor, *, hidden: bool = False) -> GradientUnavailableError:
    """The error for a parameter whose ``grad`` is None.

    Args:
        param: the parameter.
        hidden: whether its engine may keep an unreduced gradient elsewhere, unless it is attached.
    """
    name = registry.name_of(param)
    if not param.requires_grad:
        return UnusedGradientError(f"{name} has no gradient: it does not require one")
    cleared = f"{name} has no gradient: no backward pass used it since its gradient was cleared"
    if not registry.is_named(param):
        unreduced = ", or what there is is not reduced yet" if hidden else ", or the last one did not use it"
        return GradientUnavailableError(f"{cleared}{unreduced}; call attach(model, optimizer) to have it told apart")
    if registry.others_have_gradients(param):
        return UnusedGradientError(f"{name} has no gradient: the backward pass did not use it")
    return GradientUnavailableError(cleared)


def ready_state(optimizer: torch.optim.Optimizer, owned: torch.Tensor, param: torch.Tensor) -> dict[str, Any]:
    """The state that an optimizer keeps for a tensor.

    Raises:
        StateNotReadyError: the optimizer has not stepped yet.
    """
    state: dict[str, Any] = optimizer.state.get(owned, {})
    if not state:
        kind = type(optimizer).__name__
        when = f"{kind} makes it at its first step"
        if any(optimizer.state.values()):
            when = f"{kind} keeps some for other parameters, and has not updated this one or keeps none for it"
        raise StateNotReadyError(f"{registry.name_of(param)} has no optimizer state yet: {when}")
    return state


def state_entry(state: dict[str, Any], param: torch.Tensor, key: str, *, quantised: bool = False) -> torch.Tensor:
    """One optimizer state as a tensor; Python numbers become 0-dimensional ones.

    Raises:
        StateKeyError: the optimizer keeps no such state, or `readable` refuses it.
    """
    if key not in state:
        raise StateKeyError(
            f"optim_state_key '{key}' is not kept for {registry.name_of(param)}; its optimizer keeps {sorted(state)}"
        )
    return readable(state[key], param, key, quantised=quantised)


def spread(params: Sequence[torch.Tensor], shardings: Sequence[Sharding], locate: Locate) -> None:
    """Write the fp32 pieces into the whole lp parameters of every rank, cast by their holders.

    All ranks of the shardings' groups must call it.

    Args:
        params: the lp parameters, whole and contiguous on every rank.
        shardings: where their pieces are, of the lp dtype.
        locate: this rank's fp32 pieces of some of them.
    """
    order = _in_turn(shardings)

    def located(items: Sequence[int]) -> Shards:
        return locate([order[item] for item in items])

    plan = Plan([shardings[item] for item in order], bucket_bytes_for(shardings))
    for _ in gather(plan, located, out=lambda i: params[order[i]].data):
        pass


def _in_turn(shardings: Sequence[Sharding]) -> list[int]:
    """An order in which all ranks send equally much at any time: a part of each rank's slice in turn."""
    sent: dict[tuple[dist.ProcessGroup | None, int], int] = {}
    before = []
    for sharding in shardings:
        fragments = enumerate(sharding.layout.fragments)
        largest = max(((f.numel, -rank) for rank, f in fragments if f is not None), default=(0, 0))
        holder = (sharding.group, largest[1])
        before.append(sent.get(holder, 0))
        sent[holder] = before[-1] + largest[0]
    return sorted(range(len(shardings)), key=before.__getitem__)


def number_sharding(key: str, group: dist.ProcessGroup | None, ranks: Sequence[bool], device: torch.device) -> Sharding:
    """The sharding of an optimizer state that is one number and only some ranks have: the first of them sends it.

    Args:
        key: the state's.
        group: whose ranks are meant.
        ranks: whether each has the number, by group rank.
        device: the parameter's.
    """
    fragments = tuple(Fragment((), ()) if has else None for has in ranks)
    first = next((rank for rank, has in enumerate(ranks) if has), 0)
    copies = frozenset(rank for rank, has in enumerate(ranks) if has and rank != first)
    dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    return Sharding(torch.Size(()), dtype, device, Layout((), fragments, copies), group)


def is_number(key: str) -> bool:
    """Whether torch's optimizers keep one number for the whole parameter under that key."""
    return key == "step"


def value_kind(dtype: torch.dtype) -> str:
    """The kind of the value of a tensor that has no master of its own: see `Adapter.master`."""
    return "upcast" if dtype.itemsize < 4 else "fp32"
