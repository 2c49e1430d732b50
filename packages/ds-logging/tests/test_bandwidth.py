import inspect
import math
from fractions import Fraction

import pytest
from ds_logging._comms.bandwidth import RULES, canonical_name, rule_of
from ds_logging.comms_logging import calc_bw_log, convert_size
from ds_logging.errors import ArgumentError, UnknownOperationError

# nccl-tests writes S for the size of the whole array and B for the bus bandwidth. What a rank passes in is `size`.
#   operation: (S, as a function of size and n; B / (S / t), as a function of n)
NCCL_TESTS = {
    "all_reduce": (lambda size, n: size, lambda n: Fraction(2 * (n - 1), n)),
    "reduce_scatter_tensor": (lambda size, n: size, lambda n: Fraction(n - 1, n)),  # the whole input is passed in
    "reduce_scatter": (lambda size, n: size, lambda n: Fraction(n - 1, n)),
    "all_gather_into_tensor": (lambda size, n: size * n, lambda n: Fraction(n - 1, n)),  # one share is passed in
    "all_gather": (lambda size, n: size * n, lambda n: Fraction(n - 1, n)),
    "gather": (lambda size, n: size * n, lambda n: Fraction(n - 1, n)),
    "scatter": (lambda size, n: size * n, lambda n: Fraction(n - 1, n)),
    "all_to_all_single": (lambda size, n: size, lambda n: Fraction(n - 1, n)),
    "all_to_all": (lambda size, n: size, lambda n: Fraction(n - 1, n)),
    "broadcast": (lambda size, n: size, lambda n: Fraction(1)),
    "reduce": (lambda size, n: size, lambda n: Fraction(1)),
    "send": (lambda size, n: size, lambda n: Fraction(1)),
}


@pytest.mark.parametrize("n", [1, 2, 3, 8, 4096])
@pytest.mark.parametrize("op", NCCL_TESTS)
def test_formulas_of_nccl_tests(op, n):
    size, milliseconds = 123_456_789, Fraction(7, 2)
    whole, factor = NCCL_TESTS[op]
    bytes_per_second = whole(size, n) / (milliseconds / 1000)
    algorithm, bus = calc_bw_log(op, size, float(milliseconds), group_size=n)
    assert algorithm == pytest.approx(float(bytes_per_second * 8 / 10**9))
    assert bus == pytest.approx(float(bytes_per_second * 8 / 10**9 * factor(n)))


def test_the_world_size_is_the_default_group(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert calc_bw_log("all_reduce", 1000, 1.0) == calc_bw_log("all_reduce", 1000, 1.0, group_size=4)
    assert calc_bw_log("all_reduce", 1000, 1.0) != calc_bw_log("all_reduce", 1000, 1.0, group_size=2)


@pytest.mark.parametrize("op", sorted(RULES))
def test_no_time_and_no_bytes_are_no_bandwidth(op):
    assert calc_bw_log(op, 1000, 0.0, group_size=4) == (0.0, 0.0)
    assert calc_bw_log(op, 0, 1.0, group_size=4) == (0.0, 0.0)


def test_an_unknown_operation_is_a_typed_error_and_no_exit():
    with pytest.raises(UnknownOperationError) as error:
        calc_bw_log("all_shuffle", 1, 1.0)
    assert "comm_op='all_shuffle'" in str(error.value)
    assert "all_reduce" in str(error.value)
    assert not issubclass(UnknownOperationError, SystemExit)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("all_reduce", -1, 1.0), "size=-1"),
        (("all_reduce", 1.5, 1.0), "size=1.5"),
        (("all_reduce", 1, -1.0), "duration=-1.0"),
        (("all_reduce", 1, math.nan), "duration=nan"),
        (("all_reduce", 1, math.inf), "duration=inf"),
        (("all_reduce", 1, "soon"), "duration='soon'"),
    ],
)
def test_wrong_numbers(arguments, name):
    with pytest.raises(ArgumentError, match=name):
        calc_bw_log(*arguments)


@pytest.mark.parametrize("group_size", [0, -1, 1.5, "4"])
def test_wrong_group_size(group_size):
    with pytest.raises(ArgumentError, match=f"group_size={group_size!r}"):
        calc_bw_log("all_reduce", 1, 1.0, group_size=group_size)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0B"),
        (1, "1.0 B"),
        (1023, "1023.0 B"),
        (1024, "1.0 KB"),
        (1024**2 - 1, "1.0 MB"),  # never "1024.0 KB"
        (1024**5, "1.0 PB"),
        (1024**9, "1024.0 YB"),
        (711_826_473, "678.85 MB"),
    ],
)
def test_convert_size(size, text):
    assert convert_size(size) == text


