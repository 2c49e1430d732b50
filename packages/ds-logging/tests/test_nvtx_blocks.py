"""instrument_w_nvtx as a context manager, and its arguments."""

import threading

import pytest
from ds_logging import nvtx as ds_nvtx
from ds_logging._nvtx.range_style import COLORS, parse_color
from ds_logging.errors import ArgumentError
from ds_logging.nvtx import instrument_w_nvtx


class Recorder:
    """What is open on each thread; a pop of another range than the last one is a failure."""

    def __init__(self):
        self.thread = threading.local()
        self.events = []

    def push(self, message, domain):
        if not hasattr(self.thread, "open"):
            self.thread.open = []
        self.thread.open.append(domain)
        self.events.append(f"+{message}")

    def pop(self, domain):
        assert self.thread.open.pop() == domain
        self.events.append("-")


@pytest.fixture
def recorder():
    return Recorder()


def test_a_block(recorder):
    with instrument_w_nvtx(message="outer", backend=recorder), instrument_w_nvtx("inner", backend=recorder, domain="d"):
        pass
    assert recorder.events == ["+outer", "+inner", "-", "-"]


def test_a_block_that_raises(recorder):
    with pytest.raises(KeyError), instrument_w_nvtx("m", backend=recorder):
        raise KeyError
    assert recorder.events == ["+m", "-"]


def test_one_object_is_a_decorator_and_a_block_and_nests(recorder):
    ranges = instrument_w_nvtx("m", backend=recorder)

    @ranges
    def step():
        return 1

    with ranges, ranges:
        assert step() == 1
    assert recorder.events == ["+m"] * 3 + ["-"] * 3


@pytest.mark.parametrize("before", [True, False])
def test_switching_inside_a_block_keeps_the_balance(recorder, monkeypatch, before):
    monkeypatch.setattr(ds_nvtx, "enable_nvtx", before)
    ranges = instrument_w_nvtx("m", backend=recorder)
    with ranges:
        ds_nvtx.enable_nvtx = not before
        with ranges:
            ds_nvtx.enable_nvtx = before
    assert recorder.events == ["+m", "-"]


def test_threads_share_one_object(recorder, monkeypatch):
    """One thread enters while ranges are on, the other while they are off; each leaves what it entered."""
    ranges = instrument_w_nvtx("m", backend=recorder)
    entered, leave = threading.Event(), threading.Event()

    def other():
        with ranges:
            entered.set()
            assert leave.wait(30)

    monkeypatch.setattr(ds_nvtx, "enable_nvtx", False)
    thread = threading.Thread(target=other)
    thread.start()
    assert entered.wait(30)
    ds_nvtx.enable_nvtx = True
    with ranges:
        leave.set()
        thread.join(30)
        assert recorder.events == ["+m"]
    assert recorder.events == ["+m", "-"]


def test_the_first_argument_may_be_the_message(recorder):
    @instrument_w_nvtx("name", backend=recorder)
    def step():
        return 1

    assert step() == 1
    assert recorder.events == ["+name", "-"]


def test_a_block_needs_a_message():
    with pytest.raises(ArgumentError, match="message=None"), instrument_w_nvtx():
        pass


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"message": 3}, "message=3"),
        ({"message": "a\0b"}, "message='a.x00b'"),
        ({"domain": 4}, "domain=4"),
        ({"color": "no color"}, "color='no color': give one of blue"),
        ({"color": "#12"}, "color='#12'"),
        ({"color": "#gggggg"}, "color='#gggggg'"),
        ({"color": 2**32}, "color=4294967296"),
        ({"color": True}, "color=True"),
        ({"category": 0}, "category=0"),
        ({"category": 1.5}, "category=1.5"),
        ({"category": "\0"}, "category="),
        ({"payload": "3"}, "payload='3' .str.: give an int or a float"),
        ({"payload": True}, "payload=True"),
        ({"payload": [1]}, "payload=.1. .list."),
        ({"payload": 2**63}, "must fit in 64 bits"),
    ],
)
def test_arguments_are_checked_whether_or_not_they_are_drawn(arguments, complaint):
    with pytest.raises(ArgumentError, match=complaint):
        instrument_w_nvtx(**arguments)
    with pytest.raises(ArgumentError, match=complaint):
        instrument_w_nvtx(len, **arguments)


def test_two_messages():
    with pytest.raises(ArgumentError, match="func='a' and message='b'"):
        instrument_w_nvtx("a", message="b")


def test_colors_are_those_of_the_nvtx_package():
    colors = pytest.importorskip("nvtx.colors")
    for name, argb in COLORS.items():
        assert argb == 0xFF000000 | colors.color_to_hex(name)
    assert parse_color("#FFa500") == COLORS["orange"]
    assert parse_color(0x80FF0000) == 0x80FF0000
