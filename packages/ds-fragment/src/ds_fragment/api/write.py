"""Writing: every rank checks what it was given, all agree, and only then anything changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ds_fragment.collective.checksum import checksum
from ds_fragment.collective.exchange import agree
from ds_fragment.engines.base import is_state
from ds_fragment.engines.model import Named, check_written, named
from ds_fragment.engines.shards import Shards, refresh
from ds_fragment.engines.state import kept_as
from ds_fragment.engines.versions import known_engine
from ds_fragment.errors import FragmentError, InvalidValueError
from ds_fragment.record import registry

Update = Callable[[Any, torch.Tensor], torch.Tensor | None]


def set_many(
    values: Mapping[torch.Tensor, torch.Tensor] | Iterable[tuple[torch.Tensor, torch.Tensor]],
    what: str = "value",
    *,
    refresh_lp: bool = True,
) -> None:
    """Write whole values into many sharded parameters, all of them or, where anything is wrong, none.

    All ranks of the parameters' groups must call it with the same parameters and the same values; that they are the
    same is checked.

    Args:
        values: values by parameter, or (parameter, value) pairs; a value has the parameter's whole shape, any floating
            dtype and device.
        what: ``"value"``, ``"grad"``, or the key of an optimizer state.
        refresh_lp: bring the low-precision weights up to date at once.

    Raises:
        TypeError: ``values`` holds something else.
        InvalidValueError: a value has the wrong shape or dtype.
        RankMismatchError: the ranks were given different values.
        FragmentError: there is nothing to write to (no such state, no gradient).
    """
    pairs = list(values.items() if isinstance(values, Mapping) else values)
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(f"values holds a {type(pair).__name__}, expected (parameter, value) pairs, or a dict")
    shards = Shards([param for param, _ in pairs], check_written(what), "set_many")
    wholes: list[torch.Tensor] = []
    sums: list[int] = []

    def prepare() -> list[torch.Tensor | None]:
        pieces = []
        for item, (param, value) in enumerate(pairs):
            sharding = shards.shardings[item]
            whole = _checked(param, value, sharding.shape, "value").to(sharding.dtype).contiguous()
            sums.append(checksum(whole))
            pieces.append(sharding.cut(whole))
            wholes.append(whole)
        return pieces

    targets, pieces = _agreed(shards, prepare, sums)
    _hand_over(shards, targets, pieces)
    if what == "value" and refresh_lp:
        refresh(shards, wholes)


def set_local(param: torch.Tensor, value: torch.Tensor, what: str, *, refresh_lp: bool = True) -> None:
    """Write this rank's piece of one parameter. All ranks of its group must call it, each with its own piece.

    Args:
        param: the parameter.
        value: of the shape that `get_local` gives on this rank; an empty tensor where the rank holds nothing.
        what: ``"value"``, ``"grad"``, or the key of an optimizer state.
        refresh_lp: bring the low-precision weights up to date at once.

    Raises:
        InvalidValueError: the value has the wrong shape or dtype.
        FragmentError: there is nothing to write to.
    """
    shards = Shards([param], check_written(what), "set_local")

    def prepare() -> list[torch.Tensor | None]:
        piece = shards.local(0)
        shape = torch.Size([0]) if piece is None else piece.shape
        return [_checked(param, value, shape, "value of this rank's piece")]

    targets, pieces = _agreed(shards, prepare, [])
    _hand_over(shards, targets, pieces)
    if what == "value" and refresh_lp:
        refresh(shards, None)


def update_many(
    params: nn.Module | Iterable[torch.Tensor] | Iterable[Named],
    fn: Update,
    what: str = "value",
    *,
    bucket_bytes: int | None = None,
    refresh_lp: bool = True,
) -> None:
    """Read, apply and write back, bucket by bucket; nothing is written before every result is there and right.

    All ranks of the parameters' groups must call it with the same parameters. Each rank holds the new pieces of its
    own fragments until the end, so that a failure half-way leaves everything as it was.

    Args:
        params: a module, parameters, or (name, parameter) pairs.
        fn: called as ``fn(name or parameter, whole tensor)`` on every rank; returns the new whole tensor, or None to
            leave it. It may change the tensor it is given. It must do the same on every rank.
        what: ``"value"``, ``"grad"``, or the key of an optimizer state.
        bucket_bytes: how much travels at once; see `iter_full`.
        refresh_lp: bring the low-precision weights up to date at once.

    Raises:
        InvalidValueError: a result has the wrong shape or dtype.
        FragmentError: a rank could not deliver its piece; the same on every rank.
        Exception: what ``fn`` raises, as a `FragmentError` on every rank.
    """
    names, tensors = named(params)
    shards = Shards(tensors, check_written(what), "update_many")
    sums: list[int] = []
    pieces: list[torch.Tensor | None] = []
    failure: list[Exception] = []

    def updated(item: int, tensor: torch.Tensor) -> torch.Tensor | None:
        result = fn(tensors[item] if names is None else names[item], tensor)
        if result is None:
            sums.append(-1)
            return None
        sharding = shards.shardings[item]
        whole = _checked(tensors[item], result, sharding.shape, "result of fn").to(sharding.dtype).contiguous()
        sums.append(checksum(whole))
        cut = sharding.cut(whole)
        return None if cut is None else cut.clone()

    try:
        for item, tensor in shards.full(range(len(tensors)), bucket_bytes):
            piece: torch.Tensor | None = None
            if not failure:
                try:
                    piece = updated(item, tensor)
                except Exception as error:
                    failure.append(error)
            pieces.append(piece)
    except FragmentError as error:  # the ranks of other groups may not know of it yet
        failure.append(error)

    def prepare() -> list[torch.Tensor | None]:
        if failure:
            raise failure[0]
        return pieces

    # Replicas read for themselves, and may differ by how their engine rounds: fn's results are theirs.
    readers = [
        sharding.shards or adapter.writers(param)
        for adapter, param, sharding in zip(shards.adapters, shards.params, shards.shardings, strict=True)
    ]
    targets, pieces = _agreed(shards, prepare, sums, readers)
    _hand_over(shards, targets, pieces)
    if what == "value" and refresh_lp:
        refresh(shards, None)


def _agreed(
    shards: Shards,
    prepare: Callable[[], list[torch.Tensor | None]],
    sums: list[int],
    among: Sequence[Sequence[dist.ProcessGroup]] | None = None,
) -> tuple[list[torch.Tensor | None], list[torch.Tensor | None]]:
    """Targets and pieces of this rank, once every rank has all of its own and the sums are the same among the groups.

    ``among`` is for each sum the groups in which it should be the same: all that write the parameter, unless told.
    """
    error: Exception | None = None
    targets: list[torch.Tensor | None] = []
    pieces: list[torch.Tensor | None] = []
    try:
        for adapter, param in zip(shards.adapters, shards.params, strict=True):
            adapter.require_writable(param)
        targets = [shards.local(item) for item in range(len(shards.params))]
        pieces = prepare()
        for item, target in enumerate(targets):
            if target is not None and target.layout != torch.strided:
                raise InvalidValueError(
                    f"'{shards.what}' of {shards.name(item)} is of layout {target.layout}, which cannot be "
                    "written: make it dense first"
                )
            if target is not None and is_state(shards.what):
                _check_kept(shards, item, target)
    except Exception as caught:
        error = caught
    scopes = shards.scopes()
    groups = list(dict.fromkeys(group for scope in scopes for group in scope))
    with shards.named_if_broken(range(len(shards.params))):
        try:
            agree(error, groups, shards.device(), sums, shards.name, scopes if among is None else among)
        except FragmentError:
            shards.forget()
            raise
    return targets, pieces


def _check_kept(shards: Shards, item: int, target: torch.Tensor) -> None:
    """State that is computed from what the optimizer keeps is a fresh tensor each time: what is written is lost."""
    kind = kept_as(target)
    if not kind and target.dim() == 0:
        again = shards.local(item)
        kind = "Python number" if again is not None and again.data_ptr() != target.data_ptr() else ""
    if kind:
        raise InvalidValueError(
            f"'{shards.what}' of {shards.name(item)} is a {kind}, which cannot be written: assign it in "
            "optimizer.state on each rank"
        )


def _hand_over(shards: Shards, targets: Sequence[torch.Tensor | None], pieces: Sequence[torch.Tensor | None]) -> None:
    """Have each engine write its pieces; what is None on either side stays as it is."""
    with torch.no_grad(), known_engine():
        for item, (target, piece) in enumerate(zip(targets, pieces, strict=True)):
            if target is not None and piece is not None and piece.numel():
                shards.adapters[item].write(shards.params[item], shards.what, piece)


def _checked(param: torch.Tensor, value: object, shape: torch.Size, name: str) -> torch.Tensor:
    """The value as a tensor without a graph, if it fits."""
    if not isinstance(value, torch.Tensor):
        raise InvalidValueError(f"{name} for {registry.name_of(param)} is a {type(value).__name__}, expected a tensor")
    if value.shape != shape:
        raise InvalidValueError(
            f"{name} for {registry.name_of(param)} has shape {tuple(value.shape)}, expected {tuple(shape)}"
        )
    if value.dtype.is_complex or (not value.dtype.is_floating_point and shape.numel() > 1):
        raise InvalidValueError(
            f"{name} for {registry.name_of(param)} has dtype {value.dtype}, expected a floating-point one: "
            "convert it first"
        )
    if hasattr(value, "full_tensor") or value.layout != torch.strided:
        raise InvalidValueError(
            f"{name} for {registry.name_of(param)} is a {type(value).__name__} of layout {value.layout}, expected a "
            "dense tensor: pass value.full_tensor() or value.to_dense()"
        )
    return value.detach()
