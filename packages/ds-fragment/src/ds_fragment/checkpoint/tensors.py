"""What is saved or loaded: the named tensors of a model, of a mapping, of pairs, or of a `Shadow`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ds_fragment.collective.digest import checksums
from ds_fragment.collective.exchange import Locate
from ds_fragment.collective.plan import Plan, bucket_bytes_for
from ds_fragment.engines.loaded import is_a, is_dtensor
from ds_fragment.engines.model import clean_name, is_model, own_buffers, own_parameters
from ds_fragment.engines.shards import Shards
from ds_fragment.errors import InvalidValueError
from ds_fragment.sharding import Sharding

Selection = str | Iterable[str] | Callable[[str], bool]


@runtime_checkable
class ShardValues(Protocol):
    """What stands in for a model's values, as a `ds_fragment.Shadow` does."""

    @property
    def source(self) -> Any:
        """The module, or the (name, parameter) pairs, whose values it stands in for."""

    def locate(self, shards: Shards) -> Locate:
        """What gives this rank's pieces of the items; each has the dtype and the size that its place says.

        Raises:
            FragmentError: it does not have them.
        """


What = nn.Module | Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]] | ShardValues


@dataclass
class Tensors:
    """Named tensors, each once.

    Attributes:
        sharded: parameters, and whatever else an engine may hold in shards, by name.
        cast: how many of them are stored in another dtype where one is asked for; they come first. Buffers are not.
        buffers: of a module, that every rank holds whole, by name.
        tied: further names of the same tensors, each with the name that it is known by here.
        unmatched: patterns, and functions that include, which match no name here.
    """

    sharded: dict[str, torch.Tensor] = field(default_factory=dict)
    cast: int = 0
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    unmatched: list[str] = field(default_factory=list)


def collect(what: Any, include: Selection | None = None, exclude: Selection | None = None) -> Tensors:
    """The tensors that are meant.

    Raises:
        TypeError: ``what`` is something else.
        InvalidValueError: two tensors have one name, or one is on the meta device, or not dense.
    """
    if isinstance(what, ShardValues):
        what = what.source
    included, excluded = _Patterns("include", include), _Patterns("exclude", exclude)
    found, known = Tensors(), dict[object, str]()
    names: set[str] = set()
    for kind, name, tensor in _named(what):
        if (include is not None and not included.match(name)) | excluded.match(name):
            continue
        _require_values(name, tensor)
        if kind == "other" and tensor.shape == (0,) and "deepspeed" in sys.modules and not hasattr(tensor, "ds_id"):
            raise InvalidValueError(
                f"'{name}' has shape (0,), as what state_dict() gives under DeepSpeed's ZeRO-3: pass the module"
            )
        if name in names:
            raise InvalidValueError(f"'{name}' is the name of two tensors: give each its own")
        names.add(name)
        first = known.setdefault(_identity(tensor), name)
        if first != name:
            found.tied[name] = first
        elif kind == "buffer" and not is_dtensor(tensor):
            found.buffers[name] = tensor
        else:  # `distribute_module` makes DTensors of buffers; they travel as parameters do
            found.sharded[name] = tensor
            found.cast += kind != "buffer"
    found.unmatched = [*included.unmatched(), *excluded.unmatched()]
    if callable(include) and not names:
        found.unmatched.append(getattr(include, "__name__", repr(include)))
    return found


def _require_values(name: str, tensor: torch.Tensor) -> None:
    """Raise unless the tensor has values of its own, one after the other or in shards."""
    if is_lazy(tensor):
        raise InvalidValueError(f"'{name}' is of a lazy module and has no shape yet: run a forward pass first")
    if tensor.is_meta:
        raise InvalidValueError(
            f"'{name}' is on the meta device and has no values: materialize the model, or bring in what is "
            "offloaded, first"
        )
    if tensor.layout != torch.strided:
        raise InvalidValueError(f"'{name}' is {tensor.layout}, which safetensors cannot hold: make it dense first")
    waits = is_a(tensor, "torch.distributed._functional_collectives", "AsyncCollectiveTensor")
    if is_traceable_wrapper_subclass(tensor) and not is_dtensor(tensor) and not waits:
        raise InvalidValueError(
            f"'{name}' is a {type(tensor).__name__}, which has its values in other tensors, as quantized weights do: "
            "dequantize it first"
        )


