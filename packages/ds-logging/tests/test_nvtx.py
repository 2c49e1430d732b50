import asyncio
import functools
import inspect
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from ds_logging import _timeline, nvtx as ds_nvtx
from ds_logging._nvtx import backends as _nvtx_backends, ranged as _ranged
from ds_logging._nvtx.backends import TorchNvtx, nvtx_package
from ds_logging.errors import ArgumentError
from ds_logging.nvtx import instrument_w_nvtx


class Recorder:
    """Checks that ranges nest, and writes down what is open when."""

    def __init__(self):
        self.open = []
        self.events = []

    def push(self, message, domain):
        self.open.append((message, domain))
        self.events.append(f"+{message}")

    def pop(self, domain):
        message, opened = self.open.pop()
        assert opened == domain
        self.events.append(f"-{message}")


@pytest.fixture
def recorder():
    recorder = Recorder()
    yield recorder
    assert recorder.open == []


@pytest.fixture
def ranged(recorder):
    return functools.partial(instrument_w_nvtx, backend=recorder, message="f")


def test_a_range_around_the_body(recorder):
    @instrument_w_nvtx(backend=recorder)
    def step(x, *, y):
        recorder.events.append("body")
        return x + y

    assert step(1, y=2) == 3
    name = "test_a_range_around_the_body.<locals>.step"
    assert recorder.events == [f"+{name}", "body", f"-{name}"]


def test_the_range_ends_when_the_function_raises(recorder, ranged):
    @ranged
    def fail():
        raise KeyError("boom")

    with pytest.raises(KeyError, match="boom"):
        fail()
    assert recorder.events == ["+f", "-f"]


def original(a: int, /, b: str = "x", *, c: float = 1.0) -> str:
    """What it does."""
    return f"{a}{b}{c}"


async def coroutine():
    """A coroutine."""


def generator():
    """A generator."""
    yield


async def async_generator():
    """An async generator."""
    yield


@pytest.mark.parametrize("function", [original, coroutine, generator, async_generator])
def test_the_wrapper_looks_like_the_function(ranged, function):
    wrapped = ranged(function)
    assert wrapped.__wrapped__ is function
    for name in ("__name__", "__qualname__", "__doc__", "__module__"):
        assert getattr(wrapped, name) == getattr(function, name)
    assert inspect.signature(wrapped) == inspect.signature(function)
    for kind in (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction):
        assert kind(wrapped) == kind(function)


def test_an_async_function_is_ranged_only_while_it_runs(recorder):
    def part(name):
        @instrument_w_nvtx(backend=recorder, message=name)
        async def run():
            recorder.events.append(f"{name}1")
            await asyncio.sleep(0)
            recorder.events.append(f"{name}2")
            return name

        return run()

    async def main():
        return await asyncio.gather(part("a"), part("b"))

    assert asyncio.run(main()) == ["a", "b"]
    assert recorder.events == ["+a", "a1", "-a", "+b", "b1", "-b", "+a", "a2", "-a", "+b", "b2", "-b"]


def test_an_async_function_that_raises_or_is_cancelled(recorder, ranged):
    @ranged
    async def fail():
        await asyncio.sleep(0)
        raise KeyError("boom")

    with pytest.raises(KeyError, match="boom"):
        asyncio.run(fail())

    cleaned = []

    @ranged
    async def wait():
        try:
            await asyncio.sleep(3600)
        finally:
            cleaned.append(list(recorder.open))

    async def main():
        task = asyncio.ensure_future(wait())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert cleaned == [[("f", "ds")]]


def test_a_generator_is_ranged_only_while_it_runs(recorder, ranged):
    @ranged
    def count():
        recorder.events.append("one")
        got = yield 1
        recorder.events.append(f"got {got}")
        try:
            yield 2
        except KeyError:
            recorder.events.append("caught")
        yield 3
        return "end"

    steps = count()
    assert recorder.events == []
    assert next(steps) == 1
    recorder.events.append("between")
    assert steps.send("x") == 2
    assert steps.throw(KeyError()) == 3
    with pytest.raises(StopIteration) as stop:
        next(steps)
    assert stop.value.value == "end"
    first, second, third, last = ["+f", "one", "-f"], ["+f", "got x", "-f"], ["+f", "caught", "-f"], ["+f", "-f"]
    assert recorder.events == [*first, "between", *second, *third, *last]


