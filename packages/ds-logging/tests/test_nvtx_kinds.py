"""What is decorated stays what it is: a class, a property, a partial object, a cached function."""

import abc
import asyncio
import contextlib
import copy
import dataclasses
import functools
import gc
import inspect
import pickle
import sys
import types

import pytest
from ds_logging.errors import ArgumentError
from ds_logging.nvtx import instrument_w_nvtx


class Recorder:
    def __init__(self):
        self.events = []

    def push(self, message, domain):
        self.events.append(f"+{message}")

    def pop(self, domain):
        self.events.append("-")

    def __reduce__(self):
        return Recorder, ()


@pytest.fixture
def recorder():
    recorder = Recorder()
    yield recorder
    assert recorder.events.count("-") == len(recorder.events) / 2


@pytest.fixture
def ranged(recorder):
    return functools.partial(instrument_w_nvtx, backend=recorder)


def add(a, b=2):
    return a + b


@instrument_w_nvtx(backend=Recorder())
@functools.lru_cache
def cached(x):
    return x


def test_a_class_stays_a_class(recorder, ranged):
    @ranged(message="A")
    class A:
        def __init__(self, x, *, y=2):
            self.values = (x, y)

    assert isinstance(A, type)
    assert isinstance(A(1), A)
    assert A(1, y=3).values == (1, 3)
    assert str(inspect.signature(A)) == "(x, *, y=2)"
    assert recorder.events == ["+A", "-"] * 2


def test_a_class_without_init(recorder, ranged):
    @ranged(message="A")
    class A:
        pass

    assert isinstance(A(), A)
    assert recorder.events == ["+A", "-"]
    assert str(inspect.signature(A)) == "()"
    with pytest.raises(TypeError, match="argument"):
        A(3)


def test_a_class_whose_new_takes_the_arguments(ranged):
    @ranged
    class Pair(tuple):
        __slots__ = ()

        def __new__(cls, *values):
            return super().__new__(cls, values)

    assert Pair(1, 2) == (1, 2)


def test_an_inherited_init_follows_the_order_of_the_object_s_own_class(ranged):
    @ranged
    class Mixin:
        pass

    class Base:
        def __init__(self):
            self.base = True

    class Both(Mixin, Base):
        pass

    assert Both().base


def test_a_dataclass_is_decorated_from_above(recorder, ranged):
    @ranged(message="D")
    @dataclasses.dataclass
    class D:
        x: int = 0

    assert D(3) == D(x=3)
    assert recorder.events == ["+D", "-"] * 2

    with pytest.raises(ArgumentError, match="above @dataclass"):

        @dataclasses.dataclass
        @instrument_w_nvtx
        class E:
            x: int = 0


@pytest.mark.parametrize("cls", [dict, int, object])
def test_a_built_in_class(cls):
    with pytest.raises(ArgumentError, match="is built in"):
        instrument_w_nvtx(cls)


def test_a_property(recorder, ranged):
    class A:
        @ranged(message="p")
        @property
        def p(self):
            """What it is."""
            return self._p

        @p.setter
        def p(self, value):
            self._p = value

        q = ranged(p)

        @ranged
        @functools.cached_property
        def c(self):
            return [1]

    a = A()
    a.p = 3
    assert a.p == 3
    assert recorder.events == ["+p", "-"]
    a.q = 4
    assert a.q == 4
    assert A.p.__doc__ == A.q.__doc__ == "What it is."
    assert a.c is a.c
    assert recorder.events.count("+test_a_property.<locals>.A.c") == 1


def test_an_abstract_method_stays_abstract(ranged):
    class A(abc.ABC):
        @ranged
        @abc.abstractmethod
        def do(self): ...

        @ranged
        @property
        @abc.abstractmethod
        def value(self): ...

    assert A.__abstractmethods__ == {"do", "value"}


def test_a_cached_function_keeps_its_cache(recorder, ranged):
    @ranged(message="f")
    @functools.lru_cache(maxsize=7)
    def square(x):
        return x * x

    assert (square(3), square(3)) == (9, 9)
    assert square.cache_info().hits == 1
    assert square.cache_parameters()["maxsize"] == 7
    square.cache_clear()
    assert square.cache_info().hits == 0
    assert square.__name__ == "square"
    assert str(inspect.signature(square)) == "(x)"

    class A:
        @ranged
        @functools.lru_cache  # noqa: B019  (what users write)
        def method(self, x):
            return (self, x)

    a = A()
    assert a.method(1) == (a, 1)
    assert A.method.cache_info().misses == 1


def test_singledispatch(recorder, ranged):
    @ranged
    @functools.singledispatch
    def name(x):
        return "object"

    @name.register
    def _(x: int):
        return "int"

    assert (name(""), name(1)) == ("object", "int")

    class A:
        @ranged
        @functools.singledispatchmethod
        def name(self, x):
            return "object"

        @name.register
        def _(self, x: int):
            return "int"

    assert (A().name(""), A().name(1)) == ("object", "int")


