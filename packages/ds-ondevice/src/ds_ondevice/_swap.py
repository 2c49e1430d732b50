"""Give tensors their values without changing which objects they are."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch

from ds_ondevice._claims import CLAIMED
from ds_ondevice._modules import ORIGINS, Origin
from ds_ondevice._ops import Recording
from ds_ondevice._slots import Slot, put_device


class Swaps:
    """Exchanges of what two tensors are, in the order that they were made."""

    def __init__(self) -> None:
        self._done: list[tuple[torch.Tensor, torch.Tensor]] = []

    def swap(self, old: torch.Tensor, new: torch.Tensor) -> bool:
        """Make ``old`` what ``new`` is, with its own hooks, if nothing else holds on to what it was.

        A weak reference to ``old``, an autograd graph or a view made of it prevents that, says
        `torch.utils.swap_tensors`.
        """
        if not _swap(old, new):
            return False
        self._done.append((old, new))
        return True

    def undo(self) -> None:
        """Make every tensor what it was."""
        for old, new in reversed(self._done):
            _swap(old, new)
        self._done.clear()


def _swap(old: torch.Tensor, new: torch.Tensor) -> bool:
    hooks, after_grad = old._backward_hooks, getattr(old, "_post_accumulate_grad_hooks", None)
    try:
        torch.utils.swap_tensors(old, new)  # type: ignore[no-untyped-call]
    except RuntimeError:
        return False
    if hooks and old.requires_grad:  # these belong to what the tensor was, and are not taken along
        old._backward_hooks = hooks
    if after_grad and old.requires_grad:
        old._post_accumulate_grad_hooks = after_grad
    return True


class Exchange:
    """Puts the new tensors where the old ones are; takes that back."""

    def __init__(self, parts: Iterable[torch.nn.Module], slots: list[Slot], recordings: Iterable[Recording]) -> None:
        self._parts, self._slots, self._recordings = tuple(parts), slots, tuple(recordings)
        self._swaps = Swaps()
        self._origins: dict[torch.nn.Module, dict[str, Origin]] = {}
        self._vars = [dict(vars(part)) for part in self._parts]
        self._registries = [(dict(part._parameters.items()), dict(part._buffers.items())) for part in self._parts]
        # A tensor with weak references to it cannot be swapped: hold on to what was made, and let go of ours.
        self._made = [[tensor for ref in each.made if (tensor := ref()) is not None] for each in self._recordings]
        for each in self._recordings:
            each.made.clear()

    def put(self, replacements: dict[int, torch.Tensor], device: torch.device) -> set[int]:
        """Give every tensor its replacement, and attributes that remember a device that one.

        Returns:
            The ids of the tensors in the place of which another object stands now.
        """
        held = {
            id(tensor): tensor for tensors in (*(slot.held for slot in self._slots), *self._made) for tensor in tensors
        }
        others = {}
        for key, new in replacements.items():
            if not self._swaps.swap(held[key], new):
                others[key] = new
        for slot in self._slots if others else ():
            slot.put(others)
        for part in self._parts:
            if part in ORIGINS:
                self._origins[part] = ORIGINS.pop(part)
            put_device(part, lambda found: found is CLAIMED or found.type == "meta", device)
            if isinstance(part, torch.nn.RNNBase):
                part.flatten_parameters()  # one chunk of memory, as its constructor makes it where cuDNN is used
        return set(others)

    def undo(self) -> None:
        """The module as it was."""
        self._swaps.undo()
        ORIGINS.update(self._origins)
        for part, attributes, (parameters, buffers) in zip(self._parts, self._vars, self._registries, strict=True):
            vars(part).update(attributes)
            part._parameters.update(parameters)
            part._buffers.update(buffers)

    def close(self) -> None:
        """Watch what is on meta still, as before."""
        for recording, made in zip(self._recordings, self._made, strict=True):
            recording.made.extend(weakref.ref(tensor) for tensor in made if tensor.is_meta)
        self._made = []
