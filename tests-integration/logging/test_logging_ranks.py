"""The logger on real ranks: before, during and after a process group."""

import io
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ds_logging import configure, log_dist, logger, set_step
from ds_logging.logging import get_dist_msg, print_json_dist
from ranks import run_ranks

pytest.importorskip("torch")


def messages(stream):
    return [line.partition("> ")[2] for line in stream.getvalue().splitlines()]


def log_through_a_life(rank, folder):
    import torch.distributed as dist

    stream = io.StringIO()
    configure(stream=stream, format="%(rank)d> %(message)s")
    log_dist("before")
    log_dist("before, all", ranks=[-1])
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 3), rank=rank, world_size=3)
    os.environ["RANK"] = "77"  # from here on the process group knows better
    log_dist("during")
    log_dist("during, two", ranks=[1, 2])
    log_dist("nobody", ranks=[3])
    log_dist("one of two", ranks=[0, 4])
    dist.destroy_process_group()
    os.environ["RANK"] = str(rank)
    log_dist("after", ranks=[-1])
    return messages(stream)


def test_the_rank_is_right_before_during_and_after_a_process_group(tmp_path):
    assert run_ranks(log_through_a_life, 3, str(tmp_path), init=False) == [
        ["[Rank 0] before", "[Rank 0] before, all", "[Rank 0] during", "[Rank 0] one of two", "[Rank 0] after"],
        ["[Rank 1] before, all", "[Rank 1] during, two", "[Rank 1] after"],
        ["[Rank 2] before, all", "[Rank 2] during, two", "[Rank 2] after"],
    ]


def log_by_launcher(rank):
    stream = io.StringIO()
    configure(stream=stream, format="%(rank)d> %(message)s")
    for name in ("RANK", "WORLD_SIZE"):
        del os.environ[name]
    os.environ["SLURM_PROCID"] = str(rank)
    log_dist("slurm", ranks=[1])
    return messages(stream)


def test_a_slurm_rank_is_known_before_init():
    assert run_ranks(log_by_launcher, 2, init=False) == [[], ["[Rank 1] slurm"]]


def write_json(rank, folder):
    print_json_dist({"from": rank}, ranks=[1], path=Path(folder, "out.json"))
    return get_dist_msg("x", ranks=[1])


def test_one_rank_writes_json(tmp_path):
    assert run_ranks(write_json, 2, str(tmp_path)) == [None, "[Rank 1] x"]
    assert (tmp_path / "out.json").read_text() == '{"from": 1, "rank": 1}'


def import_beside_torch(rank):
    for name in [name for name in sys.modules if name.split(".")[0] == "ds_logging"]:
        del sys.modules[name]
    import ds_logging
    import torch

    assert logging.getLogger("ds").handlers == []
    return torch.cuda.is_initialized(), hasattr(ds_logging, "logger")


def test_importing_beside_torch_does_not_initialise_cuda():
    assert run_ranks(import_beside_torch, 1, init=False) == [(False, True)]


def take_turns(rank, path):
    configure(file=path, format="%(rank)d> %(message)s", ranks="all")
    for turn in range(3):
        time.sleep(0.02 * (3 - rank))  # the last rank comes first
        log_dist(f"turn {turn}", in_order=True)
    log_dist("odd", ranks=[1], in_order=True)
    log_dist("hidden", level="debug", in_order=True)


def test_in_order_the_lines_come_by_rank(tmp_path):
    path = tmp_path / "log"
    run_ranks(take_turns, 3, str(path))
    wanted = [f"{rank}> [Rank {rank}] turn {turn}" for turn in range(3) for rank in range(3)]
    assert path.read_text().splitlines() == [*wanted, "1> [Rank 1] odd"]


def miss_a_turn(rank, path):
    from ds_logging._log import in_order as _in_order

    _in_order.PATIENCE = 0.2
    configure(file=path, format="%(rank)d> %(message)s", ranks="all")
    if rank != 0:
        log_dist("here", in_order=True)


def test_a_rank_that_does_not_come_is_named_and_hangs_nobody(tmp_path):
    path = tmp_path / "log"
    run_ranks(miss_a_turn, 3, str(path))
    text = path.read_text()
    assert text.count("] here") == 2
    assert "rank 0 did not come" in text


def log_in_a_group(rank):
    import torch.distributed as dist

    stream = io.StringIO()
    configure(stream=stream, format="%(rank)d> %(message)s")
    pairs = [dist.new_group([0, 3]), dist.new_group([1, 2])]
    own = pairs[0] if rank in (0, 3) else pairs[1]
    log_dist("second of its pair", ranks=[1], group=own)
    log_dist("first of its pair", group=own)
    log_dist("of the other pair", ranks=[-1], group=pairs[1 - pairs.index(own)])
    log_dist("in turns", ranks=[-1], group=own, in_order=True)
    return messages(stream)


def test_ranks_of_a_group_count_within_it():
    lines = [[line.partition("] ")[2] for line in found] for found in run_ranks(log_in_a_group, 4)]
    assert lines[0] == lines[1] == ["first of its pair", "in turns"]
    assert lines[2] == lines[3] == ["second of its pair", "in turns"]


