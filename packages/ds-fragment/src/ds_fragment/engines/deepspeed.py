"""The parts common to DeepSpeed's ZeRO optimizers. DeepSpeed itself is never imported.

[Note: flat fp32] Every ZeRO stage keeps, for each group of parameters, one flat fp32 tensor on each rank, and optimizes
that: the state of the base optimizer belongs to flat tensors, and is cut like them. A number such as ``step`` belongs
to all parameters of a flat tensor at once.

[Note: window] The micro batches between two optimizer steps. Gradients are summed over a window, and multiplied by
the loss scale until the step.
"""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.hooks import RemovableHandle

from ds_fragment.engines.base import Adapter, ready_state, state_entry, value_kind
from ds_fragment.engines.optimized import Optimized
from ds_fragment.engines.state import other_shape
from ds_fragment.errors import FragmentError, GradientUnavailableError, UnlinkedParameterError, UnusedGradientError
from ds_fragment.layout import Layout, whole
from ds_fragment.record import forget, note, noted, record_of, registry
from ds_fragment.sharding import Sharding

UNUSED = "no backward pass used it since the last optimizer step"
UNREDUCED = (
    "what is here is this rank's own, not reduced over the ranks; read it after the backward pass of the last micro "
    "batch, before step()"
)
MIXED = (
    "the first backward pass after the last optimizer step did not use it, and DeepSpeed then added its gradient to "
    "what an earlier step had left there"
)

# Why a parameter that an engine holds has no master, gradient or state.
UNTRAINED = "it was frozen, or in none of the optimizer's parameter groups, when the engine was made"


@dataclass(slots=True, eq=False)
class Slot:
    """Where the engine keeps one parameter.

    Attributes:
        shape: of the whole parameter.
        layout: over the flattened parameter, by group rank.
        group: the ranks that it is cut over; None where each holds the whole.
        optimizer: DeepSpeed's, weakly; None where there is none.
        index: which of the optimizer's flat fp32 tensors it is in.
        start: where this rank's piece begins there.
        untrained: why there is no fp32 value; empty where there is one.
        position: where its gradient is in the engine's lists, among those of this rank's parameters.
        gaps: how many gaps lie before it in this rank's flat tensor; a list of the whole tensor has an entry for each.
        offset: where this rank's piece begins in the flattened parameter.
        numel: its elements.
    """

    shape: torch.Size
    layout: Layout
    group: dist.ProcessGroup | None
    optimizer: weakref.ref[Any] | None
    index: int = -1
    start: int = 0
    untrained: str = ""
    position: int = -1
    gaps: int = 0
    offset: int = field(init=False)
    numel: int = field(init=False)

    def __post_init__(self) -> None:
        fragment = self.layout.fragments[0 if self.group is None else self.group.rank()]
        self.numel = 0 if fragment is None else fragment.numel
        self.offset = fragment.offset[0] if fragment is not None and fragment.offset else 0

    @property
    def engine(self) -> Any:
        """DeepSpeed's optimizer; None where there is none, or it is gone."""
        return None if self.optimizer is None else self.optimizer()

    def sharding(self, param: torch.Tensor, key: Hashable, dtype: torch.dtype) -> Sharding:
        """Where a quantity is that is cut like the parameter."""
        fields = (self.shape, dtype, param.device, self.layout, self.group)
        return record_of(param).sharding(key, self, lambda: Sharding(*fields))


@dataclass(slots=True, eq=False)
class Watch:
    """A hook on a parameter, and whether its gradient of this window was added to an earlier step's remains."""

    hook: RemovableHandle
    mixed: bool = False


