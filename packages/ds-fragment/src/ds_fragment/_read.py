"""Reading: from parameters and a quantity to places, a plan, and whole tensors."""

from __future__ import annotations

import contextlib
import hashlib
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ds_fragment._adapters import Adapter, adapter_of
from ds_fragment._check import meet
from ds_fragment._exchange import Locate, Pieces, Place, Plan, agree, bucket_bytes_for, fetch, gather, numels, plan_of
from ds_fragment._identity import IdentityMap, Seen
from ds_fragment._loaded import is_a
from ds_fragment._recent import Recent
from ds_fragment._registry import clean_name, registry
from ds_fragment.errors import FragmentError, InvalidValueError, StateKeyError

Named = tuple[str, torch.Tensor]
K = TypeVar("K")


class _Survey:
    """Where one quantity of some parameters is: found out once, good until one of them is held in another way."""

    def __init__(self, params: Sequence[torch.Tensor], what: str) -> None:
        self.what, self.generation = what, registry.generation
        self.error: FragmentError | None = None
        self.adapters = [adapter_of(param) for param in params]
        self._params = Seen(params)
        self.homes = [adapter.place(param, "value") for adapter, param in zip(self.adapters, params, strict=True)]
        self.places = self.homes if what == "value" else [self._place(param, i) for i, param in enumerate(params)]
        self.held = [place.layout.held(place.rank) for place in self.places]
        self.groups = list(dict.fromkeys(group for place in self.homes for group in place.groups))
        by_adapter: dict[Adapter, list[int]] = {}
        for item, adapter in enumerate(self.adapters):
            by_adapter.setdefault(adapter, []).append(item)
        self.by_adapter = list(by_adapter.items())
        self.settle = self.to_settle(self.places)
        self.agreed_at: int | None = None  # what `_agreements` counted when all was as agreed
        self.plan: tuple[int | None, Plan] | None = None  # the last one, and the bucket_bytes that were asked for
        self._stamps = [] if self.error is not None else self._stamps_of(params)

    def _place(self, param: torch.Tensor, item: int) -> Place:
        try:
            return self.adapters[item].place(param, self.what)
        except FragmentError as error:
            self.error = self.error or error
            return self.homes[item]

    def to_settle(self, places: Sequence[Place]) -> Sequence[dist.ProcessGroup]:
        """The groups whose ranks each hold something whole that some of them may lack."""
        groups: dict[dist.ProcessGroup, None] = {}
        if self.what != "value":
            for place, home in zip(places, self.homes, strict=True):
                if place.alone:
                    groups.update(dict.fromkeys(home.replicas if home.group is None else (home.group,)))
        return tuple(groups)

    def _stamps_of(self, params: Sequence[torch.Tensor]) -> list[Sequence[object]]:
        if len(self.by_adapter) == 1:
            return [self.adapters[0].stamps(params, self.what)]
        return [adapter.stamps([params[i] for i in items], self.what) for adapter, items in self.by_adapter]

    def holds(self, params: Sequence[torch.Tensor]) -> bool:
        """Whether it is still good for these parameters, which have the ids of those that it was made for."""
        if self.generation != registry.generation or not self._params.alive:
            return False
        try:
            return self._stamps_of(params) == self._stamps
        except (FragmentError, LookupError):
            return False


_surveys = Recent[_Survey](most=50_000)  # parameters


def _survey_of(params: Sequence[torch.Tensor], what: str) -> _Survey:
    """The survey of a quantity of the parameters, made now unless there is one that is still good."""
    key = (what, *map(id, params))
    found = _surveys.get(key)
    if found is not None and found.holds(params):
        return found
    made = _Survey(params, what)
    if made.error is None:  # with an error goes all that its traceback refers to
        _surveys.put(key, made, len(params))
    return made


class _Agreements:
    """By parameter and state, where the ranks agreed that it is; until then, nothing.

    Attributes:
        changes: a count of what changed, so that a caller knows whether anything did.
    """

    def __init__(self) -> None:
        # The place, or None where they have to agree anew; and where the parameter was then.
        self._places = IdentityMap[dict[str, tuple[Place | None, Place]]]()
        self.changes = 0

    def get(self, param: torch.Tensor, what: str, home: Place) -> Place | None:
        """Where the state is, if the ranks agreed when the parameter was where it is now."""
        place, then = (self._places.get(param) or {}).get(what, (None, None))
        return place if then is home else None

    def ever(self, param: torch.Tensor, what: str) -> bool:
        """Whether they have agreed before."""
        return what in (self._places.get(param) or {})

    def drop(self, param: torch.Tensor, what: str) -> None:
        """As if they never had."""
        if (self._places.get(param) or {}).pop(what, None) is not None:
            self.changes += 1

    def put(self, param: torch.Tensor, what: str, place: Place | None, home: Place) -> None:
        """Remember it."""
        self._places[param] = {**(self._places.get(param) or {}), what: (place, home)}
        self.changes += 1


