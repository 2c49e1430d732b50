"""Run one forward, and a backward where there is something to go back from, and record what it calls."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as hooks
from torch.overrides import TorchFunctionMode

from ds_z3leaf._outputs import seen_by_hooks, tensors_in
from ds_z3leaf._rehearse.calls import Call, read_calls
from ds_z3leaf._rehearse.index import ModuleIndex
from ds_z3leaf._rehearse.stand_in import in_training, kept_random_state, random_state, stand_in

Forward = Callable[[nn.Module, Any], Any]

# Functions of torch whose result, or its shape, puts values of a tensor at the program's disposal.
_READS = frozenset(
    {"item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__contains__", "is_nonzero", "equal"}
    | {"allclose", "nonzero", "argwhere", "unique", "unique_consecutive", "masked_select", "bincount"}
)


@dataclass(frozen=True)
class Pass:
    """What one forward called.

    Attributes:
        batch: number of its batch.
        repeat: number of the run of this batch.
        forward: the calls.
        backward: how often the backward reached the output of each module, by the module's number; None without one.
    """

    batch: int
    repeat: int
    forward: Call
    backward: Mapping[int, int] | None


@dataclass(frozen=True)
class Recording:
    """What this rank's batches called.

    Attributes:
        passes: one for each batch and repeat.
        deciders: numbers of the modules that read values of tensors and call other modules after it.
        without_floats: numbers of the modules that a pass called without a tensor of floating point.
        odd_outputs: numbers of the modules that returned neither a tensor with a gradient nor a tuple with one.
        on_meta: whether the model ran on meta.
    """

    passes: tuple[Pass, ...]
    deciders: frozenset[int]
    without_floats: frozenset[int]
    odd_outputs: frozenset[int]
    on_meta: bool


def record(
    index: ModuleIndex,
    batches: Iterable[Any],
    forward: Forward | None,
    *,
    backward: bool,
    repeats: int | None,
    meta: bool,
) -> Recording:
    """Run all batches of this rank on stand-ins for the model's tensors ([Note: events] in calls.py).

    Args:
        batches: a mapping is given to the model as keywords, a tuple or list as arguments, anything else as one.
        forward: called with the model and a batch instead.
        backward: go back from the loss in the output, or from the sum of the output's tensors.
        repeats: runs of each batch; None stands for 1, or for 4 where the forward draws random numbers on the host.
        meta: run on meta.
    """
    session = _Session(index, forward, backward, meta)
    passes: list[Pass] = []
    with session, kept_random_state():
        for number, batch in enumerate(batches):
            runs = repeats or 1
            repeat = 0
            while repeat < runs:
                before = random_state()
                passes.append(session.run(number, repeat, batch))
                if repeats is None and _differ(before, random_state()):
                    runs = 4
                repeat += 1
    odd = frozenset(session.odd_outputs)
    return Recording(tuple(passes), frozenset(session.deciders), frozenset(session.without_floats), odd, meta)


class _Session:
    """A model on stand-ins, with the hooks that write the events."""

    def __init__(self, index: ModuleIndex, forward: Forward | None, backward: bool, meta: bool) -> None:
        self.index = index
        self.deciders: set[int] = set()
        self.without_floats: set[int] = set()
        self.odd_outputs: set[int] = set()
        self._forward = forward or _call
        self._backward = backward
        self._meta = meta
        self._model = index.modules[0]
        self._events: list[int] = []
        self._active: Counter[int] = Counter()
        self._stack: list[tuple[int, int]] = []  # module, and how many reads there had been when it was entered
        self._reads = 0
        self._reached: Counter[int] = Counter()
        self._open = contextlib.ExitStack()

    def __enter__(self) -> _Session:
        self._open.enter_context(torch.compiler.set_stance("force_eager"))
        self._open.enter_context(torch.inference_mode(False))
        self._open.enter_context(in_training(self._model))
        self._open.enter_context(stand_in(self.index, self._access, meta=self._meta))
        # Two hooks on all modules: hooks on each would take longer to install than a forward takes.
        self._open.callback(hooks.register_module_forward_pre_hook(self._enter).remove)
        self._open.callback(hooks.register_module_forward_hook(self._leave, always_call=True).remove)
        for number, module in enumerate(self.index.modules):
            if self.index.holds[number] and any(True for _ in module.children()):  # the others cannot become leaves
                handle = module.register_forward_pre_hook(self._watch_input(number), with_kwargs=True)
                self._open.callback(handle.remove)
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def run(self, number: int, repeat: int, batch: Any) -> Pass:
        """One pass over a batch."""
        self._events.clear()
        self._active.clear()
        self._stack.clear()
        self._reached = Counter()
        device = "meta" if self._meta else device_of(self._model)
        reads = contextlib.nullcontext() if self._meta else _Reads(self._count_read)  # on meta, a read raises
        reached = None
        with torch.set_grad_enabled(self._backward):
            with reads:
                output = self._forward(self._model, _moved(batch, device))
            calls = read_calls(self._events, len(self.index.modules))
            loss = _loss_of(output) if self._backward else None
            if loss is not None:
                loss.backward()  # type: ignore[no-untyped-call]
                reached = dict(self._reached)
        for module in self.index.modules:
            for param in module._parameters.values():
                if param is not None:
                    param.grad = None
        return Pass(number, repeat, calls, reached)

    def _number(self, module: nn.Module) -> int | None:
        """The number of a module with parameters; None for the others, and for those of other models."""
        number = self.index.number.get(id(module))
        return number if number is not None and self.index.holds[number] else None

    def _enter(self, module: nn.Module, args: Any) -> None:
        number = self._number(module)
        if number is None:
            return
        self._events.append(number)
        if self._reads:
            self.deciders.update(outer for outer, before in self._stack if before < self._reads)
        self._active[number] += 1
        self._stack.append((number, self._reads))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        number = self._number(module)
        if number is None:
            return
        self._events.append(~number)
        self._active[number] -= 1
        if self._stack and self._stack[-1][0] == number:
            self._stack.pop()
        if self._backward:
            self._watch_output(number, output)

    def _access(self, number: int) -> None:
        if self._stack and not self._active[number]:
            self._events.append(len(self.index.modules) + number)

    def _count_read(self) -> None:
        self._reads += 1

    def _watch_input(self, number: int) -> Callable[..., None]:
        def watch(module: nn.Module, args: Any, kwargs: Any) -> None:
            given = (*args, *kwargs.values())
            if not any(isinstance(value, torch.Tensor) and value.is_floating_point() for value in given):
                self.without_floats.add(number)

        return watch

    def _watch_output(self, number: int, output: Any) -> None:
        if not seen_by_hooks(output):
            self.odd_outputs.add(number)
        reached = self._reached
        done = False

        def reach(grad: torch.Tensor) -> None:
            nonlocal done
            if not done:  # a call with several outputs is reached once
                done = True
                reached[number] += 1

        for tensor in tensors_in(output):
            if tensor.requires_grad:
                tensor.register_hook(reach)  # type: ignore[no-untyped-call]


class _Reads(TorchFunctionMode):
    """Tells when the program reads values of a tensor, or gets a tensor whose shape depends on values."""

    def __init__(self, count: Callable[[], None]) -> None:
        super().__init__()
        self._count = count

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _READS or (name == "where" and len(args) == 1) or (name == "__getitem__" and _by_mask(args)):
            self._count()
        return func(*args, **(kwargs or {}))


def _by_mask(args: Any) -> bool:
    keys = args[1] if isinstance(args[1], tuple) else (args[1],)
    return any(isinstance(key, torch.Tensor) and key.dtype in (torch.bool, torch.uint8) for key in keys)


def _differ(before: tuple[Any, Any], after: tuple[Any, Any]) -> bool:
    return before[1] != after[1] or not torch.equal(before[0], after[0])


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def device_of(model: nn.Module) -> torch.device:
    """Where a model is: the device of its first parameter or buffer."""
    tensors = chain(model.parameters(), model.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _moved(value: Any, device: Any) -> Any:
    """A batch with its tensors on a device, detached from the caller's."""
    if isinstance(value, torch.Tensor):
        moved = value.detach().to(device)
        return moved.clone() if moved.is_inference() else moved
    if isinstance(value, Mapping):
        entries = {key: _moved(entry, device) for key, entry in value.items()}
        if type(value) is dict or not isinstance(value, MutableMapping):
            return entries
        same = copy.copy(value)  # a batch of transformers has its entries as attributes, too
        for key, entry in entries.items():
            same[key] = entry
        return same
    if isinstance(value, (tuple, list)):
        listed = [_moved(entry, device) for entry in value]
        return type(value)(*listed) if hasattr(value, "_fields") else type(value)(listed)
    return value


def _loss_of(output: Any) -> torch.Tensor | None:
    """The loss in an output, or the sum of its floating point tensors; None if nothing in it has a gradient."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(loss, torch.Tensor) and loss.requires_grad:
        return loss.sum()
    sums = [
        (torch.view_as_real(end) if end.is_complex() else end).float().sum()
        for end in tensors_in(output)
        if end.requires_grad
    ]
    return torch.stack([each.to(sums[0].device) for each in sums]).sum() if sums else None
