"""What is known of parameters beside themselves: one record for each, kept on the parameter.

[Note: record] A parameter's record is an attribute of the parameter, as DeepSpeed's ``_hp_mapping`` is: it goes when
the parameter goes. Nothing refers to a parameter weakly, since torch refuses to move one that is referred to so
(`torch.utils.swap_tensors`, which ``model.to()`` calls for DTensors). Such a move also takes the attributes away; a
parameter of an attached model whose record is gone gets a new one from what was attached.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from operator import attrgetter
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from ds_fragment.sharding import Sharding

V = TypeVar("V")

_ATTRIBUTE = "_ds_fragment"
_record = attrgetter(_ATTRIBUTE)


class Record:
    """What is known of one parameter; see [Note: record].

    Attributes:
        owner: the id of the parameter, which a copy of it does not have.
        model: the attached model, weakly.
        name: in the attached model, without the prefixes of wrappers.
        optimizer: that updates it, weakly.
        master: its fp32 value, weakly, where it was attached with one.
        lowered: the parameter that this one was attached as the fp32 value of.
        notes: what adapters know of it, by class.
        engine: the adapter of the engine that holds it, as somebody last asked.
        home: how its value was sharded then.
        version: what the engine said of it then, see `Adapter.versions`.
        generation: of the registry then.
        shardings: of its quantities, each with what it follows from.
        agreed: by optimizer state, the sharding that the ranks agreed on (None where they have to agree anew), and the
            sharding of the parameter then.
    """

    __slots__ = (
        "agreed",
        "engine",
        "generation",
        "home",
        "lowered",
        "master",
        "model",
        "name",
        "notes",
        "optimizer",
        "owner",
        "shardings",
        "version",
    )

    def __init__(self, owner: int) -> None:
        self.owner = owner
        self.model: weakref.ref[nn.Module] | None = None
        self.name: str | None = None
        self.optimizer: weakref.ref[torch.optim.Optimizer] | None = None
        self.master: weakref.ref[torch.Tensor] | None = None
        self.lowered: torch.Tensor | None = None
        self.notes: dict[type, Any] = {}
        self.engine: Any = None
        self.home: Sharding | None = None
        self.version: object = None
        self.generation = -1
        self.shardings: dict[Hashable, tuple[object, Sharding]] = {}
        self.agreed: dict[str, tuple[Sharding | None, Sharding]] = {}

    def sharding(self, key: Hashable, source: object, make: Callable[[], Sharding]) -> Sharding:
        """The sharding that was made under the key, as long as ``source``, which it follows from, is the same."""
        found = self.shardings.get(key)
        if found is None or (found[0] is not source and found[0] != source):
            found = self.shardings[key] = (source, make())
        return found[1]

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """A copy of a parameter, in memory or in a file, has no record: what is loaded needs no ds-fragment."""
        return OrderedDict, ()


def record_of(param: torch.Tensor) -> Record:
    """The parameter's record; made if there is none."""
    record = getattr(param, _ATTRIBUTE, None)
    if type(record) is Record and record.owner == id(param):
        return record
    made = Record(id(param))
    setattr(param, _ATTRIBUTE, made)
    registry.restore(param)
    return made


def records_of(params: Sequence[torch.Tensor]) -> list[Record]:
    """The records of many parameters."""
    try:
        found = list(map(_record, params))
    except AttributeError:
        return list(map(record_of, params))
    if set(map(type, found)) <= {Record} and [record.owner for record in found] == list(map(id, params)):
        return found
    return list(map(record_of, params))


def noted(param: torch.Tensor, kind: type[V]) -> V | None:
    """What an adapter noted of the parameter in an object of that class; None if nothing."""
    found: V | None = record_of(param).notes.get(kind)
    return found


def note(param: torch.Tensor, what: object) -> None:
    """Note an object, in the place of an earlier one of its class."""
    record_of(param).notes[type(what)] = what


def forget(param: torch.Tensor, kind: type[V]) -> V | None:
    """Take a note away and return it; None if there is none."""
    found: V | None = record_of(param).notes.pop(kind, None)
    return found


