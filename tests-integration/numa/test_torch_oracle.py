"""The modes that torch has too give every GPU the CPUs that ``torchrun --numa-binding`` gives it."""

from __future__ import annotations

import io
import itertools
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ds_numa import Topology, format_ranges, plan_binding
from ds_numa.errors import NotEnoughCoresError

binding = pytest.importorskip("torch.numa.binding", reason="this torch has no NUMA binding")

MODES = {"node": "NODE", "socket": "SOCKET", "exclusive": "EXCLUSIVE", "l3": "CORE_COMPLEX"}


@dataclass
class Machine:
    """A machine as lists of CPUs, and the same as the files that torch reads."""

    sockets: int
    nodes_per_socket: int
    gpu_nodes: list[int]  # of each GPU
    l3_per_node: int
    cores_per_l3: int
    smt: int
    numbering: str
    mask: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.node_cpus: list[list[int]] = []
        self.l3: list[list[int]] = []
        self.cores: list[list[int]] = []
        num_nodes = self.sockets * self.nodes_per_socket
        total = num_nodes * self.l3_per_node * self.cores_per_l3
        for node in range(num_nodes):
            self.node_cpus.append([])
            for _ in range(self.l3_per_node):
                self.l3.append([])
                for _ in range(self.cores_per_l3):
                    i = len(self.cores)
                    if self.numbering == "siblings adjacent":
                        core = [i * self.smt + thread for thread in range(self.smt)]
                    elif self.numbering == "siblings last":
                        core = [i + thread * total for thread in range(self.smt)]
                    else:  # nodes take turns, as Dell's firmware numbers
                        inside = i % (total // num_nodes)
                        core = [inside * num_nodes + node + thread * total for thread in range(self.smt)]
                    self.cores.append(core)
                    self.l3[-1] += core
                    self.node_cpus[-1] += core
        self.mask = self.mask or {cpu for core in self.cores for cpu in core}

    @property
    def pcis(self) -> list[str]:
        return [f"{i:04x}:{i:02x}:{i:02x}.0" for i in range(len(self.gpu_nodes))]

    @property
    def socket_cpus(self) -> list[list[int]]:
        step = self.nodes_per_socket
        return [list(itertools.chain(*self.node_cpus[i : i + step])) for i in range(0, len(self.node_cpus), step)]

    def topology(self) -> Topology:
        return Topology.from_dict(
            {
                "nodes": {str(node): {"cpus": cpus} for node, cpus in enumerate(self.node_cpus)},
                "cores": self.cores,
                "allowed": sorted(self.mask),
                "gpus": [
                    {"pci": pci, "node": node, "uuid": f"GPU-{pci}"}
                    for pci, node in zip(self.pcis, self.gpu_nodes, strict=True)
                ],
                "sockets": self.socket_cpus,
                "l3": self.l3,
            }
        )

    def read(self, root: Path) -> Topology:
        """The same machine, read from the files that torch reads and those that say where the GPUs are."""
        files = self.files()
        files["/sys/devices/system/cpu/online"] = format_ranges(cpu for core in self.cores for cpu in core)
        files["/sys/devices/system/node/online"] = files["/sys/devices/system/node/possible"]
        for pci in self.pcis:
            files[f"/sys/bus/pci/devices/{pci}/vendor"] = "0x10de"
            files[f"/sys/bus/pci/devices/{pci}/class"] = "0x030200"
            files[f"/proc/driver/nvidia/gpus/{pci}/information"] = f"Model: \t X\nGPU UUID: \t GPU-{pci}"
        for path, text in files.items():
            target = root / path.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(f"{text}\n")
        return Topology.from_sysfs(root, allowed=self.mask)

    def files(self) -> dict[str, str]:
        found = {"/sys/devices/system/node/possible": format_ranges(range(len(self.node_cpus)))}
        for node, cpus in enumerate(self.node_cpus):
            found[f"/sys/devices/system/node/node{node}/cpulist"] = format_ranges(cpus)
        for core in self.cores:
            for cpu in core:
                folder = f"/sys/devices/system/cpu/cpu{cpu}"
                found[f"{folder}/topology/thread_siblings_list"] = format_ranges(core)
                socket = next(i for i, cpus in enumerate(self.socket_cpus) if cpu in cpus)
                found[f"{folder}/topology/physical_package_id"] = str(socket)
                shared = {1: core, 2: core, 3: next(group for group in self.l3 if cpu in group)}
                for level, cpus in shared.items():
                    index = f"{folder}/cache/index{level}"
                    found[f"{index}/type"] = "Unified" if level > 1 else "Data"
                    found[f"{index}/level"] = str(level)
                    found[f"{index}/shared_cpu_list"] = format_ranges(cpus)
        for pci, node in zip(self.pcis, self.gpu_nodes, strict=True):
            found[f"/sys/bus/pci/devices/{pci}/numa_node"] = str(node)
        return found


@pytest.fixture
def torchs_choice(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Machine, int, str], set[int]]]:
    """Ask torch's own functions, which read the machine's files."""

    def ask(machine: Machine, gpu: int, mode: str) -> set[int]:
        files = machine.files()

        def fake_open(path: str) -> io.StringIO:
            if path not in files:
                raise FileNotFoundError(path)
            return io.StringIO(files[path])

        def listdir(folder: str) -> list[str]:
            names = (path.removeprefix(f"{folder}/") for path in files if path.startswith(f"{folder}/"))
            return sorted({name.split("/")[0] for name in names})

        def properties(index: int) -> SimpleNamespace:
            return SimpleNamespace(pci_domain_id=index, pci_bus_id=index, pci_device_id=index)

        cuda = SimpleNamespace(device_count=lambda: len(machine.gpu_nodes), get_device_properties=properties)
        fake_os = SimpleNamespace(path=os.path, listdir=listdir, sched_getaffinity=lambda _: set(machine.mask))
        monkeypatch.setattr(binding, "open", fake_open, raising=False)
        monkeypatch.setattr(binding, "os", fake_os)
        monkeypatch.setattr(binding, "torch", SimpleNamespace(cuda=cuda))
        options = binding.NumaOptions(affinity_mode=binding.AffinityMode[MODES[mode]])
        chosen: set[int] = binding._get_logical_cpus_to_bind_to(gpu_index=gpu, numa_options=options)
        return chosen

    yield ask
    monkeypatch.undo()