class DeepSpeedAdapter(Adapter):
    """Reads and writes the flat tensors of a ZeRO optimizer; each stage's adapter says where they are."""

    @abstractmethod
    def _slot(self, param: torch.Tensor) -> Slot:
        """Where the parameter is.

        Raises:
            UnlinkedParameterError: its engine cannot be found.
        """

    @abstractmethod
    def _flat(self, optimizer: Any, index: int) -> torch.Tensor:
        """This rank's flat fp32 tensor, 1-D, under which the base optimizer keeps its state."""

    @abstractmethod
    def _lp_part(self, param: torch.Tensor, slot: Slot) -> torch.Tensor:
        """This rank's part of the low-precision parameter: the value where there is no fp32 one."""

    @abstractmethod
    def _gradient(self, param: torch.Tensor, slot: Slot, optimizer: Any) -> torch.Tensor | None:
        """This rank's piece of the reduced gradient as it is stored, loss scale and all; any shape.

        Raises:
            GradientUnavailableError: there is none.
        """

    @abstractmethod
    def _after_gradient(self, param: torch.Tensor, slot: Slot, optimizer: Any, stored: torch.Tensor) -> None:
        """Update what the engine keeps beside a gradient that was written: its norm, and whether it overflows."""

    @abstractmethod
    def _begins_on(self, param: torch.Tensor, optimizer: Any) -> torch.Tensor | bool | None:
        """What the engine adds a backward pass's gradient to, asked before it does.

        False if it adds it to nothing; None if this is not the window's first.
        """

    def _readable(self, optimizer: Any, index: int, tensor: torch.Tensor) -> torch.Tensor:
        """A flat fp32 tensor, or a state of it, where it can be read and written."""
        return tensor

    def _dtype(self, optimizer: Any, index: int) -> torch.dtype:
        """The dtype of a flat fp32 tensor, whether or not that can be read now."""
        return self._flat(optimizer, index).dtype

    def _base_optimizer(self, optimizer: Any, index: int) -> torch.optim.Optimizer:
        found: torch.optim.Optimizer = optimizer.optimizer
        return found

    def _group_index(self, optimizer: Any, index: int) -> int:
        """Which of the base optimizer's parameter groups a flat fp32 tensor is of."""
        return index

    def _optimizer(self, param: torch.Tensor, slot: Slot) -> Any:
        optimizer = slot.engine
        if optimizer is None or slot.untrained:
            raise UnlinkedParameterError(
                f"{registry.name_of(param)} is in no optimizer of DeepSpeed's: {slot.untrained or 'the engine is gone'}"
            )
        return optimizer

    def sharding(self, param: torch.Tensor, what: str) -> Sharding:
        """An interval of the flattened parameter on each rank; state that is one number is whole on each."""
        slot = self._slot(param)
        if what in ("grad", "lp"):
            return slot.sharding(param, what, torch.float32 if what == "grad" else param.dtype)
        if what == "value":
            dtype = param.dtype if slot.untrained else self._dtype(self._optimizer(param, slot), slot.index)
            return slot.sharding(param, (what, dtype), dtype)
        source = self._source(param, slot, what)
        if source.dim():
            return slot.sharding(param, ("state", source.dtype), source.dtype)
        number = (source.shape, source.dtype, source.device)
        return record_of(param).sharding(("number", source.dtype), slot, lambda: Sharding(*number, whole(()), None))

    def versions(self, params: Sequence[torch.Tensor]) -> Sequence[object]:
        """The slots of the parameters that are this engine's."""
        return list(zip(map(self.claims, params), map(self._slot, params), strict=True))

    def local(self, param: torch.Tensor, what: str) -> torch.Tensor | None:
        """This rank's fragment of the fp32 value or of state; of the gradient in fp32, without the loss scale."""
        (piece,) = self.pieces([param], what)
        return piece.to(torch.float32) if what == "grad" and piece is not None else piece

    def pieces(self, params: Sequence[torch.Tensor], what: str) -> list[torch.Tensor | None]:
        """As `local`, but gradients that need only a cast as they are stored: the exchange casts all at once."""
        slots = list(map(self._slot, params))
        if what == "lp":
            return list(map(self._lp_part, params, slots))
        if what == "grad":
            _synchronize(params, slots)
            return list(map(self._unscaled_gradient, params, slots))
        return list(map(_cut, slots, self._sources(params, slots, what)))

    def _source(self, param: torch.Tensor, slot: Slot, what: str) -> torch.Tensor:
        """The tensor that this rank's piece of a value or state is cut out of."""
        if what == "value" and slot.untrained:
            return self._lp_part(param, slot)
        optimizer = self._optimizer(param, slot)
        entry = None if what == "value" else state_entry(self._state(param, slot), param, what)
        flat = self._readable(optimizer, slot.index, self._flat(optimizer, slot.index)).detach()
        if entry is None:
            return flat
        entry = self._readable(optimizer, slot.index, entry)
        if entry.dim() and entry.shape != flat.shape:
            raise other_shape(entry, param, what, flat.shape)
        return entry

    def _sources(self, params: Sequence[torch.Tensor], slots: Sequence[Slot], what: str) -> list[torch.Tensor]:
        """`_source` of each, looked up once for each flat tensor."""
        found: dict[tuple[int, int], torch.Tensor] = {}
        sources = []
        for param, slot in zip(params, slots, strict=True):
            key = (id(slot.optimizer), slot.index)
            source = None if slot.untrained else found.get(key)
            if source is None:
                source = found[key] = self._source(param, slot, what)
            sources.append(source)
        return sources

    def write(self, param: torch.Tensor, what: str, piece: torch.Tensor) -> None:
        """Replace this rank's piece; a gradient is stored times the loss scale, in the engine's own dtype."""
        if what != "grad":
            super().write(param, what, piece)
            return
        slot = self._slot(param)
        _synchronize([param], [slot])
        stored, scale = self._stored_gradient(param, slot)
        assert stored is not None
        stored.detach().copy_(piece.reshape(stored.shape).float() * scale)
        self._after_gradient(param, slot, self._optimizer(param, slot), stored)

    def writes_through(self, what: str) -> bool:
        """All but gradients: the engine keeps them scaled, and remembers their norms."""
        return what != "grad"

    def _unscaled_gradient(self, param: torch.Tensor, slot: Slot) -> torch.Tensor | None:
        """This rank's piece of the gradient, 1-D; as it is stored where it needs no more than a cast, else in fp32."""
        stored, scale = self._stored_gradient(param, slot)
        if stored is None or scale == 1.0:
            return None if stored is None else stored.detach().view(-1)
        return stored.detach().to(torch.float32, copy=True).view(-1).div_(scale)

    def _stored_gradient(self, param: torch.Tensor, slot: Slot) -> tuple[torch.Tensor | None, float]:
        """This rank's piece of the gradient, and the loss scale that it is multiplied by."""
        if slot.untrained:
            raise unused_gradient(param, slot.untrained, others=False)
        optimizer = self._optimizer(param, slot)
        return self._gradient(param, slot, optimizer), loss_scale(optimizer)

    def _state(self, param: torch.Tensor, slot: Slot) -> dict[str, Any]:
        optimizer = self._optimizer(param, slot)
        return ready_state(self._base_optimizer(optimizer, slot.index), self._flat(optimizer, slot.index), param)

    def state_keys(self, param: torch.Tensor) -> list[str]:
        """The keys of the base optimizer's state, the same on every rank."""
        return list(self._state(param, self._slot(param)))

    def optimized(self, params: Sequence[torch.Tensor]) -> list[Optimized | None]:
        """By the base optimizer, on a flat fp32 tensor."""
        found: list[Optimized | None] = []
        for slot in map(self._slot, params):
            optimizer = None if slot.untrained else slot.engine
            if optimizer is None:
                found.append(None)
                continue
            base = self._base_optimizer(optimizer, slot.index)
            group = base.param_groups[self._group_index(optimizer, slot.index)]
            found.append(Optimized(base, self._flat(optimizer, slot.index), group, type(base).__name__))
        return found

    def master(self, param: torch.Tensor) -> str:
        """A true master, but for parameters that are not trained."""
        return value_kind(self.sharding(param, "value").dtype)

    def _watch(self, param: torch.Tensor, optimizer: Any) -> None:
        """Note at each backward pass whether the window's gradient of the parameter begins on old remains."""
        held_param, held_optimizer = weakref.ref(param), weakref.ref(optimizer)

        def see(_gradient: torch.Tensor) -> None:
            param, optimizer = held_param(), held_optimizer()
            remains = None if param is None or optimizer is None else self._begins_on(param, optimizer)
            if remains is not None:
                watch.mixed = bool(remains.any()) if isinstance(remains, torch.Tensor) else remains

        earlier = forget(param, Watch)
        if earlier is not None:
            earlier.hook.remove()
        if param.requires_grad:
            watch = Watch(param.register_hook(see))  # type: ignore[no-untyped-call]
            note(param, watch)


