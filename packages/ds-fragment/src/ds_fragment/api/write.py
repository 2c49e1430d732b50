"""Writing: every rank checks what it was given, all agree, and only then anything changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ds_fragment import _flight
from ds_fragment.collective.agree import agree
from ds_fragment.collective.digest import digest_of_all, digests
from ds_fragment.collective.plan import BUCKET_BYTES
from ds_fragment.engines.base import Adapter, is_state
from ds_fragment.engines.model import Named, check_written, named, parameter_finder
from ds_fragment.engines.shards import Shards, commit, refresh
from ds_fragment.engines.state import kept_as
from ds_fragment.errors import FragmentError, InvalidValueError, RankMismatchError
from ds_fragment.record import registry

Update = Callable[[Any, torch.Tensor], torch.Tensor | None]
Pair = tuple[torch.Tensor | str, torch.Tensor]

_cut_over = attrgetter("group", "replicas", "stages")


def set_many(
    values: Mapping[torch.Tensor, torch.Tensor] | Mapping[str, torch.Tensor] | Iterable[Pair],
    what: str = "value",
    *,
    model: nn.Module | None = None,
    refresh_lp: bool = True,
    bucket_bytes: int | None = None,
) -> None:
    """Write whole values into many sharded parameters. All ranks of the parameters' groups must call it.

    All ranks pass the same parameters and the same values; that they are the same is checked by a digest. Of a mapping
    or a list all values are written or, where anything is wrong, none. Any other iterable, such as a generator, is
    taken bucket by bucket: of each bucket all values are written or none, and no more than two buckets of values are
    in memory.

    Args:
        values: values by parameter or by name, or (parameter or name, value) pairs; a value has the parameter's whole
            shape, any floating dtype and device.
        what: ``"value"``, ``"grad"``, or the key of an optimizer state.
        model: the model that names are looked up in; the attached models unless told.
        refresh_lp: bring the low-precision weights up to date at once.
        bucket_bytes: of a generator, bytes of values at a time; 64 MiB on a CPU and 1 GiB on a GPU unless told.

    Raises:
        TypeError: ``values`` holds something else.
        InvalidValueError: a value has the wrong shape or dtype, or there is no parameter of that name.
        RankMismatchError: the ranks were given different values.
        FragmentError: there is nothing to write to (no such state, no gradient).
    """
    check_written(what)
    find = parameter_finder(model)
    if isinstance(values, Mapping | list | tuple):
        pairs = list(values.items() if isinstance(values, Mapping) else values)
        _write(list(map(_pair, pairs)), what, find, refresh_lp)
        return
    written = 0
    for chunk, last, error in _chunks(values, bucket_bytes):
        try:
            _write(chunk, what, find, refresh_lp, error, last=last)
        except FragmentError as failed:
            if not written:
                raise
            raise type(failed)(f"{failed}. The {written} values before this bucket are written") from failed
        written += len(chunk)


def _pair(pair: Any) -> Pair:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise TypeError(f"values holds a {type(pair).__name__}, expected (parameter, value) pairs, or a dict")
    return pair[0], pair[1]


def _chunks(values: Iterable[Any], bucket_bytes: int | None) -> Iterator[tuple[list[Pair], bool, Exception | None]]:
    """Pairs of a bucket, whether it is the last one, and what the iterable raised; all ranks cut alike."""
    chunk: list[Pair] = []
    filled, error = 0, None
    found = iter(values)
    while error is None:
        try:
            pair = _pair(next(found))
        except StopIteration:
            break
        except Exception as raised:
            error = raised
            break
        whole = pair[1] if isinstance(pair[1], torch.Tensor) else torch.empty(0)
        limit = BUCKET_BYTES.get(whole.device.type, BUCKET_BYTES["cpu"]) if bucket_bytes is None else bucket_bytes
        nbytes = 4 * whole.numel()
        if chunk and filled + nbytes > limit:
            yield chunk, False, None
            chunk, filled = [], 0
        chunk.append(pair)
        filled += nbytes
        del pair, whole
    yield chunk, True, error


def _write(
    pairs: Sequence[Pair],
    what: str,
    find: Callable[[object], torch.Tensor],
    refresh_lp: bool,
    error: Exception | None = None,
    *,
    last: bool = True,
) -> None:
    """Write some values, all or none."""
    params, values = list[torch.Tensor](), list[torch.Tensor]()
    for key, value in pairs:
        try:
            params.append(find(key))
            values.append(value)
        except InvalidValueError as unknown:
            error = error or unknown
    shards = Shards(params, what, "set_many")

    def prepare() -> list[torch.Tensor | None]:
        if error is not None:
            raise error
        for item, param in enumerate(params):
            sharding = shards.shardings[item]
            values[item] = _checked(param, values[item], sharding.shape, "value").contiguous()
        return [sharding.cut(value) for sharding, value in zip(shards.shardings, values, strict=True)]

    targets, pieces, error = _prepared(shards, prepare)
    _agree_on_values(shards, error, values, last=last)
    commit(shards, targets, pieces)
    if what == "value" and refresh_lp:
        refresh(shards, [_rounded(value, s.dtype) for value, s in zip(values, shards.shardings, strict=True)])


def _rounded(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The value as it is written, of which the low-precision weight is made."""
    return value if value.dtype.itemsize < dtype.itemsize else value.to(dtype)


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
    commit(shards, targets, pieces)
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
    own fragments until the end, so that a failure half-way leaves everything as it was. For an elementwise function
    `map_shards` does the same without a gather.

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
        sums.extend(digests([whole], [sharding.dtype], sharding.device))
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
    commit(shards, targets, pieces)
    if what == "value" and refresh_lp:
        refresh(shards, None)


