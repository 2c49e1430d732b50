"""The communication log over NCCL. One GPU is enough: a group of one rank launches its kernels all the same."""

import os
import time
from collections import Counter

import pytest
from ds_logging import CommsLogger
from ds_logging._comms.recorder import recorder
from ranks import run_ranks

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def join(rank, folder):
    import torch.distributed as dist

    torch.cuda.set_device(0)
    store = dist.FileStore(f"{folder}/store", 1)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=rank, world_size=1)


def every_call(rank, folder):
    import torch.distributed as dist

    join(rank, folder)
    big = torch.ones(1 << 24, device="cuda")
    with CommsLogger() as comms:
        for _ in range(5):
            dist.all_reduce(big)
        dist.all_reduce(big, async_op=True).wait()
        dist.all_gather_into_tensor(torch.empty_like(big), big)
        dist.reduce_scatter_tensor(torch.empty_like(big), big)
        with dist._coalescing_manager():
            dist.all_reduce(big[:4])
            dist.all_reduce(big[:4])
        operations = [dist.P2POp(dist.isend, big, 0), dist.P2POp(dist.irecv, torch.empty_like(big), 0)]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        dist.all_reduce(torch.ones(2))  # gloo, in the same group
        dist.barrier()
        counts = Counter()
        timed = Counter()
        for stats in comms._snapshot():
            counts[(stats.key.raw_name, stats.key.msg_size, stats.key.dtype)] += stats.count
            timed[stats.key.raw_name] += stats.latencies.count
        in_flight = recorder.in_flight()
    dist.destroy_process_group()
    return dict(counts), dict(timed), len(in_flight)


def test_every_call_is_recorded_once_and_the_device_measures_it(tmp_path):
    [(counts, timed, in_flight)] = run_ranks(every_call, 1, str(tmp_path), init=False)
    whole = 4 << 24
    assert counts == {
        ("all_reduce", whole, "float32"): 6,
        ("all_gather", whole, "float32"): 1,
        ("reduce_scatter", whole, "float32"): 1,
        ("all_reduce", 32, "float32"): 1,
        ("batch_isend_irecv", 2 * whole, ""): 1,
        ("send", whole, "float32"): 1,
        ("recv", whole, "float32"): 1,
        ("all_reduce", 8, "float32"): 1,
        ("barrier", 0, ""): 1,
    }
    assert timed["all_reduce"] >= 7
    assert timed["all_gather"] == timed["reduce_scatter"] == 1
    assert in_flight == 0


def without_waiting(rank, folder):
    """Issue 3,000 operations behind a long kernel; return whether the device was still busy then."""
    import torch.distributed as dist

    join(rank, folder)
    x, small = torch.randn(8192, 8192, device="cuda"), torch.ones(8, device="cuda")
    dist.all_reduce(small)
    torch.cuda.synchronize()
    with CommsLogger() as comms:
        end = torch.cuda.Event()
        for _ in range(300):
            x @ x
        end.record()
        for number in range(3000):
            dist.all_reduce(small, async_op=True)
            if number == 100:  # more would fill the stream's queue, and then the driver waits
                busy = not end.query()
        torch.cuda.synchronize()
        total = comms.get_total_operations()
    dist.destroy_process_group()
    return busy, total


def test_the_host_never_waits_for_the_device(tmp_path):
    assert run_ranks(without_waiting, 1, str(tmp_path), init=False) == [(True, 3000)]


def captured(rank, folder):
    import torch.distributed as dist

    join(rank, folder)
    x = torch.ones(8, device="cuda")
    dist.all_reduce(x)
    with CommsLogger() as comms:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            dist.all_reduce(x)
        for _ in range(3):
            graph.replay()
        dist.all_reduce(x)
        torch.cuda.synchronize()
        total = comms.get_total_operations()
    begin = torch.cuda.CUDAGraph.capture_begin
    dist.destroy_process_group()
    return total, begin.__module__


def test_what_a_cuda_graph_captures_is_not_counted(tmp_path):
    assert run_ranks(captured, 1, str(tmp_path), init=False) == [(1, "torch.cuda.graphs")]


def train_ddp(rank, folder):
    """DDP's reducer issues its operations in C++. FSDP2 issues none in a group of one rank."""
    import torch.distributed as dist

    join(rank, folder)
    model = torch.nn.Sequential(*[torch.nn.Linear(1024, 1024, bias=False) for _ in range(4)]).cuda()
    parallel = torch.nn.parallel.DistributedDataParallel(model, device_ids=[0])
    with CommsLogger() as comms:
        for _ in range(3):
            parallel(torch.randn(4, 1024, device="cuda")).sum().backward()
        torch.cuda.synchronize()
        found = [stats for stats in comms._snapshot() if stats.key.dtype == "float32"]
    dist.destroy_process_group()
    return (
        {stats.key.raw_name for stats in found},
        sum(stats.total_bytes for stats in found),
        sum(stats.count - stats.latencies.count for stats in found),
    )


def test_a_ddp_run_is_logged_whole_and_timed(tmp_path):
    [(kinds, total, untimed)] = run_ranks(train_ddp, 1, str(tmp_path), init=False)
    assert kinds == {"all_reduce"}
    assert total == 3 * 4 * 1024 * 1024 * 4  # the gradients of every step
    assert untimed == 0


def stuck(rank, folder):
    """A kernel that waits for the host, and an operation behind it: `explain` says what is in flight."""
    import torch.distributed as dist

    join(rank, folder)
    small = torch.ones(8, device="cuda")
    dist.all_reduce(small)
    torch.cuda.synchronize()
    with CommsLogger(hang_signal=None) as comms:
        torch.cuda._sleep(4_000_000_000)  # cycles: about two seconds
        dist.all_reduce(small, async_op=True)
        time.sleep(0.2)
        text = comms.explain(timeout=1)
        torch.cuda.synchronize()
        after = comms.explain(timeout=1)
    dist.destroy_process_group()
    return text, after, os.getpid()


def test_an_operation_that_waits_on_the_device_is_in_flight(tmp_path):
    [(text, after, _)] = run_ranks(stuck, 1, str(tmp_path), init=False)
    assert "all_reduce" in text
    assert text != after