def is_mixed(param: torch.Tensor) -> bool:
    """Whether the gradient of this window was added to what an earlier step had left; see `Watch`."""
    watch = noted(param, Watch)
    return watch is not None and watch.mixed


def _cut(slot: Slot, source: torch.Tensor) -> torch.Tensor | None:
    """This rank's piece."""
    if slot.untrained or not source.dim():
        return source
    return source.narrow(0, slot.start, slot.numel) if slot.numel else None


def no_gradient(param: torch.Tensor, reason: str) -> GradientUnavailableError:
    """The error for a gradient that cannot be read."""
    return GradientUnavailableError(f"{registry.name_of(param)} has no reduced gradient: {reason}")


def unused_gradient(param: torch.Tensor, reason: str, *, others: bool) -> GradientUnavailableError:
    """The error for a parameter that has no gradient at all.

    Args:
        param: the parameter.
        reason: why it has none.
        others: whether other parameters of the engine have one in this window, so that its backward passes did not use
            this one.
    """
    kind = UnusedGradientError if others or not param.requires_grad else GradientUnavailableError
    return kind(f"{registry.name_of(param)} has no reduced gradient: {reason}")


def loss_scale(optimizer: Any) -> float:
    """The factor that the engine multiplied the loss of this window by."""
    scaler = getattr(optimizer, "torch_autocast_gradscaler", None)
    if scaler is not None and not optimizer.custom_loss_scaler:
        return float(scaler.get_scale())
    return float(getattr(optimizer, "loss_scale", None) or 1.0)


