"""Optimizer state as whole named tensors with parameter groups: out of any engine, and into any other.

[Note: names] The state ``exp_avg`` of the parameter ``layers.0.weight`` is the tensor ``layers.0.weight/exp_avg``; the
tensors of one key come after each other. ``step`` is a 0-dimensional fp32 tensor for each parameter, also where the
optimizer counts the steps of a parameter group as a whole, as apex's and DeepSpeed's FusedAdam do. The parameter
groups are JSON: for each group the names of its parameters, the class of the optimizer, and every hyperparameter.

[Note: one for all] Engines that optimize flat tensors keep one ``step`` for all parameters of such a tensor. A file
whose parameters differ there cannot be loaded into such an engine. A parameter without state in the file, since no
backward pass ever used it, has zeros in a flat tensor, as it would have had there from the start; an engine that
optimizes parameters one by one then keeps no state of it, as before its first step.

[Note: implementations] Which implementation of an optimizer runs (``foreach``, ``fused``, ``capturable``,
``differentiable``) stays as it is where state is loaded. All other hyperparameters come from the file.
"""

from __future__ import annotations

import contextlib
import json
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ds_fragment.checkpoint.files import Reader
from ds_fragment.checkpoint.tensors import part_sums
from ds_fragment.checkpoint.writer import Entry, Order, Writer, optimizer_target
from ds_fragment.collective.agree import agree, everyone, share
from ds_fragment.collective.exchange import Shards as Found
from ds_fragment.engines import held_by
from ds_fragment.engines.base import Adapter, is_number
from ds_fragment.engines.optimized import Optimized, Optimizers, unwrapped_optimizers
from ds_fragment.engines.shards import Shards
from ds_fragment.engines.state import kept_as
from ds_fragment.engines.versions import known_engine
from ds_fragment.errors import (
    FragmentError,
    InvalidValueError,
    RankMismatchError,
    StateKeyError,
    UnlinkedParameterError,
)
from ds_fragment.record import registry

_IMPLEMENTATION = {"foreach", "fused", "capturable", "differentiable"}
_NO_HYPERPARAMETERS = {"params", "param_names", "step"}
_PARAMS, _KIND = "params", "optimizer"
_HOST = torch.device("cpu")