def say_alike(rank, folder):
    from ds_logging._log import collapse as _collapse

    _collapse.PATIENCE = 5.0  # a slow machine is no reason to show a line
    _collapse.ANSWER = 20.0
    stream = open(f"{folder}/{rank}", "w")  # noqa: SIM115  (lives as long as the process)
    configure(stream=stream, ranks="all", collapse=True, format="%(message)s")
    log_dist("alike")
    logger.info("alike, too")
    log_dist(f"of rank {rank}")
    if rank < 2:
        log_dist("of two")
    logger.error("an error")
    log_dist("for oneself", ranks=[2])
    for handler in list(logger.handlers):
        handler.close()  # what exit does: everything is shown


def test_lines_that_ranks_say_alike_are_shown_once(tmp_path):
    run_ranks(say_alike, 3, str(tmp_path))
    shown = [Path(tmp_path, str(rank)).read_text().splitlines() for rank in range(3)]
    assert shown[0][:5] == ["[Rank 0] alike", "alike, too", "[Rank 0] of rank 0", "[Rank 0] of two", "an error"]
    summary = " ".join(shown[0][5:])
    assert "ranks 1-2 said the same" in summary
    assert "'alike'" in summary
    assert "'alike, too'" in summary
    assert "rank 1 said the same: 'of two'" in summary
    assert sorted(shown[1]) == ["[Rank 1] of rank 1", "an error"]
    assert sorted(shown[2]) == ["[Rank 2] for oneself", "[Rank 2] of rank 2", "an error"]


def say_alike_with_extras(rank, path):
    with open(f"{path}-{rank}", "w") as stream:
        configure(stream=stream, ranks="all", collapse=True, json=True)
        set_step(3)
        log_dist("large", extra={"norm": 1.25})
        for handler in list(logger.handlers):
            handler.close()


def test_the_line_about_other_ranks_has_no_extras_of_a_line(tmp_path):
    run_ranks(say_alike_with_extras, 2, str(tmp_path / "log"))
    own, others = map(json.loads, (tmp_path / "log-0").read_text().splitlines())
    assert (own["message"], own["norm"], own["step"]) == ("large", 1.25, 3)
    assert others["message"] == "rank 1 said the same: 'large'"
    assert "norm" not in others


def say_in_order_and_alike(rank, path):
    with open(path, "a") as stream:
        configure(stream=stream, ranks="all", collapse=True, format="%(message)s")
        for turn in range(2):
            log_dist("turn %d", turn, ranks=[-1], in_order=True)


def test_lines_in_the_order_of_the_ranks_are_not_held_back(tmp_path):
    path = tmp_path / "log"
    run_ranks(say_in_order_and_alike, 3, str(path))
    wanted = [f"[Rank {rank}] turn {turn}" for turn in range(2) for rank in range(3)]
    assert path.read_text().splitlines() == wanted


def append_long_lines(rank, path):
    configure(file=path, ranks="all", format="%(message)s")
    for _ in range(30):
        logger.info(str(rank) * 60_000)


def test_long_lines_of_several_ranks_in_one_file_stay_whole(tmp_path):
    path = tmp_path / "log"
    run_ranks(append_long_lines, 3, str(path), init=False)
    lines = path.read_text().splitlines()
    assert sorted(lines) == sorted([str(rank) * 60_000 for rank in range(3)] * 30)


def write_a_file_each(rank, folder):
    configure(file=f"{folder}/logs/{{rank}}-{{local_rank}}.json", json=True, ranks="all")
    set_step(7)
    logger.info("loaded %d", 3, extra={"loss": 0.5, "odd": object})
    set_step(None)
    log_dist("tagged", ranks=[-1], extra={"step": 9})


def test_each_rank_writes_json_lines_to_its_own_file(tmp_path):
    run_ranks(write_a_file_each, 2, str(tmp_path), env={"TORCHELASTIC_RESTART_COUNT": "1"})
    for rank in range(2):
        first, second = map(json.loads, (tmp_path / "logs" / f"{rank}-{rank}.json").read_text().splitlines())
        wanted = {"rank": rank, "local_rank": rank, "world_size": 2, "level": "INFO", "logger": "ds", "step": 7}
        wanted |= {"message": "loaded 3", "loss": 0.5, "restart": 1, "func": "write_a_file_each"}
        assert {name: first[name] for name in wanted} == wanted
        assert "class 'object'" in first["odd"]
        assert (second["message"], second["step"]) == ("tagged", 9)


WORKERS = """
import sys
import torch
from ds_logging import configure, log_dist, logger, warning_once

class Loud:
    def __len__(self):
        return 2

    def __getitem__(self, index):
        log_dist(f"item {index}")
        warning_once(f"plain {index}")
        return index

if __name__ == "__main__":
    configure(file=sys.argv[1], format="%(rank_tag)s%(message)s")
    list(torch.utils.data.DataLoader(Loud(), num_workers=2, multiprocessing_context="fork"))
"""


def test_lines_of_data_loader_workers_are_marked(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(WORKERS)
    subprocess.run([sys.executable, str(script), str(tmp_path / "log")], check=True, timeout=60)
    assert sorted((tmp_path / "log").read_text().splitlines()) == [
        "[Rank 0 worker 0] item 0",
        "[Rank 0 worker 0] plain 0",
        "[Rank 0 worker 1] item 1",
        "[Rank 0 worker 1] plain 1",
    ]
