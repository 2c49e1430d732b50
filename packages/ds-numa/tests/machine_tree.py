"""Write machines as ``sys`` and ``proc`` trees with any of the files that kernels of different age have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

CPU = "sys/devices/system/cpu"
NODE = "sys/devices/system/node"


def ranges(cpus: Sequence[int]) -> str:
    return ",".join(str(cpu) for cpu in sorted(cpus))


def mask(cpus: Sequence[int], words: int = 4) -> str:
    value = sum(1 << cpu for cpu in cpus)
    return ",".join(f"{value >> (32 * i) & 0xFFFFFFFF:08x}" for i in reversed(range(words)))


class MachineTree:
    """A tree that grows by calls. ``masks`` writes masks and no lists, as old kernels and some copies have them."""

    def __init__(self, root: Path, *, masks: bool = False, new_names: bool = True) -> None:
        self.root, self.masks = root, masks
        self.siblings, self.package = (
            ("core_cpus", "package_cpus") if new_names else ("thread_siblings", "core_siblings")
        )

    def put(self, path: str, text: object) -> MachineTree:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(f"{text}\n")
        return self

    def put_cpus(self, folder: str, name: str, cpus: Sequence[int], *, listed: str, masked: str) -> None:
        if self.masks:
            self.put(f"{folder}/{name}{masked}", mask(cpus))
        else:
            self.put(f"{folder}/{name}{listed}", ranges(cpus))

    def cpus(
        self,
        cores: Sequence[Sequence[int]],
        *,
        sockets: Sequence[Sequence[int]] = (),
        caches: Mapping[int, Sequence[Sequence[int]]] | None = None,
        offline: Sequence[int] = (),
        lists: bool = True,
    ) -> MachineTree:
        """Cores, packages (``lists`` also writes each CPU's package mates) and caches by level."""
        everything = sorted(cpu for core in cores for cpu in core)
        self.put(f"{CPU}/online", ranges(everything))
        self.put(f"{CPU}/present", ranges([*everything, *offline]))
        for cpu in offline:
            (self.root / f"{CPU}/cpu{cpu}").mkdir(parents=True, exist_ok=True)
        for core in cores:
            for cpu in core:
                self.put_cpus(f"{CPU}/cpu{cpu}/topology", self.siblings, core, listed="_list", masked="")
        for number, socket in enumerate(sockets):
            for cpu in socket:
                self.put(f"{CPU}/cpu{cpu}/topology/physical_package_id", number)
                if lists:
                    self.put_cpus(f"{CPU}/cpu{cpu}/topology", self.package, socket, listed="_list", masked="")
        for level, groups in (caches or {}).items():
            for group in groups:
                for cpu in group:
                    folder = f"{CPU}/cpu{cpu}/cache/index{level}"
                    self.put(f"{folder}/level", level)
                    self.put(f"{folder}/type", "Data" if level == 1 else "Unified")
                    self.put_cpus(folder, "shared_cpu", group, listed="_list", masked="_map")
        return self

    def node(
        self,
        number: int,
        cpus: Sequence[int] = (),
        *,
        gib: float | None = 64,
        distance: str | None = None,
        near: Sequence[int] = (),
        bandwidth: int | None = None,
        access: str = "access1",
    ) -> MachineTree:
        folder = f"{NODE}/node{number}"
        self.put_cpus(folder, "cpu", cpus, listed="list", masked="map")
        if gib is not None:
            self.put(f"{folder}/meminfo", f"Node {number} MemTotal:       {int(gib * 2**20)} kB")
        if distance is not None:
            self.put(f"{folder}/distance", distance)
        for other in near:
            (self.root / f"{folder}/{access}/initiators/node{other}").mkdir(parents=True)
        if bandwidth is not None:
            self.put(f"{folder}/{access}/initiators/read_bandwidth", bandwidth)
        return self

    def pci(self, address: str, **files: object) -> MachineTree:
        """A PCI device; ``klass`` stands for the file ``class``."""
        for name, text in files.items():
            self.put(f"sys/bus/pci/devices/{address}/{'class' if name == 'klass' else name}", text)
        return self
