"""The engines that ship, as the conformance kit knows them: small, on gloo, one entry of `ENGINES` each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.distributed as dist
from ds_fragment.testing import Engine, Training, adam, net
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

ENGINES: dict[str, Engine] = {}


def _add(engine: Engine) -> None:
    ENGINES[engine.name] = engine


def _place() -> dict[str, int]:
    """This rank among data-parallel ranks that are all ranks."""
    return {"data_index": dist.get_rank(), "data_ranks": dist.get_world_size()}


# Plain PyTorch.


def _plain(seed: int) -> Training:
    model = net(seed)
    return Training(model, adam(model.parameters()))


_add(Engine("plain", _plain, world_size=1, layout="1 rank"))


# DistributedDataParallel.


class _Ddp(Training):
    def no_sync(self):
        return self.model.no_sync()


def _ddp(seed: int) -> Training:
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(net(seed), find_unused_parameters=True)
    return _Ddp(model, adam(model.parameters()), **_place())


_add(Engine("ddp", _ddp))


# FSDP2.


class _Fsdp2(Training):
    def step(self) -> None:
        super().step()
        for module in self.model.modules():
            if isinstance(module, FSDPModule):  # what an eval forward left gathered does not follow the optimizer
                module.reshard()

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        self.model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.model.set_requires_gradient_sync(True)


def _fsdp2(seed: int, **options) -> Training:
    model, mesh = net(seed), init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (model.up, model.down, model):
        fully_shard(module, mesh=mesh, **options)
    return _Fsdp2(model, adam(model.parameters()), **_place())


_add(Engine("fsdp2", _fsdp2))
