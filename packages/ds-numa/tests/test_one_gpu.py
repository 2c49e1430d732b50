from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from ds_numa._one_gpu import gpu_is_shared

ENV = {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "3"}


@pytest.mark.parametrize(
    ("launcher", "shared"),
    [
        ({"CUDA_VISIBLE_DEVICES": "3"}, True),  # CUDA_VISIBLE_DEVICES=3 torchrun
        ({"CUDA_VISIBLE_DEVICES": "0,3"}, False),
        ({}, False),
        (None, False),  # slurmstepd does not let us look
    ],
)
def test_a_choice_that_the_launcher_had_already_is_everybodys(
    tmp_path: Path, put_process: Callable[..., None], launcher: dict[str, str] | None, shared: bool
) -> None:
    put_process(9, 7, "0-3", ENV)
    put_process(7, 1, "0-3", launcher)
    assert gpu_is_shared(ENV, 1, 2, root=tmp_path, pid=9) is shared


def test_without_a_launcher_nothing_is_known(tmp_path: Path) -> None:
    assert gpu_is_shared({"CUDA_VISIBLE_DEVICES": "3"}, 1, 2, root=tmp_path, pid=9) is False


@pytest.mark.parametrize(
    ("name", "value", "shared"),
    [
        ("CUDA_VISIBLE_DEVICES", "MIG-5c4c2f", True),
        ("CUDA_VISIBLE_DEVICES", "GPU-5c4c2f", False),
        ("NVIDIA_VISIBLE_DEVICES", "MIG-5c4c2f", True),
        ("ZE_AFFINITY_MASK", "0.1", True),
        ("ZE_AFFINITY_MASK", "1", False),
    ],
)
def test_a_part_of_a_gpu_has_neighbours(tmp_path: Path, name: str, value: str, shared: bool) -> None:
    assert gpu_is_shared({name: value}, 0, 2, root=tmp_path, pid=9) is shared
