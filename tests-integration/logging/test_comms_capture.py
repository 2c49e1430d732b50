"""What a communication log records of programs that do not know it, compared with lists written by hand."""

import os
import signal
import threading
import time
from collections import Counter

import pytest
from ds_logging import CommsLogger
from ds_logging._comms.hook import METHODS
from ds_logging._comms.recorder import recorder
from ranks import run_ranks

pytest.importorskip("torch")


def recorded(comms):
    """Count what was recorded by (record name, bytes of one operation, dtype, group, ranks)."""
    return Counter(
        {(s.key.record_name, s.key.msg_size, s.key.dtype, s.key.group, s.key.ranks): s.count for s in comms._snapshot()}
    )


def every_call(rank):
    import torch
    import torch.distributed as dist
    from torch.distributed import all_reduce as imported_before

    eight, world = torch.ones(8), (0, 1)
    tp = dist.new_group([0, 1], group_desc="tp")
    alone = [dist.new_group([0], group_desc="alone"), dist.new_group([1], group_desc="alone")][rank]
    with CommsLogger() as comms:
        imported_before(eight)
        dist.all_reduce(eight.to(torch.float64))
        dist.all_reduce(eight, group=tp, async_op=True).wait()
        dist.all_reduce(eight, group=alone)
        dist.all_reduce(tensor=torch.ones(3, dtype=torch.bfloat16))
        dist.broadcast(torch.ones(5, dtype=torch.int64), 0)
        dist.reduce(eight, 1)
        dist.all_gather([torch.empty(8) for _ in range(2)], eight)
        dist.all_gather_into_tensor(torch.empty(16), eight)
        dist.reduce_scatter_tensor(torch.empty(4), eight)
        dist.reduce_scatter(torch.empty(8), [torch.ones(8), torch.ones(8)])
        dist.all_to_all_single(torch.empty(8), eight)
        dist.gather(eight, [torch.empty(8) for _ in range(2)] if rank == 0 else None)
        dist.scatter(torch.empty(8), [eight, eight] if rank == 0 else None)
        dist.barrier()
        dist.monitored_barrier()
        if rank == 0:
            dist.send(torch.ones(2), 1)
            dist.recv(torch.empty(4), 1)
        else:
            dist.recv(torch.empty(2))
            dist.isend(torch.ones(4), 0).wait()
        with dist._coalescing_manager(group=tp):
            dist.all_reduce(torch.ones(2), group=tp)
            dist.all_reduce(torch.ones(3), group=tp)
    dist.all_reduce(eight)  # after the end of recording
    default = "0:default_pg"
    names = {name.partition(":")[2]: name for name in (key[3] for key in recorded(comms))}
    wanted = Counter(
        {
            ("all_reduce", 32, "float32", default, world): 1,
            ("all_reduce", 64, "float64", default, world): 1,
            ("all_reduce", 32, "float32", names["tp"], world): 1,
            ("all_reduce", 32, "float32", names["alone"], (rank,)): 1,
            ("all_reduce", 6, "bfloat16", default, world): 1,
            ("broadcast", 40, "int64", default, world): 1,
            ("reduce", 32, "float32", default, world): 1,
            ("all_gather", 32, "float32", default, world): 2,
            ("reduce_scatter", 32, "float32", default, world): 1,
            ("reduce_scatter", 64, "float32", default, world): 1,
            ("all_to_all", 32, "float32", default, world): 1,
            ("gather", 32, "float32", default, world): 1,
            ("scatter", 32, "float32", default, world): 1,
            ("barrier", 0, "", default, world): 2,
            (("send", "recv")[rank], 8, "float32", default, world): 1,
            (("recv", "send")[rank], 16, "float32", default, world): 1,
            ("all_reduce", 20, "float32", names["tp"], world): 1,
        }
    )
    found = recorded(comms)
    assert found == wanted, f"missing {wanted - found}, besides {found - wanted}"
    operations = list(comms._history)
    assert all(operation.completed for operation in operations)
    timed = [operation for operation in operations if operation.latency_ms is not None]
    assert all(0 < operation.latency_ms < 30_000 for operation in timed)
    assert len(timed) > len(operations) / 2
    return [(operation.group, operation.sequence, operation.kind) for operation in operations if operation.sequence]