@pytest.mark.parametrize("size", [-1, math.nan, math.inf, "1"])
def test_convert_size_of_a_wrong_size(size):
    with pytest.raises(ArgumentError, match="size_bytes="):
        convert_size(size)


def test_group_size_is_keyword_only():
    assert inspect.signature(calc_bw_log).parameters["group_size"].kind is inspect.Parameter.KEYWORD_ONLY


# What DeepSpeed 0.19.8 wraps in its `timed_op` and passes to `CommsLogger.append`.
DEEPSPEEDS = """all_gather all_gather_into_tensor all_gather_object all_reduce all_reduce_coalesced all_to_all
all_to_all_single barrier batch_isend_irecv broadcast broadcast_object_list gather inference_all_reduce irecv isend
monitored_barrier recv reduce reduce_scatter reduce_scatter_tensor scatter send"""


@pytest.mark.parametrize("op", DEEPSPEEDS.split())
def test_every_operation_that_deepspeed_times_has_a_formula(op):
    algorithm, bus = calc_bw_log(op, 1_000_000, 1.0, group_size=4)
    assert 0 < bus <= 2 * algorithm


def test_operations_that_deepspeed_0_19_8_added():
    assert calc_bw_log("all_to_all", 1_000_000, 1.0, group_size=4) == (8.0, 6.0)
    assert calc_bw_log("batch_isend_irecv", 1_000_000, 1.0, group_size=4) == (8.0, 8.0)
    assert calc_bw_log("broadcast_object_list", 1_000_000, 1.0, group_size=4) == (8.0, 8.0)


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (
            "all_gather all_gather_single all_gather_into_tensor _all_gather_base _allgather_base all_gather_coalesced "
            "all_gather_single_coalesced allgather_into_tensor_coalesced all_gather_object allgather_fn allgather "
            "c10d::allgather_ c10d::_allgather_base_ nccl:all_gather nccl:_all_gather_base gloo:all_gather "
            "nccl:all_gather_into_tensor_coalesced _c10d_functional.all_gather_into_tensor "
            "torch.ops._c10d_functional.all_gather_into_tensor.default _c10d_functional::all_gather_into_tensor_out "
            "_c10d_functional_autograd::all_gather_into_tensor",
            "all_gather",
        ),
        (
            "reduce_scatter reduce_scatter_single reduce_scatter_tensor _reduce_scatter_base reduce_scatter_fn "
            "nccl:_reduce_scatter_base c10d::reduce_scatter_tensor_coalesced_ _c10d_functional.reduce_scatter_tensor",
            "reduce_scatter",
        ),
        (
            "all_reduce allreduce all_reduce_coalesced inference_all_reduce nccl:all_reduce gloo:all_reduce "
            "c10d::allreduce_ _c10d_functional.all_reduce _c10d_functional.all_reduce_ allreduce_coalesced",
            "all_reduce",
        ),
        (
            "all_to_all all_to_all_single alltoall alltoall_base c10d::alltoall_base_ nccl:all_to_all nccl:alltoallv",
            "all_to_all",
        ),
        ("send isend send_object_list c10d::send", "send"),
        ("recv irecv recv_object_list c10d::recv_ c10d::recv_any_source_ recv_anysource", "recv"),
        ("barrier monitored_barrier nccl:all_reduce_barrier nccl:barrier c10d::monitored_barrier_", "barrier"),
        ("broadcast broadcast_object_list nccl:broadcast _c10d_functional::broadcast_", "broadcast"),
        ("reduce nccl:reduce c10d::reduce_", "reduce"),
        ("gather gather_object nccl:gather", "gather"),
        ("scatter scatter_object_list nccl:scatter", "scatter"),
        ("batch_isend_irecv", "batch_isend_irecv"),
    ],
)
def test_canonical_names(names, wanted):
    assert {name: canonical_name(name) for name in names.split()} == dict.fromkeys(names.split(), wanted)


@pytest.mark.parametrize(
    ("name", "wanted"), [("nccl:send 0->1", "send"), ("nccl:recv 0<-1", "recv"), ("nccl:send 12->3", "send")]
)
def test_the_peers_of_the_flight_recorder_are_taken_off(name, wanted):
    assert canonical_name(name) == wanted


@pytest.mark.parametrize(
    "name", ["nccl:coalesced", "my_op", "all_shuffle", "", "sender", "_", "all", "tensor", "a.b.c"]
)
def test_an_unknown_name_stays_and_has_no_formula(name):
    assert canonical_name(name) == name
    assert rule_of(name) is None


@pytest.mark.parametrize("op", sorted(RULES))
def test_a_canonical_name_is_its_own(op):
    assert canonical_name(op) == op