class OptimizerState:
    """All optimizer state of named parameters, to be saved. All ranks must make it with the same parameters.

    Args:
        named: parameters by their names in the file, each once.
        optimizer: that updates them; True for those that were attached, or that their engine has.
        leaders: the ranks that write, one of each set of ranks that have the same parameters.
        at: which of these sets this rank is in.

    Attributes:
        entries: what there is to save of this set of ranks: see [Note: names]. Empty before the first step.
        param_groups: their parameter groups, as JSON holds them.

    Raises:
        UnlinkedParameterError: no optimizer updates any of the parameters.
        StateKeyError: state is neither a number nor a tensor that can be given back as it is; names both.
        FragmentError: the ranks differ, or a piece of state cannot be read. All errors are the same on every rank.
    """

    def __init__(
        self,
        named: Mapping[str, torch.Tensor],
        optimizer: Optimizers | bool,
        *,
        leaders: Sequence[int] = (0,),
        at: int = 0,
    ) -> None:
        self.entries: list[Entry] = []
        self.param_groups: list[dict[str, Any]] = []
        self._shards: list[Shards] = []
        found, error = dict[str, Optimized](), None
        try:
            found = _optimized(named, optimizer)
            self.param_groups = _saved_groups(found)
        except Exception as caught:
            error = caught
        agree(error, everyone(), _HOST)
        stage = _digest(list(named))
        _compare(stage, self.param_groups, lambda i: f"parameter group {i}")
        keys = _keys_everywhere(stage, found)
        for key, names in _by_key(keys).items():
            shards = Shards([named[name] for name in names], key, "save_full")
            error = error or _unreadable(shards)
            self._shards.append(shards)
            for name, sharding in zip(names, shards.shardings, strict=True):
                dtype = torch.float32 if is_number(key) and not sharding.shape else sharding.dtype
                self.entries.append(Entry(f"{name}/{key}", dtype, sharding.shape))
        steps = _group_steps(found, keys)
        self._steps = list(steps.values())
        self.entries += [Entry(f"{name}/step", torch.float32, torch.Size(())) for name in steps]
        agree(error, everyone(), _HOST)
        kinds = [[str(entry.dtype), *entry.shape] for entry in self.entries]
        _compare(stage, kinds, lambda i: f"the shape or dtype of '{self.entries[i].name}'")
        sums = [*(total for shards in self._shards for total in _sums_of_whole(shards)), *self._steps]
        _compare(stage, sums, lambda i: f"'{self.entries[i].name}', which every rank holds whole,")
        sets, self._groups = [self.entries], self.param_groups
        if len(leaders) > 1:
            mine = [[entry.to_json() for entry in self.entries], self.param_groups]
            told = share(mine if dist.get_rank() == leaders[at] else None)
            sets = [list(map(Entry.from_json, told[rank][0])) for rank in leaders]
            self._groups = [group for rank in leaders for group in told[rank][1]]
        self._order = Order.of(sets)
        self._positions = self._order.positions[at]

    def writer(self, target: Path, max_shard_bytes: int, token: str) -> Writer:
        """What all sets of ranks write their state with, beside the save to ``target``."""
        metadata, order = {"param_groups": json.dumps(self._groups)}, self._order
        beside = optimizer_target(target, token)
        return Writer(beside, order.entries, metadata, max_shard_bytes, token=token, cuts=order.starts)

    def stream(
        self,
        put: Callable[[int | None, torch.Tensor], Exception | None],
        dst: int | None = None,
        bucket_bytes: int | None = None,
        failure: Exception | None = None,
    ) -> Exception | None:
        """Gather the whole tensors, in the order of `entries`. All ranks must call it.

        Args:
            put: called with the position among the entries of all sets of ranks, None where another set writes it, and
                the tensor, which is delivered here, until it returns an error.
            dst: see `iter_full`.
            bucket_bytes: see `iter_full`.
            failure: why this rank cannot take part; it sends the error to the others instead of its pieces.

        Returns:
            This rank's first error, which ranks of other groups need to be told.
        """

        def locate(shards: Shards, items: Sequence[int]) -> Found:
            if failure is not None:
                raise failure
            return shards.pieces(items)

        start = 0
        for shards in self._shards:
            positions = self._positions[start : start + len(shards.params)]
            start += len(shards.params)
            try:
                for position, tensor in shards.full(positions, bucket_bytes, dst, partial(locate, shards)):
                    failure = failure or put(position, tensor)
            except Exception as caught:
                failure = failure or caught
        for position, step in zip(self._positions[start:], self._steps, strict=True):
            failure = failure or put(position, torch.tensor(float(step)))
        return failure