def test_every_call_of_torch_is_recorded_with_its_size_dtype_and_group():
    first, second = run_ranks(every_call, 2)
    assert len(first) == len(second) > 15
    lone = ("send", "recv")
    shared = [[one for one in side if one[2] not in lone and "alone" not in one[0]] for side in (first, second)]
    assert shared[0] == shared[1]  # (group, sequence) names the same operation on both ranks


def object_calls(rank):
    import torch
    import torch.distributed as dist
    from torch.distributed import all_gather_object as imported_before

    pytest.importorskip("numpy")
    with CommsLogger() as comms:
        imported_before([None, None], {"a": 1})
        dist.broadcast_object_list(["x"], src=0)
        dist.scatter_object_list([None], ["a", "b"] if rank == 0 else None, src=0)
        peer = 1 - rank
        operations = [dist.P2POp(dist.isend, torch.ones(2), peer), dist.P2POp(dist.irecv, torch.empty(2), peer)]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
    counts = Counter()
    for key, count in recorded(comms).items():
        counts[key[0]] += count
    return dict(counts)


def test_calls_made_of_several_operations_are_recorded_besides_their_parts():
    for counts in run_ranks(object_calls, 2):
        assert counts == {
            "all_gather_object": 1,
            "all_gather": 2,
            "broadcast_object_list": 1,
            "broadcast": 3,  # two of the list, one of the largest size to scatter
            "scatter_object_list": 1,
            "scatter": 2,
            "batch_isend_irecv": 1,
            "send": 1,
            "recv": 1,
        }


def issued_in_cpp(rank):
    import torch
    import torch.distributed as dist
    import torch.distributed._functional_collectives as functional

    with CommsLogger() as comms:
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
        ddp_setup = recorded(comms)
        comms.reset_data()
        model(torch.ones(2, 4)).sum().backward()
        ddp = recorded(comms)
        comms.reset_data()
        functional.all_reduce(torch.ones(8), "sum", dist.group.WORLD).wait()
        compiled = torch.compile(
            lambda x: functional.all_reduce(x * 2, "sum", dist.group.WORLD) + 1, backend="eager", fullgraph=True
        )
        assert compiled(torch.ones(6)).tolist() == [5.0] * 6
        rest = recorded(comms)
    named = lambda found: {(key[0], key[1], key[2]): count for key, count in found.items()}  # noqa: E731
    return named(ddp_setup), named(ddp), named(rest)


def test_what_cpp_issues_is_recorded():
    for setup, ddp, rest in run_ranks(issued_in_cpp, 2):
        assert setup[("broadcast", 80, "float32")] == 1  # the weights
        assert ddp == {("all_reduce", 80, "float32"): 1}
        assert rest == {("all_reduce", 32, "float32"): 1, ("all_reduce", 24, "float32"): 1}