def _agreed(
    shards: Shards,
    prepare: Callable[[], list[torch.Tensor | None]],
    sums: list[int],
    among: Sequence[Sequence[dist.ProcessGroup]] | None = None,
) -> tuple[Sequence[torch.Tensor | None], list[torch.Tensor | None]]:
    """Targets and pieces of this rank, once every rank has all of its own and the sums are the same among the groups.

    ``among`` is for each sum the groups in which it should be the same: all that write the parameter, unless told.
    """
    targets, pieces, error = _prepared(shards, prepare)
    agree_on(shards, error, sums, shards.scopes() if among is None else among, shards.name)
    return targets, pieces


def _prepared(
    shards: Shards, prepare: Callable[[], list[torch.Tensor | None]]
) -> tuple[Sequence[torch.Tensor | None], list[torch.Tensor | None], Exception | None]:
    """Targets and pieces of this rank, and what is wrong with them."""
    error: Exception | None = None
    targets: Sequence[torch.Tensor | None] = []
    pieces: list[torch.Tensor | None] = []
    _flight.check_earlier()
    try:
        for adapter, param in zip(shards.adapters, shards.params, strict=True):
            adapter.require_writable(param)
        targets = shards.pieces(range(len(shards.params)))
        pieces = prepare()
        for item, target in enumerate(targets):
            if target is not None and (target.layout != torch.strided or is_state(shards.what)):
                check_target(shards, item, target)
    except Exception as caught:
        error = caught
    return targets, pieces, error


def _agree_on_values(shards: Shards, error: Exception | None, values: Sequence[torch.Tensor], *, last: bool) -> None:
    """Have the ranks compare their values: all that the same groups write at once, and each where those differ."""
    scopes, dtypes, device = shards.scopes(), [sharding.dtype for sharding in shards.shardings], shards.device()
    together: dict[tuple[dist.ProcessGroup, ...], list[int]] = {}
    for item, scope in enumerate(scopes):
        together.setdefault(scope, []).append(item)
    totals: list[int] = []
    if error is None:
        try:
            for items in together.values():
                of_all = digest_of_all([values[item] for item in items], [dtypes[item] for item in items], device)
                totals.append(of_all ^ (not last))
        except Exception as caught:
            error = caught
    try:
        agree_on(shards, error, totals, list(together))
    except RankMismatchError:  # on all ranks, which now find out of which parameters
        agree_on(shards, error, [] if error is not None else digests(values, dtypes, device), scopes, shards.name)
        raise


def agree_on(
    shards: Shards,
    error: Exception | None,
    sums: Sequence[int] = (),
    scopes: Sequence[Sequence[dist.ProcessGroup]] | None = None,
    name: Callable[[int], str] = str,
) -> None:
    """As `agree`, among the ranks that write the parameters; all of them must call it."""
    with shards.named_if_broken(range(len(shards.params))):
        try:
            agree(error, _groups_of(shards), shards.device(), sums, name, scopes)
        except FragmentError:
            shards.forget()
            raise


def _groups_of(shards: Shards) -> list[dist.ProcessGroup]:
    """The groups whose ranks write the parameters; told once for all that are cut over the same."""
    told_by_adapter = any(type(adapter).writers is not Adapter.writers for adapter in dict.fromkeys(shards.adapters))
    shardings = shards.homes if shards.what == "value" else [*shards.homes, *shards.shardings]
    kinds = dict.fromkeys(map(_cut_over, shardings)) if not told_by_adapter else {}
    if told_by_adapter or any(stages for _, _, stages in kinds):
        return list(dict.fromkeys(group for scope in shards.scopes() for group in scope))
    return list(dict.fromkeys(each for group, replicas, _ in kinds for each in (group, *replicas) if each is not None))


def check_target(shards: Shards, item: int, target: torch.Tensor) -> None:
    """Raise where what is written would be lost: state that is computed from what the optimizer keeps is a copy."""
    if target.layout != torch.strided:
        raise InvalidValueError(
            f"'{shards.what}' of {shards.name(item)} is of layout {target.layout}, which cannot be written: make it "
            "dense first"
        )
    kind = kept_as(target)
    if not kind and target.dim() == 0:
        again = shards.local(item)
        kind = "Python number" if again is not None and again.data_ptr() != target.data_ptr() else ""
    if kind:
        raise InvalidValueError(
            f"'{shards.what}' of {shards.name(item)} is a {kind}, which cannot be written: assign it in "
            "optimizer.state on each rank"
        )


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