def test_a_closed_generator_cleans_up_inside_its_range(recorder, ranged):
    seen = []

    @ranged
    def count():
        try:
            yield 1
        finally:
            seen.append(list(recorder.open))

    steps = count()
    next(steps)
    steps.close()
    assert seen == [[("f", "ds")]]
    count().close()  # never started
    assert seen == [[("f", "ds")]]


def test_generators_that_interleave_do_not_close_each_others_ranges(recorder):
    def part(name):
        @instrument_w_nvtx(backend=recorder, message=name)
        def run():
            yield name
            yield name

        return run()

    a, b = part("a"), part("b")
    assert [next(a), next(b), next(a), next(b)] == ["a", "b", "a", "b"]
    assert list(a) == list(b) == []
    opened = [event for event in recorder.events if event[0] == "+"]
    assert opened == ["+a", "+b", "+a", "+b", "+a", "+b"]


def test_a_generator_that_raises(ranged):
    @ranged
    def fail():
        yield 1
        raise KeyError("boom")

    with pytest.raises(KeyError, match="boom"):
        list(fail())


def test_an_async_generator_passes_everything_through(recorder, ranged):
    seen = []

    @ranged
    async def count():
        try:
            got = yield 1
            await asyncio.sleep(0)
            seen.append((got, list(recorder.open)))
            try:
                yield 2
            except KeyError:
                yield 3
            yield 4
        finally:
            await asyncio.sleep(0)
            seen.append(list(recorder.open))

    async def main():
        source = count()
        assert await source.asend(None) == 1
        assert recorder.open == []
        assert await source.asend("x") == 2
        assert await source.athrow(KeyError()) == 3
        await source.aclose()
        return [item async for item in count()]

    assert asyncio.run(main()) == [1, 2, 4]
    open_range = [("f", "ds")]
    assert seen == [("x", open_range), open_range, (None, open_range), open_range]


def test_an_async_generator_that_raises(ranged):
    @ranged
    async def fail():
        yield 1
        raise KeyError("boom")

    async def main():
        return [item async for item in fail()]

    with pytest.raises(KeyError, match="boom"):
        asyncio.run(main())


def test_switched_off_there_is_no_range(recorder, ranged, monkeypatch):
    monkeypatch.setattr(ds_nvtx, "enable_nvtx", False)

    async def collect():
        return [item async for item in ranged(async_generator)()]

    assert ranged(original)(1) == "1x1.0"
    assert list(ranged(generator)()) == [None]
    asyncio.run(ranged(coroutine)())
    assert asyncio.run(collect()) == [None]
    assert recorder.events == []


@pytest.mark.parametrize("before", [True, False])
def test_switching_in_the_middle_of_a_call_keeps_the_balance(recorder, ranged, monkeypatch, before):
    monkeypatch.setattr(ds_nvtx, "enable_nvtx", before)

    @ranged
    def toggle():
        ds_nvtx.enable_nvtx = not before

    @ranged
    def toggle_between():
        yield 1
        ds_nvtx.enable_nvtx = not before
        yield 2

    toggle()
    assert recorder.events == (["+f", "-f"] if before else [])
    ds_nvtx.enable_nvtx = before
    list(toggle_between())
    assert recorder.events == (["+f", "-f"] * 4 if before else [])


def test_the_switch_is_read_at_every_call(recorder, ranged, monkeypatch):
    wrapped = ranged(original)
    monkeypatch.setattr(ds_nvtx, "enable_nvtx", False)
    wrapped(1)
    monkeypatch.setattr(ds_nvtx, "enable_nvtx", True)
    wrapped(1)
    assert recorder.events == ["+f", "-f"]


