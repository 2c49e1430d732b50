"""Ranges as a real tool sees them: ``nvtx_tool.c``, attached as Nsight Systems is, in a process of its own."""

import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("nvtx")

IMPORTS = "import asyncio, functools, threading\nfrom ds_logging import instrument_w_nvtx\nimport ds_logging.nvtx\n"


@pytest.fixture(scope="module")
def tool(tmp_path_factory):
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler (cc, gcc or clang) builds nvtx_tool.c")
    library = tmp_path_factory.mktemp("tool") / "tool.so"
    source = Path(__file__).with_name("nvtx_tool.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source)], check=True, timeout=120)
    return library


@pytest.fixture
def seen(tool, run_script):
    """Run a program under the tool; return its events, and fail where a pop is not of the last push of its domain."""

    def run(code, **environ):
        done = run_script(IMPORTS + code, NVTX_INJECTION64_PATH=str(tool), **environ)
        events = [line.split("\t") for line in done.stderr.splitlines()]
        assert all(event[0] in ("push", "pop", "name") for event in events), done.stderr
        return events

    return run


def depths(events):
    """How many ranges are open after each event; every one must be closed at the end."""
    depth, found = 0, []
    for kind, *_ in events:
        depth += {"push": 1, "pop": -1}.get(kind, 0)
        assert depth >= 0
        found.append(depth)
    assert depth == 0
    return found


def test_name_domain_colour_category_and_payload(seen):
    events = seen("""
@instrument_w_nvtx(message="m", color="red", category="io", payload=3)
def f(): pass
f()
@instrument_w_nvtx(domain="data", category=7, payload=-2.5, color=0x11223344)
def g(): pass
g()
with instrument_w_nvtx("block", domain=None): pass
""")
    assert events == [
        ["name", "ds", "1", "io"],
        ["push", "ds", "m", "ffff0000", "1", "3"],
        ["pop", "ds"],
        ["push", "data", "g", "11223344", "7", "-2.5"],
        ["pop", "data"],
        ["push", "-", "block", "ff", "0", "-"],
        ["pop", "-"],
    ]


@pytest.mark.parametrize(
    "code",
    [
        "@instrument_w_nvtx\ndef f(): raise SystemExit(0)\nf()",
        "@instrument_w_nvtx\ndef f(): yield 1; yield 2\nnext(f())",
        "@instrument_w_nvtx\ndef f(): yield 1; yield 2\nkept = f(); next(kept)",
        "@instrument_w_nvtx\ndef f(): pass\nt = threading.Thread(target=f); t.start(); t.join()",
        "@instrument_w_nvtx\nclass A: pass\nassert isinstance(A(), A)",
        "class A:\n  @instrument_w_nvtx\n  @property\n  def p(self): return 1\nassert A().p == 1",
        "@instrument_w_nvtx\nasync def f(): await asyncio.sleep(0)\nasyncio.run(f())",
        "instrument_w_nvtx(functools.lru_cache(len))(())",
    ],
)
def test_every_range_is_closed(seen, code):
    assert max(depths(seen(code))) >= 1


def test_interleaved_coroutines_never_nest(seen):
    events = seen("""
@instrument_w_nvtx
async def a():
    for _ in range(3): await asyncio.sleep(0)
@instrument_w_nvtx
async def b():
    for _ in range(3): await asyncio.sleep(0)
async def main(): await asyncio.gather(a(), b())
asyncio.run(main())
""")
    assert depths(events) == [1, 0] * 8
    assert [event[2] for event in events[::2]] == ["a", "b"] * 4


def test_the_switch(seen):
    events = seen("""
@instrument_w_nvtx
def f(): pass
f()
ds_logging.nvtx.enable_nvtx = False
f()
ds_logging.nvtx.enable_nvtx = True
f()
""")
    assert [event[0] for event in events] == ["push", "pop"] * 2


def test_the_variable_that_switches_off(seen):
    assert seen("def f(): pass\nassert instrument_w_nvtx(f) is f", DS_NVTX="off") == []


def test_the_wrapper_travels_to_another_process(seen):
    events = seen("""
import pickle
from ds_logging._nvtx.backends import Span
f = instrument_w_nvtx(functools.partial(len, (1, 2)), message="m", color="red")
assert pickle.loads(pickle.dumps(f))() == 2
""")
    assert events == [["push", "ds", "m", "ffff0000", "0", "-"], ["pop", "ds"]]


def test_a_library_that_cannot_be_loaded_is_no_tool(run_script):
    code = f"{IMPORTS}def f(): pass\nassert instrument_w_nvtx(f) is f"
    assert run_script(code, NVTX_INJECTION64_PATH="/no/such/tool.so").stderr == ""


def test_without_a_tool_nothing_is_imported_for_it(run_script):
    code = f"{IMPORTS}import sys\ndef f(): pass\nassert instrument_w_nvtx(f) is f\nassert 'nvtx' not in sys.modules"
    assert run_script(code, NVTX_INJECTION64_PATH="").stderr == ""
