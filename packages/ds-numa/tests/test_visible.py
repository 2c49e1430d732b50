"""What AMD's and Intel's runtimes show."""

from __future__ import annotations

import pytest
from ds_numa import Gpu, visible_gpus
from ds_numa.errors import GpuLookupError

# The runtime's order is not the order of addresses, as on real MI250X nodes.
AMD = [
    Gpu("0000:c1:00.0", 3, "GPU-aaaa000000000001", vendor="amd", ordinals=(0,)),
    Gpu("0000:c9:00.0", 3, "GPU-aaaa000000000002", vendor="amd", ordinals=(1,)),
    Gpu("0000:d1:00.0", 0, "GPU-bbbb000000000003", vendor="amd", ordinals=(3,)),
    Gpu("0000:d9:00.0", 0, "GPU-bbbb000000000004", vendor="amd", ordinals=(2,)),
]


def hip(**env: str) -> str:
    """The visible GPUs by the last digit of their names."""
    return "".join((gpu.uuid or "?")[-1] for gpu in visible_gpus(AMD, env))


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, "1243"),
        ({"ROCR_VISIBLE_DEVICES": "2,3"}, "43"),
        ({"ROCR_VISIBLE_DEVICES": " 3 , 0"}, "31"),
        ({"ROCR_VISIBLE_DEVICES": ""}, ""),
        ({"ROCR_VISIBLE_DEVICES": "0,0,1"}, "1"),  # a repeated one ends the list
        ({"ROCR_VISIBLE_DEVICES": "1,9,0"}, "2"),
        ({"ROCR_VISIBLE_DEVICES": "-1"}, ""),
        ({"ROCR_VISIBLE_DEVICES": "0x1"}, "2"),
        ({"ROCR_VISIBLE_DEVICES": "gpu-BBBB000000000003,0"}, "31"),
        ({"ROCR_VISIBLE_DEVICES": "GPU-aaaa,0"}, ""),  # fits two
        ({"ROCR_VISIBLE_DEVICES": "1,GPU-cccc,0"}, "2"),
        ({"HIP_VISIBLE_DEVICES": "3,1"}, "32"),
        ({"HIP_VISIBLE_DEVICES": "1,1,0"}, "21"),  # a repeated one counts once
        ({"HIP_VISIBLE_DEVICES": "1, 0"}, "2"),
        ({"HIP_VISIBLE_DEVICES": "-1"}, ""),
        ({"HIP_VISIBLE_DEVICES": "GPU-bbbb000000000004"}, "4"),
        ({"CUDA_VISIBLE_DEVICES": "2"}, "4"),
        ({"CUDA_VISIBLE_DEVICES": "2", "HIP_VISIBLE_DEVICES": "0"}, "1"),
        ({"CUDA_VISIBLE_DEVICES": "2", "HIP_VISIBLE_DEVICES": ""}, "4"),
        ({"ROCR_VISIBLE_DEVICES": "2,3", "HIP_VISIBLE_DEVICES": "1"}, "3"),
        ({"ROCR_VISIBLE_DEVICES": "2", "HIP_VISIBLE_DEVICES": "2"}, ""),
        ({"HIP_VISIBLE_DEVICES": "0", "GPU_DEVICE_ORDINAL": "0"}, "1"),
    ],
)
def test_amd(env: dict[str, str], expected: str) -> None:
    assert hip(**env) == expected


def test_amds_runtimes_disagree_about_one_variable() -> None:
    with pytest.raises(GpuLookupError, match="set HIP_VISIBLE_DEVICES alone"):
        hip(GPU_DEVICE_ORDINAL="1")


def test_parts_of_a_gpu_share_its_address() -> None:
    gpus = [Gpu(f"000{i}:01:00.0", i, f"GPU-{i:016x}", vendor="amd", ordinals=(2 * i, 2 * i + 1)) for i in range(4)]
    found = visible_gpus(gpus, {"ROCR_VISIBLE_DEVICES": "1,2,7"})
    assert [gpu.node for gpu in found] == [0, 1, 3]
    with pytest.raises(GpuLookupError, match="use numbers"):
        visible_gpus(gpus, {"ROCR_VISIBLE_DEVICES": "GPU-0000000000000001"})


# Two cards of two tiles, and one of one.
INTEL = [
    Gpu("0000:18:00.0", 0, vendor="intel", ordinals=(0, 1)),
    Gpu("0000:2a:00.0", 0, vendor="intel", ordinals=(2, 3)),
    Gpu("0000:9a:00.0", 1, vendor="intel", ordinals=(4,)),
]


def level_zero(**env: str) -> str:
    """The visible devices by the letter of their card."""
    names = dict(zip((gpu.pci for gpu in INTEL), "abc", strict=True))
    return "".join(names[gpu.pci] for gpu in visible_gpus(INTEL, env))


COMPOSITE = {"ZE_FLAT_DEVICE_HIERARCHY": "COMPOSITE"}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, "aabbc"),
        (COMPOSITE, "abc"),
        ({"ZE_FLAT_DEVICE_HIERARCHY": "combined"}, "aabbc"),
        ({"ZE_AFFINITY_MASK": "1,2"}, "ab"),
        ({"ZE_AFFINITY_MASK": "4,0"}, "ac"),  # a mask chooses and does not order
        ({"ZE_AFFINITY_MASK": "9"}, ""),
        ({"ZE_AFFINITY_MASK": ""}, "aabbc"),
        ({"ZE_AFFINITY_MASK": "0.1,2"} | COMPOSITE, "ac"),
        ({"ZE_AFFINITY_MASK": "1.0,1.1"} | COMPOSITE, "b"),
        ({"ONEAPI_DEVICE_SELECTOR": "level_zero:0,3"}, "ab"),
        ({"ONEAPI_DEVICE_SELECTOR": "*:gpu"}, "aabbc"),
        ({"ONEAPI_DEVICE_SELECTOR": "Level_Zero:*;!level_zero:0,1"}, "bbc"),
        ({"ONEAPI_DEVICE_SELECTOR": "!level_zero:0"} | COMPOSITE, "bc"),
        ({"ONEAPI_DEVICE_SELECTOR": "opencl:*"}, ""),
        ({"ONEAPI_DEVICE_SELECTOR": "*:cpu;level_zero:2"} | COMPOSITE, "c"),
        ({"ZE_AFFINITY_MASK": "2,3,4", "ONEAPI_DEVICE_SELECTOR": "level_zero:2"}, "c"),
    ],
)
def test_intel(env: dict[str, str], expected: str) -> None:
    assert level_zero(**env) == expected


@pytest.mark.parametrize(
    "env",
    [
        {"ZE_AFFINITY_MASK": "0.1"},  # a tile of what is a tile already
        {"ZE_AFFINITY_MASK": "x"},
        {"ONEAPI_DEVICE_SELECTOR": "level_zero"},
        {"ONEAPI_DEVICE_SELECTOR": "level_zero:0.*"},
    ],
)
def test_what_only_the_runtime_can_tell_is_an_error(env: dict[str, str]) -> None:
    with pytest.raises(GpuLookupError, match=next(iter(env))):
        level_zero(**env)


def test_one_vendor_counts() -> None:
    nvidia = Gpu("0000:ff:00.0", 1, "GPU-1")
    everything = [*INTEL, *AMD, nvidia]
    assert visible_gpus(everything, {}) == [nvidia]
    hidden = Gpu("0000:ff:00.0", 1, "GPU-1", usable=False)
    assert {gpu.vendor for gpu in visible_gpus([*INTEL, *AMD, hidden], {})} == {"amd"}
    assert visible_gpus([hidden], {}) == []
