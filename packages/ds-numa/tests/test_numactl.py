from __future__ import annotations

import errno
import inspect
import os
import shutil
from typing import Any

import ds_numa
import pytest
from ds_numa import Binding, Topology, numactl
from ds_numa.errors import AffinityConflictError, CoreListError, NotEnoughCoresError, RankError
from ds_numa.numactl import check_for_numactl_pkg, get_numa_cores, get_numactl_cmd

SPARSE = Topology.from_dict(
    {
        "nodes": {"0": {"cpus": "0-3,8-11"}, "1": {"kind": "empty"}, "8": {"cpus": "4-7,12-15"}},
        "cores": [[i, i + 8] for i in range(8)],
        "allowed": "0-6,8-15",
    }
)


@pytest.fixture
def sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Topology, "here", classmethod(lambda cls: SPARSE))
    monkeypatch.setattr(numactl, "memory_policy_refusal", lambda: None)
    monkeypatch.setattr(numactl, "check_for_numactl_pkg", lambda: True)


def test_the_signatures_are_deepspeeds() -> None:
    def plain(function: Any) -> list[str]:
        parameters = inspect.signature(function).parameters.values()
        return [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]

    assert plain(numactl.get_numa_cores) == plain(numactl.check_for_numactl_pkg) == []
    assert plain(numactl.parse_range) == ["rng"]
    assert plain(numactl.parse_range_list) == ["range_str"]
    assert plain(numactl.get_numactl_cmd) == ["bind_core_list", "num_local_procs", "local_rank"]


@pytest.mark.usefixtures("sparse")
def test_looking_needs_no_numactl_and_loses_no_sparse_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert get_numa_cores() == [[0, 1, 2, 3, 8, 9, 10, 11], [], [4, 5, 6, 12, 13, 14, 15]]


def test_looking_at_this_machine() -> None:
    assert sorted(cpu for node in get_numa_cores() for cpu in node) == sorted(os.sched_getaffinity(0))


@pytest.mark.usefixtures("sparse")
def test_the_command_is_the_plan() -> None:
    # 15 CPUs of 8 cores: every one of them is used, siblings together.
    assert get_numactl_cmd(None, 2, 0) == (4, ["numactl", "-m", "0", "-C", "0-3,8-11"])
    assert get_numactl_cmd(None, 2, 1) == (4, ["numactl", "-m", "8", "-C", "4-6,12-15"])
    assert get_numactl_cmd(None, 1, 0) == (8, ["numactl", "-C", "0-6,8-15"])


@pytest.mark.usefixtures("sparse")
def test_listed_cores_count_one_thread_each() -> None:
    assert get_numactl_cmd("4-6,0-3", 2, 0) == (4, ["numactl", "-m", "0", "-C", "0-3"])
    assert get_numactl_cmd("4-6,0-3", 2, 1) == (3, ["numactl", "-m", "8", "-C", "4-6"])
    assert get_numactl_cmd("0,8,1,9", 2, 0) == (2, ["numactl", "-m", "0", "-C", "0,8"])


@pytest.mark.usefixtures("sparse")
def test_a_container_that_refuses_memory_policy_gets_cpus_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(numactl, "memory_policy_refusal", lambda: OSError(errno.EPERM, "Operation not permitted"))
    assert get_numactl_cmd(None, 2, 0) == (4, ["numactl", "-C", "0-3,8-11"])
    assert "memory policy is refused here" in caplog.text


@pytest.mark.usefixtures("sparse")
def test_a_missing_binary_is_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(numactl, "check_for_numactl_pkg", lambda: False)
    assert get_numactl_cmd(None, 2, 0)[0] == 4
    assert "numactl is not installed" in caplog.text


def test_high_bandwidth_memory_is_preferred() -> None:
    def box(cpus: int) -> Topology:
        distances = {"0": 10, "1": 20, "2": 12, "3": 22}, {"0": 20, "1": 10, "2": 22, "3": 12}
        nodes: dict[str, Any] = {
            "0": {"cpus": "0-1", "distances": distances[0]},
            "1": {"cpus": "2-3", "distances": distances[1]},
        }
        return Topology.from_dict({"nodes": nodes | {"2": {"kind": "hbm"}, "3": {"kind": "hbm"}}})

    assert get_numactl_cmd(None, 2, 1, topology=box(4)) == (2, ["numactl", "-p", "3", "-C", "2-3"])
    assert get_numactl_cmd(None, 1, 0, topology=box(4)) == (4, ["numactl", "-P", "2-3", "-C", "0-3"])