_agreements = _Agreements()


class Quantity:
    """One quantity of many parameters: where each is, and this rank's pieces.

    [Note: agreement] Where optimizer state is can depend on the optimizer, which a rank may lack or keep otherwise. The
    ranks that hold a parameter agree on it before the first exchange, so that the constructor is collective then. Later
    ones go by what was agreed: a rank on which that is not so any more sends an error in the place of its data, and the
    next call agrees anew. It does so only where all ranks of the group that shares the parameter know of the error, and
    among them, or some would agree while others read. A place that cannot be told becomes an error that this rank sends
    with the first piece, as does a disagreement.
    """

    def __init__(self, params: Sequence[torch.Tensor], what: str, call: str = "a read") -> None:
        self.params, self.what = params, what
        self._survey = _survey_of(params, what)
        self.adapters, self.homes = self._survey.adapters, self._survey.homes
        self.places, self.error = self._survey.places, self._survey.error
        self.told: set[dist.ProcessGroup] = set()  # the groups whose ranks all know of an error
        if self._survey.groups:
            meet(self._survey.groups, lambda: self._words(call))
        if what not in ("value", "grad") and self._survey.agreed_at != _agreements.changes:
            self._agree()

    def _agree(self) -> None:
        """See [Note: agreement]; what no group holds is nobody else's business."""
        known = [self._known(item) for item in range(len(self.params))]
        new, others = [], dict[dist.ProcessGroup | None, list[int]]()
        for item, home in enumerate(self.homes):
            if known[item] is None and not _agreements.ever(self.params[item], self.what):
                new.append(item)
            else:
                others.setdefault(home.group, []).append(item)
        asked = [(new, [self.homes[item].groups for item in new])] if new else []
        for group, items in others.items():
            if group is not None and any(known[item] is None for item in items):
                asked.append((items, [(group,)] * len(items)))
        for items, scopes in asked:
            if self._agree_on(items, scopes):
                for item in items:
                    known[item] = self.places[item]
        if known == self.places and self.error is None:  # places are equal if they are the same
            self._survey.agreed_at = _agreements.changes
            return
        for item, (before, now) in enumerate(zip(known, self.places, strict=True)):
            if self.error is None and before is not None and not before.like(now):
                self.error = StateKeyError(
                    f"'{self.what}' of {self.name(item)} is not kept as at the last read (then {before.dtype} of shape "
                    f"{tuple(before.shape)}, now {now.dtype} of shape {tuple(now.shape)}): call again, so that the "
                    "ranks agree anew"
                )
        if self.error is not None:
            self.places = [home if place is None else place for home, place in zip(self.homes, known, strict=True)]

    def _known(self, item: int) -> Place | None:
        """Where the state is to be found, as far as that need not be agreed on."""
        home = self.homes[item]
        return self.places[item] if home.group is None else _agreements.get(self.params[item], self.what, home)

    def _agree_on(self, items: Sequence[int], scopes: Sequence[Sequence[dist.ProcessGroup]]) -> bool:
        """Whether the ranks of some groups found the state of some parameters alike; all of them call it."""
        key = zlib.crc32(self.what.encode())
        places = [self.places[item] for item in items]
        kinds = [hash((key, *place.shape, place.dtype.itemsize, place.alone)) for place in places]
        groups = list(dict.fromkeys(group for scope in scopes for group in scope))
        name = lambda i: f"the state asked of {self.name(items[i])}"  # noqa: E731
        try:
            agree(self.error, groups, self.device(), kinds, name, scopes)
        except FragmentError as error:
            self.error = error
            return False
        for item in items:
            _agreements.put(self.params[item], self.what, self.places[item], self.homes[item])
        return True

    def _doubt(self) -> None:
        """Have the next call agree anew, among those of whom all know that they have to."""
        for param, home in zip(self.params, self.homes, strict=True):
            if home.group in self.told and _agreements.ever(param, self.what):
                _agreements.put(param, self.what, None, home)

    def forget(self) -> None:
        """As if the ranks had never agreed; to be called where all that hold the parameters do."""
        for param in self.params:
            _agreements.drop(param, self.what)

    def _words(self, call: str) -> str:
        """The call in words, different for different parameters."""
        names = [self.name(item) for item in range(len(self.params))]
        shapes = [(name, *place.shape) for name, place in zip(names, self.homes, strict=True)]
        digest = hashlib.sha256(repr(shapes).encode()).hexdigest()[:8]
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        return f"{call}('{self.what}') with {shown or 'no parameters'} [{digest}]"

    def name(self, item: int) -> str:
        """The parameter's name for messages."""
        return registry.name_of(self.params[item])

    def local(self, item: int) -> torch.Tensor | None:
        """This rank's piece, or the error."""
        return self.pieces([item])[0]

    def pieces(self, items: Sequence[int]) -> Pieces:
        """This rank's pieces of some of the parameters, or the error."""
        if self.error is not None:
            raise self.error
        survey, params = self._survey, self.params
        if len(survey.by_adapter) == 1:
            found = self.adapters[0].pieces([params[item] for item in items], self.what)
        else:
            found = [self.adapters[item].local(params[item], self.what) for item in items]
        held, expected = numels(found), [survey.held[item] for item in items]
        if held != expected:
            wrong = next(i for i in range(len(items)) if held[i] != expected[i])
            raise FragmentError(
                f"{self.name(items[wrong])}: {held[wrong]} elements are here where its layout says {expected[wrong]}"
            )
        return found

    def full(
        self,
        keys: Sequence[K],
        bucket_bytes: int | None = None,
        dst: int | None = None,
        locate: Locate | None = None,
    ) -> Iterator[tuple[K, torch.Tensor]]:
        """The whole tensors that are delivered here, each with its key; all ranks must take all of them.

        ``locate`` stands in for `pieces`.
        """
        plan = self._plan(bucket_bytes, to_one=dst is not None)
        buckets = self.gather(plan, locate or self.pieces, dst)
        for items in plan.buckets:
            with self.named_if_broken(items):
                tensors = next(buckets)
            for position, item in enumerate(items):
                tensor, tensors[position] = tensors[position], None
                if tensor is not None:
                    yield keys[item], tensor
                del tensor  # not to be held while the next bucket is received
        with self.named_if_broken(range(len(self.params))):
            next(buckets, None)  # there is no further bucket, but word of how it went elsewhere

    def gather(self, plan: Plan, locate: Locate, dst: int | None = None) -> Iterator[list[torch.Tensor | None]]:
        """As `gather` of the module `_exchange`, among the ranks that share the parameters."""
        survey = self._survey
        settle = survey.settle if self.places is survey.places else survey.to_settle(self.places)
        return gather(plan, locate, dst=dst, settle=settle, told=self.told)

    def _plan(self, bucket_bytes: int | None, *, to_one: bool = False) -> Plan:
        """What travels with what."""
        last = self._survey.plan if self.places is self._survey.places else None
        if last is not None and last[0] == bucket_bytes and last[1].to_one == to_one:
            return last[1]
        limit = bucket_bytes
        if limit is None:
            limit = bucket_bytes_for(self.places)
            if self.device().type != "cpu":  # two of the largest parameter are taken in any case
                limit = max([limit, *(place.nbytes for place in self.places if not place.alone)])
        plan = plan_of(self.places, limit, to_one=to_one)
        if self.places is self._survey.places:
            self._survey.plan = (bucket_bytes, plan)
        return plan

    def one(self) -> torch.Tensor:
        """The whole tensor of the only parameter; as `full`, without what it takes for many."""
        if self.places[0].alone:
            ((_, tensor),) = self.full([0])
        else:
            try:
                tensor = fetch(self._plan(1), self.pieces)
            except Exception as error:  # to enter the context for every parameter takes as long as to look it up
                if isinstance(error, FragmentError):  # which all ranks of the group read
                    self.told.update(self.places[0].groups[:1])
                with self.named_if_broken([0]):
                    raise
        return tensor

    @contextlib.contextmanager
    def named_if_broken(self, items: Sequence[int]) -> Iterator[None]:
        """Say which parameters a collective was about that did not come to its end."""
        try:
            yield
        except FragmentError:
            self._doubt()
            raise
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            names = ", ".join(self.name(item) for item in items[:3]) + (", ..." if len(items) > 3 else "")
            raise FragmentError(
                f"the exchange of '{self.what}' of {names} broke off: a rank died, or did not make the same call in "
                f"the same order ({error})"
            ) from error

    def scopes(self) -> list[tuple[dist.ProcessGroup, ...]]:
        """For each parameter, the groups whose ranks write it together."""
        pairs = zip(self.homes, self.places, strict=True)
        return [tuple(dict.fromkeys((*home.groups, *place.groups))) for home, place in pairs]

    def device(self) -> torch.device:
        """Where collectives about these parameters run."""
        return self.places[0].device if self.places else torch.device("cpu")


