"""Reading: from parameters and a quantity to places, a plan, and whole tensors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import nn

from ds_fragment._adapters import adapter_of
from ds_fragment._attach import clean_name
from ds_fragment._exchange import Locate, Place, Plan, gather
from ds_fragment.errors import FragmentError, InvalidValueError

BUCKET_BYTES = 64 << 20
_PLANS_KEPT = 16

Named = tuple[str, torch.Tensor]
_plans: OrderedDict[tuple[object, ...], Plan] = OrderedDict()


def plan_of(places: Sequence[Place], bucket_bytes: int) -> Plan:
    """A plan for the places, from the few that were used last if it is one of them."""
    if all(place.alone for place in places):
        return Plan(places, bucket_bytes)
    key = (bucket_bytes, *map(id, places))  # the plan keeps the places, so that an id means one place
    plan = _plans.get(key)
    if plan is None:
        plan = _plans[key] = Plan(places, bucket_bytes)
        if len(_plans) > _PLANS_KEPT:
            _plans.popitem(last=False)
    else:
        _plans.move_to_end(key)
    return plan


class Quantity:
    """One quantity of many parameters: where each is, and this rank's pieces.

    A place that cannot be told on this rank (no optimizer attached here, no such state) becomes an error that this
    rank sends in the place of its data; what it would send is assumed to be placed as the parameter's value is.
    """

    def __init__(self, params: Sequence[torch.Tensor], what: str) -> None:
        self.params, self.what = params, what
        self.adapters = [adapter_of(param) for param in params]
        self.places: list[Place] = []
        self.errors: dict[int, FragmentError] = {}
        for item, (adapter, param) in enumerate(zip(self.adapters, params, strict=True)):
            try:
                place = adapter.place(param, what)
            except FragmentError as error:
                if what == "value":
                    raise
                place = adapter.place(param, "value")
                if place.alone:
                    raise
                self.errors[item] = error
            self.places.append(place)

    def local(self, item: int) -> torch.Tensor | None:
        """This rank's piece, or the error."""
        if item in self.errors:
            raise self.errors[item]
        return self.adapters[item].local(self.params[item], self.what)

    def full(
        self, bucket_bytes: int = BUCKET_BYTES, dst: int | None = None, locate: Locate | None = None
    ) -> Iterator[tuple[int, torch.Tensor | None]]:
        """The whole tensors by item; all ranks must take all of them. ``locate`` stands in for `local`."""
        plan = plan_of(self.places, bucket_bytes)
        for items, tensors in zip(plan.buckets, gather(plan, locate or self.local, dst=dst), strict=True):
            for position, item in enumerate(items):
                tensor, tensors[position] = tensors[position], None
                yield item, tensor
                del tensor

    def groups(self) -> list[dist.ProcessGroup]:
        """The groups that hold the pieces, each once, in the order of the parameters."""
        found = {place.group: None for place in self.places if place.group is not None}
        return list(found)

    def device(self) -> torch.device:
        """Where collectives about these parameters run."""
        return self.places[0].device if self.places else torch.device("cpu")


def read_one(param: torch.Tensor, what: str) -> torch.Tensor:
    """The whole of one quantity of one parameter, a fresh tensor."""
    ((_, tensor),) = Quantity([param], what).full()
    assert tensor is not None
    return tensor


def named(params: nn.Module | Iterable[torch.Tensor] | Iterable[Named]) -> tuple[list[str] | None, list[torch.Tensor]]:
    """Names, if there are any, and parameters.

    Raises:
        TypeError: something is neither a tensor nor a (name, tensor) pair.
    """
    items: list[torch.Tensor | Named] = list(params.named_parameters() if isinstance(params, nn.Module) else params)
    pairs = [item for item in items if isinstance(item, tuple)]
    if items and len(pairs) == len(items):
        return [clean_name(name) for name, _ in pairs], [_tensor(param) for _, param in pairs]
    return None, [_tensor(item) for item in items]


def _tensor(item: object) -> torch.Tensor:
    if not isinstance(item, torch.Tensor):
        raise TypeError(f"params holds a {type(item).__name__}, expected parameters or (name, parameter) pairs")
    return item


def iter_full(
    params: nn.Module | Iterable[torch.Tensor] | Iterable[Named],
    what: str = "value",
    *,
    bucket_bytes: int = BUCKET_BYTES,
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
        bucket_bytes: how much travels at once. The memory taken is at most two buckets, or two of the largest
            parameter where that is more.
        dst: the global rank to deliver to; the others take part and are yielded nothing. All ranks unless told.
        device: where the tensors are wanted; the parameter's device unless told.
        dtype: what they are cast to; the master's dtype unless told.

    Yields:
        (name, tensor) where names were given, else (parameter, tensor): fresh tensors of the whole shape, in order.

    Raises:
        FragmentError: a rank could not deliver its piece (no such state, no gradient); the same on every rank.
        ValueError: ``bucket_bytes`` is not positive, or ``dst`` is no rank.
    """
    if bucket_bytes <= 0:
        raise ValueError(f"bucket_bytes is {bucket_bytes}, expected a positive number of bytes")
    if dst is not None:
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        if not 0 <= dst < world_size:
            raise ValueError(f"dst is {dst}, expected a global rank in [0, {world_size})")
    names, tensors = named(params)
    quantity = Quantity(tensors, check_what(what))
    return _iterate(quantity, names, bucket_bytes, dst, device, dtype)


def _iterate(
    quantity: Quantity,
    names: list[str] | None,
    bucket_bytes: int,
    dst: int | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> Iterator[tuple[str | torch.Tensor, torch.Tensor]]:
    for item, tensor in quantity.full(bucket_bytes, dst):
        if tensor is not None:
            key = quantity.params[item] if names is None else names[item]
            yield key, tensor.to(device=device, dtype=dtype)


def check_what(what: object) -> str:
    """The quantity's name.

    Raises:
        InvalidValueError: it is not a string.
    """
    if not isinstance(what, str) or not what:
        raise InvalidValueError(f"what is {what!r}, expected 'value', 'grad' or the key of an optimizer state")
    return what
