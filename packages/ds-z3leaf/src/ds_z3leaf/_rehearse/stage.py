"""A rehearsal on the stage: what this rank's batches called, and the other ranks to compare it with."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import nn

from ds_z3leaf._rehearse.calls import (
    PASS,
    Call,
    Parting,
    all_calls,
    choose_leaf,
    find_partings,
    find_stacks,
    find_strays,
    hidden_by,
    reduce_call,
)
from ds_z3leaf._rehearse.checks import Options, needs_meta
from ds_z3leaf._rehearse.index import ModuleIndex
from ds_z3leaf._rehearse.passes import Pass, Recording, device_of, record
from ds_z3leaf._rehearse.ranks import Ranks
from ds_z3leaf._rehearse.stand_in import kept_random_state
from ds_z3leaf._walk import check_model
from ds_z3leaf.errors import LeafRehearsalError, LeafValueError

_SHOWN = 5  # modules that a note names


@dataclass(frozen=True)
class Problem:
    """One reason for which ranks part.

    Attributes:
        text: what happens, in words.
        leaf: number of the module that helps as a leaf; None if no leaf can help.
    """

    text: str
    leaf: int | None


@dataclass(frozen=True)
class Rehearsal:
    """What was tried.

    Attributes:
        ranks: how many ranks took part.
        passes: forwards of this rank.
        device: "meta", or the device that the model ran on.
        backward: whether every pass of this rank went back, too.
        calls: how often a pass of this rank called each module with parameters, at most, by name.
        never_called: modules with parameters that no pass of any rank called, the outermost ones outside the leaves;
            nothing is known of their order.
    """

    ranks: int
    passes: int
    device: str
    backward: bool
    calls: Mapping[str, int]
    never_called: tuple[str, ...]


class Stage:
    """Runs the batches when it is made; all ranks must make it, and call its methods, together.

    Raises:
        LeafTypeError, LeafValueError, LeafNotFoundError: an argument cannot be used; there are no batches.
        LeafRehearsalError: the forward fails on a rank, or ranks have different models or arguments.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        options: Options,
        given: Callable[[], Iterable[nn.Module]] = tuple,
    ) -> None:
        self.options = options
        self.ranks = Ranks(options.group)
        error: Exception | None = None
        taken: list[Any] = []
        leaves: list[nn.Module] = []
        try:
            check_model(model)
            options.check(batches)
            leaves = list(given())
            must_be_meta = needs_meta(model)
            with kept_random_state():  # a loader draws an order
                taken = list(islice(batches, options.max_batches))
        except Exception as caught:
            error = caught
        self.ranks.agree(error, "the rehearsal cannot start")
        self.index = ModuleIndex(model)
        self._compare_models()
        self._compare("device", options.device)
        self.given = {self.index.number[id(module)] for module in leaves}
        self._compare("leaves", [self.index.names[number] for number in sorted(self.given)])
        if sum(self.ranks.gather(len(taken))) == 0:
            raise LeafValueError("batches is empty on every rank: pass at least one batch")
        self.recording = self._record(taken, must_be_meta)
        recording = self.recording
        own = (recording.deciders, recording.without_floats, recording.odd_outputs, self._called())
        self.deciders, self.without_floats, self.odd_outputs, self.called = (
            frozenset().union(*sets) for sets in zip(*self.ranks.gather(own), strict=True)
        )

    def _record(self, batches: list[Any], must_be_meta: bool) -> Recording:
        device = self.options.device
        only_meta = must_be_meta or device == "meta"
        for meta in (True,) if only_meta else (False,) if device == "model" else (True, False):
            error: Exception | None = None
            try:
                recording = record(
                    self.index,
                    batches,
                    self.options.forward,
                    backward=self.options.backward,
                    repeats=self.options.repeats,
                    meta=meta,
                )
            except Exception as caught:
                error = caught
            if meta and not only_meta:
                if any(self.ranks.gather(error is not None)):
                    continue  # a rank cannot run on meta: all run where the model is, which shows what is wrong
            else:
                where = " on meta, where tensors have no values" if meta else ""
                self.ranks.agree(error, f"the forward cannot run{where}")
            break
        return recording

    def _compare_models(self) -> None:
        digests = self.ranks.gather(self.index.digest())
        other = next((rank for rank, text in enumerate(digests) if text != digests[0]), None)
        if other is None:
            return
        lines = self.ranks.gather(self.index.lines() if self.ranks.rank in (0, other) else [])
        pairs = zip([*lines[0], "nothing more"], [*lines[other], "nothing more"], strict=False)
        one, two = next((one, two) for one, two in pairs if one != two)
        raise LeafRehearsalError(
            f"ranks have different models: rank {self.ranks.numbers[0]} has {one} where rank "
            f"{self.ranks.numbers[other]} has {two}: build the same model on every rank"
        )

    def _compare(self, name: str, value: object) -> None:
        values = self.ranks.gather(value)
        for rank, other in zip(self.ranks.numbers, values, strict=True):
            if other != values[0]:
                raise LeafRehearsalError(
                    f"ranks have different arguments: {name} is {values[0]!r} on rank {self.ranks.numbers[0]} and "
                    f"{other!r} on rank {rank}: pass the same on every rank"
                )

    def find_problems(self, leaves: Iterable[int]) -> list[Problem]:
        """Where forwards and backwards part under these leaves; the same list on every rank, in the order of calls.

        The ranks' own batches are compared first; ranks are compared with each other once these agree.
        """
        leaves = frozenset(leaves)
        passes = self.recording.passes
        seen = [self._view(each, leaves) for each in passes]
        found: dict[int | None, Problem] = {}
        for own in self.ranks.gather(list(self._own_problems(seen, leaves))):
            for problem in own:
                found.setdefault(problem.leaf, problem)
        if found:
            return list(found.values())
        digests = self.ranks.gather({view.key: view.digests() for view in seen})
        pair = _first_difference(digests)
        if pair is None:
            return []
        key, first, second = pair
        mine = next((view for view in seen if view.key == key), None) if self.ranks.rank in (first, second) else None
        views = self.ranks.gather(mine)
        one, two = views[first], views[second]
        assert one is not None
        assert two is not None
        return list(self._compare_passes(one, two, leaves))

    def _view(self, each: Pass, leaves: frozenset[int]) -> _View:
        calls = reduce_call(each.forward, leaves, self.index)
        hidden = hidden_by(leaves, self.index)
        reached = each.backward and {
            number: count
            for number, count in each.backward.items()
            if number in leaves or (self.index.owns[number] and number not in hidden)
        }
        label = f"batch {each.batch}" + (f" (run {each.repeat + 1})" if each.repeat else "")
        if self.ranks.size > 1:
            label += f" of rank {self.ranks.numbers[self.ranks.rank]}"
        return _View((each.batch, each.repeat), label, calls, each.backward, reached)

    def _own_problems(self, seen: list[_View], leaves: frozenset[int]) -> Iterator[Problem]:
        for view in seen:
            for leaf, called, stack in find_strays(view.calls, leaves, self.index):
                around = next((n for n in reversed(stack) if leaf in self.index.inside(n) and n != leaf), None)
                yield Problem(
                    f"{view.label} calls {self._name(called)}, a part of {self._name(leaf)}, while that is not being "
                    "called itself: as a leaf it would not be gathered then",
                    around,
                )
        if self.options.across_batches:
            for view in seen[1:]:
                yield from self._compare_passes(seen[0], view, leaves)

    def _compare_passes(self, first: _View, second: _View, leaves: frozenset[int]) -> Iterator[Problem]:
        parted = False
        for parting in find_partings(first.calls, second.calls):
            parted = True
            yield Problem(self._describe(parting, first, second), choose_leaf(parting, leaves, self.index))
        if not parted:
            yield from self._compare_backward(first, second, leaves)

    def _describe(self, parting: Parting, first: _View, second: _View) -> str:
        after = "" if parting.before is None else f"after {self._name(parting.before)} "
        where = f" in {self._name(parting.stack[-1])}" if parting.stack else ""
        return (
            f"{after}{first.label} goes on with {self._name(parting.first)}, {second.label} with "
            f"{self._name(parting.second)}{where}"
        )

    def _compare_backward(self, first: _View, second: _View, leaves: frozenset[int]) -> Iterator[Problem]:
        if first.reached is None or second.reached is None:
            return
        for number in sorted({*first.reached, *second.reached}):
            one, two = first.reached.get(number, 0), second.reached.get(number, 0)
            if one == two:
                continue
            around = {module for stack in find_stacks(first.calls, number) for module in stack} - {number}
            helping = [
                module
                for module in sorted(around, key=lambda each: len(self.index.inside(each)))
                if module not in leaves
                and number in self.index.inside(module)
                and 0 < first.everywhere(module) == second.everywhere(module)
            ]
            yield Problem(
                f"the backward of {first.label} reaches {self._name(number)} {_times(one)}, that of {second.label} "
                f"{_times(two)}",
                helping[0] if helping else None,
            )

    def _own_parameters(self, number: int) -> list[nn.Parameter]:
        return list(self.index.modules[number].parameters(recurse=False))

    def _called(self) -> frozenset[int]:
        """The modules with parameters that this rank's passes called."""
        passes = self.recording.passes
        return frozenset(call.module for each in passes for call in all_calls(each.forward) if not call.access)

    def _name(self, number: int | None) -> str:
        return "nothing more" if number is None else repr(self.index.names[number]) if number else "the model itself"

    def describe(self, leaves: Iterable[int]) -> Rehearsal:
        """What was tried. What is inside a leaf need not be called."""
        calls: dict[str, int] = {}
        seen: set[int] = set()
        for each in self.recording.passes:
            made = list(all_calls(each.forward))
            seen.update(call.module for call in made)
            counts = Counter(call.module for call in made if not call.access and call.module != PASS)
            for number, count in counts.items():
                name = self.index.names[number]
                calls[name] = max(calls.get(name, 0), count)
        everywhere = set().union(*self.ranks.gather(seen))
        return Rehearsal(
            self.ranks.size,
            len(self.recording.passes),
            "meta" if self.recording.on_meta else str(device_of(self.index.modules[0])),
            all(each.backward is not None for each in self.recording.passes),
            calls,
            tuple(self._never_called(everywhere | hidden_by(leaves, self.index))),
        )

    def notes(self, leaves: Iterable[int], rehearsal: Rehearsal) -> list[str]:
        """What these leaves cannot do, and what the rehearsal did not see, in words."""
        notes = []
        for number in leaves:
            reasons = ["is called without a tensor of floating point"] if number in self.without_floats else []
            if number in self.odd_outputs:
                reasons.append("returns neither a tensor that has a gradient nor a tuple with one")
            times = rehearsal.calls.get(self.index.names[number], 0)
            if times > 1:
                reasons.append(f"is called {times} times in a forward")
            trained = any(param.requires_grad for param in self.index.modules[number].parameters())
            if reasons and trained:
                notes.append(
                    f"leaf {self.index.describe(number)} {' and '.join(reasons)}: ZeRO-3 cannot train it as a leaf, "
                    "FSDP2 can. Or let no rank go another way there: give every rank a blank image, or drop no layers"
                )
        return notes + _describe_unseen(rehearsal)

    def _never_called(self, seen: set[int]) -> Iterator[str]:
        used = {id(param) for number in seen if number != PASS for param in self._own_parameters(number)}
        tied = {
            number
            for number, owns in enumerate(self.index.owns)
            if owns and used.issuperset(map(id, self._own_parameters(number)))
        }
        seen = seen | tied
        covered: set[int] = set()
        for number, name in enumerate(self.index.names):
            if number in covered or not self.index.holds[number] or number in seen:
                continue
            inside = self.index.inside(number)
            if seen.isdisjoint(part for part in inside if self.index.owns[part]):
                covered |= inside
                yield name