def read_one(param: torch.Tensor, what: str) -> torch.Tensor:
    """The whole of one quantity of one parameter, a fresh tensor."""
    return Quantity([param], what, "safe_get_full").one()


def named(params: nn.Module | Iterable[torch.Tensor] | Iterable[Named]) -> tuple[list[str] | None, list[torch.Tensor]]:
    """Names, if there are any, and parameters.

    Raises:
        TypeError: something is neither a tensor nor a (name, tensor) pair.
    """
    items: list[Any] = list(sharded(params).named_parameters() if isinstance(params, nn.Module) else params)
    kinds = set(map(type, items))
    if kinds == {tuple} and set(map(len, items)) == {2}:
        names, tensors = zip(*items, strict=True)
        return list(map(clean_name, names)), _tensors(tensors, set(map(type, tensors)))
    return None, _tensors(items, kinds)


def sharded(model: nn.Module) -> nn.Module:
    """The model itself, with its own parameters in place.

    It is taken out of what wraps it and renames its parameters. Between passes FSDP2 may leave gathered low-precision
    copies where the parameters were; they are given back.
    """
    while isinstance(model, DistributedDataParallel) or is_a(model, "deepspeed", "DeepSpeedEngine"):
        model = model.module  # type: ignore[assignment]
    for module in model.modules():
        if is_a(module, "torch.distributed.fsdp", "FSDPModule"):
            module.reshard()  # type: ignore[operator]
    return model