def test_methods_of_all_kinds(recorder):
    ranged = functools.partial(instrument_w_nvtx, backend=recorder)

    class Model:
        @ranged
        def plain(self):
            return self

        @ranged
        @classmethod
        def of_class(cls):
            return cls

        @ranged
        @staticmethod
        def of_nobody(x):
            return x

        def __call__(self):
            return 1

    model = Model()
    assert model.plain() is model
    assert Model.of_class() is model.of_class() is Model
    assert Model.of_nobody(3) == model.of_nobody(3) == 3
    assert ranged(model.plain)() is model
    assert ranged(model)() == 1
    assert recorder.events[-1].endswith("Model")


def test_other_callables(recorder):
    ranged = functools.partial(instrument_w_nvtx, backend=recorder)
    assert ranged(len)([1]) == 1
    assert ranged(functools.partial(original, 1))(c=2.0) == "1x2.0"
    assert recorder.events == ["+len", "-len", "+original", "-original"]


def test_an_instance_with_an_async_call(recorder, ranged):
    class Client:
        async def __call__(self):
            await asyncio.sleep(0)
            return list(recorder.open)

    assert asyncio.run(ranged(Client())()) == [("f", "ds")]


def test_the_domain_is_passed_on(recorder):
    seen = []
    instrument_w_nvtx(lambda: seen.extend(recorder.open), message="m", domain="d", backend=recorder)()
    assert seen == [("m", "d")]


def test_deepspeeds_domain(recorder):
    assert ds_nvtx.DEEPSPEED_NVTX_DOMAIN == "DeepSpeed"

    @instrument_w_nvtx(domain=ds_nvtx.DEEPSPEED_NVTX_DOMAIN, backend=recorder)
    def step():
        return list(recorder.open)

    assert step()[0][1] == "DeepSpeed"


def test_what_cannot_be_called():
    with pytest.raises(ArgumentError, match="func=3 cannot be called"):
        instrument_w_nvtx(3)


def fake_torch(compiling=False, with_nvtx=True):
    calls = []
    nvtx = SimpleNamespace(range_push=lambda message: calls.append(f"+{message}"), range_pop=lambda: calls.append("-"))
    return SimpleNamespace(
        compiler=SimpleNamespace(is_compiling=lambda: compiling),
        _C=SimpleNamespace(_nvtx=object()) if with_nvtx else SimpleNamespace(),
        cuda=SimpleNamespace(nvtx=nvtx),
        calls=calls,
    )


def forget():
    """Ask the environment, and for packages, anew."""
    for cached in (_nvtx_backends._mode, _nvtx_backends._tool_is_named, nvtx_package):
        cached.cache_clear()
    _nvtx_backends._cached_span.cache_clear()
    ds_nvtx._shared_ranges.cache_clear()


@pytest.fixture
def environment(monkeypatch):
    """Set what decides whether functions are wrapped: the environment and the modules that are there."""

    def change(*, modules=(), **variables):
        for name in ("DS_NVTX", *_nvtx_backends.INJECTION_VARIABLES):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        for name, module in modules:
            monkeypatch.setitem(sys.modules, name, module)
        forget()

    yield change
    monkeypatch.undo()
    forget()


class DummyDomain:
    """What the nvtx package gives for a domain that no tool looks at."""


class FakePackage:
    """The part of the nvtx package that is used, written down."""

    def __init__(self, attached=True):
        self.calls = []
        self.made = []
        self.attached = attached

    def get_domain(self, name):
        if not self.attached:
            return DummyDomain()

        def attributes(*values):
            self.made.append(values)
            return values

        return SimpleNamespace(
            get_event_attributes=attributes,
            push_range=lambda values: self.calls.append(f"+{name}:{values[0]}"),
            pop_range=lambda: self.calls.append(f"-{name}"),
        )


TOOL = {"NVTX_INJECTION64_PATH": "/a/tool.so"}


def test_under_torch_compile_there_is_no_range(recorder, ranged, monkeypatch):
    monkeypatch.setattr(_ranged, "is_compiling", lambda: True)
    ranged(original)(1)
    with ranged():
        pass
    assert recorder.events == []


def test_whether_torch_compiles_is_asked_of_torch_once_it_is_there(monkeypatch):
    monkeypatch.setattr(_ranged, "is_compiling", _ranged._ask_whether_torch_compiles)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert not _ranged.is_compiling()
    monkeypatch.setitem(sys.modules, "torch", fake_torch(compiling=True))
    assert _ranged.is_compiling()
    assert _ranged.is_compiling is _ranged._ask_whether_torch_compiles  # nothing is stored while torch compiles
    torch = fake_torch()
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert not _ranged.is_compiling()
    assert _ranged.is_compiling is torch.compiler.is_compiling


