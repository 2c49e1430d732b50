"""What `_torch_mesh` expects of PyTorch's `DeviceMesh`, for the PyTorch that is installed."""

from __future__ import annotations

import pytest
import torch
from ds_groups import ParallelTopology, UnsupportedTorchError, _torch_mesh
from ranks import run_ranks
from torch.distributed import device_mesh
from torch.distributed.device_mesh import DeviceMesh

VERSION = tuple(map(int, torch.__version__.split(".")[:2]))


def test_kind_of_this_version():
    assert _torch_mesh.mesh_kind() == ("tensor" if VERSION < (2, 10) else "layout")
    assert _torch_mesh._keeps_infos() == (VERSION < (2, 8))
    assert _torch_mesh._compiles_subclasses() == (VERSION >= (2, 12))
    assert hasattr(_torch_mesh._mesh_layout, "_FlatLayout") == (VERSION >= (2, 13))


def unknown(rank):
    class Other:
        def __init__(self, device_type, mesh):
            pass

    bound = ParallelTopology(2).bind(timeout=20)
    _torch_mesh.mesh_kind.cache_clear()
    _torch_mesh.DeviceMesh = Other
    with pytest.raises(UnsupportedTorchError, match="init_device_mesh"):
        bound.to_device_mesh("dp")
    return len(bound)


def changed(rank):
    """A mesh that answers with other ranks, or other groups, than it was made of."""
    bound = ParallelTopology(4, tp=2).bind(timeout=20)
    true = DeviceMesh.get_group
    DeviceMesh.get_group = lambda self, mesh_dim=None: bound.group(("dp", "tp"))
    with pytest.raises(UnsupportedTorchError, match="has another group in dimension dp"):
        bound.to_device_mesh("dp", "tp")
    DeviceMesh.get_group = true
    _torch_mesh.find_root = lambda mesh: mesh
    with pytest.raises(UnsupportedTorchError, match="has lost its root"):
        bound.to_device_mesh("dp", "tp")


def test_an_unknown_mesh_is_refused():
    assert run_ranks(unknown, 2) == [0, 0]


def test_a_mesh_that_answers_wrongly_is_refused():
    run_ranks(changed, 4)


def test_private_parts_are_there():
    if _torch_mesh.mesh_kind() == "layout":
        assert hasattr(DeviceMesh, "_get_root_mesh")
    else:
        assert hasattr(device_mesh._mesh_resources, "child_to_root_mapping")
