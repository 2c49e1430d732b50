"""Compare what ranks called, and choose the leaves under which they call the same. Pure: no communication, no model.

[Note: events] An event is a number. ``n`` says that module ``n`` of the index was entered, ``~n`` that it was left.
Modules without parameters in them are not recorded: no engine gathers anything for them. ``count + n``, where ``count``
is the number of modules, says that a parameter of module ``n`` was read while the module was not being called.

[Note: gathers] An engine gathers parameters when it enters a module that has parameters of its own; for a leaf it
gathers everything inside at once, and nothing when modules inside are called. So a leaf set turns the calls of a
forward into a sequence of gathers, and ranks that have different sequences wait for each other for ever. A *parting* is
the innermost call, made by both, during which two ranks go on with different modules. No leaf inside that
call can help, since what one rank calls there the other does not call at all; the module called becomes a leaf.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ds_z3leaf._rehearse.index import ModuleIndex

PASS = -1  # the number of the call that stands for one whole forward


@dataclass(slots=True)
class Call:
    """One call of a module.

    Attributes:
        module: its number in the index; `PASS` is the whole forward.
        calls: the calls made during it, in order.
        access: no call, but a parameter read while its module was not being called.
        gathers: the numbers of the modules that the engine gathers for during it, in order; set by `reduce_call`.
    """

    module: int
    calls: list[Call] = field(default_factory=list)
    access: bool = False
    gathers: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Parting:
    """Where two forwards part.

    Attributes:
        stack: the modules that both have entered, the outermost first; the last is where they part.
        before: the module that both called last in it, or None.
        first, second: what each calls next in it; None where it calls nothing more.
        needed: the modules that a leaf must hold to help.
    """

    stack: tuple[int, ...]
    before: int | None
    first: int | None
    second: int | None
    needed: frozenset[int]


def read_calls(events: Iterable[int], count: int) -> Call:
    """The calls of one forward from its events ([Note: events]), of an index of `count` modules."""
    whole = Call(PASS)
    stack = [whole]
    for event in events:
        if event >= count:
            read = Call(event - count, access=True)
            if stack[-1].calls[-1:] != [read]:  # weight and bias, one after the other
                stack[-1].calls.append(read)
        elif event >= 0:
            call = Call(event)
            stack[-1].calls.append(call)
            stack.append(call)
        else:
            # A forward that raises leaves its modules in order, but a hook of somebody else may lack a leave.
            while len(stack) > 1 and stack.pop().module != ~event:
                pass
    return whole


def reduce_call(call: Call, leaves: Iterable[int], index: ModuleIndex) -> Call:
    """The calls as an engine sees them that has these leaves: without those inside a leaf, and with `gathers` set."""
    return _reduce(call, frozenset(leaves), frozenset(), index)[0]


def _reduce(call: Call, leaves: frozenset[int], hidden: frozenset[int], index: ModuleIndex) -> list[Call]:
    if call.access:
        return [] if call.module in hidden else [Call(call.module, access=True, gathers=(~call.module,))]
    within = hidden
    if call.module in leaves and call.module not in hidden:
        within = hidden | index.inside(call.module)
    calls = [kept for made in call.calls for kept in _reduce(made, leaves, within, index)]
    if call.module in hidden:
        return calls
    own = call.module != PASS and (call.module in leaves or index.owns[call.module])
    gathers = tuple([call.module] if own else []) + tuple(number for made in calls for number in made.gathers)
    return [Call(call.module, calls, gathers=gathers)] if gathers or call.module == PASS else []


def find_partings(first: Call, second: Call, stack: tuple[int, ...] = ()) -> Iterator[Parting]:
    """Every innermost call during which two reduced forwards part."""
    if first.gathers == second.gathers:
        return
    inner = stack if first.module == PASS else (*stack, first.module)
    ours, theirs = [_key(call) for call in first.calls], [_key(call) for call in second.calls]
    if ours == theirs:
        for one, other in zip(first.calls, second.calls, strict=True):
            yield from find_partings(one, other, inner)
        return
    start = _common(ours, theirs)
    end = _common(ours[start:][::-1], theirs[start:][::-1])
    middle = [*first.calls[start : len(ours) - end], *second.calls[start : len(theirs) - end]]
    yield Parting(
        inner,
        ours[start - 1][0] if start else None,
        ours[start][0] if start < len(ours) else None,
        theirs[start][0] if start < len(theirs) else None,
        frozenset(number if number >= 0 else ~number for call in middle for number in call.gathers),
    )


def _key(call: Call) -> tuple[int, bool]:
    return call.module, call.access


def _common(ours: Sequence[object], theirs: Sequence[object]) -> int:
    """How many entries two sequences have in common from the start."""
    count = 0
    for one, other in zip(ours, theirs, strict=False):
        if one != other:
            break
        count += 1
    return count


def choose_leaf(parting: Parting, leaves: Iterable[int], index: ModuleIndex) -> int | None:
    """The innermost module that both have entered and that holds all they call differently; None if there is none."""
    taken = set(leaves)
    for number in reversed(parting.stack):
        if number not in taken and parting.needed <= index.inside(number):
            return number
    return None


def find_strays(call: Call, leaves: Iterable[int], index: ModuleIndex) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """Calls of modules inside a leaf that is not being called: the engine would gather nothing for them.

    Yields:
        The leaf, the module called, and the stack of modules around the call, the outermost first.
    """
    leaf_of: dict[int, int] = {}
    for leaf in leaves:
        leaf_of.update(dict.fromkeys(index.inside(leaf) - {leaf}, leaf))
    pending: list[tuple[Call, tuple[int, ...]]] = [(call, ())]
    while pending:
        made, stack = pending.pop()
        holder = leaf_of.get(made.module)
        if holder is not None and holder not in stack:
            yield holder, made.module, stack
            continue
        inner = stack if made.module == PASS else (*stack, made.module)
        pending.extend((below, inner) for below in reversed(made.calls))


def find_stacks(call: Call, number: int) -> Iterator[tuple[int, ...]]:
    """The modules around each call of a module, the outermost first."""
    pending: list[tuple[Call, tuple[int, ...]]] = [(call, ())]
    while pending:
        made, stack = pending.pop()
        if made.module == number and not made.access:
            yield stack
        inner = stack if made.module == PASS else (*stack, made.module)
        pending.extend((below, inner) for below in made.calls)


def all_calls(call: Call) -> Iterator[Call]:
    """A call and all that were made during it."""
    pending = [call]
    while pending:
        made = pending.pop()
        pending.extend(made.calls)
        yield made


def hidden_by(leaves: Iterable[int], index: ModuleIndex) -> set[int]:
    """The modules inside leaves, without the leaves."""
    return {number for leaf in leaves for number in index.inside(leaf) if number != leaf}


def outermost(leaves: Mapping[int, str], index: ModuleIndex) -> dict[int, str]:
    """The leaves, with their reasons, that are inside no other, in the model's order."""
    within = hidden_by(leaves, index)
    return {leaf: leaves[leaf] for leaf in sorted(leaves) if leaf not in within}