class Attachment(Protocol):
    """One call of `attach`, which can be made again."""

    def model(self) -> nn.Module | None:
        """The model, while it is there."""

    def key(self) -> Hashable:
        """The same for a call with the same model, optimizers and masters; None once everything is gone."""

    def learn(self) -> Iterable[torch.Tensor]:
        """Note what was attached; returns the parameters that were noted."""


class Registry:
    """What was attached, and what is asked of the records."""

    def __init__(self) -> None:
        self._attachments: list[tuple[Attachment, set[int]]] = []  # with the ids of the parameters that were noted
        self._restoring = False
        self.generation = 0  # what was found out of parameters in an earlier one may be wrong by now

    def changed(self) -> None:
        """Have everything that was found out of parameters be found out anew."""
        self.generation += 1

    def attach(self, attachment: Attachment) -> None:
        """Note what was attached now, and again whenever a parameter has lost its record."""
        self.changed()
        replaced = (None, attachment.key())
        kept = [(other, ids) for other, ids in self._attachments if other.key() not in replaced]
        self._attachments = [*kept, *self._learned([attachment])]

    def restore(self, param: torch.Tensor) -> None:
        """Note what was attached once more, if it was attached with this parameter, which has a new record."""
        if not self._restoring and any(id(param) in ids for _, ids in self._attachments):
            self._attachments = self._learned([attachment for attachment, _ in self._attachments])
            self.changed()

    def _learned(self, attachments: Iterable[Attachment]) -> list[tuple[Attachment, set[int]]]:
        self._restoring = True
        try:
            return [(attachment, set(map(id, attachment.learn()))) for attachment in attachments]
        finally:
            self._restoring = False

    def models(self) -> Iterator[nn.Module]:
        """The attached models that are still there."""
        return (model for attachment, _ in self._attachments if (model := attachment.model()) is not None)

    def add_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Record the optimizer for every tensor in its parameter groups."""
        reference = weakref.ref(optimizer)
        for group in optimizer.param_groups:
            for param in group["params"]:
                record_of(param).optimizer = reference

    def add_names(self, model: nn.Module, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Record which model the parameters are of, and what they are called there."""
        reference = weakref.ref(model)
        for name, param in named:
            record = record_of(param)
            record.model, record.name = reference, name

    def add_master(self, param: torch.Tensor, master: torch.Tensor) -> None:
        """Record that ``master`` is the fp32 value of ``param``."""
        record_of(param).master = weakref.ref(master)
        record_of(master).lowered = param

    def optimizer_of(self, param: torch.Tensor) -> torch.optim.Optimizer | None:
        """The optimizer that was attached and is still alive."""
        reference = record_of(param).optimizer
        return None if reference is None else reference()

    def master_of(self, param: torch.Tensor) -> torch.Tensor | None:
        """The fp32 master that was attached and is still alive."""
        reference = record_of(param).master
        return None if reference is None else reference()

    def lowered(self, master: torch.Tensor) -> torch.Tensor | None:
        """The parameter that was attached with this master."""
        record = getattr(master, _ATTRIBUTE, None)  # asked of every parameter at every step: none is made
        return record.lowered if type(record) is Record and record.owner == id(master) else None

    def others_have_gradients(self, param: torch.Tensor) -> bool:
        """Whether a parameter of the attached model that this one is in, or its master, has a gradient now."""
        reference = record_of(param).model
        model = None if reference is None else reference()
        for other in () if model is None else model.parameters():
            master = self.master_of(other)
            if other.grad is not None or (master is not None and master.grad is not None):
                return True
        return False

    def is_named(self, param: torch.Tensor) -> bool:
        """Whether the parameter is in an attached model."""
        return record_of(param).name is not None

    def name_of(self, param: torch.Tensor) -> str:
        """The parameter's name for messages: its own where known, else its shape."""
        name = record_of(param).name
        return (
            f"parameter '{name}'"
            if name is not None
            else f"a parameter of shape {tuple(getattr(param, 'ds_shape', param.shape))}"
        )


registry = Registry()
