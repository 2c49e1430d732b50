"""With real ranks it is tested where torch is."""

from types import SimpleNamespace

import pytest
from ds_logging._comms.exchange import _device, decode, encode, gather_bytes


@pytest.mark.parametrize("data", [None, [], {"a": [1, 2.5, None, "ü"]}, list(range(10_000))])
def test_encoding_round_trip(data):
    assert decode(encode(data)) == data


def test_repetition_is_compressed():
    assert len(encode(["all_reduce"] * 10_000)) < 2000


def test_without_a_process_group_this_rank_is_alone():
    assert gather_bytes(b"x") == [b"x"]


@pytest.mark.parametrize(
    ("types", "backend", "wanted"),
    [
        (["cuda"], "nccl", ("cuda", 3)),
        (["cpu"], "gloo", ("cpu",)),
        (["cuda", "cpu"], "cpu:gloo,cuda:nccl", ("cpu",)),  # the host needs no memory of the device
        ([], "nccl", ("cuda", 3)),  # a torch that does not say
        ([], "gloo", ("cpu",)),
    ],
)
def test_the_tensors_are_on_a_device_that_the_backend_takes(types, backend, wanted):
    torch = SimpleNamespace(device=lambda *place: place, cuda=SimpleNamespace(current_device=lambda: 3))
    group = SimpleNamespace(_device_types=[SimpleNamespace(type=one) for one in types])
    dist = SimpleNamespace(group=SimpleNamespace(WORLD=group), get_backend=lambda group: backend)
    assert _device(torch, dist, None) == _device(torch, dist, group) == wanted
