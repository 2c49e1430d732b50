"""A DeepSpeed run in the communication log, compared with what torch's profiler saw of the same steps."""

from collections import Counter

import pytest
from ds_logging import CommsLogger
from ranks import run_ranks

pytest.importorskip("torch")
pytest.importorskip("deepspeed")

ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "2"}
# What torch.distributed's functions are called in the dispatcher, and what the log calls them.
KINDS = {
    "c10d::allreduce_": "all_reduce",
    "c10d::allreduce_coalesced_": "all_reduce",
    "c10d::allgather_": "all_gather",
    "c10d::_allgather_base_": "all_gather",
    "c10d::allgather_into_tensor_coalesced_": "all_gather",
    "c10d::reduce_scatter_": "reduce_scatter",
    "c10d::_reduce_scatter_base_": "reduce_scatter",
    "c10d::reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "c10d::broadcast_": "broadcast",
    "c10d::reduce_": "reduce",
    "c10d::gather_": "gather",
    "c10d::alltoall_base_": "all_to_all",
    "c10d::barrier": "barrier",
}


def kinds(comms):
    counts = Counter()
    for stats in comms._snapshot():
        counts[stats.key.raw_name] += stats.count
    return dict(counts)


def train(rank, stage):
    import deepspeed
    import torch

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": True},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with CommsLogger() as comms, torch.profiler.profile(activities=activities) as profile:
        for _ in range(3):
            engine.backward(engine(torch.randn(2, 64, dtype=torch.bfloat16)).float().sum())
            engine.step()
    seen = Counter()
    for event in profile.events():
        if event.name.startswith("c10d::"):
            seen[KINDS[event.name]] += 1
    untimed = sum(stats.count - stats.latencies.count for stats in comms._snapshot())
    return kinds(comms), dict(seen), untimed


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_run_is_logged_whole(stage):
    for recorded, seen, untimed in run_ranks(train, 2, stage, env=ENVIRONMENT, timeout=180):
        assert recorded == seen
        assert sum(seen.values()) > 6
        assert untimed < sum(seen.values())


def deepspeeds_own_log(rank):
    import deepspeed
    import deepspeed.comm.comm as comm
    import torch

    deepspeed.init_distributed("gloo", verbose=False)
    torch.distributed.barrier()  # a rank that starts late would make the others' first latency long
    comm.comms_logger = CommsLogger()
    deepspeed.comm.configure(enabled=True, prof_all=True)
    tensor = torch.ones(1024)
    for _ in range(5):
        deepspeed.comm.all_reduce(tensor)
        deepspeed.comm.all_reduce(tensor, log_name="mine")
        torch.distributed.broadcast(tensor, 0)  # not through DeepSpeed
    report = deepspeed.comm.log_summary(return_dict=True)
    deepspeed.comm.configure(enabled=False)
    return {
        name: (entry["count"], entry["timed_count"], entry["max_latency_ms"] < 1000)
        for name, sizes in report["summary"].items()
        for entry in sizes.values()
    }


def test_what_deepspeed_measures_itself_is_counted_once_under_its_name():
    for found in run_ranks(deepspeeds_own_log, 2, env=ENVIRONMENT):
        assert found["all_reduce"] == (5, 5, True)
        assert found["mine"] == (5, 5, True)
        assert found["broadcast"][0] == 5