@dataclass(frozen=True)
class _View:
    """A pass as an engine with some leaves sees it; ranks send it to each other."""

    key: tuple[int, int]
    label: str
    calls: Call
    backward: Mapping[int, int] | None
    reached: Mapping[int, int] | None

    def digests(self) -> tuple[str, str | None]:
        """Of the forward, and of the backward if there was one."""
        return _digest(self.calls.gathers), None if self.reached is None else _digest(sorted(self.reached.items()))

    def everywhere(self, number: int) -> int:
        """How often the backward reached a module, leaf or not."""
        return (self.backward or {}).get(number, 0)


def _digest(value: object) -> str:
    return hashlib.blake2b(repr(value).encode(), digest_size=16).hexdigest()


def _describe_unseen(rehearsal: Rehearsal) -> list[str]:
    """What a rehearsal did not see, in words."""
    notes = []
    if rehearsal.never_called:
        shown = ", ".join(repr(name) for name in rehearsal.never_called[:_SHOWN])
        more = len(rehearsal.never_called) - _SHOWN
        notes.append(
            f"no batch called {shown}{f' and {more} more' if more > 0 else ''}: nothing is known of their order. "
            "Rehearse batches that use them"
        )
    if not rehearsal.backward:
        notes.append(
            "backward passes were not compared on this rank: they were turned off, or had nothing to start from"
        )
    return notes


def _times(count: int) -> str:
    return "not at all" if count == 0 else "once" if count == 1 else f"{count} times"


def _first_difference(
    digests: list[dict[tuple[int, int], tuple[str, str | None]]],
) -> tuple[tuple[int, int], int, int] | None:
    """The first pass in which two ranks differ, forward or backward, and these ranks. A pass may have no backward."""
    for key in sorted({key for own in digests for key in own}):
        for part in (0, 1):
            having = [(rank, own[key][part]) for rank, own in enumerate(digests) if key in own]
            known = [(rank, text) for rank, text in having if text is not None]
            for rank, text in known[1:]:
                if text != known[0][1]:
                    return key, known[0][0], rank
    return None
