"""DeepSpeed's own module for groups, where DeepSpeed is the engine; it is never imported from here.

[Note: live] DeepSpeed's module is *live* when the program has imported ``deepspeed.utils.groups``. It then keeps the
state: values and groups are read from its variables and written to them, so that the engine and
`ds_groups.parallel_state` speak of the same ones. Under ``ds_train_utils.install()`` that name is
`ds_groups.parallel_state` itself, and there is nothing to follow.
"""

from __future__ import annotations

import sys
import weakref
from types import ModuleType
from typing import Generic, TypeVar

from ._c10d import current_world

T = TypeVar("T")


def deepspeed_groups() -> ModuleType | None:
    """DeepSpeed's module for groups; None where it is not imported, half imported, or replaced by ours."""
    found = sys.modules.get("deepspeed.utils.groups")
    if found is None or found is sys.modules.get(f"{__package__}.parallel_state"):
        return None
    return None if getattr(found.__spec__, "_initializing", False) else found


class Assigned(Generic[T]):
    """An attribute that is a variable of DeepSpeed's module too, where that is live.

    Assigning sets both. Reading asks DeepSpeed's first; the owner's value counts where DeepSpeed's is unset and never
    had it, because it was assigned before DeepSpeed was imported. ``del`` takes back what was assigned here.

    Args:
        variable: its name in DeepSpeed's module, and in the owner's ``vars``.
        unset: what it is until somebody assigns it.
        of_world: it is unset again, in both modules, when the default process group that there was at its assignment
            is destroyed. An object that DeepSpeed assigned belongs to the world in which it is first read, and an
            int of DeepSpeed's is DeepSpeed's to unset.
    """

    def __init__(self, variable: str, unset: T, *, of_world: bool = False) -> None:
        self._variable, self._unset, self._of_world = variable, unset, of_world
        self._written: ModuleType | None = None  # DeepSpeed's module, if the last assignment went there too
        self._seen: tuple[T, weakref.ref[object] | None] | None = None  # a value, and the world that it belongs to

    def __get__(self, owner: object, kind: type | None = None) -> T:
        value = self._read(owner)
        if not self._of_world or value is self._unset or (isinstance(value, int) and deepspeed_groups() is not None):
            return value  # DeepSpeed may have assigned an equal int in the present world: only it can tell
        if self._seen is None or self._seen[0] is not value or self._seen[1] is None:
            self._remember(value)
            return value
        world = self._seen[1]()
        if world is None or world is not current_world():
            self.__set__(owner, self._unset)
            return self._unset
        return value

    def __set__(self, owner: object, value: T) -> None:
        engine = self._written = deepspeed_groups()
        vars(owner)[self._variable] = value
        if engine is not None:
            setattr(engine, self._variable, value)
        self._remember(value)

    def __delete__(self, owner: object) -> None:
        own = vars(owner).pop(self._variable, self._unset)
        engine = deepspeed_groups()
        if engine is not None and getattr(engine, self._variable, self._unset) is own:
            setattr(engine, self._variable, self._unset)

    def _read(self, owner: object) -> T:
        own: T = vars(owner).get(self._variable, self._unset)
        engine = deepspeed_groups()
        if engine is None:
            return own
        theirs: T = getattr(engine, self._variable, self._unset)
        return own if theirs is self._unset and engine is not self._written else theirs

    def _remember(self, value: T) -> None:
        world = current_world()
        self._seen = value, None if world is None else weakref.ref(world)