def compare(
    machine: Machine, mode: Any, ask: Callable[[Machine, int, str], set[int]], topology: Topology | None = None
) -> int:
    """Every GPU has a rank; returns how many GPUs were compared."""
    topology = topology or machine.topology()
    theirs: list[set[int] | None] = []
    for gpu in range(len(machine.gpu_nodes)):
        try:
            theirs.append(ask(machine, gpu, mode))
        except RuntimeError as error:
            if "physical cores on" not in str(error):
                raise
            theirs.append(None)
    if None in theirs:
        with pytest.raises(NotEnoughCoresError, match="mode = 'exclusive' divides"):
            plan_binding(topology, len(theirs), mode=mode)
        return 0
    for devices in ("auto", machine.pcis):
        plan = plan_binding(topology, len(theirs), mode=mode, devices=devices)
        assert [set(b.cpus) for b in plan.bindings] == theirs, machine
    # A job that starts fewer ranks than there are GPUs, in another order: torch counts all GPUs all the same.
    backwards = list(reversed(range(len(theirs))))[:3]
    plan = plan_binding(topology, len(backwards), mode=mode, devices=[machine.pcis[gpu] for gpu in backwards])
    assert [set(b.cpus) for b in plan.bindings] == [theirs[gpu] for gpu in backwards], machine
    return len(theirs)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("numbering", ["siblings adjacent", "siblings last", "nodes in turn"])
def test_every_regular_machine(mode: str, numbering: str, torchs_choice: Any) -> None:
    compared = 0
    for sockets, nodes, gpus, l3, cores, smt in itertools.product((1, 2), (1, 2), (1, 3), (1, 2), (1, 3), (1, 2)):
        homes = [node for node in range(sockets * nodes) for _ in range(gpus)]
        compared += compare(Machine(sockets, nodes, homes, l3, cores, smt, numbering), mode, torchs_choice)
    assert compared >= 100


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(6))
def test_masks_and_gpus_in_any_order(mode: str, seed: int, torchs_choice: Any) -> None:
    dice = random.Random(seed)
    compared = 0
    for _ in range(12):
        numbering = dice.choice(["siblings adjacent", "siblings last", "nodes in turn"])
        shape = (dice.randint(1, 2), dice.randint(1, 4))
        homes = [dice.randrange(shape[0] * shape[1]) for _ in range(dice.randint(1, 8))]
        machine = Machine(*shape, homes, dice.randint(1, 4), dice.randint(1, 4), dice.randint(1, 4), numbering)
        machine.mask = {cpu for cpu in machine.mask if dice.random() < 0.7}
        for cpus in machine.node_cpus:  # torch's own rules fail where a node has no allowed CPU
            machine.mask.add(dice.choice(cpus))
        compared += compare(machine, mode, torchs_choice)
    assert compared >= 12


def test_a_large_machine(torchs_choice: Any) -> None:
    homes = [node for node in range(8) for _ in range(2)]
    machine = Machine(2, 4, homes, 3, 8, 2, "siblings last")
    for mode in MODES:
        assert compare(machine, mode, torchs_choice) == 16


@pytest.mark.parametrize("numbering", ["siblings adjacent", "siblings last", "nodes in turn"])
def test_machines_read_from_their_files(numbering: str, torchs_choice: Any, tmp_path: Path) -> None:
    dice = random.Random(numbering)
    for i in range(4):
        homes = [node for node in range(4) for _ in range(2)]
        dice.shuffle(homes)
        machine = Machine(2, 2, homes, 2, 3, 2, numbering)
        machine.mask -= set(dice.sample(sorted(machine.mask), 5))
        topology = machine.read(tmp_path / str(i))
        for mode in MODES:
            assert compare(machine, mode, torchs_choice, topology) == 8
