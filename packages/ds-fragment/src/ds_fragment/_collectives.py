"""The collectives of `torch.distributed`, under the names that the installed torch does not warn about.

[Note: exit] A thread of gloo's lets go of the tensors of a collective a moment after the caller has them. If it is the
last to do so it needs the interpreter's lock, and where the interpreter has begun to end by then, the process aborts.
A process group that is destroyed waits for its threads; but FSDP2's device mesh, for one, keeps its groups. So a
program that has communicated on a CPU takes a tenth of a second longer to exit, in which the threads get their turn.

[Note: broken] What is raised where a collective is launched or waited for becomes a `CollectiveError`, whatever the
backend raises: so a rank that died is told apart from what goes wrong on this rank alone.
"""

from __future__ import annotations

import atexit
import functools
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

# Renamed in torch 2.13; the old names stay for a while.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

# No collective's failure: no memory, and what an earlier kernel of this rank's did on the GPU.
_LOCAL = (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError))


class CollectiveError(RuntimeError):
    """A collective did not come to its end; see [Note: broken]."""

    @classmethod
    def of(cls, error: RuntimeError) -> RuntimeError:
        """What to raise from what the launch of a collective, or the wait for it, raised."""
        if isinstance(error, _LOCAL):
            return error
        return cls(f"broke off: a rank died, or did not make the same call in the same order ({error})")


def all_gather(output: torch.Tensor, given: torch.Tensor, *, group: dist.ProcessGroup, later: bool = False) -> Any:
    """`all_gather_into_tensor`; returns what is to be waited for if ``later``."""
    try:
        return _all_gather(output, given, group=group, async_op=later)
    except RuntimeError as error:
        raise CollectiveError.of(error) from error


def wait_for(work: dist.Work) -> None:
    """Wait for one collective."""
    try:
        work.wait()
    except RuntimeError as error:
        raise CollectiveError.of(error) from error


@functools.cache
def leave_gently(kind: str) -> None:
    """To be called before a collective on devices of that type; see [Note: exit]."""
    if kind == "cpu":
        atexit.register(time.sleep, 0.1)


def device_for(group: dist.ProcessGroup, device: torch.device) -> torch.device:
    """The parameter's device if the group's backend moves its memory, else the one that the backend moves."""
    supported = {d.type for d in group._device_types}
    if device.type in supported:
        return device
    kind = "cuda" if "cuda" in supported else sorted(supported)[0]
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def coalesces(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether the group takes collectives on several tensors as one launch: NCCL does, gloo and others do not."""
    return device.type != "cpu" and bool(getattr(group._get_backend(device), "supports_coalescing", False))


def all_gather_many(
    outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], group: dist.ProcessGroup
) -> list[dist.Work]:
    """Several all-gathers at once, asynchronously; with NCCL as one launch.

    All ranks of the group must call it.

    Args:
        outputs: 1-D, contiguous, for each the inputs of all ranks in rank order.
        inputs: 1-D, contiguous, of the outputs' dtypes, as long on every rank.
        group: the ranks.

    Returns:
        What is to be waited for.
    """
    if len(outputs) > 1 and coalesces(group, outputs[0].device):
        many = getattr(group, "all_gather_single_coalesced", None) or group.allgather_into_tensor_coalesced
        try:
            return [many(list(outputs), list(inputs))]
        except RuntimeError as error:
            raise CollectiveError.of(error) from error
    pairs = zip(outputs, inputs, strict=True)
    return [all_gather(output, given, group=group, later=True) for output, given in pairs]


def broadcast_many(parts: Sequence[tuple[int, torch.Tensor]], group: dist.ProcessGroup) -> list[dist.Work]:
    """Several broadcasts at once, asynchronously; with NCCL as one launch, so that all senders send at the same time.

    All ranks of the group must call it.

    Args:
        parts: for each the rank in the group that sends it, and the tensor that it sends and the others receive into.
        group: the ranks.

    Returns:
        What is to be waited for.
    """
    backend: Any = group._get_backend(parts[0][1].device)  # the group would ask torch's dispatcher each time
    try:
        if len(parts) == 1 or not coalesces(group, parts[0][1].device):
            return [backend.broadcast([part], _from(root)) for root, part in parts]
        backend._start_coalescing()
        try:
            for root, part in parts:
                backend.broadcast([part], _from(root))
        finally:
            work = backend._end_coalescing()
        return [work]
    except RuntimeError as error:
        raise CollectiveError.of(error) from error


def exchange_many(operations: list[dist.P2POp]) -> list[dist.Work]:
    """Several sends and receives at once; returns what is to be waited for.

    Gloo sends and receives nothing but the memory of a CPU, though it gathers that of a GPU: what is on a GPU goes
    through a copy, and is waited for here.
    """
    received = []
    for operation in operations:
        there = operation.tensor
        group: Any = operation.group
        if there.is_cuda and group._get_backend(there.device).name() == "gloo":
            operation.tensor = there.cpu()
            if operation.op is dist.irecv:
                received.append((there, operation.tensor))
    try:
        works: list[dist.Work] = dist.batch_isend_irecv(operations)
    except RuntimeError as error:
        raise CollectiveError.of(error) from error
    if not received:
        return works
    for work in works:
        wait_for(work)
    for there, here in received:
        there.copy_(here)
    return []


@functools.cache
def _from(root: int) -> Any:
    options: Any = dist.BroadcastOptions()
    options.rootRank, options.rootTensor, options.asyncOp = root, 0, True
    return options
