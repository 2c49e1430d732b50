"""A communication log explains real hangs: asked, at a signal, after a time-out and after a time."""

import contextlib
import logging
import os
import signal
import threading
import time

import pytest
from ds_logging import CommsLogger
from ranks import run_ranks

pytest.importorskip("torch")


def wait_for_file(path):
    deadline = time.monotonic() + 40
    while not os.path.exists(path) and time.monotonic() < deadline:
        time.sleep(0.05)


def rank_2_does_not_come(rank, folder, how):
    """Ranks 0 and 1 enter an all-reduce, which rank 2 enters only when the others have explained."""
    import torch
    import torch.distributed as dist

    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("ds").addHandler(handler)
    tp = dist.new_group([0, 1, 2], group_desc="tp")
    read, write = os.pipe()
    stderr = os.dup(2)
    with CommsLogger(hang_after=1.0 if how == "time" else None) as comms:
        dist.all_reduce(torch.ones(4), group=tp)
        said = f"{folder}/said"
        if rank == 2:
            wait_for_file(said)
            dist.all_reduce(torch.ones(8), group=tp)
            return None
        explanation = []

        def help_from_outside():
            time.sleep(0.5)
            if how == "asked":
                explanation.append(comms.explain(timeout=5))
            elif how == "signal":
                os.kill(os.getpid(), signal.SIGUSR1)
                explanation.append(os.read(read, 65536).decode())
            else:
                deadline = time.monotonic() + 30
                while time.monotonic() < deadline and not messages and not os.path.exists(said):
                    time.sleep(0.05)
                explanation.extend(messages)
            with open(f"{said}-{rank}", "w"):
                pass
            with contextlib.suppress(FileExistsError):
                other = f"{said}-{1 - rank}"
                if how != "time":
                    wait_for_file(other)
                os.close(os.open(said, os.O_CREAT))

        if how == "signal":
            os.dup2(write, 2)
        helper = threading.Thread(target=help_from_outside)
        helper.start()
        dist.all_reduce(torch.ones(8), group=tp)
        helper.join(30)
        os.dup2(stderr, 2)
    return "\n".join(explanation)


@pytest.mark.parametrize("how", ["asked", "signal"])
def test_a_rank_that_does_not_come_is_named_by_every_rank_that_waits(tmp_path, how):
    first, second, _ = run_ranks(rank_2_does_not_come, 3, str(tmp_path), how, timeout=90)
    for text in (first, second):
        assert "rank 2" in text.lower(), text
        assert "all_reduce 2" in text, text
        assert "tp" in text, text


def test_after_a_time_one_rank_logs_it(tmp_path):
    first, second, _ = run_ranks(rank_2_does_not_come, 3, str(tmp_path), "time", timeout=90)
    assert "rank 2" in (first + second).lower()
    assert "all_reduce 2" in first + second


def time_out(rank, folder):
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("ds").addHandler(handler)
    group = dist.new_group([0, 1], timeout=timedelta(seconds=2), group_desc="short")
    with CommsLogger() as comms:
        dist.all_reduce(torch.ones(4), group=group)
        if rank == 1:
            wait_for_file(f"{folder}/said")
            return [], None
        with pytest.raises(RuntimeError, match=r"(?i)timed out"):
            dist.all_reduce(torch.ones(8), group=group)
        with open(f"{folder}/said", "w"):
            pass
        summary = comms.get_operation_summary("all_reduce")
    return messages, (summary[32]["count"], summary[32]["timed_count"])


def test_a_time_out_is_explained_before_it_raises_and_counts_without_a_latency(tmp_path):
    (messages, counts), _ = run_ranks(time_out, 2, str(tmp_path), timeout=90)
    assert len(messages) == 1
    assert "rank 1" in messages[0].lower()
    assert "all_reduce 2" in messages[0]
    assert "short" in messages[0]
    assert counts == (1, 0)


def signal_given_back(rank):
    seen = []
    signal.signal(signal.SIGUSR1, lambda *_: seen.append(1))
    mine = signal.getsignal(signal.SIGUSR1)
    with CommsLogger():
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.1)
        during = signal.getsignal(signal.SIGUSR1) is mine
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(0.1)
    return during, signal.getsignal(signal.SIGUSR1) is mine, len(seen)


def test_a_handler_of_the_program_stays():
    assert run_ranks(signal_given_back, 1) == [(True, True, 2)]


def explain_without_recording(rank):
    before = threading.active_count()
    text = CommsLogger().explain(timeout=0.5)
    return text, threading.active_count() - before


def test_a_log_that_does_not_record_asks_all_the_same_and_leaves_no_thread():
    for text, threads in run_ranks(explain_without_recording, 2):
        assert text.startswith("hang explanation: ")
        assert threads == 0


def test_without_a_process_group_there_is_nothing_to_explain():
    assert "no process group" in CommsLogger().explain()
