"""The questions that an adapter answers, the list of adapters, and what they share."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ds_fragment.collective.exchange import Locate, Pieces, Sharding, bucket_bytes_for, gather, plan_of
from ds_fragment.engines.state import readable
from ds_fragment.errors import (
    GradientUnavailableError,
    StateKeyError,
    StateNotReadyError,
    UnlinkedParameterError,
    UnusedGradientError,
)
from ds_fragment.layout import Fragment, Layout
from ds_fragment.record import registry


def is_weight(what: str) -> bool:
    """Whether a quantity is the weights: the fp32 value, or ``"lp"``, those that the model computes with."""
    return what in ("value", "lp")


def is_state(what: str) -> bool:
    """Whether a quantity is optimizer state, given by its key."""
    return what != "grad" and not is_weight(what)


class Adapter(ABC):
    """Reads and writes the pieces of one engine's parameters."""

    name: str

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

        Many reads are faster if it is the same object as long as the quantity does not move.
        """

    @abstractmethod
    def local(self, param: torch.Tensor, what: str) -> torch.Tensor | None:
        """This rank's piece of a quantity, of its fragment's size; None where this rank holds nothing.

        A view of what the engine holds, or, where the engine keeps something else (a scaled gradient), a fresh tensor.

        Raises:
            FragmentError: it cannot be had here, now; the exchange tells every rank.
        """

    def prepare(self, params: Sequence[torch.Tensor]) -> None:
        """What the ranks have to tell each other before `place` can answer; all ranks of the groups call it."""
        return

    def empty(self, param: torch.Tensor, what: str) -> torch.Tensor:
        """The piece of a rank that holds nothing."""
        sharding = self.sharding(param, what)
        return torch.empty(0, dtype=sharding.dtype, device=sharding.device)

    @abstractmethod
    def state_keys(self, param: torch.Tensor) -> list[str]:
        """The optimizer states of the parameter that this rank knows of."""

    @abstractmethod
    def master(self, param: torch.Tensor) -> str:
        """Where the fp32 value comes from: ``"fp32"``, or ``"upcast"`` where only a low-precision one exists."""

    def stamps(self, params: Sequence[torch.Tensor], what: str) -> Sequence[object]:
        """What the places of the parameters follow from: as long as it is equal, so are the places.

        It is asked before every use of places that were found earlier. May raise what `place` raises.
        """
        if what == "value":
            return [(adapter_of(param), self.sharding(param, what)) for param in params]
        return [(adapter_of(param), self.sharding(param, "value"), self.sharding(param, what)) for param in params]

    def pieces(self, params: Sequence[torch.Tensor], what: str) -> list[torch.Tensor | None]:
        """What `local` says of each."""
        return [self.local(param, what) for param in params]

    def writers(self, param: torch.Tensor) -> tuple[dist.ProcessGroup, ...]:
        """Groups whose ranks each hold the whole parameter, and so have to write the same."""
        return ()

    def learn(self, model: nn.Module) -> None:
        """Remember, weakly, what only the model can tell of its parameters; called by `attach`."""
        return

    def require_writable(self, param: torch.Tensor) -> None:
        """Raise a `FragmentError` where what is written now would be lost; the exchange tells every rank."""
        return

    def write(self, param: torch.Tensor, what: str, piece: torch.Tensor) -> None:
        """Replace this rank's piece of a quantity; every rank's input is known to be right by then."""
        target = self.local(param, what)
        assert target is not None
        target.copy_(piece.view(target.shape))

    def refresh_lp(self, params: Sequence[torch.Tensor], values: Sequence[torch.Tensor] | None) -> None:
        """Bring the low-precision weights up to date with the fp32 pieces, where the engine does not by itself.

        Args:
            params: all of this engine's.
            values: the whole values where the caller has them, the same on every rank; without them the ranks tell
                each other, and all must call.
        """
        return


_adapters: list[Adapter] = []


def register_adapter(adapter: Adapter) -> None:
    """Ask ``adapter`` about parameters from now on, before those that were registered earlier."""
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
    return next(adapter for adapter in _adapters if adapter.claims(param))


def held_by(param: Any) -> tuple[Adapter, torch.Tensor]:
    """The adapter that claims the parameter, and the parameter; in the place of a gathered copy what it is a copy of.

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
        FragmentError: what `state_of` and `state_entry` raise for the first that has none.
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

    All ranks of the places' groups must call it.

    Args:
        params: the lp parameters, whole and contiguous on every rank.
        places: where their pieces are, of the lp dtype.
        locate: this rank's fp32 pieces of some of them.
    """
    order = _in_turn(shardings)

    def located(items: Sequence[int]) -> Pieces:
        return locate([order[item] for item in items])

    plan = plan_of([shardings[item] for item in order], bucket_bytes_for(shardings))
    for _ in gather(plan, located, out=lambda i: params[order[i]].data):
        pass


def _in_turn(shardings: Sequence[Sharding]) -> list[int]:
    """An order in which all ranks send as much at any time: of a flat partition, a bit of each slice in turn."""
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
    """Where an optimizer state that is one number is, when only some ranks have it: the first of them sends it.

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
    """What the value of a tensor that is its own master is."""
    return "upcast" if dtype.itemsize < 4 else "fp32"