class OptimizerLoad(contextlib.AbstractContextManager["OptimizerLoad"]):
    """Optimizer state of a file, to be loaded. All ranks must make it with the same parameters and the same file.

    State that the optimizer makes at its first step is made here, where it is not there yet. A context manager: where
    nothing was written at its end, everything is as it was.

    Args:
        named: parameters by their names in the file, each once.
        optimizer: that updates them; True for those that were attached, or that their engine has.
        reader: the file with the optimizer state; its metadata has the parameter groups.
        rename: what a parameter of the file is called here; None for one that is left out.
        strict: whether it is a problem that only the file has state of a parameter, or that a parameter which is
            trained here is in none of the file's groups.

    Attributes:
        problems: why it cannot be loaded; empty on all ranks, or on none.
    """

    def __init__(
        self,
        named: Mapping[str, torch.Tensor],
        optimizer: Optimizers | bool,
        reader: Reader,
        *,
        rename: Callable[[str], str | None] = str,
        strict: bool = True,
    ) -> None:
        self.problems: list[str] = []
        self._reader, self._rename = reader, rename
        self._named = dict(named)
        self._undo = contextlib.ExitStack()
        self._rounded: list[str] = []
        self._optimized: dict[str, Optimized] = {}
        self._counted: set[int] = set()  # ids of the live groups in which steps are counted
        self._groups: list[tuple[dict[str, Any], dict[str, Any]]] = []  # live, and what is set in it
        self._stored: dict[str, dict[str, str]] = {}  # by parameter and key, the name of the file's tensor
        self._shards: dict[str, tuple[list[str], Shards]] = {}
        stages: list[Callable[[], None]] = [
            partial(self._compare, optimizer, strict),
            self._make_state,
            self._find_pieces,
        ]
        for stage in stages:
            try:
                stage()
            except FragmentError as error:
                self.problems.append(str(error))
            except Exception as error:
                self.problems.append(f"{type(error).__name__}: {error}")
            if self._any_problems():
                return
        if self._rounded:
            warnings.warn(
                f"optimizer state is kept with fewer digits here than in the file; rounded: {_some(self._rounded)}",
                stacklevel=5,
            )

    def _any_problems(self) -> bool:
        """Whether there is a problem on any rank; all call it."""
        error = InvalidValueError("; ".join(self.problems)) if self.problems else None
        try:
            agree(error, everyone(), _HOST)
        except FragmentError as told:
            self.problems = self.problems or [str(told)]
        return bool(self.problems)

    def _compare(self, optimizer: Optimizers | bool, strict: bool) -> None:
        """What can be told from the file and the parameter groups alone."""
        self._optimized = _optimized(self._named, optimizer)
        for entry in self._reader.shapes:
            stored, _, key = entry.rpartition("/")
            name = self._rename(stored)
            if name is None:
                continue
            other = self._stored.setdefault(name, {}).setdefault(key, entry)
            if other != entry:
                self.problems.append(f"'{name}' is one tensor here, and the file has both '{entry}' and '{other}'")
        unknown = sorted(set(self._stored) - set(self._optimized))
        if unknown and strict:
            self.problems.append(f"the file has optimizer state of {_some(unknown)}, which no optimizer updates here")
        self._map_groups(strict)
        tensors: dict[int, list[str]] = {}
        for name, each in self._optimized.items():
            tensors.setdefault(id(each.owned), []).append(name)
        for names in tensors.values():
            self._compare_in_one_tensor(names)

    def _map_groups(self, strict: bool) -> None:
        saved: list[dict[str, Any]] = self._reader.json("param_groups", list)
        group_of = {self._rename(name): index for index, group in enumerate(saved) for name in group[_PARAMS]}
        here: dict[int, list[str]] = {}
        for name, each in self._optimized.items():
            here.setdefault(id(each.group), []).append(name)
        for names in here.values():
            live = self._optimized[names[0]]
            absent = [name for name in names if name not in group_of and self._named[name].requires_grad]
            sources = {group_of[name]: name for name in names if name in group_of}
            if absent and (strict or not sources):
                self.problems.append(f"no parameter group of the file has {_some(absent)}")
            if not sources:
                continue
            group, *others = [_settings(saved[index]) for index in sources]
            differ = sorted({key for other in others for key in {*group, *other} if group.get(key) != other.get(key)})
            if differ:
                self.problems.append(
                    f"{_some(list(sources.values()))} are in one parameter group here and in {len(sources)} of the "
                    f"file, with different {', '.join(differ)}: put them into groups of their own"
                )
            kind = saved[next(iter(sources))].get(_KIND)
            self._compare_kinds(live, kind, group, stateful=any(name in self._stored for name in names))
            self._groups.append((live.group, {key: _like(live.group.get(key), value) for key, value in group.items()}))

    def _compare_kinds(self, live: Optimized, kind: str | None, group: Mapping[str, Any], *, stateful: bool) -> None:
        """Of another optimizer whose state is not there yet, hyperparameters tell; else its keys do."""
        if kind is None or kind == live.kind:
            return
        lacking = set(live.group) - set(group) - _IMPLEMENTATION - _NO_HYPERPARAMETERS
        if lacking and set(group) - set(live.group) and not stateful:
            self.problems.append(
                f"the file is of the optimizer {kind}, whose groups have no {', '.join(sorted(lacking))}; here is "
                f"{live.kind}"
            )
        else:
            warnings.warn(
                f"the optimizer state is {kind}'s, and the optimizer here is {live.kind}: the run goes on as before "
                "only if both compute the same",
                stacklevel=2,
            )

    def _compare_in_one_tensor(self, names: Sequence[str]) -> None:
        """See [Note: one for all]."""
        first, *others = [name for name in names if name in self._stored] or [""]
        for other in others:
            if set(self._stored[first]) != set(self._stored[other]):
                self.problems.append(
                    f"'{first}' and '{other}' share one optimizer state here, and the file has "
                    f"{sorted(self._stored[first])} of the one and {sorted(self._stored[other])} of the other"
                )
                return
        for key, entry in self._stored[first].items() if others else ():
            if self._reader.shapes[entry]:
                continue
            number = self._reader.tensor(entry)
            for other in others:
                found = self._reader.tensor(self._stored[other][key])
                if not torch.equal(number, found):
                    self.problems.append(
                        f"'{first}' and '{other}' share one '{key}' here, and the file has {number.item():g} and "
                        f"{found.item():g}: they can be loaded into an engine that keeps one for each parameter, such "
                        "as FSDP2"
                    )
                    return

    def _make_state(self) -> None:
        """Have every optimizer keep what the file has state of."""
        settings = {id(group): values for group, values in self._groups}
        together: dict[int, list[str]] = {}
        for name, each in self._optimized.items():
            together.setdefault(id(each.owned), []).append(name)
        lacking: dict[tuple[str, ...], list[str]] = {}
        for names in together.values():
            each = self._optimized[names[0]]
            stored = next((set(self._stored[name]) for name in names if name in self._stored), None)
            if each.optimizer is None or (stored is None and not each.state):
                continue
            elsewhere = each.owned is not held_by(self._named[names[0]])[1] and not each.owned.numel()
            counted = each.counts_for_group
            if stored is not None and counted:
                stored -= {"step"}
            if elsewhere and each.keys != stored:
                raise FragmentError(
                    f"the optimizer state of {_some(names)} is on NVMe, and the file has other state or none: load, "
                    "after the first step, what was saved after a step"
                )
            if stored is None:
                continue
            if each.keys != stored:
                counted = self._remake(names[0], each, settings.get(id(each.group), {}))
            if counted:
                stored -= {"step"}
                self._counted.add(id(each.group))
            if each.keys != stored:
                kinds = (each.kind, *sorted(each.keys), "", *sorted(stored))
                lacking.setdefault(kinds, []).extend(names)
        for (kind, *keys), names in lacking.items():
            at = keys.index("")
            self.problems.append(
                f"{kind} keeps {keys[:at] or 'nothing'} of {_some(names)}, and the file has {keys[at + 1 :]}: load "
                "into the kind of optimizer that saved it"
            )
        for adapter, params in self._by_adapter().items():
            adapter.forget_state(params)

    def _remake(self, name: str, each: Optimized, settings: Mapping[str, Any]) -> bool:
        """Make the state anew; tensors that are there stay the same objects, as an engine may refer to them.

        Returns:
            Whether steps are counted in the group.
        """
        optimizer, owned = each.optimizer, each.owned
        assert optimizer is not None
        before = optimizer.state.pop(owned, None)

        def undo() -> None:
            optimizer.state.pop(owned, None)
            if before is not None:
                optimizer.state[owned] = before

        self._undo.callback(undo)
        try:
            counted = each.make_state(settings)
        except Exception as error:
            raise FragmentError(
                f"{each.kind} could not make its state of '{name}': {type(error).__name__}: {error}"
            ) from error
        state = each.state
        for key, entry in (before or {}).items():
            if isinstance(entry, torch.Tensor) and getattr(state.get(key), "shape", None) == entry.shape:
                state[key] = entry
        return counted

    def _find_pieces(self) -> None:
        first = {id(each.group): name for name, each in reversed(self._optimized.items())}
        for row in share([first[group] for group in self._counted]):  # a rank without state cannot tell by itself
            self._counted.update(id(self._optimized[name].group) for name in row if name in self._optimized)
        shared: dict[int, set[str]] = {}
        for name, each in self._optimized.items():
            shared.setdefault(id(each.owned), set()).update(self._stored.get(name, ()))
        keys = {name: shared[id(each.owned)] for name, each in self._optimized.items()}
        for name, each in self._optimized.items():
            if id(each.group) in self._counted:
                keys[name] = keys[name] - {"step"}
        self._compare_counted()
        for key, names in _by_key(keys).items():
            shards = Shards([self._named[name] for name in names], key, "set_optimizer_state")
            self._shards[key] = names, shards
            error = _unreadable(shards) or _unwritable(shards)
            if error is not None:
                self.problems.append(str(error))
            for name, sharding in zip(names, shards.shardings, strict=True):
                if name in self._stored:
                    self._compare_entry(self._stored[name][key], sharding.shape, sharding.dtype)

    def _group_steps(self) -> dict[int, dict[str, int]]:
        """By the id of each live group in which steps are counted, those that the file has of its parameters."""
        found: dict[int, dict[str, int]] = {}
        for name, each in self._optimized.items():
            entry = self._stored.get(name, {}).get("step")
            if entry is not None and id(each.group) in self._counted:
                found.setdefault(id(each.group), {})[name] = int(self._reader.tensor(entry).item())
        return found

    def _compare_counted(self) -> None:
        for steps in self._group_steps().values():
            (first, step), *others = steps.items()
            other = next((name for name, value in others if value != step), None)
            if other is not None:
                self.problems.append(
                    f"the optimizer here counts the steps of a parameter group, and the file has {step} of '{first}' "
                    f"and {steps[other]} of '{other}'"
                )

    def _compare_entry(self, entry: str, shape: torch.Size, dtype: torch.dtype) -> None:
        stored, kept = self._reader.shapes[entry], self._reader.dtypes[entry]
        if shape != stored and (shape.numel(), torch.Size(stored).numel()) != (1, 1):
            self.problems.append(f"'{entry}' has shape {stored} in the file and {tuple(shape)} here")
        elif not shape or kept == dtype:
            return
        elif kept.is_floating_point != dtype.is_floating_point or _largest(kept) > 2 * _largest(dtype):
            self.problems.append(f"'{entry}' is {kept} in the file and {dtype} here, which may not hold its values")
        elif kept.itemsize > dtype.itemsize:
            self._rounded.append(entry)

    def _by_adapter(self) -> dict[Adapter, list[torch.Tensor]]:
        found: dict[Adapter, list[torch.Tensor]] = {}
        for name in self._optimized:
            adapter, param = held_by(self._named[name])
            found.setdefault(adapter, []).append(param)
        return found

    @property
    def total(self) -> int:
        """Bytes of what is written on all ranks together."""
        return sum(sharding.nbytes for _, shards in self._shards.values() for sharding in shards.shardings)

    def write(self) -> Iterator[int]:
        """Set hyperparameters, and write this rank's pieces of the state: no communication. To be taken to its end.

        Yields:
            Bytes, of all ranks together, that were written.

        Raises:
            CheckpointError: the file cannot be read to its end; some state is written.
        """
        assert not self.problems
        self._undo.pop_all()
        live = [id(value) for group, _ in self._groups for value in group.values() if isinstance(value, torch.Tensor)]
        for group, settings in self._groups:
            for key, value in settings.items():
                now = group.get(key)
                if isinstance(now, torch.Tensor) and live.count(id(now)) == 1:  # what is compiled refers to it
                    now.copy_(value)
                else:
                    group[key] = value
        groups = {id(each.group): each.group for each in self._optimized.values()}
        for at, steps in self._group_steps().items():
            groups[at]["step"] = next(iter(steps.values()))
        with torch.no_grad(), known_engine():
            for key, (names, shards) in self._shards.items():
                for item, name in enumerate(names):
                    self._write(name, key, shards, item)
                    yield shards.shardings[item].nbytes
            self._clear()

    def _write(self, name: str, key: str, shards: Shards, item: int) -> None:
        state = self._optimized[name].state
        entry = state.get(key)
        if name not in self._stored:
            piece = shards.local(item)
            if isinstance(entry, torch.Tensor) and entry.dim() and piece is not None:
                piece.zero_()
        elif isinstance(entry, int | float):
            state[key] = type(entry)(self._reader.tensor(self._stored[name][key]).item())
        else:
            sharding = shards.shardings[item]
            target, fragment = shards.local(item), sharding.layout.fragments[sharding.rank]
            if target is not None and fragment is not None:
                piece = self._reader.fragment(self._stored[name][key], sharding.layout.shape, fragment)
                target.copy_(piece.view(target.shape))

    def _clear(self) -> None:
        """Take away, or zero where an engine may refer to it, the state of tensors that the file has none of."""
        stored = {id(each.owned) for name, each in self._optimized.items() if name in self._stored}
        for name, each in self._optimized.items():
            if id(each.owned) in stored or not each.state:
                continue
            assert each.optimizer is not None
            if each.owned is held_by(self._named[name])[1]:
                del each.optimizer.state[each.owned]
                continue
            for key, entry in each.state.items():
                if isinstance(entry, torch.Tensor):
                    entry.zero_()
                elif isinstance(entry, int | float):
                    each.state[key] = type(entry)(0)
        for adapter, params in self._by_adapter().items():
            adapter.forget_state(params)

    def __exit__(self, *_: object) -> None:
        with self._undo:
            pass
        for adapter, params in self._by_adapter().items():
            adapter.forget_state(params)