def at_boundary(optimizer: Any) -> bool:
    """Whether the window's last micro batch is under way or done."""
    found = optimizer.is_gradient_accumulation_boundary  # a method, or a plain bool where DeepSpeed is older
    return bool(found() if callable(found) else found)


def remembered(optimizer: Any, name: str) -> Any:
    """The table in which the engine notes its gradients.

    Raises:
        FragmentError: an older DeepSpeed, which cannot tell old gradients from new ones.
    """
    if not hasattr(optimizer, name):
        raise FragmentError(
            f"this DeepSpeed does not keep {type(optimizer).__name__}.{name}, without which gradients of the last step "
            "look like new ones: reading gradients of this engine needs DeepSpeed 0.19 or later"
        )
    return getattr(optimizer, name)


def _synchronize(params: Sequence[torch.Tensor], slots: Sequence[Slot]) -> None:
    """Wait for the engines' work on gradients that runs beside the current CUDA stream."""
    pairs = zip(params, slots, strict=True)
    engines = {id(slot.optimizer): (slot.engine, param.device) for param, slot in pairs if param.is_cuda}
    for optimizer, device in engines.values():
        if getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False):
            torch.cuda.synchronize(device)
        stream = getattr(optimizer, "reduce_and_partition_stream", None)
        if stream is not None:
            torch.cuda.current_stream(device).wait_stream(stream)
