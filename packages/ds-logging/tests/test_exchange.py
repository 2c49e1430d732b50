"""With real ranks it is tested where torch is."""

import pytest
from ds_logging._exchange import decode, encode, gather_bytes


@pytest.mark.parametrize("data", [None, [], {"a": [1, 2.5, None, "ü"]}, list(range(10_000))])
def test_encoding_round_trip(data):
    assert decode(encode(data)) == data


def test_repetition_is_compressed():
    assert len(encode(["all_reduce"] * 10_000)) < 2000


def test_without_a_process_group_this_rank_is_alone():
    assert gather_bytes(b"x") == [b"x"]