def _optimized(named: Mapping[str, torch.Tensor], optimizer: Optimizers | bool) -> dict[str, Optimized]:
    """What the optimizers keep of each parameter that they update.

    Raises:
        UnlinkedParameterError: they update none.
    """
    chosen = [] if isinstance(optimizer, bool) else unwrapped_optimizers(optimizer)
    if not isinstance(optimizer, bool) and not chosen:
        raise InvalidValueError("optimizer is empty: pass the optimizers that update the parameters, or True")
    for given in chosen:
        registry.add_optimizer(given)
        registry.changed()
    items: dict[Adapter, list[tuple[str, torch.Tensor]]] = {}
    with known_engine():
        for name, param in named.items():
            adapter, own = held_by(param)
            items.setdefault(adapter, []).append((name, own))
        found = {
            name: each
            for adapter, pairs in items.items()
            for (name, _), each in zip(pairs, adapter.optimized([own for _, own in pairs]), strict=True)
            if each is not None and (not chosen or registry.optimizer_of(each.owned) in (None, *chosen))
        }
    if not found:
        raise UnlinkedParameterError(
            f"no optimizer updates any of the {len(named)} parameters: pass optimizer=, or call attach(model, "
            "optimizer) on every rank first"
        )
    return {name: found[name] for name in named if name in found}