def train_fsdp2(rank):
    import torch
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(64, 64, bias=False) for _ in range(3)])
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with CommsLogger() as comms:
        for _ in range(4):
            model(torch.randn(2, 64)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    return {(key[0], key[1]): count for key, count in recorded(comms).items()}


def test_an_fsdp2_run_is_logged_whole():
    share, whole = 64 * 64 * 4 // 2, 64 * 64 * 4
    for found in run_ranks(train_fsdp2, 2):
        # Each step gathers three layers before the forward pass, and again before the backward pass, where the last
        # layer is gathered still; and scatters three gradients.
        assert found == {("all_gather", share): 4 * 6, ("reduce_scatter", whole): 4 * 3}


def undone(rank):
    import torch
    import torch._C._distributed_c10d as c10d
    import torch.distributed as dist

    def state():
        return (
            {name: c10d.ProcessGroup.__dict__.get(name) for name in METHODS},
            c10d.Work.__dict__["wait"],
            {name: getattr(dist, name) for name in ("all_gather_object", "batch_isend_irecv")},
            dist.all_gather_object.__closure__[0].cell_contents,
            threading.active_count(),
        )

    before = state()
    outer, inner = CommsLogger(), CommsLogger()
    with outer:
        dist.all_reduce(torch.ones(1))
        with inner:
            dist.all_reduce(torch.ones(2))
        dist.all_reduce(torch.ones(3))
        assert state()[0] != before[0]
    deadline = time.monotonic() + 10
    while state() != before and time.monotonic() < deadline:
        time.sleep(0.01)  # for the thread to see it
    assert state() == before
    dist.all_reduce(torch.ones(4))
    with pytest.raises(KeyError), inner:
        raise KeyError
    assert state()[:4] == before[:4]
    return [sorted(key[1] for key in recorded(log)) for log in (outer, inner)]


def test_everything_is_undone_at_the_end_and_logs_may_overlap():
    assert run_ranks(undone, 2) == [[[4, 8, 12], [8]]] * 2


def before_and_after_groups(rank, folder):
    import torch
    import torch.distributed as dist

    comms = CommsLogger()
    comms.start()  # before there is any group
    for life in range(2):
        dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/{life}", 2), rank=rank, world_size=2)
        dist.all_reduce(torch.ones(1 + life))
        late = dist.new_group([1, 0], group_desc="late")
        dist.all_reduce(torch.ones(8), group=late)
        alone = dist.new_group([rank], use_local_synchronization=True)
        dist.all_reduce(torch.ones(16), group=alone)
        time.sleep(0.3)  # the thread looks at groups now and then
        dist.destroy_process_group()
    comms.stop()
    return sorted((s.key.msg_size, s.count, s.key.group_size, s.key.ranks) for s in comms._snapshot())


def test_recording_outlives_process_groups(tmp_path):
    for rank, found in enumerate(run_ranks(before_and_after_groups, 2, str(tmp_path), init=False)):
        world = (0, 1)
        alone = [entry for entry in found if entry[0] == 64]  # named for its ranks, so alike in both lives
        assert [(4, 1, 2, world), (8, 1, 2, world), (32, 2, 2, world)] == [entry for entry in found if entry[0] != 64]
        assert sum(entry[1] for entry in alone) == 2
        assert {entry[2:] for entry in alone} == {(1, (rank,))}


def more_than_the_ring(rank):
    import torch
    import torch.distributed as dist

    tensors = [torch.ones(1 + number % 3) for number in range(300)]
    with CommsLogger() as comms:
        for tensor in tensors:
            dist.all_reduce(tensor)
    return recorded(comms).total(), recorder.lost, sum(1 for one in comms._history if one.sequence)


@pytest.mark.parametrize(("size", "numbered"), [("64", 64), ("1000", 300)])
def test_calls_of_python_are_counted_when_torch_forgets_them(size, numbered):
    for total, lost, found in run_ranks(more_than_the_ring, 2, env={"TORCH_FR_BUFFER_SIZE": size}):
        assert (total, lost) == (300, 0)
        assert numbered <= found <= 300  # the thread may have read the ring in between


def without_the_ring(rank):
    import torch
    import torch.distributed as dist

    with CommsLogger() as comms:
        dist.all_reduce(torch.ones(2))
        dist.all_reduce(torch.ones(2))
    not_seen = comms.summary(merge=False, show=False)["not_seen"]
    with CommsLogger() as other:
        dist.all_reduce(torch.ones(2))
    assert comms.summary(merge=False, show=False)["not_seen"] == not_seen  # of its own recording
    assert other.summary(show=False)["not_seen"] == not_seen
    return [(one.kind, one.sequence) for one in comms._history], not_seen


def test_without_torchs_record_calls_of_python_are_recorded_and_the_rest_is_named():
    for operations, not_seen in run_ranks(without_the_ring, 2, env={"TORCH_FR_BUFFER_SIZE": "0"}):
        assert operations == [("all_reduce", 1), ("all_reduce", 2)]
        assert len(not_seen) == 1
        assert "gloo" in not_seen[0]
        assert "DDP" in not_seen[0]


def in_threads(rank):
    import torch
    import torch.distributed as dist

    groups = [dist.new_group([0, 1]) for _ in range(4)]

    def work(number):
        for _ in range(50):
            with comms.timed("all_reduce", 4, record_name=f"thread {number}"):
                dist.all_reduce(torch.ones(1 + number), group=groups[number])

    with CommsLogger() as comms:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(50)
    return {(key[0], key[1]): count for key, count in recorded(comms).items()}


def test_threads_lose_nothing_and_names_stay_with_their_thread():
    wanted = {(f"thread {number}", 4 * (number + 1)): 50 for number in range(4)}
    assert run_ranks(in_threads, 2) == [wanted, wanted]


def interrupted(rank):
    import torch
    import torch.distributed as dist

    calls, busy = [], False

    def handle(*_):
        nonlocal busy
        if not busy:  # the next signal comes before the answer
            busy = True
            calls.append(comms.get_total_operations())
            busy = False

    with CommsLogger() as comms:
        signal.signal(signal.SIGALRM, handle)
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.002)
        for _ in range(200):
            dist.all_reduce(torch.ones(4))
            comms.append("send", "by hand", 1.0, 8, group_size=2)
            comms.get_operation_names()
        signal.setitimer(signal.ITIMER_REAL, 0)
        total = comms.get_total_operations()
    return total, len(calls) > 5, calls == sorted(calls)


