from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from ds_numa import Gpu, Topology, visible_gpus
from ds_numa._gpus import normalise_pci
from ds_numa.errors import GpuLookupError

Machine = Callable[..., Path]

# Two nodes; PCI order is not node order.
GPUS = [
    Gpu("0000:17:00.0", 0, "GPU-aaaa1111-0", None, "H200"),
    Gpu("0000:3d:00.0", 0, "GPU-aaaa2222-0", None, "H200"),
    Gpu("0000:9a:00.0", 1, "GPU-bbbb3333-0", None, "H200"),
    Gpu("0000:c1:00.0", 1, "GPU-bbbb4444-0", None, "H200"),
]
A, B, C, D = (gpu.pci for gpu in GPUS)


def visible(value: str | None, **more: str) -> list[str]:
    env = more if value is None else {"CUDA_VISIBLE_DEVICES": value, **more}
    return [gpu.pci for gpu in visible_gpus(GPUS, env)]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, [A, B, C, D]),
        ("2,3", [C, D]),  # cuda:0 is NVML's GPU 2
        ("3,0", [D, A]),
        (" 1 , 2 ", [B, C]),
        ("", []),
        ("NoDevFiles", []),
        ("0,-1,2", [A]),  # CUDA stops at the first that is none
        ("1,9,0", [B]),
        ("1,,0", [B]),
        (",0", []),
        ("0,0", []),  # repeated: CUDA fails
        ("2,0,1,0", []),
        ("1,9,1", [B]),  # the repetition is not reached
        ("1gpu,+2,00, 3", [B, C, A, D]),  # digits at the start count
        ("0.5;1", [A]),
        ("-0", [A]),
        ("all", []),
        ("GPU-bbbb4444-0,GPU-aaaa1111-0", [D, A]),
        ("GPU-bbbb3,GPU-AAAA1111-0", [C, A]),  # a name may be shortened and written large
        ("GPU-bbbb3,0", [C]),  # names or numbers, not both
        ("0,GPU-bbbb3", [A]),
        ("GPU-bbbb3,GPU-bbbb3333", []),  # one GPU by two names
        ("GPU-bbbb3,GPU-ffff,GPU-aaaa1", [C]),
        ("GPU-bbbb3 ,GPU-aaaa1", [C, A]),
        ("GPU-bbbb3, GPU-aaaa1", [C]),
        (" GPU-bbbb3", []),
        ("gpu-bbbb3", []),
        ("GPU-bbbb3333-0x", [C]),
        ("MIG-GPU-aaaa2222-0/3/0", [B]),
        ("MIG-GPU-aaaa2222-0/3/0,MIG-GPU-aaaa2222-0/4/0", [B, B]),
        ("MIG-GPU-aaaa2222-0/3/0,MIG-GPU-aaaa2222-0/3/0", []),
        ("MIG-GPU-aaaa2222-0/3/0,GPU-aaaa1", [B]),
    ],
)
def test_cuda_visible_devices_is_read_as_cuda_reads_it(value: str | None, expected: list[str]) -> None:
    assert visible(value) == expected


@pytest.mark.parametrize(("value", "count"), [("GPU-aaaa", 2), ("GPU-ffff", 0), ("MIG-GPU-ffff/1/0", 0)])
def test_a_first_name_that_fits_no_or_several_gpus(value: str, count: int) -> None:
    with pytest.raises(GpuLookupError, match=f"fits {count} GPUs: name exactly one of GPU-aaaa1111-0"):
        visible(value)


def test_mig_devices_are_placed_by_their_parent() -> None:
    parents = {"MIG-1": "00000000:C1:00.0", "MIG-2": "00000000:C1:00.0"}
    found = visible_gpus(GPUS, {"CUDA_VISIBLE_DEVICES": "MIG-1,MIG-2"}, mig_parent=parents.__getitem__)
    assert [gpu.pci for gpu in found] == [D, D]
    with pytest.raises(GpuLookupError, match="install ds-numa\\[nvidia\\]"):
        visible("MIG-1")


def test_numbers_of_mixed_models_need_an_order() -> None:
    mixed = [*GPUS[:3], Gpu(D, 1, "GPU-z", None, "T4")]
    with pytest.raises(GpuLookupError, match="set CUDA_DEVICE_ORDER=PCI_BUS_ID"):
        visible_gpus(mixed, {"CUDA_VISIBLE_DEVICES": "1"})
    assert [gpu.pci for gpu in visible_gpus(mixed, {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"})] == [A, B, C, D]
    assert [gpu.pci for gpu in visible_gpus(mixed, {"CUDA_VISIBLE_DEVICES": "GPU-z"})] == [D]


def test_gpus_of_unknown_make_are_not_cudas() -> None:
    assert visible_gpus([Gpu("0000:01:00.0", 0)], {}) == []


def test_gpus_that_were_not_given_have_no_number() -> None:
    gpus = [replace(GPUS[0], usable=False), *GPUS[1:]]
    assert [gpu.pci for gpu in visible_gpus(gpus, {"CUDA_VISIBLE_DEVICES": "0,2"})] == [B, D]


def test_names_that_the_driver_does_not_tell() -> None:
    gpus = [Gpu(A, 0, vendor="nvidia"), Gpu(B, 0, vendor="nvidia")]
    assert [gpu.pci for gpu in visible_gpus(gpus, {"CUDA_VISIBLE_DEVICES": "1"})] == [B]
    with pytest.raises(GpuLookupError, match="use numbers"):
        visible_gpus(gpus, {"CUDA_VISIBLE_DEVICES": "GPU-1"})


@pytest.mark.parametrize("text", ["17:00.0", "0000:17:00.0", "00000000:17:00.0", " 0000:17:00.0 "])
def test_pci_addresses_have_one_form(text: str) -> None:
    assert normalise_pci(text) == "0000:17:00.0"


@pytest.mark.parametrize("text", ["", "17", "0000:17:00.9", "GPU-1", "0"])
def test_what_is_no_pci_address(text: str) -> None:
    with pytest.raises(GpuLookupError, match="is not a PCI address"):
        normalise_pci(text)


def test_gpus_are_read_from_the_machine(machine: Machine) -> None:
    root = machine(
        "0-3",
        nodes={0: "0-1", 1: "2-3"},
        pci={
            "0000:C1:00.0".lower(): {"numa_node": "1", "vendor": "0x10de", "class": "0x030200"},
            "0000:17:00.0": {"numa_node": "-1", "vendor": "0x10de", "class": "0x030200"},
            "0000:03:00.0": {"numa_node": "0", "vendor": "0x1002", "class": "0x038000"},
            "0000:02:00.0": {"numa_node": "0", "vendor": "0x1a03", "class": "0x030000"},  # a board's own display
            "0000:04:00.0": {"numa_node": "0", "vendor": "0x8086", "class": "0x020000"},  # a network card
            "10000:01:00.0": {"numa_node": "1", "vendor": "0x8086", "class": "0x038000"},
        },
        nvidia={"0000:c1:00.0": ("GPU-2", "H200", None), "0000:17:00.0": ("GPU-1", "H200", None)},
    )
    assert Topology.from_sysfs(root).gpus == (
        Gpu("0000:03:00.0", 0, vendor="amd"),
        Gpu("0000:17:00.0", None, "GPU-1", None, "H200"),
        Gpu("0000:c1:00.0", 1, "GPU-2", None, "H200"),
        Gpu("10000:01:00.0", 1, vendor="intel", ordinals=(0,)),
    )
