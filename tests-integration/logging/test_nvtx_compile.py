"""instrument_w_nvtx with a real torch: under torch.compile, and with torch's own backend."""

import sys

import ds_logging.nvtx
import pytest
from ds_logging import CommsLogger, instrument_w_nvtx
from ds_logging._nvtx_backends import TorchNvtx, _nvtx_package, find_backend

torch = pytest.importorskip("torch")


class Recorder:
    def __init__(self):
        self.events = []

    def push(self, message, domain):
        self.events.append(f"+{message}")

    def pop(self, domain):
        self.events.append("-")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def counted(function):
    """Compile with fullgraph=True, which raises at any graph break; count the graphs."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    return torch.compile(function, fullgraph=True, backend=backend), graphs


@pytest.mark.parametrize("with_recorder", [True, False])
def test_no_graph_break_and_no_range(with_recorder):
    recorder = Recorder()

    @instrument_w_nvtx(message="f", backend=recorder if with_recorder else None)
    def step(x, *, scale):
        return torch.sin(x) * scale

    compiled, graphs = counted(step)
    x = torch.arange(4.0)
    torch.testing.assert_close(compiled(x, scale=2.0), torch.sin(x) * 2.0)
    assert recorder.events == []
    assert len(graphs) == 1
    step(x, scale=2.0)
    assert recorder.events == (["+f", "-"] if with_recorder else [])


def test_torch_compile_takes_the_eager_backend():
    inner = instrument_w_nvtx(torch.sin)
    compiled = torch.compile(lambda x: inner(x) + 1, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(torch.ones(2)), torch.sin(torch.ones(2)) + 1)


def test_a_module_whose_forward_is_instrumented():
    recorder = Recorder()

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(3, 3)

        @instrument_w_nvtx(backend=recorder)
        def forward(self, x):
            return self.linear(x).relu()

    block = Block()
    compiled, graphs = counted(block)
    x = torch.randn(2, 3, requires_grad=True)
    compiled(x).sum().backward()
    assert x.grad is not None
    assert len(graphs) == 1
    assert recorder.events == []


def test_an_instrumented_generator_is_compiled_through():
    recorder = Recorder()

    @instrument_w_nvtx(backend=recorder)
    def parts(x):
        yield x.sin()
        yield x.cos()

    compiled, graphs = counted(lambda x: list(parts(x)))
    first, second = compiled(torch.ones(2))
    torch.testing.assert_close(first, torch.sin(torch.ones(2)))
    torch.testing.assert_close(second, torch.cos(torch.ones(2)))
    assert len(graphs) == 1
    assert recorder.events == []


def test_switching_ranges_does_not_recompile(monkeypatch):
    compiled, graphs = counted(instrument_w_nvtx(lambda x: x + 1))
    for enabled in (True, False, True):
        monkeypatch.setattr(ds_logging.nvtx, "enable_nvtx", enabled)
        compiled(torch.ones(2))
    assert len(graphs) == 1


@pytest.fixture
def no_nvtx_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvtx", None)
    _nvtx_package.cache_clear()
    yield
    _nvtx_package.cache_clear()


def test_torch_draws_if_it_can_and_never_fails_if_it_cannot(no_nvtx_package):
    assert isinstance(find_backend(), TorchNvtx) == hasattr(torch._C, "_nvtx")
    assert instrument_w_nvtx(lambda x: x + 1)(1) == 2
    assert not torch.cuda.is_initialized()


@pytest.mark.gpu
def test_cuda_work_is_timed_without_waiting_for_it():
    comms = CommsLogger()
    comms.configure({"enabled": True})
    x = torch.randn(4096, 4096, device="cuda")
    x @ x  # loads the library
    torch.cuda.synchronize()
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    with comms.timed("all_reduce", x.nbytes, group_size=2):
        for _ in range(200):
            x @ x
    last.record()
    assert not last.query(), "the host waited for the device"
    measured = comms.get_operation_summary("all_reduce")[x.nbytes]["total_latency_ms"]
    last.synchronize()
    assert 0 < measured <= first.elapsed_time(last)  # events on the same stream, inside these two