def _named(what: Any) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Kind, name and tensor."""
    if is_model(what):
        for name, param in own_parameters(what, remove_duplicate=False):
            yield "parameter", name, param
        for name, buffer in own_buffers(what):
            yield "buffer", name, buffer
        return
    pairs = what.items() if isinstance(what, Mapping) else what
    if isinstance(pairs, torch.Tensor | str) or not isinstance(pairs, Iterable):
        raise TypeError(f"what is a {type(what).__name__}, expected a module, a mapping, pairs or a Shadow")
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not isinstance(pair[0], str):
            raise TypeError(f"what holds a {type(pair).__name__}, expected (name, tensor) pairs")
        if not isinstance(pair[1], torch.Tensor):
            raise TypeError(f"what has a {type(pair[1]).__name__} under the name '{pair[0]}', expected a tensor")
        yield "other", clean_name(pair[0]), pair[1]


def apart(sharding: Sharding, ranks: int) -> bool:
    """Whether other ranks may have a tensor of their own under the same name: only their bits tell.

    Args:
        sharding: of the tensor here.
        ranks: how many have the name.
    """
    return sharding.alone or (not sharding.replicas and len(sharding.global_ranks()) < ranks)


def part_sums(shards: Shards, items: Sequence[int], pieces: Locate) -> dict[int, tuple[int, int]]:
    """By item, which part of the tensor this rank holds, by its rank in the layout, and a sum of the part's bits."""
    found: dict[int, tuple[int, int]] = {}
    shardings = [shards.shardings[item] for item in items]
    for bucket in Plan(shardings, bucket_bytes_for(shardings)).buckets:
        chosen = [items[at] for at in bucket.items]
        for item, total in zip(chosen, checksums(pieces(chosen)), strict=True):
            found[item] = (shards.shardings[item].rank, total)
    return found


def differences(rows: Iterable[Iterable[tuple[str, int, int]]]) -> dict[str, tuple[int, int]]:
    """By name, two ranks that hold one part of a tensor with different bits.

    Args:
        rows: by rank, names with what `part_sums` has of them.
    """
    first: dict[tuple[str, int], tuple[int, int]] = {}  # by name and part, the first rank and its sum
    found: dict[str, tuple[int, int]] = {}
    for rank, row in enumerate(rows):
        for name, part, total in row:
            other, expected = first.setdefault((name, part), (rank, total))
            if total != expected:
                found.setdefault(name, (other, rank))
    return found


def experts(shards: Shards, names: Iterable[str], ranks: int) -> list[str]:
    """Why one file cannot hold experts that have the same names on ranks which hold different ones; empty if it can.

    DeepSpeed and Megatron mark such parameters with ``allreduce = False``, DeepSpeed also where there are no others.

    Args:
        shards: the parameters.
        names: of each.
        ranks: how many have these names.
    """
    found = [
        name
        for name, param, sharding in zip(names, shards.params, shards.shardings, strict=True)
        if getattr(param, "allreduce", True) is False
        and getattr(param, "group_name", "") != "ep_size_1"
        and apart(sharding, ranks)
    ]
    if not found or ranks == 1:
        return []
    return [
        f"expert-parallel ranks have different tensors under the names {some(found)}, and one file cannot hold them: "
        "use the engine's own checkpoints, or give each its own name"
    ]


def some(names: Sequence[str]) -> str:
    """How many names, and what they are."""
    shown = 20
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{len(names)} ({', '.join(names[:shown])}{more})" if names else "none"


def _identity(tensor: torch.Tensor) -> object:
    """Equal for tensors that are the same one, as the entries of a state dict are that are tied.

    Of DTensors only those that are one object: ranks that hold nothing of one could not tell otherwise.
    """
    if type(tensor) is not torch.Tensor or not tensor.numel() or tensor.layout != torch.strided:
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


class _Patterns:
    """Names that are chosen by patterns of `fnmatch`, or by a function."""

    def __init__(self, argument: str, given: Selection | None) -> None:
        self._function = given if callable(given) else None
        if given is not None and not callable(given) and not isinstance(given, Iterable):
            raise TypeError(f"{argument} is a {type(given).__name__}, expected patterns of names or a function")
        patterns: Iterable[Any] = () if given is None or callable(given) else given
        self._patterns: Sequence[str] = [given] if isinstance(given, str) else list(patterns)
        if not self._patterns and given is not None and not callable(given):
            raise InvalidValueError(f"{argument} is empty, expected patterns of names, or None")
        self._matched: set[str] = set()

    def match(self, name: str) -> bool:
        """Whether the name is chosen."""
        if self._function is not None:
            return bool(self._function(name))
        matched = [pattern for pattern in self._patterns if fnmatchcase(name, pattern)]
        self._matched.update(matched)
        return bool(matched)

    def unmatched(self) -> list[str]:
        """The patterns that matched no name."""
        return [pattern for pattern in self._patterns if pattern not in self._matched]
