"""Reading: from parameters and a quantity to places, a plan, and whole tensors."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ds_fragment._adapters import adapter_of
from ds_fragment._check import meet
from ds_fragment._exchange import Locate, Place, Plan, agree, gather
from ds_fragment._loaded import is_a
from ds_fragment._registry import clean_name, registry
from ds_fragment.errors import FragmentError, InvalidValueError

_BUCKET_BYTES = 64 << 20  # about what a CPU moves in the time that it takes to start some collectives
_BUCKET_BYTES_GPU = 256 << 20
_ITEMS_PLANNED = 20_000  # in the plans that are kept

Named = tuple[str, torch.Tensor]


class _Plans:
    """The plans that were used last; they hold places, no tensors."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[object, ...], Plan] = OrderedDict()
        self._items = 0

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, places: Sequence[Place], bucket_bytes: int) -> Plan:
        """The plan for the places, made now unless it is one of them."""
        key = (bucket_bytes, *map(id, places))  # a plan keeps its places, so that an id means one place
        plan = self._kept.get(key)
        if plan is None:
            plan = self._kept[key] = Plan(places, bucket_bytes)
            self._items += len(places)
            while self._items > _ITEMS_PLANNED and len(self._kept) > 1:
                self._items -= len(self._kept.popitem(last=False)[1].places)
        else:
            self._kept.move_to_end(key)
        return plan

    def clear(self) -> None:
        """Forget all."""
        self._kept.clear()
        self._items = 0


_plans = _Plans()
atexit.register(_plans.clear)  # a gloo group that outlives the interpreter may abort it


def plan_of(places: Sequence[Place], bucket_bytes: int) -> Plan:
    """A plan for the places, from the few that were used last if it is one of them."""
    if all(place.alone for place in places):
        return Plan(places, bucket_bytes)
    return _plans.get(places, bucket_bytes)


class Quantity:
    """One quantity of many parameters: where each is, and this rank's pieces.

    Where optimizer state is can depend on the optimizer, which a rank may lack: for state, the ranks that hold the
    parameters agree on it first, so that the constructor is collective. For anything else, a place that cannot be told
    becomes an error that this rank sends with the first piece.
    """

    def __init__(self, params: Sequence[torch.Tensor], what: str, call: str = "a read") -> None:
        self.params, self.what = params, what
        self.adapters = [adapter_of(param) for param in params]
        self.homes = [adapter.place(param, "value") for adapter, param in zip(self.adapters, params, strict=True)]
        groups = list(dict.fromkeys(group for place in self.homes for group in place.groups))
        meet(groups, lambda: self._words(call))
        self.places = self.homes if what == "value" else [self._place(item) for item in range(len(params))]
        if what not in ("value", "grad"):
            key = zlib.crc32(what.encode())
            kinds = [hash((key, *place.shape, place.dtype.itemsize, place.alone)) for place in self.places]
            scopes = [place.groups for place in self.homes]
            agree(self.error, groups, self.device(), kinds, lambda i: f"the state asked of {self.name(i)}", scopes)

    error: FragmentError | None = None

    def _place(self, item: int) -> Place:
        try:
            return self.adapters[item].place(self.params[item], self.what)
        except FragmentError as error:
            self.error = self.error or error
            return self.homes[item]

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
        if self.error is not None:
            raise self.error
        place, piece = self.places[item], self.adapters[item].local(self.params[item], self.what)
        held, expected = 0 if piece is None else piece.numel(), place.layout.held(place.rank)
        if held != expected:
            raise FragmentError(f"{self.name(item)}: {held} elements are here where its layout says {expected}")
        return piece

    def full(
        self, bucket_bytes: int | None = None, dst: int | None = None, locate: Locate | None = None
    ) -> Iterator[tuple[int, torch.Tensor | None]]:
        """The whole tensors by item; all ranks must take all of them. ``locate`` stands in for `local`."""
        if bucket_bytes is None:
            bucket_bytes = _BUCKET_BYTES if self.device().type == "cpu" else _BUCKET_BYTES_GPU
        plan = plan_of(self.places, bucket_bytes)
        buckets = gather(plan, locate or self.local, dst=dst)
        for items in plan.buckets:
            with self.named_if_broken(items):
                tensors = next(buckets)
            for position, item in enumerate(items):
                tensor, tensors[position] = tensors[position], None
                yield item, tensor
                del tensor

    @contextlib.contextmanager
    def named_if_broken(self, items: Sequence[int]) -> Iterator[None]:
        """Say which parameters a collective was about that did not come to its end."""
        try:
            yield
        except (FragmentError, torch.OutOfMemoryError):
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
    ((_, tensor),) = Quantity([param], what, "safe_get_full").full()
    assert tensor is not None
    return tensor


def named(params: nn.Module | Iterable[torch.Tensor] | Iterable[Named]) -> tuple[list[str] | None, list[torch.Tensor]]:
    """Names, if there are any, and parameters.

    Raises:
        TypeError: something is neither a tensor nor a (name, tensor) pair.
    """
    items: list[torch.Tensor | Named] = list(
        sharded(params).named_parameters() if isinstance(params, nn.Module) else params
    )
    pairs = [item for item in items if isinstance(item, tuple)]
    if items and len(pairs) == len(items):
        return [clean_name(name) for name, _ in pairs], [_tensor(param) for _, param in pairs]
    return None, [_tensor(item) for item in items]


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


def _tensor(item: object) -> torch.Tensor:
    if not isinstance(item, torch.Tensor):
        raise TypeError(f"params holds a {type(item).__name__}, expected parameters or (name, parameter) pairs")
    return item


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
        bucket_bytes: how much travels at once; unless told, 64 MiB on a CPU and 256 MiB on a GPU. The memory taken is
            about two buckets, or two of the largest parameter where that is more; three for a flat partition on gloo.
        dst: the global rank to deliver to; the others take part and are yielded nothing. All ranks unless told.
        device: where the tensors are wanted; the parameter's device unless told.
        dtype: what they are cast to; the master's dtype unless told.

    Yields:
        (name, tensor) where names were given, else (parameter, tensor): fresh tensors of the whole shape, in order.

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
    return _iterate(quantity, names, bucket_bytes, dst, device, dtype)


def _iterate(
    quantity: Quantity,
    names: list[str] | None,
    bucket_bytes: int | None,
    dst: int | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> Iterator[tuple[str | torch.Tensor, torch.Tensor]]:
    for item, tensor in quantity.full(bucket_bytes, dst):
        if tensor is not None:
            key = quantity.params[item] if names is None else names[item]
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