def _digest(thing: object) -> int:
    return zlib.crc32(json.dumps(thing).encode())


def _compare(stage: int, mine: Sequence[object], name: Callable[[int], str]) -> None:
    """Raise on every rank unless the ranks with the same parameters have the same; all ranks must call it."""
    sums = list(map(_digest, mine))
    heads = {tuple(head) for head in share([stage, _digest(sums)])}
    if len(heads) == len(dict(heads)):
        return
    error = None
    for other, row in share([stage, sums]):
        if other == stage and row != sums and error is None:
            at = next((at for at, (one, two) in enumerate(zip(sums, row, strict=False)) if one != two), len(row))
            error = RankMismatchError(f"{name(min(at, len(sums) - 1))} differs over the ranks")
    agree(error, everyone(), _HOST)


def _keys_everywhere(stage: int, found: Mapping[str, Optimized]) -> dict[str, set[str]]:
    """The keys of each parameter's state on any rank with the same parameters; all ranks must call it."""
    keys = {name: each.keys for name, each in found.items()}
    kinds = sorted({tuple(sorted(each)) for each in keys.values()})
    mine = [stage, kinds, [kinds.index(tuple(sorted(each))) for each in keys.values()]]
    if len(set(share(_digest(mine)))) > 1:
        for other, theirs, at in share(mine):
            for name, kind in zip(keys, at, strict=False) if other == stage else ():
                keys[name].update(theirs[kind])
    return keys


