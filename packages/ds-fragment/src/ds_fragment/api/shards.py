"""An elementwise function on every rank's own shards, in place: no fp32 data travels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ds_fragment.api.write import agree_on, check_target
from ds_fragment.engines.base import is_state
from ds_fragment.engines.dtensor import DTensorAdapter
from ds_fragment.engines.model import Named, check_written, named
from ds_fragment.engines.shards import Shards, refresh
from ds_fragment.engines.versions import known_engine
from ds_fragment.errors import FragmentError, InvalidValueError

ShardUpdate = Callable[[Any, torch.Tensor], torch.Tensor | None]


def map_shards(
    params: nn.Module | Iterable[torch.Tensor] | Iterable[Named],
    fn: ShardUpdate,
    what: str = "value",
    *,
    refresh_lp: bool = True,
) -> None:
    """Apply an elementwise function to this rank's shards: clamp, prune, scale, add noise. Nothing fp32 is gathered.

    All ranks of the parameters' groups must call it with the same parameters. They agree in one small collective for
    each group that everything can be written, before ``fn`` is called for the first time (not for the values of
    DTensors, which always can be), and in another afterwards that ``fn`` failed nowhere.

    Args:
        params: a module, parameters, or (name, parameter) pairs.
        fn: called once a parameter as ``fn(name or parameter, shard)``, without autograd. ``shard`` has the dtype in
            which the quantity is read and any shape: 1-D for engines that flatten, that of the local tensor for a
            DTensor. It is the engine's own memory where the engine keeps the quantity as it is read, else a copy.
            ``fn`` returns a new tensor of the same shape and dtype, or None: it changed the shard in place, or leaves
            it. Ranks that hold nothing of a parameter do not call ``fn`` for it. Where several ranks hold the same
            elements (DDP, HSDP, ``Replicate``, ZeRO-0), each of them calls it: it must be deterministic there, or they
            diverge, and nobody checks that they did not.
        what: ``"value"``, ``"grad"``, or the key of an optimizer state.
        refresh_lp: bring the low-precision weights up to date at the end; ZeRO-1 and 2 and flat partitions gather
            those.

    Raises:
        FragmentError: there is nothing to write to, on some rank, and nothing is changed; or ``fn`` raised. The same on
            every rank.
        InvalidValueError: the quantity cannot be written, and nothing is changed; or ``fn`` returned something of
            another type, shape or dtype. The same on every rank.

    An error of ``fn`` names the parameter. The parameters before it are changed by then on the rank that failed, and
    all of them on others; the low-precision weights are brought up to date all the same.

    >>> weight = nn.Parameter(torch.tensor([-2.0, 0.5, 3.0]))
    >>> map_shards([weight], lambda _, shard: shard.clamp_(-1, 1))
    >>> weight.tolist()
    [-1.0, 0.5, 1.0]
    """
    names, tensors = named(params)
    shards = Shards(tensors, check_written(what), "map_shards")
    if not _always_writable(shards):
        agree_writable(shards)
    failure: Exception | None = None
    try:
        _map(shards, tensors if names is None else names, fn)
    except Exception as caught:
        failure = caught
    try:
        agree_on(shards, failure)
    except FragmentError as error:
        if error.status and refresh_lp:  # all ranks know of it; without a status the collective broke off
            refresh_value(shards)
        raise
    if refresh_lp:
        refresh_value(shards)


def _map(shards: Shards, keys: Sequence[object], fn: ShardUpdate) -> None:
    with torch.no_grad(), known_engine():
        for item, piece, through in located(shards):
            shard = piece.detach()  # which fn may make a view of in place, unlike the engine's own
            try:
                result = fn(keys[item], shard)
                if result is None or result is shard:
                    result = shard
                else:
                    _check_result(result, shard)
            except Exception as error:
                raise _failed(shards.name(item), keys[item], error) from error
            if not through:
                shards.adapters[item].write(shards.params[item], shards.what, result)
            elif result is not shard:
                shard.copy_(result)


def _failed(known_as: str, key: object, error: Exception) -> FragmentError:
    """The error for what ``fn`` raised, or for what it returned."""
    kind, said = FragmentError, f"fn raised {type(error).__name__}: {error}"
    if isinstance(error, InvalidValueError):
        kind, said = InvalidValueError, str(error)
    name = f"parameter '{key}'" if isinstance(key, str) else known_as
    return kind(
        f"map_shards stopped at {name}; the parameters before it are changed already, and all of them on ranks where "
        f"fn did not fail: {said}"
    )


def _check_result(result: object, shard: torch.Tensor) -> None:
    if not isinstance(result, torch.Tensor):
        raise InvalidValueError(f"the result of fn is a {type(result).__name__}, expected a tensor or None")
    if result.shape != shard.shape or result.dtype != shard.dtype or result.layout != torch.strided:
        raise InvalidValueError(
            f"the result of fn is a {result.dtype} tensor of shape {tuple(result.shape)} and layout {result.layout}, "
            f"expected a strided one of {shard.dtype} and shape {tuple(shard.shape)}, as the shard is"
        )


def located(shards: Shards) -> Iterator[tuple[int, torch.Tensor, bool]]:
    """Item, this rank's piece, and whether a change in place is all that it takes to write it.

    Pieces of no elements are left out. A piece that its engine makes anew is made when its turn comes.
    """
    through = {adapter: adapter.writes_through(shards.what) for adapter in dict.fromkeys(shards.adapters)}
    if all(through.values()):
        for item, piece in enumerate(shards.pieces(range(len(shards.params)))):
            if piece is not None and piece.numel():
                yield item, piece, True
        return
    for item, adapter in enumerate(shards.adapters):
        found = shards.local(item)
        if found is not None and found.numel():
            yield item, found.to(shards.shardings[item].dtype), through[adapter]


def _always_writable(shards: Shards) -> bool:
    """Whether no rank can lack what is written: the value of a DTensor is the parameter itself."""
    return shards.what == "value" and all(isinstance(a, DTensorAdapter) for a in dict.fromkeys(shards.adapters))


def agree_writable(shards: Shards, check: Callable[[], None] | None = None) -> None:
    """Raise on every rank where one of them could not write one of its pieces, or ``check`` raises there.

    All ranks of the parameters' groups must call it; one small collective for each group.
    """
    error: Exception | None = None
    try:
        for adapter, param in zip(shards.adapters, shards.params, strict=True):
            adapter.require_writable(param)
        for item, piece, _ in located(shards):
            if piece.layout != torch.strided or is_state(shards.what):
                check_target(shards, item, piece)
        if check is not None:
            check()
    except Exception as caught:
        error = caught
    agree_on(shards, error)


def refresh_value(shards: Shards) -> None:
    """Bring the low-precision weights up to date, if values were written; all ranks must call it."""
    if shards.what == "value":
        refresh(shards, None)
