"""ZeRO-3 with NVMe offload: all that holds of other engines, and nothing of DeepSpeed's is moved for it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("needs DeepSpeed", allow_module_level=True)
if not Path("/usr/include/libaio.h").exists():
    pytest.skip("needs libaio (apt-get install libaio-dev)", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parent))

import ds_fragment
import torch.distributed as dist
from ds_fragment import tensor_fragment as ours
from engines import ENV, TIMEOUT, Case, Net, backward, make_engine, train, trained
from oracles import lp_weights, same, told
from ranks import run_ranks
from test_values_and_state import live

PARAMETERS = {"buffer_size": 1_000_000, "max_in_cpu": 0}


def case_of(folder: Path, **zero: Any) -> Case:
    """The matrices are in files, with the largest gradient and parameter; the rest is too small for it.

    At these widths each piece begins at a multiple of 512 bytes in its group. Where one does not, DeepSpeed 0.19.6 does
    not get its gradient back from the file as it was, and steps with that.
    """
    parameters_too = "offload_param" in zero
    where = {"device": "nvme", "nvme_path": str(folder), "buffer_count": 16}
    zero = {name: {**where, **section} if isinstance(section, dict) else section for name, section in zero.items()}
    width = 128 if parameters_too else 96
    return Case("zero3", "bf16", gas=2, width=width, zero=zero, zero_init=parameters_too)


@pytest.mark.parametrize(
    "zero",
    [
        pytest.param({"offload_optimizer": {}}, id="optimizer"),
        pytest.param({"offload_optimizer": {}, "offload_param": PARAMETERS}, id="parameters_too"),
        pytest.param(
            {"offload_optimizer": {"pipeline_read": True, "pipeline_write": True}, "sub_group_size": 200_000},
            id="pipelined",
        ),
    ],
)
def test_values_gradients_and_state(tmp_path: Path, zero: dict[str, Any]) -> None:
    run_ranks(live, 2, [case_of(tmp_path, **zero)], env=ENV, timeout=TIMEOUT)


def _files(rank: int, folder: Path) -> None:
    engine = make_engine(case_of(folder, offload_optimizer={}))
    ds_fragment.attach(engine)
    params = trained(engine)
    train(engine, 0)
    backward(engine, 1)
    weight, optimizer = params["b.weight"], engine.optimizer
    index, _, _ = optimizer.grad_position[weight.ds_id]
    assert optimizer._swappable_optimizer_subgroup(index)
    assert {file.parent.name for file in folder.rglob("*.swp")} == {"rank0", "rank1"}

    flat = optimizer.fp32_partitioned_groups_flat[index]
    before = ours.safe_get_full_fp32_param(weight)
    for what in ("value", "exp_avg", "grad"):
        assert dict(ds_fragment.iter_full([("w", weight)], what))["w"].any()
        assert not flat.numel(), "DeepSpeed's tensors were swapped in"
    assert "fp32" in str(ds_fragment.describe(weight))

    optimizer._optimizer_states_and_gradient_swap_in(index)  # as within a step
    assert "between optimizer steps" in told(lambda: ours.safe_get_full_fp32_param(weight))
    assert "between optimizer steps" in told(lambda: ours.safe_set_full_fp32_param(weight, before + 1))
    optimizer._release_swap_buffers(index)
    assert same(ours.safe_get_full_fp32_param(weight), before)

    dist.barrier()
    (mine,) = folder.rglob(f"rank{rank}/{flat.ds_id}.tensor.swp")
    kept = mine.read_bytes()
    if rank == 1:
        mine.write_bytes(kept[:-4096])
    text = told(lambda: list(ds_fragment.iter_full(engine.module)))
    assert text.startswith("FragmentError: rank 1: DeepSpeed's swap file")
    assert "bytes where" in text
    mine.write_bytes(kept)
    assert same(ours.safe_get_full_fp32_param(weight), before)
    engine.destroy()


def test_files_are_read_in_place_and_only_between_steps(tmp_path: Path) -> None:
    run_ranks(_files, 2, tmp_path, env=ENV, timeout=TIMEOUT)


def _in_memory_as_well(rank: int, folder: Path) -> None:
    engine = make_engine(case_of(folder, offload_optimizer={}, offload_param=PARAMETERS))
    ds_fragment.attach(engine)
    train(engine, 0)
    param: Any = trained(engine)["b.weight"]
    swapper = param.nvme_swapper
    assert param.ds_tensor.status.name == "NOT_AVAILABLE"
    new = ours.safe_get_full_fp32_param(param).neg().bfloat16().float()
    swapper.swap_in([param], async_op=False)
    assert param.ds_tensor.status.name == "AVAILABLE"
    ours.safe_set_full_fp32_param(param, new)
    swapper.remove_partition_and_release_buffers([param])  # nothing is written back
    assert same(lp_weights(engine)["b.weight"], new)
    engine.destroy()


def test_a_write_reaches_the_file_of_a_parameter_that_is_in_memory(tmp_path: Path) -> None:
    run_ranks(_in_memory_as_well, 2, tmp_path, env=ENV, timeout=TIMEOUT)


class Frozen(Net):
    """A matrix that is not trained, and large enough for a file."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.b.weight.requires_grad_(False)


def _frozen(rank: int, folder: Path) -> None:
    engine = make_engine(case_of(folder, offload_optimizer={}, offload_param=PARAMETERS), net=Frozen)
    ds_fragment.attach(engine)
    train(engine, 0)
    param: Any = engine.module.b.weight
    assert param.ds_tensor.status.name == "NOT_AVAILABLE"
    assert ds_fragment.describe(param).master == "upcast"
    expected = lp_weights(engine)["b.weight"]
    assert expected.any()
    assert same(ours.safe_get_full_fp32_param(param), expected)
    assert same(dict(ds_fragment.iter_full(engine.module))["b.weight"].float(), expected)
    assert param.ds_tensor.status.name == "NOT_AVAILABLE"
    new = expected.neg()
    ours.safe_set_full_fp32_param(param, new)
    assert same(ours.safe_get_full_fp32_param(param), new)
    train(engine, 1)
    assert same(lp_weights(engine)["b.weight"], new)
    engine.destroy()


def test_a_frozen_parameter_in_a_file(tmp_path: Path) -> None:
    run_ranks(_frozen, 2, tmp_path, env=ENV, timeout=TIMEOUT)
