"""Which random numbers a recorded operator would have drawn.

[Note: streams] An operator on meta draws no random numbers, so a generator stands still while a model is recorded. A
constructor may move it all the same: it seeds it (``torch.manual_seed``), saves and restores its state
(``fork_rng``, Megatron's trackers), or brings a generator of its own. `materialize` has to follow, so the recorder must
notice. At the beginning of a block and after every recorded draw, a `Stream` writes a number, the *marker*, into the
generator's state. A state that comes back with a known marker was saved after that draw; a state with another one was
set by somebody.

In a CPU generator, a Mersenne twister, the marker lies in the lower 31 bits of its first word. Between two draws that
word is used up, and what follows does not depend on these bits (Matsumoto and Nishimura 1998: the state has 19937 bits,
31 fewer than its words). So numbers that are really drawn inside the block are what they would be. The end of the
block takes the marker out again.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from dataclasses import dataclass

import torch

_MARKERS = itertools.count(0x5D5D00)
_WATCHING = threading.Lock()  # one recorder at a time watches: the default generators are the process's

# A state consists of numbers of 8 bytes: on the CPU the seed, two counters, the position, the words; on CUDA the seed
# and the offset. By kind: which of them has the marker, from which bit on, and in how many bits.
_PLACES = {"cpu": (3, 0, 31), "cuda": (1, 40, 24)}


@dataclass(frozen=True, eq=False, slots=True)
class Draw:
    """Where an operator's random numbers come from.

    Attributes:
        generator: one that the constructor brought; None for the default generator of the device.
        kind: "cpu" or "cuda": the kind of generator that was watched; "" if none was.
        after: first go back to where the stream stood after what has this order.
        state: or first set this state.
        seed: the seed that gives ``state``, if one does.
    """

    generator: torch.Generator | None = None
    kind: str = ""
    after: int | None = None
    state: torch.Tensor | None = None
    seed: int | None = None


class Stream:
    """One generator of the CPU or of CUDA, watched while a block is open.

    Args:
        generator: whose state is watched.
        default: whether it is a default generator. Its state at the beginning is that at `materialize`.
        order: where in the recording the watching begins.
    """

    def __init__(self, generator: torch.Generator, *, default: bool, order: int) -> None:
        self.generator = generator
        self._given = None if default else generator
        self._kind = generator.device.type
        self._index, self._shift, bits = _PLACES[self._kind]
        self._mask = ((1 << bits) - 1) << self._shift
        # By seed and marker: after which operator the state was marked so, and the number before it was marked.
        self._known: dict[tuple[int, int], tuple[int, int]] = {}
        self._last = (0, 0)
        self._on = Draw(self._given, self._kind)  # most operators just go on
        if default:
            state = generator.get_state()
            self._mark(state, order, self._number(state).value)

    def draw(self, order: int) -> Draw:
        """Note that operator ``order`` draws."""
        state = self.generator.get_state()
        number = self._number(state).value
        key = self._key(state, number)
        known = self._known.get(key)
        if known is None:
            fresh = self.generator.get_state()
            self._mark(state, order, number)
            return Draw(self._given, self._kind, state=fresh, seed=_seed_of(self.generator, fresh))
        after, unmarked = known
        draw = self._on if key == self._last else Draw(self._given, self._kind, after=after)
        self._mark(state, order, unmarked)
        return draw

    def drawn(self, order: int) -> None:
        """Note that operator ``order``, which was announced by `draw`, has really drawn."""
        state = self.generator.get_state()
        number = self._number(state).value
        known = self._known.get(self._key(state, number))  # None where a CPU generator has made new words
        self._mark(state, order, number if known is None else known[1])

    def close(self) -> None:
        """Take the marker out of the state."""
        state = self.generator.get_state()
        number = self._number(state)
        known = self._known.get(self._key(state, number.value))
        if known is not None:
            number.value = (number.value & ~self._mask) | (known[1] & self._mask)
            self.generator.set_state(state)

    def _mark(self, state: torch.Tensor, order: int, unmarked: int) -> None:
        number = self._number(state)
        number.value = (number.value & ~self._mask) | (next(_MARKERS) << self._shift & self._mask)
        self.generator.set_state(state)
        self._last = self._key(state, number.value)
        self._known[self._last] = (order, unmarked)

    def _key(self, state: torch.Tensor, number: int) -> tuple[int, int]:
        return ctypes.c_uint64.from_address(state.data_ptr()).value, number & self._mask

    def _number(self, state: torch.Tensor) -> ctypes.c_uint64:
        return ctypes.c_uint64.from_address(state.data_ptr() + 8 * self._index)


class Streams:
    """The default generators, and those that constructors bring, watched by one recorder.

    Where another thread records already, nothing is watched: the order in which two threads move one generator is
    not known, with or without meta.
    """

    def __init__(self) -> None:
        self._watching = False
        self._defaults: list[Stream] = []
        self._given: dict[int, Stream] = {}

    def open(self, order: int) -> None:
        """Begin to watch the default generators."""
        self._watching = _WATCHING.acquire(blocking=False)
        if self._watching:
            found = [torch.default_generator]
            if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
                found.append(torch.cuda.default_generators[torch.cuda.current_device()])
            self._defaults = [Stream(generator, default=True, order=order) for generator in found]

    def close(self) -> None:
        """Leave every generator as it would be without this."""
        if self._watching:
            for stream in (*self._defaults, *self._given.values()):
                stream.close()
            self._defaults, self._given = [], {}
            self._watching = False
            _WATCHING.release()

    def draws(self, order: int, generator: torch.Generator | None) -> tuple[Draw, ...]:
        """Note that operator ``order`` draws, from ``generator`` or from the default one."""
        if generator is not None:
            if not self._watching or generator.device.type not in _PLACES:
                return (Draw(generator),)
            return (self._stream(generator, order).draw(order),)
        return tuple([stream.draw(order) for stream in self._defaults]) or (Draw(),)

    def drawn(self, order: int, generator: torch.Generator | None) -> None:
        """Note that operator ``order`` has really drawn."""
        if self._watching and (generator is None or generator.device.type in _PLACES):
            for stream in self._defaults if generator is None else [self._stream(generator, order)]:
                stream.drawn(order)

    def _stream(self, generator: torch.Generator, order: int) -> Stream:
        key = _key(generator)
        for stream in self._defaults:
            if _key(stream.generator) == key:
                return stream
        if key not in self._given:
            self._given[key] = Stream(generator, default=False, order=order)
        return self._given[key]


def _key(generator: torch.Generator | None) -> int:
    """Tells generators apart: torch wraps one in a new object each time that it hands it out."""
    return 0 if generator is None else int(generator._cdata)  # type: ignore[attr-defined]


def _seed_of(generator: torch.Generator, state: torch.Tensor) -> int | None:
    """The seed that gives this state of ``generator``, if one does."""
    seed = generator.initial_seed()
    size = state.untyped_storage().nbytes()
    fresh = torch.Generator(generator.device).manual_seed(seed).get_state()
    same = ctypes.string_at(fresh.data_ptr(), size) == ctypes.string_at(state.data_ptr(), size)
    return seed if same else None


class Positions:
    """The generators while a recording runs again.

    Args:
        device: where it runs.
        draws: every draw that is going to be made, in order.
    """

    def __init__(self, device: torch.device, draws: list[tuple[Draw, ...]]) -> None:
        self._device = device
        self._generators: dict[int, torch.Generator] = {}
        self._saved: dict[tuple[int, int], torch.Tensor] = {}
        self._awaited: dict[int, set[int]] = {}
        for draw in map(self._chosen, draws):
            if draw.after is not None:
                self._awaited.setdefault(_key(draw.generator), set()).add(draw.after)

    def move(self, order: int, draws: tuple[Draw, ...]) -> torch.Generator | None:
        """Bring the generator to where operator ``order`` draws; return one to pass on, if one was passed.

        Raises:
            ValueError: the state of a CPU generator would have to be that of another device's.
        """
        draw = self._chosen(draws)
        key = _key(draw.generator)
        awaited = self._awaited.get(key, set())
        if draw.generator is None and not awaited and draw.after is None and draw.state is None:
            return None
        generator = self._real(draw)
        for past in [past for past in awaited if past < order]:
            awaited.remove(past)
            self._saved[key, past] = generator.get_state()
        if draw.state is not None:
            self._set(generator, draw)
        elif draw.after is not None:
            generator.set_state(self._saved[key, draw.after])
        return None if draw.generator is None else generator

    def _chosen(self, draws: tuple[Draw, ...]) -> Draw:
        return next((draw for draw in draws if draw.kind == self._device.type), draws[0])

    def _real(self, draw: Draw) -> torch.Generator:
        key, given = _key(draw.generator), draw.generator
        if key not in self._generators:
            if given is None:
                self._generators[key] = _default_generator(self._device)
            elif given.device.type != self._device.type or (draw.state is not None and not _stands(given, draw.state)):
                self._generators[key] = torch.Generator(self._device)  # what others did with theirs since is left alone
            else:
                self._generators[key] = given
        return self._generators[key]

    def _set(self, generator: torch.Generator, draw: Draw) -> None:
        assert draw.state is not None
        if draw.kind == generator.device.type:
            generator.set_state(draw.state)
        elif draw.seed is not None:
            generator.manual_seed(draw.seed)
        else:
            raise ValueError(
                f"the constructor gave a generator of the {draw.kind} a state that no seed gives, and {self._device} "
                "has no such state: materialize on the CPU and move the module, or seed the generator instead"
            )


def _stands(generator: torch.Generator, state: torch.Tensor) -> bool:
    return torch.equal(generator.get_state(), state)


def _default_generator(device: torch.device) -> torch.Generator:
    if device.type == "cpu":
        return torch.default_generator
    module = torch.get_device_module(device)
    generators = getattr(module, "default_generators", ())
    if not generators:
        raise ValueError(f"the constructor moved the random number generator, and that of {device} cannot be moved")
    found: torch.Generator = generators[device.index or 0]
    return found