@pytest.mark.parametrize(
    ("variables", "package"),
    [({}, FakePackage()), (TOOL, FakePackage(attached=False)), ({**TOOL, "DS_NVTX": "off"}, FakePackage())],
)
def test_where_nothing_is_drawn_a_function_stays_itself(environment, variables, package):
    environment(modules=[("nvtx", package)], **variables)

    class Kinds:
        @property
        def value(self):
            return 1

    partial, static = functools.partial(original, 1), staticmethod(original)
    for kind in (original, coroutine, generator, len, partial, static, Kinds, vars(Kinds)["value"]):
        assert instrument_w_nvtx(kind) is kind
    with instrument_w_nvtx("block"):
        pass
    assert package.calls == package.made == []


def test_the_nvtx_package_comes_first_and_is_prepared_once(environment):
    package, torch = FakePackage(), fake_torch()
    environment(modules=[("nvtx", package), ("torch", torch)], **TOOL)
    step = instrument_w_nvtx(original, domain="d", color="red", category="c", payload=3)
    for _ in range(2):
        step(1)
    assert package.calls == ["+d:original", "-d"] * 2
    assert package.made == [("original", 0xFFFF0000, "c", 3)]
    assert torch.calls == []


def test_a_block_in_a_loop_is_prepared_once(environment):
    package = FakePackage()
    environment(modules=[("nvtx", package)], **TOOL)
    for _ in range(3):
        with instrument_w_nvtx("block"):
            pass
    assert package.calls == ["+ds:block", "-ds"] * 3
    assert package.made == [("block", None, None, None)]


def test_torch_comes_second(environment):
    torch = fake_torch()
    environment(modules=[("nvtx", None), ("torch", torch)], **TOOL)
    instrument_w_nvtx(original, domain="not known to torch")(1)
    assert torch.calls == ["+original", "-"]


def test_torch_that_is_imported_inside_a_range_does_not_end_it(monkeypatch):
    backend, torch = TorchNvtx(), fake_torch()
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    backend.push("before", "ds")
    monkeypatch.setitem(sys.modules, "torch", torch)
    backend.push("after", "ds")
    backend.pop("ds")
    backend.pop("ds")
    assert torch.calls == ["+after", "-"]


@pytest.mark.parametrize("torch", [None, fake_torch(with_nvtx=False), SimpleNamespace()])
def test_without_both_a_function_stays_itself(environment, torch):
    environment(modules=[("nvtx", None), ("torch", torch)], **TOOL)
    assert instrument_w_nvtx(original) is original


def test_the_environment_can_have_everything_wrapped(environment):
    environment(modules=[("nvtx", None), ("torch", fake_torch())], DS_NVTX="on")
    assert instrument_w_nvtx(original).__wrapped__ is original


def test_an_unknown_mode(environment):
    environment(DS_NVTX="yes")
    with pytest.raises(ArgumentError, match="DS_NVTX='yes': give on, off or auto"):
        instrument_w_nvtx(original)


def test_a_listener_gets_every_range(environment, monkeypatch):
    environment(modules=[("nvtx", None), ("torch", None)])
    heard = []
    assert instrument_w_nvtx(original) is original
    monkeypatch.setattr(_timeline, "listener", lambda *what: heard.append(what))
    step, steps = instrument_w_nvtx(original), instrument_w_nvtx(generator)
    before = time.time_ns()
    step(1)
    list(steps())
    with instrument_w_nvtx("block"), pytest.raises(KeyError), instrument_w_nvtx("inner"):
        raise KeyError
    after = time.time_ns()
    assert [name for name, *_ in heard] == ["original", "generator", "generator", "inner", "block"]
    for _, start, end, thread in heard:
        assert before <= start <= end <= after
        assert thread == threading.get_ident()
    monkeypatch.setattr(_timeline, "listener", None)
    step(1)
    assert len(heard) == 5