def test_memory_that_nothing_tells_apart_is_not_shut_out() -> None:
    nodes = {"0": {"cpus": "0-3"}, "1": {"cpus": "4-7"}, "2": {"memory_bytes": 1 << 38}}
    machine = Topology.from_dict({"nodes": nodes})
    assert get_numactl_cmd(None, 2, 1, topology=machine) == (4, ["numactl", "-p", "1", "-C", "4-7"])


def test_devices_do_not_move_the_command() -> None:
    gpus = [{"pci": f"0000:1{i}:00.0", "node": 1, "uuid": str(i)} for i in range(2)]
    machine = Topology.from_dict({"nodes": {"0": {"cpus": "0-3"}, "1": {"cpus": "4-7"}}, "gpus": gpus})
    assert get_numactl_cmd(None, 2, 0, topology=machine) == (4, ["numactl", "-m", "0", "-C", "0-3"])


@pytest.mark.parametrize(
    ("memory", "nodes", "words"),
    [
        ("preferred", (1,), ["-p", "1"]),
        ("preferred", (0, 2), ["-P", "0,2"]),
        ("bind", (0, 1), ["-m", "0-1"]),
        ("interleave", (0, 1, 2), ["-i", "0-2"]),
        ("none", (), []),
    ],
)
def test_every_memory_mode_has_its_words(memory: Any, nodes: tuple[int, ...], words: list[str]) -> None:
    binding = Binding(0, (0, 1, 4), 3, (0,), memory, nodes)
    assert numactl.numactl_args(binding) == [*words, "-C", "0-1,4"]
    assert numactl.numactl_args(binding, memory=False) == ["-C", "0-1,4"]


def test_another_machine_can_be_asked_about() -> None:
    flat = Topology.from_dict({"nodes": {"0": {"cpus": "0-6"}}})
    assert [get_numactl_cmd(None, 2, rank, topology=flat) for rank in range(2)] == [
        (4, ["numactl", "-C", "0-3"]),
        (3, ["numactl", "-C", "4-6"]),
    ]


@pytest.mark.usefixtures("sparse")
@pytest.mark.parametrize(
    ("cores", "message"),
    [
        ("3-1", "bind_core_list = '3-1': '3-1' runs backwards: write 1-3"),
        ("a", "bind_core_list = 'a': 'a' is no number or range: write 4 or 0-3"),
        ("", "bind_core_list = '' is empty"),
        ("0,0", "bind_core_list = '0,0' names 0 twice"),
        (
            "0-99",
            "bind_core_list = '0-99': CPUs 16-99 are not online here and CPUs 7 are outside .* choose from 0-6,8-15",
        ),
        ("7", "bind_core_list = '7': CPUs 7 are outside this process's CPU mask"),
    ],
)
def test_bad_core_lists(cores: str, message: str) -> None:
    with pytest.raises(CoreListError, match=message):
        get_numactl_cmd(cores, 2, 0)


@pytest.mark.usefixtures("sparse")
def test_bad_ranks() -> None:
    with pytest.raises(RankError, match=r"local_rank = 2 must lie in 0\.\.1"):
        get_numactl_cmd(None, 2, 2)
    with pytest.raises(RankError, match="num_local_procs = 0"):
        get_numactl_cmd(None, 0, 0)
    with pytest.raises(NotEnoughCoresError):
        get_numactl_cmd("0-1", 3, 0)


@pytest.mark.usefixtures("sparse")
def test_kmp_affinity_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KMP_AFFINITY", "compact")
    with pytest.raises(AffinityConflictError, match=r"KMP_AFFINITY = 'compact' .* unset it"):
        get_numactl_cmd(None, 2, 0)


def test_the_binary_is_found_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert check_for_numactl_pkg() is True
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert check_for_numactl_pkg() is False


def test_the_package_offers_the_same_functions() -> None:
    for name in ("get_numa_cores", "check_for_numactl_pkg", "parse_range", "parse_range_list", "get_numactl_cmd"):
        assert getattr(ds_numa, name) is getattr(numactl, name)
