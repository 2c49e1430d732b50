"""The estimate of NCCL's memory: arithmetic on the constants of its source."""

from __future__ import annotations

import pytest
from ds_groups import TopologyError
from ds_groups._rehearse.nccl_memory import MIB, nccl_memory


def test_one_rank_takes_nothing():
    assert nccl_memory(1, 1) == 0


def test_inside_a_node():
    pool, connection = 32 * 16 // 2, 10 + 2  # chunks of half a MiB; LL + LL128 + Simple round up to 10 MiB
    assert nccl_memory(2, 2) == (pool + 24 * connection) * MIB
    assert nccl_memory(8, 8) == nccl_memory(3, 3) == (pool + 24 * 2 * connection) * MIB
    assert nccl_memory(8, 8, "all-to-all") - nccl_memory(8, 8) == 32 * 7 * connection * MIB
    assert nccl_memory(8, 8, "pipeline") - nccl_memory(8, 8) == 32 * 2 * connection * MIB


def test_a_rank_a_node():
    pool, connection = 16 * 16 // 8, 10 + 10  # chunks of an eighth of a MiB; LL128 + Simple both ways
    assert nccl_memory(2, 1) == (pool + 2 * connection) * MIB
    assert nccl_memory(1000, 1) == (pool + 2 * 2 * connection) * MIB
    assert nccl_memory(1000, 1, "all-to-all") - nccl_memory(1000, 1) == pool * MIB


def test_channels_and_buffers_scale_it():
    assert nccl_memory(8, 8, channels=12) - nccl_memory(8, 8, channels=6) == 6 * 2 * 12 * MIB
    assert nccl_memory(8, 8, p2p_channels=4) - nccl_memory(8, 8, p2p_channels=2) == 16 * MIB
    assert nccl_memory(8, 8, buffer_bytes=8 * MIB) - nccl_memory(8, 8) == 24 * 2 * 4 * MIB


@pytest.mark.parametrize("on_node", [0, 9])
def test_more_ranks_on_a_node_than_there_are(on_node):
    with pytest.raises(TopologyError, match=f"on_node={on_node} must be from 1 to the 8 ranks"):
        nccl_memory(8, on_node)
