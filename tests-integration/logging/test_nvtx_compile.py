"""instrument_w_nvtx with a real torch: under torch.compile, and with torch's own backend."""

import copy
import functools
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import ds_logging.nvtx
import pytest
from ds_logging import CommsLogger, instrument_w_nvtx

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
    ds_logging.nvtx.enable_nvtx = True
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


def test_blocks_and_classes_inside_a_graph():
    recorder = Recorder()

    @instrument_w_nvtx(backend=recorder)
    class Doubled:
        def __init__(self, x):
            self.x = 2 * x

    def step(x):
        with instrument_w_nvtx("block", color="red", payload=3):
            y = x.sin()
        with instrument_w_nvtx(message="ours", backend=recorder):
            return y + Doubled(x).x

    compiled, graphs = counted(step)
    x = torch.ones(2)
    for enabled in (True, False, True):
        ds_logging.nvtx.enable_nvtx = enabled
        torch.testing.assert_close(compiled(x), x.sin() + 2 * x)
    assert len(graphs) == 1
    assert recorder.events == []


@pytest.mark.parametrize(
    "kind", ["builtin", "partial", "torch function", "bound method", "module", "inner", "property"]
)
def test_every_kind_inside_a_graph(kind):
    recorder = Recorder()
    ranged = functools.partial(instrument_w_nvtx, backend=recorder)

    class Scale(torch.nn.Module):
        @ranged
        @property
        def two(self):
            return 2

        def forward(self, x):
            return x * 2

    module = Scale()

    def decorated_inside(x):
        @instrument_w_nvtx
        def inner(y):
            return y * 2

        return inner(x)

    doubles = {
        "builtin": ranged(functools.partial(torch.mul, 2)),
        "torch function": lambda x, add=ranged(torch.add): add(x, x),  # noqa: B008
        "partial": ranged(functools.partial(lambda a, b: a * b, 2)),
        "bound method": ranged(module.forward),
        "module": ranged(module),
        "inner": decorated_inside,
        "property": lambda x: x * module.two,
    }
    double = doubles[kind]
    compiled, graphs = counted(lambda x: double(x))
    torch.testing.assert_close(compiled(torch.ones(2)), torch.full((2,), 2.0))
    assert len(graphs) == 1
    assert recorder.events == []


def test_a_module_inside_a_module_stays_a_part_of_it():
    recorder = Recorder()

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.part = instrument_w_nvtx(torch.nn.Linear(2, 2), message="part", backend=recorder)

        def forward(self, x):
            return self.part(x)

    net = Net()
    assert sorted(net.state_dict()) == ["part.bias", "part.weight"]
    assert len(list(net.parameters())) == 2
    twin = copy.deepcopy(net)
    torch.nn.init.zeros_(twin.part.weight)
    torch.nn.init.zeros_(twin.part.bias)
    x = torch.ones(1, 2)
    assert twin(x).tolist() == [[0.0, 0.0]]
    assert net(x).tolist() != [[0.0, 0.0]]
    assert recorder.events == ["+part", "-"] * 2
    loaded = pickle.loads(pickle.dumps(instrument_w_nvtx(torch.nn.Linear(2, 2))))
    assert loaded(x).shape == (1, 2)


def test_an_autograd_function():
    recorder = Recorder()
    ranged = functools.partial(instrument_w_nvtx, backend=recorder)

    class Double(torch.autograd.Function):
        @staticmethod
        @ranged(message="forward")
        def forward(ctx, x):
            return x * 2

        @ranged(message="backward")
        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    x = torch.ones(2, requires_grad=True)
    Double.apply(x).sum().backward()
    assert x.grad.tolist() == [2.0, 2.0]
    assert recorder.events == ["+forward", "-", "+backward", "-"]


def test_a_torch_without_nvtx_draws_nothing_and_never_fails(monkeypatch):
    """The torch of the tests is one for the CPU, whose torch.cuda.nvtx raises at every call."""
    from ds_logging._nvtx.backends import TorchNvtx, torch_nvtx

    assert (torch_nvtx() is not None) == hasattr(torch._C, "_nvtx")
    backend = TorchNvtx()
    backend.push("m", "ds")
    backend.pop("ds")
    assert not torch.cuda.is_initialized()


# Run under a tool, in a process of its own: CUDA work inside ranges, drawn by the nvtx package or by torch.
ON_THE_DEVICE = """
import sys
if "--torch" in sys.argv:
    sys.modules["nvtx"] = None
import torch
from ds_logging import instrument_w_nvtx

@instrument_w_nvtx(message="matmul", color="green", payload=1)
def multiply(x):
    return x @ x

x = torch.randn(256, 256, device="cuda")
with instrument_w_nvtx("step"):
    y = multiply(x)
torch.cuda.synchronize()
assert y.isfinite().all()
"""


@pytest.mark.gpu
@pytest.mark.parametrize("drawer", ["nvtx", "torch"])
def test_ranges_around_work_on_the_device(tmp_path, drawer):
    if drawer == "nvtx":
        pytest.importorskip("nvtx")
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler builds the tool")
    source = Path(__file__).parents[2] / "packages" / "ds-logging" / "tests" / "nvtx_tool.c"
    library = tmp_path / "tool.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source)], check=True, timeout=120)
    command = [sys.executable, "-c", ON_THE_DEVICE, f"--{drawer}"]
    environment = {**os.environ, "NVTX_INJECTION64_PATH": str(library)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    # Libraries of CUDA draw ranges, too.
    events = [line.split("\t") for line in done.stderr.splitlines() if line.startswith(("push\t", "pop\t"))]
    domain = "ds" if drawer == "nvtx" else "-"
    ours = [
        event[2] for event in events if event[0] == "push" and event[1] == domain and event[2] in ("step", "matmul")
    ]
    assert ours == ["step", "matmul"]
    assert sum(event == ["pop", domain] for event in events) >= 2


@pytest.mark.gpu
def test_nsight_systems_sees_the_ranges(tmp_path):
    nsys = shutil.which("nsys")
    if nsys is None:
        pytest.skip("nsys is not installed")
    script, report = tmp_path / "work.py", tmp_path / "report"
    script.write_text(ON_THE_DEVICE)
    profile = [nsys, "profile", "--trace=nvtx,cuda", "--sample=none", "-o", str(report), sys.executable, str(script)]
    subprocess.run(profile, check=True, capture_output=True, timeout=300)
    stats = [nsys, "stats", "--report=nvtx_sum", "--format=csv", f"{report}.nsys-rep"]
    text = subprocess.run(stats, check=True, capture_output=True, text=True, timeout=300).stdout
    assert "ds:matmul" in text
    assert "ds:step" in text


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


def test_colors_may_have_names_of_matplotlib():
    from ds_logging._nvtx.range_style import parse_color

    pytest.importorskip("matplotlib")
    assert parse_color("tab:blue") == 0xFF1F77B4