def _tensors(items: Sequence[Any], kinds: set[type]) -> list[torch.Tensor]:
    wrong = next((kind for kind in kinds if not issubclass(kind, torch.Tensor)), None)
    if wrong is not None:
        raise TypeError(f"params holds a {wrong.__name__}, expected parameters or (name, parameter) pairs")
    return list(items)


def iter_full(
    params: nn.Module | Iterable[torch.Tensor] | Iterable[Named],
    what: str = "value",
    *,
    bucket_bytes: int | None = None,
    dst: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[str | torch.Tensor, torch.Tensor]]:
    """Yield the whole fp32 value, gradient or optimizer state of many sharded parameters, one after the other.

    They travel in buckets, one collective for each group and bucket; the next bucket is under way while the caller
    works on this one. All ranks of the parameters' groups must call it, with the same parameters in the same order,
    and iterate to the end.

    Args:
        params: a module, parameters, or (name, parameter) pairs.
        what: ``"value"``, ``"grad"``, or the key of an optimizer state.
        bucket_bytes: how much travels at once; unless told, 64 MiB on a CPU, and on a GPU 1 GiB or the largest
            parameter where that is more. The memory taken is about two buckets, or two of the largest parameter, beside
            what the caller still holds.
        dst: the global rank to deliver to; the others take part and are yielded nothing. What other ranks share without
            it, as experts of another expert-parallel rank, is delivered nowhere then. All ranks unless told.
        device: where the tensors are wanted; the parameter's device unless told.
        dtype: what they are cast to; the master's dtype unless told.

    Yields:
        (name, tensor) where names were given, else (parameter, tensor): fresh tensors of the whole shape, in order. On
        a GPU those below 8 MiB share storages of up to a bucket: clone a small one that is to be kept by itself.

    Raises:
        FragmentError: a rank could not deliver its piece (no such state, no gradient); the same on every rank.
        ValueError: ``bucket_bytes`` is not positive, or ``dst`` is no rank.
    """
    if bucket_bytes is not None and bucket_bytes <= 0:
        raise ValueError(f"bucket_bytes is {bucket_bytes}, expected a positive number of bytes")
    if dst is not None:
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        if not 0 <= dst < world_size:
            raise ValueError(f"dst is {dst}, expected a global rank in [0, {world_size})")
    names, tensors = named(params)
    quantity = Quantity(tensors, check_what(what), "iter_full")
    keys: Sequence[str | torch.Tensor] = tensors if names is None else names
    found = quantity.full(keys, bucket_bytes, dst)
    if device is None and dtype is None:
        return found
    return _converted(found, device, dtype)


def _converted(
    found: Iterator[tuple[K, torch.Tensor]], device: torch.device | str | None, dtype: torch.dtype | None
) -> Iterator[tuple[K, torch.Tensor]]:
    for key, tensor in found:
        yield key, tensor.to(device=device, dtype=dtype)
        del tensor  # not to be held while the next bucket is received


def check_what(what: object) -> str:
    """The quantity's name.

    Raises:
        InvalidValueError: it is not a string.
    """
    if not isinstance(what, str) or not what:
        raise InvalidValueError(f"what is {what!r}, expected 'value', 'grad' or the key of an optimizer state")
    return what