def test_partial_objects(recorder, ranged):
    partial = ranged(functools.partial(add, 1), message="p")
    assert partial() == 3
    assert (partial.func, partial.args) == (add, (1,))
    assert pickle.loads(pickle.dumps(partial))() == copy.deepcopy(partial)() == 3

    async def later(x):
        await asyncio.sleep(0)
        return x

    waiting = ranged(functools.partial(later, 1), message="p")
    assert inspect.iscoroutinefunction(waiting)
    assert asyncio.run(waiting()) == 1

    class A:
        def add(self, a, b):
            return a + b

        increment = ranged(functools.partialmethod(add, 1))

    assert A().increment(2) == 3
    assert recorder.events[-2:] == ["+test_partial_objects.<locals>.A.add", "-"]


def test_bound_methods(recorder, ranged):
    class A:
        async def later(self, x):
            await asyncio.sleep(0)
            return x

        def method(self):
            return self

    for later in (ranged(A().later, message="l"), ranged(functools.partial(A().later), message="l")):
        assert asyncio.run(later(1)) == 1
        assert recorder.events == ["+l", "-"] * 2
        recorder.events.clear()

    a = A()
    method = ranged(a.method, message="m")
    assert inspect.ismethod(method)
    assert method.__self__ is a is method()
    items = []
    ranged(items.append, message="append")(1)
    assert items == [1]
    assert recorder.events == ["+m", "-", "+append", "-"]


def test_a_builtin_does_not_become_a_method(ranged):
    class A:
        size = ranged(len)

    assert A().size([1, 2]) == 2


def test_an_object_passes_its_attributes_through(recorder, ranged):
    class Model:
        """A model."""

        def __init__(self):
            self.training = True

        def __call__(self, x):
            return x + 1

        def __getitem__(self, grid):
            return lambda x: (grid, x)

    model = Model()
    wrapped = ranged(model, message="m")
    assert isinstance(wrapped, Model)
    assert wrapped(1) == 2
    assert wrapped.training
    wrapped.training = False
    assert not model.training
    assert wrapped[3](4) == (3, 4)
    assert wrapped.__doc__ == "A model."
    assert "training" in dir(wrapped)
    with pytest.raises(AttributeError, match="nothing"):
        _ = wrapped.nothing
    assert copy.copy(wrapped)(1) == 2
    assert recorder.events[:2] == ["+m", "-"]


@pytest.fixture
def importable(monkeypatch):
    """pytest loads this file without a name that pickle would find."""
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or types.SimpleNamespace(**globals()))


def test_what_stands_in_a_module_is_pickled_by_name(importable):
    assert pickle.loads(pickle.dumps(cached)) is cached
    assert copy.deepcopy(cached) is cached


def test_a_coroutine_made_of_a_generator(recorder, ranged):
    @ranged(message="f")
    @types.coroutine
    def old():
        yield from asyncio.sleep(0).__await__()
        return 4

    async def main():
        return await old()

    assert asyncio.run(main()) == 4
    assert recorder.events == ["+f", "-"] * 2


def test_context_managers(recorder, ranged):
    @contextlib.contextmanager
    @ranged(message="f")
    def block():
        yield 1

    with block() as value:
        recorder.events.append("body")
        assert value == 1
    assert recorder.events == ["+f", "-", "body", "+f", "-"]
    recorder.events.remove("body")


def test_generators_left_half_way(recorder, ranged):
    @ranged(message="f")
    def count():
        try:
            yield 1
        finally:
            recorder.events.append("+cleaned up")
            recorder.events.append("-")

    assert next(count()) == 1
    gc.collect()
    assert recorder.events == ["+f", "-", "+f", "+cleaned up", "-", "-"]


def test_an_async_generator_left_half_way_is_closed_once(recorder, ranged):
    problems = []
    kept = []

    @ranged(message="f")
    async def count():
        try:
            yield 1
            yield 2
        finally:
            await asyncio.sleep(0)
            kept.append("closed")

    async def main():
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: problems.append(context))
        steps = count()
        kept.append(steps)
        assert await anext(steps) == 1

    asyncio.run(main())
    assert kept[1:] == ["closed"]
    assert problems == []


def test_exceptions_that_end_the_program(recorder, ranged):
    @ranged(message="f")
    def leave():
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        leave()
    assert recorder.events == ["+f", "-"]


def test_recursion(recorder, ranged):
    @ranged(message="f")
    def down(n):
        return down(n - 1) if n else 0

    down(100)
    assert recorder.events == ["+f"] * 101 + ["-"] * 101
