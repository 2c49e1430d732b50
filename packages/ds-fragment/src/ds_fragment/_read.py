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
from ds_fragment._exchange import Locate, Pieces, Place, Plan, agree, bucket_bytes_for, fetch, gather, plan_of
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
        self.plan: tuple[int | None, Plan] | None = None  # the last one, and the bucket_bytes that were asked for
        self._stamps = [] if self.error is not None else self._stamps_of(params)

    def _place(self, param: torch.Tensor, item: int) -> Place:
        try:
            return self.adapters[item].place(param, self.what)
        except FragmentError as error:
            self.error = self.error or error
            return self.homes[item]

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


# By state, where the ranks agreed that it is, and where the parameter was then.
_agreed = IdentityMap[dict[str, tuple[Place, Place]]]()


class Quantity:
    """One quantity of many parameters: where each is, and this rank's pieces.

    [Note: agreement] Where optimizer state is can depend on the optimizer, which a rank may lack or keep otherwise. The
    ranks that hold the parameters agree on it before the first exchange, so that the constructor is collective then.
    Later ones go by what was agreed: a rank on which that is not so any more sends an error in the place of its data,
    and the next call agrees anew. For anything else, a place that cannot be told becomes an error that this rank sends
    with the first piece.
    """

    def __init__(self, params: Sequence[torch.Tensor], what: str, call: str = "a read") -> None:
        self.params, self.what = params, what
        self._survey = _survey_of(params, what)
        self.adapters, self.homes = self._survey.adapters, self._survey.homes
        self.places, self.error = self._survey.places, self._survey.error
        if self._survey.groups:
            meet(self._survey.groups, lambda: self._words(call))
        if what not in ("value", "grad") and self._survey.groups:
            self._agree()

    def _agree(self) -> None:
        known = [self._known(item) for item in range(len(self.params))]
        if known == self.places and self.error is None:  # places are equal if they are the same
            return
        if None in known:
            key = zlib.crc32(self.what.encode())
            kinds = [hash((key, *place.shape, place.dtype.itemsize, place.alone)) for place in self.places]
            scopes = [place.groups for place in self.homes]
            name = lambda i: f"the state asked of {self.name(i)}"  # noqa: E731
            agree(self.error, self._survey.groups, self.device(), kinds, name, scopes)
            for param, place, home in zip(self.params, self.places, self.homes, strict=True):
                _agreed[param] = {**(_agreed.get(param) or {}), self.what: (place, home)}
            return
        agreed = [place for place in known if place is not None]
        for item, (before, now) in enumerate(zip(agreed, self.places, strict=True)):
            if self.error is None and not before.like(now):
                self.error = StateKeyError(
                    f"'{self.what}' of {self.name(item)} is not kept as at the last read (then {before.dtype} of shape "
                    f"{tuple(before.shape)}, now {now.dtype} of shape {tuple(now.shape)}): call again, so that the "
                    "ranks agree anew"
                )
        if self.error is not None:
            self.places = agreed

    def _known(self, item: int) -> Place | None:
        """Where the ranks agreed that the state is, if the parameter is where it was then."""
        place, home = (_agreed.get(self.params[item]) or {}).get(self.what, (None, None))
        return place if home is self.homes[item] else None

    def _forget(self) -> None:
        """Have the next call agree; all ranks do so when they raise an error."""
        for param in self.params:
            (_agreed.get(param) or {}).pop(self.what, None)

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
        held = [0 if piece is None else piece.numel() for piece in found]
        expected = [survey.held[item] for item in items]
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
        plan = self._plan(bucket_bytes)
        buckets = gather(plan, locate or self.pieces, dst=dst)
        for items in plan.buckets:
            with self.named_if_broken(items):
                tensors = next(buckets)
            for position, item in enumerate(items):
                tensor, tensors[position] = tensors[position], None
                if tensor is not None:
                    yield keys[item], tensor
                del tensor  # not to be held while the next bucket is received

    def _plan(self, bucket_bytes: int | None) -> Plan:
        """What travels with what."""
        last = self._survey.plan if self.places is self._survey.places else None
        if last is not None and last[0] == bucket_bytes:
            return last[1]
        limit = bucket_bytes
        if limit is None:
            limit = bucket_bytes_for(self.places)
            if self.device().type != "cpu":  # two of the largest parameter are taken in any case
                limit = max(limit, *(place.nbytes for place in self.places))
        plan = plan_of(self.places, limit)
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
            except Exception:  # to enter the context for every parameter takes as long as to look it up
                with self.named_if_broken([0]):
                    raise
        return tensor

    @contextlib.contextmanager
    def named_if_broken(self, items: Sequence[int]) -> Iterator[None]:
        """Say which parameters a collective was about that did not come to its end."""
        try:
            yield
        except FragmentError:
            self._forget()
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
        bucket_bytes: how much travels at once; unless told, 64 MiB on a CPU, and on a GPU 512 MiB or the largest
            parameter where that is more. The memory taken is about two buckets, or two of the largest parameter, beside
            what the caller still holds. Buckets of 2 GiB are some percent faster on a GPU.
        dst: the global rank to deliver to; the others take part and are yielded nothing. All ranks unless told.
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