def _by_key(keys: Mapping[str, Iterable[str]]) -> dict[str, list[str]]:
    """By key the parameters that have it, in a fixed order."""
    names: dict[str, list[str]] = {key: [] for key in sorted({key for each in keys.values() for key in each})}
    for name, each in keys.items():
        for key in each:
            names[key].append(name)
    return names


def _group_steps(found: Mapping[str, Optimized], keys: Mapping[str, set[str]]) -> dict[str, int]:
    """The steps that optimizers count in a parameter group, by each of its parameters that has state."""
    return {
        name: each.group["step"]
        for name, each in found.items()
        if keys[name] and "step" not in keys[name] and isinstance(each.group.get("step"), int)
    }


def _unreadable(shards: Shards) -> Exception | None:
    """Why this rank cannot read its pieces, or could not give them back as they are."""
    try:
        for item, piece in enumerate(shards.pieces(range(len(shards.params)))):
            kind = "" if piece is None else kept_as(piece)
            if kind:
                raise StateKeyError(
                    f"optim_state_key '{shards.what}' of {shards.name(item)} is a {kind}, whose numbers a file of "
                    "plain tensors cannot give back: use the optimizer's own state_dict()"
                )
    except Exception as error:
        return error
    return None


def _sums_of_whole(shards: Shards) -> list[int]:
    """A sum of the bits of each tensor that this rank holds whole; 0 for the rest."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [0] * len(shards.params)
    alone = [item for item, sharding in enumerate(shards.shardings) if sharding.alone]
    found = part_sums(shards, alone, shards.pieces)
    return [found[item][1] if item in found else 0 for item in range(len(shards.params))]


def _unwritable(shards: Shards) -> Exception | None:
    try:
        for adapter, param in zip(shards.adapters, shards.params, strict=True):
            adapter.require_writable(param)
    except FragmentError as error:
        return error
    return None


def _saved_groups(found: Mapping[str, Optimized]) -> list[dict[str, Any]]:
    """The parameter groups as JSON holds them; warns of hyperparameters that it cannot hold."""
    groups: dict[int, dict[str, Any]] = {}
    left_out: set[str] = set()
    for name, each in found.items():
        if id(each.group) not in groups:
            groups[id(each.group)] = group = {_PARAMS: [], _KIND: each.kind}
            for key, value in each.group.items():
                if key not in _NO_HYPERPARAMETERS:
                    try:
                        group[key] = _jsonable(value)
                    except TypeError:
                        left_out.add(key)
        groups[id(each.group)][_PARAMS].append(name)
    if left_out:
        warnings.warn(
            f"the hyperparameters {', '.join(sorted(left_out))} are left out of the file: JSON cannot hold them",
            stacklevel=2,
        )
    return list(groups.values())


def _jsonable(value: object) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, list | tuple):
        return list(map(_jsonable, value))
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _jsonable(each) for key, each in value.items()}
    raise TypeError


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters of a group of the file that are loaded: see [Note: implementations]."""
    return {key: value for key, value in group.items() if key not in {_PARAMS, _KIND, *_IMPLEMENTATION}}


def _like(live: object, value: Any) -> Any:
    """A hyperparameter of the file, in the form in which the live group has it."""
    if isinstance(live, torch.Tensor):
        return torch.full_like(live, value)
    if isinstance(live, tuple) and isinstance(value, list):
        lives = live if len(live) == len(value) else [None] * len(value)
        return tuple(_like(one, each) for one, each in zip(lives, value, strict=True))
    return value


def _largest(dtype: torch.dtype) -> float:
    """The largest number that a dtype holds."""
    return float((torch.finfo if dtype.is_floating_point else torch.iinfo)(dtype).max) if dtype != torch.bool else 1.0


def _some(names: Sequence[str]) -> str:
    """Some names in words."""
    return ", ".join(f"'{name}'" for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
