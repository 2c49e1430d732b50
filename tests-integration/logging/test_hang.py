"""A rank that does not come is named by those that wait, while they wait inside C++."""

import json
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from ds_logging._comms.bandwidth import canonical_name
from ds_logging._comms.operation import Operation
from ds_logging._hang.explainer import HangExplainer
from ds_logging._hang.signals import SignalListener
from ds_logging._hang.states import RankState, state_of
from ranks import run_ranks

pytest.importorskip("torch")

RECORDER = {"TORCH_FR_BUFFER_SIZE": "2000"}
LIMIT = 20.0  # seconds until a test gives up


def read_state():
    """This rank's state, from torch's flight recorder."""
    from torch._C import _distributed_c10d as c10d

    entries = json.loads(c10d._dump_fr_trace_json(True, False)).get("entries", [])
    operations = []
    for entry in entries:
        name, description = entry["process_group"]
        shapes = entry["input_sizes"]
        elements = sum(int(numel(shape)) for shape in shapes)
        operations.append(
            Operation(
                kind=canonical_name(entry["profiling_name"]),
                group=f"{name}:{description}",
                ranks=(0, 1, 2),
                sequence=entry["collective_seq_id"],
                nbytes=4 * elements,
                dtype=",".join(entry["input_dtypes"]),
                started_ns=entry["time_created_ns"],
                latency_ms=None,
                completed=bool(entry["retired"]),
                name=entry["profiling_name"],
            )
        )
    return state_of(operations, time.time_ns())


def numel(shape):
    product = 1
    for extent in shape:
        product *= extent
    return product


def make_explainer(rank, **arguments):
    import torch.distributed as dist

    store = dist.distributed_c10d._get_default_store()
    return HangExplainer(store, rank, dist.get_world_size(), read_state, **arguments)


def wait_for(condition):
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def in_second():
    """Say whether this rank is in the second operation. The recorder may learn late that the first one is over."""
    return any(op.sequence == 2 and not op.completed for op in read_state().operations)


def hang_until(rank, folder, act):
    """Ranks 0 and 1 enter an all-reduce; rank 2 enters it when every other rank has written its file.

    ``act`` runs on a thread of the ranks that wait, once they wait.
    """
    import torch
    import torch.distributed as dist

    tensor = torch.ones(4)
    dist.all_reduce(tensor)  # one that works

    def when_waiting():
        wait_for(in_second)
        act()

    if rank == 2:
        wait_for(lambda: all(Path(folder, f"done-{other}").exists() for other in (0, 1)))
    else:
        threading.Thread(target=when_waiting, daemon=True).start()
    dist.all_reduce(tensor)
    return tensor.tolist()


def explain(rank, folder):
    explainer = make_explainer(rank, timeout=LIMIT)
    explainer.start(poll_seconds=0.05)
    texts = []

    def act():
        texts.append(explainer.explain())
        Path(folder, f"done-{rank}").touch()

    result = hang_until(rank, folder, act)
    explainer.stop()
    return texts, result


def test_two_ranks_name_the_third(tmp_path):
    results = run_ranks(explain, 3, str(tmp_path), env=RECORDER)
    for texts, tensor in results[:2]:
        assert "3 of 3 ranks answer." in texts[0]
        assert "Rank 2 never entered all_reduce 2 of group 0:default_pg" in texts[0]
        assert "it is in no operation, and its last was all_reduce 1" in texts[0]
        assert tensor == [9.0] * 4
    assert results[2] == ([], [9.0] * 4)


def explain_at_a_signal(rank, folder):
    explainer = make_explainer(rank)
    explainer.start(poll_seconds=0.05)
    listener = SignalListener(signal.SIGUSR1, lambda: print(explainer.explain(), file=sys.stderr, flush=True))
    assert listener.start()
    written = Path(folder, f"stderr-{rank}")
    sys.stderr = open(written, "w")  # noqa: SIM115

    def act():
        os.kill(os.getpid(), signal.SIGUSR1)
        wait_for(lambda: "hang explanation" in written.read_text())
        Path(folder, f"done-{rank}").touch()

    result = hang_until(rank, folder, act)
    listener.stop()
    explainer.stop()
    sys.stderr = sys.__stderr__
    return written.read_text(), result, signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="there is no SIGUSR1")
def test_a_rank_stuck_in_a_collective_explains_at_a_signal(tmp_path):
    results = run_ranks(explain_at_a_signal, 3, str(tmp_path), env=RECORDER)
    for rank, (text, tensor, restored) in enumerate(results):
        assert ("Rank 2 never entered all_reduce 2" in text) == (rank != 2)
        assert tensor == [9.0] * 4
        assert restored


def explain_by_itself(rank, folder):
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("ds").addHandler(handler)
    explainer = make_explainer(rank, hang_after=0.5)
    explainer.start(poll_seconds=0.05)

    def act():
        until = time.monotonic() + 2.5
        while time.monotonic() < until:
            explainer.check(time.time_ns(), read_state().in_flight())
            time.sleep(0.05)
        Path(folder, f"done-{rank}").touch()

    hang_until(rank, folder, act)
    explainer.stop()
    return [(record.levelname, record.getMessage()) for record in records]


def test_an_operation_in_flight_for_long_is_logged_once(tmp_path):
    first, second, third = run_ranks(explain_by_itself, 3, str(tmp_path), env=RECORDER)
    assert (second, third) == ([], [])
    assert [level for level, _ in first] == ["ERROR"]
    assert "Rank 2 never entered all_reduce 2" in first[0][1]


def explain_a_dead_rank(rank, folder):
    import torch.distributed as dist

    explainer = make_explainer(rank, timeout=0.5)
    explainer.start(poll_seconds=0.05)
    dist.barrier()
    if rank == 2:
        Path(folder, "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    wait_for(lambda: Path(folder, "killed").exists())
    text = explainer.explain()
    Path(folder, f"done-{rank}").touch()
    wait_for(lambda: all(Path(folder, f"done-{other}").exists() for other in (0, 1)))
    explainer.stop()
    return text


def test_a_rank_that_has_ended_does_not_answer(tmp_path):
    results = run_ranks(explain_a_dead_rank, 3, str(tmp_path), env=RECORDER, killed=(2,))
    for text in results[:2]:
        assert "2 of 3 ranks answer." in text
        assert "Rank 2 does not answer: its process ended" in text


def answer_over_tcp(rank, folder):
    """The main thread waits in a store's `get` of its own, and the explainer's connection is another one."""
    import torch.distributed as dist

    port = Path(folder, "port")
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port.with_suffix(".part").write_text(str(store.port))
        port.with_suffix(".part").rename(port)
    else:
        wait_for(port.exists)
        store = dist.TCPStore("127.0.0.1", int(port.read_text()), is_master=False, wait_for_workers=False)
    explainer = HangExplainer(store, rank, 2, lambda: RankState((), time.time_ns(), f"here is {rank}"), timeout=LIMIT)
    explainer.start(poll_seconds=0.05)
    text = ""
    if rank == 1:
        store.get("go on")  # holds the connection of `store`
    else:
        text = explainer.explain()
        store.set("go on", "")
    dist.barrier()  # the store ends with rank 0
    explainer.stop()
    return text


def test_a_main_thread_that_waits_for_the_store_does_not_hold_the_explainer(tmp_path):
    text, _ = run_ranks(answer_over_tcp, 2, str(tmp_path))
    assert "2 of 2 ranks answer." in text
    assert "here is 1" in text
