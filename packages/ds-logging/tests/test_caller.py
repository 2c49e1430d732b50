import pytest
from ds_logging.comms_logging import get_caller_func
from ds_logging.errors import ArgumentError


def first(frame=None):
    return second(frame)


def second(frame):
    return third(frame)


def third(frame):
    return get_caller_func() if frame is None else get_caller_func(frame)


@pytest.mark.parametrize(
    ("frame", "name"), [(0, "get_caller_func"), (1, "third"), (2, "second"), (None, "first"), (3, "first")]
)
def test_it_counts_steps_up_the_stack(frame, name):
    assert first(frame) == name


def test_past_the_outermost_function_it_is_the_outermost(run_script):
    done = run_script("from ds_logging import get_caller_func; print(get_caller_func(), get_caller_func(99))")
    assert done.stdout == "<module> <module>\n"


@pytest.mark.parametrize("frame", [-1, 1.0, None, "1"])
def test_a_wrong_frame(frame):
    with pytest.raises(ArgumentError, match=f"frame={frame!r}"):
        get_caller_func(frame)
