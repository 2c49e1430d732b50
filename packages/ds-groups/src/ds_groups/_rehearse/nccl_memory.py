"""An estimate of the GPU memory that one NCCL communicator takes on one rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ds_groups.errors import TopologyError

if TYPE_CHECKING:
    from .traffic import Pattern

KIB, MIB = 2**10, 2**20
GRANULE = 2 * MIB  # what CUDA maps at a time, and CUDA_IPC_MIN of p2p.cc
LL_BYTES = 512 * KIB  # 8 lines * 512 threads * 8 steps * 16 bytes
LL128_BYTES = 4800 * KIB  # 120 elements * 640 threads * 8 steps * 8 bytes
SIMPLE_BYTES = 4 * MIB  # NCCL_BUFFSIZE
SHARED_STEPS = 16
NODE_CHANNELS, NODE_P2P_CHANNELS, NODE_P2P_CHUNK = 24, 32, 512 * KIB  # of a communicator inside one NVLink node
NET_CHANNELS_A_RANK, NET_P2P_CHANNELS, NET_P2P_CHUNK = 2, 16, 128 * KIB  # of one on several, a network card a rank
ASSUMPTIONS = (
    "NCCL 2.2x on NVLink nodes with a network card a GPU, rings and trees connected, communicators that share nothing; "
    "NVLS, symmetric memory, user buffers and the CUDA context are not counted"
)


def nccl_memory(
    size: int,
    on_node: int,
    pattern: Pattern = "ring",
    *,
    channels: int | None = None,
    p2p_channels: int | None = None,
    buffer_bytes: int = SIMPLE_BYTES,
) -> int:
    """Estimate the GPU memory that a communicator takes on one rank, once it has been used.

    An estimate, not a bound: NCCL chooses channels by the machine, and connects what a call needs when it first needs
    it. ``NCCL_DEBUG=INFO`` prints the channels ("24 coll channels, ... 32 p2p channels, 32 p2p channels per peer").

    The sum of, each rounded up to 2 MiB:

    - a pool for sends over the network: p2p channels * 16 steps * chunk; with all-to-all or pipeline sends to another
      node a second one for receives;
    - for collectives, in each channel, a connection to both neighbours in the ring and tree. Inside a node one takes
      the LL, LL128 and Simple buffers for receiving and 2 MiB for sending, between nodes LL128 and Simple both ways;
    - for all-to-all, in each p2p channel, a connection inside the node to every other rank there; for a pipeline, to
      the two neighbours.

    Source: ``computeBuffSizes`` of src/init.cc, ``p2pSendSetup`` and ``p2pRecvSetup`` of src/transport/p2p.cc,
    ``sharedNetBuffersInit`` and ``sendProxyConnect`` of src/transport/net.cc in NVIDIA/nccl; numbers of channels:
    NVIDIA/nccl issues 864, 1685 and 2363.

    Args:
        size: ranks of the communicator. One of a single rank is taken not to be made.
        on_node: how many of them share a node.
        pattern: what is sent besides collectives.
        channels: of collectives; None is 24 inside one node, and 2 for each rank of a node where there are several.
        p2p_channels: None is 32 inside one node and 16 where there are several.
        buffer_bytes: of the Simple protocol, ``NCCL_BUFFSIZE``.

    Returns:
        Bytes.

    Raises:
        TopologyError: ``on_node`` is not from 1 to ``size``.

    >>> [nccl_memory(size, size) // MIB for size in (1, 2, 8)], nccl_memory(8, 8, "all-to-all") // MIB
    ([0, 544, 832], 3520)
    """
    if not 1 <= on_node <= size:
        raise TopologyError(f"on_node={on_node} must be from 1 to the {size} ranks of the communicator")
    if size == 1:
        return 0
    inside = size == on_node
    if channels is None:
        channels = NODE_CHANNELS if inside else min(NET_CHANNELS_A_RANK * on_node, NODE_CHANNELS)
    if p2p_channels is None:
        p2p_channels = NODE_P2P_CHANNELS if inside else NET_P2P_CHANNELS
    local = _round(LL_BYTES + LL128_BYTES + buffer_bytes) + GRANULE
    remote = 2 * _round(LL128_BYTES + buffer_bytes)
    pool = _round(p2p_channels * SHARED_STEPS * (NODE_P2P_CHUNK if inside else NET_P2P_CHUNK))

    total = pool + channels * min(on_node - 1, 2) * local
    if not inside:
        total += NET_CHANNELS_A_RANK * min(size - 1, 2) * remote
    if pattern != "ring":
        peers = on_node - 1 if pattern == "all-to-all" else min(on_node - 1, 2)
        total += p2p_channels * peers * local + (0 if inside else pool)
    return total


def _round(size: int) -> int:
    return -(-size // GRANULE) * GRANULE
