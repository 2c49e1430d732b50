"""The logger on real ranks: before, during and after a process group."""

import io
import logging
import os
from pathlib import Path

import pytest
from ds_logging import configure, log_dist
from ds_logging.errors import RanksError
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
    with pytest.raises(RanksError, match="world size 3"):
        log_dist("nobody", ranks=[3])
    dist.destroy_process_group()
    os.environ["RANK"] = str(rank)
    log_dist("after", ranks=[-1])
    return messages(stream)


def test_the_rank_is_right_before_during_and_after_a_process_group(tmp_path):
    assert run_ranks(log_through_a_life, 3, str(tmp_path), init=False) == [
        ["[Rank 0] before", "[Rank 0] before, all", "[Rank 0] during", "[Rank 0] after"],
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
    import sys

    for name in [name for name in sys.modules if name.split(".")[0] == "ds_logging"]:
        del sys.modules[name]
    import ds_logging
    import torch

    assert logging.getLogger("ds").handlers == []
    return torch.cuda.is_initialized(), hasattr(ds_logging, "logger")


def test_importing_beside_torch_does_not_initialise_cuda():
    assert run_ranks(import_beside_torch, 1, init=False) == [(False, True)]
