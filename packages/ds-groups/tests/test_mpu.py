from __future__ import annotations

from types import SimpleNamespace

import pytest
from ds_groups import _mpu
from ds_groups._launchers import LAUNCHERS


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("get_tensor_model_parallel_world_size", _mpu.tensor_size),
        ("get_slice_parallel_world_size", _mpu.tensor_size),
        ("get_model_parallel_world_size", _mpu.tensor_size),
        ("get_pipeline_model_parallel_world_size", _mpu.pipeline_size),
        ("get_pipe_parallel_world_size", _mpu.pipeline_size),
    ],
)
def test_sizes_by_any_of_their_names(name, read):
    assert read(SimpleNamespace(**{name: lambda: 4})) == 4
    assert read(SimpleNamespace()) == read(None) == 1


def test_the_newest_name_wins():
    mpu = SimpleNamespace(get_model_parallel_world_size=lambda: 8, get_tensor_model_parallel_world_size=lambda: 2)
    assert _mpu.tensor_size(mpu) == 2


def test_ranks_per_node(monkeypatch):
    for launcher in LAUNCHERS:
        monkeypatch.delenv(launcher.rank, raising=False)
    for rank, size in (("RANK", "LOCAL_WORLD_SIZE"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")):
        with monkeypatch.context() as launched:
            launched.setenv(rank, "1")
            launched.setenv(size, "6")
            assert _mpu.ranks_per_node(24) == 6
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    assert _mpu.ranks_per_node(24) == 24
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 8)
    assert _mpu.ranks_per_node(24) == 8


def test_mesh_group():
    mesh = SimpleNamespace(mesh_dim_names=("data_parallel",), get_group=lambda mesh_dim: mesh_dim)
    assert _mpu.mesh_group(mesh, "data_parallel") == "data_parallel"
    assert _mpu.mesh_group(mesh, "sequence_parallel") is None
    assert _mpu.mesh_group(None, "data_parallel") is None