def test_a_signal_handler_may_ask_the_log_at_any_time():
    assert run_ranks(interrupted, 2) == [(400, True, True)] * 2


def forked(rank):
    import torch
    import torch.distributed as dist

    with CommsLogger() as comms:
        dist.all_reduce(torch.ones(4))
        child = os.fork()
        if child == 0:
            import torch._C._distributed_c10d as c10d

            comms.append("send", "by hand", 1.0, 8, group_size=2)
            same = c10d.ProcessGroup.allreduce.__module__ != "ds_logging._comms.hook"
            os._exit(0 if comms.get_total_operations() >= 1 and same else 1)
        _, status = os.waitpid(child, 0)
        dist.all_reduce(torch.ones(4))
    return status, recorded(comms).total()


def test_a_forked_child_records_nothing_and_does_not_hang():
    assert run_ranks(forked, 2) == [(0, 2)] * 2


def steps(rank):
    import torch
    import torch.distributed as dist
    from ds_logging._step import set_step

    with CommsLogger() as comms:
        dist.all_reduce(torch.ones(1))
        for step in range(3):
            set_step(step)
            for _ in range(step + 1):
                dist.all_reduce(torch.ones(1))
        set_step(None)
        dist.all_reduce(torch.ones(1))
    return [operation.step for operation in comms._history]


def test_operations_know_their_step():
    assert run_ranks(steps, 2) == [[None, 0, 1, 1, 2, 2, 2, None]] * 2


def dropped(rank):
    """Operations whose handles are freed without a wait, and then handles of methods that the log does not know."""
    import torch
    import torch.distributed as dist

    with CommsLogger() as comms:
        for _ in range(50):
            dist.all_reduce(torch.ones(2), async_op=True)
        dist.barrier()
        comms.get_total_operations()
        unfinished = len(recorder._hook._unfinished)
        backend = dist.group.WORLD._get_backend(torch.device("cpu"))
        for _ in range(20):
            backend.allreduce([torch.ones(3)]).wait()
    latencies = {one.latency_ms for one in comms._history if one.nbytes == 8}
    return unfinished, latencies, sorted((one.nbytes, one.kind) for one in comms._history)


def test_a_handle_that_was_dropped_gives_its_time_to_no_other():
    wanted = sorted([(8, "all_reduce")] * 50 + [(12, "all_reduce")] * 20 + [(0, "barrier")])
    for unfinished, latencies, found in run_ranks(dropped, 2):
        assert (unfinished, latencies) == (0, {None})
        assert found == wanted
