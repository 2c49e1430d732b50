"""Bytes over real ranks."""

import sys

import pytest
from ds_logging._comms.exchange import gather_bytes
from ranks import run_ranks

pytest.importorskip("torch")


def exchange(rank, sizes):
    return gather_bytes(bytes((rank * 7 + place) % 256 for place in range(sizes[rank])))


@pytest.mark.parametrize("sizes", [(0, 0), (1, 0), (3, 1000), (256, 256), (0, 5, 100_000)])
def test_every_rank_has_the_bytes_of_every_rank(sizes):
    wanted = [bytes((rank * 7 + place) % 256 for place in range(size)) for rank, size in enumerate(sizes)]
    assert run_ranks(exchange, len(sizes), sizes) == [wanted] * len(sizes)


def exchange_and_look_at_exit(rank):
    import atexit
    import time

    registered = []
    atexit.register = lambda function, *arguments: registered.append((function, arguments))
    for _ in range(2):
        gather_bytes(b"data")
    return registered == [(time.sleep, (0.1,))]


def test_gloos_threads_get_their_turn_at_exit_once():
    assert run_ranks(exchange_and_look_at_exit, 2) == [True, True]


def exchange_in_a_group(rank):
    import torch.distributed as dist

    pairs = [dist.new_group([0, 1]), dist.new_group([3, 2])]
    return gather_bytes(b"from %d" % rank * (rank + 1), pairs[rank // 2])


def test_a_group_has_its_own_exchange():
    first, second = ([b"from %d" % rank * (rank + 1) for rank in pair] for pair in ((0, 1), (2, 3)))
    assert run_ranks(exchange_in_a_group, 4) == [first, first, second, second]


def exchange_without_numpy(rank):
    import torch  # noqa: F401

    before = "numpy" in sys.modules
    sys.modules["numpy"] = None
    try:
        return gather_bytes(b"%d" % rank), before
    finally:
        del sys.modules["numpy"]


def test_numpy_is_not_needed():
    assert [result[0] for result in run_ranks(exchange_without_numpy, 2)] == [[b"0", b"1"]] * 2


def exchange_with_two_backends(rank):
    import torch.distributed as dist

    group = dist.new_group([0, 1], backend="cpu:gloo")
    return gather_bytes(b"%d" % rank, group)


def test_a_group_with_backends_by_device():
    assert run_ranks(exchange_with_two_backends, 2) == [[b"0", b"1"]] * 2
