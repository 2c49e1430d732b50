"""Tensors that are lazy, sparse, shared, empty, views, of a subclass, or strangely named: saved right, or refused."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ds_fragment import load_full, save_full
from ds_fragment.errors import CheckpointError, InvalidValueError
from safetensors.torch import load_file, load_model, save_file
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor


class Holder(nn.Module):
    """Tensors as parameters, and as buffers by name."""

    def __init__(self, *tensors: torch.Tensor, **buffers: torch.Tensor) -> None:
        super().__init__()
        for i, tensor in enumerate(tensors):
            trained = tensor.is_floating_point() or tensor.is_complex()
            self.register_parameter(f"p{i}", nn.Parameter(tensor, requires_grad=trained))
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)


def views() -> Holder:
    whole = torch.rand(12)
    return Holder(whole, whole[:6].view(2, 3), whole[6:])


def transposed() -> Holder:
    return Holder(torch.rand(3, 4).T, b=torch.rand(2, 3, 4).permute(2, 0, 1))


def bits() -> Holder:
    """One storage under two dtypes."""
    weight = torch.rand(4)
    return Holder(weight, b=weight.view(torch.int32))


def named() -> nn.Module:
    names = ("a/b", "größe", "日本", "a b", 'q"uote', "back\\slash", "😀", "__metadata__x")
    return nn.ModuleDict({name: nn.Linear(2, 2) for name in names})


MODELS: dict[str, Callable[[], nn.Module]] = {
    "complex": lambda: Holder(torch.rand(3, dtype=torch.complex64)),
    "empty": lambda: Holder(torch.rand(0), torch.rand(0, 4), torch.rand(3)),
    "nothing": nn.Module,
    "without dimensions": lambda: Holder(torch.rand(()), b=torch.randint(9, ())),
    "int8": lambda: Holder(torch.randint(9, (4, 4), dtype=torch.int8), scale=torch.rand(4)),
    "transposed": transposed,
    "views": views,
    "two dtypes": bits,
    "names": named,
    "parametrized": lambda: torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),
}


def same(model: nn.Module, other: nn.Module) -> bool:
    found, expected = model.state_dict(), other.state_dict()
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("max_shard_bytes", [1 << 30, 1])
@pytest.mark.parametrize("kind", MODELS)
def test_there_and_back(kind: str, max_shard_bytes: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, other = MODELS[kind](), MODELS[kind]()
    assert kind == "nothing" or not same(model, other)
    save_full(model, tmp_path / "model.safetensors", max_shard_bytes=max_shard_bytes)
    load_full(other, tmp_path)
    assert same(other, model)
    for file in tmp_path.glob("*.safetensors"):
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in load_file(file).items())


def lazy_buffers() -> nn.Module:
    return nn.LazyBatchNorm1d(affine=False)


def meta() -> nn.Module:
    return nn.Linear(2, 2, device="meta")


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "lazy": (lambda: nn.LazyLinear(3), "'weight' is of a lazy module"),
    "lazy buffers": (lazy_buffers, "'running_mean' is of a lazy module"),
    "sparse": (lambda: Holder(b=torch.eye(3).to_sparse()), "'b' is torch.sparse_coo"),
    "subclass": (lambda: Holder(TwoTensor(torch.ones(2), torch.ones(2))), "'p0' is a TwoTensor"),
    "meta": (meta, "'weight' is on the meta device"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind: str, tmp_path: Path) -> None:
    build, message = REFUSED[kind]
    save_full(nn.Linear(2, 2), tmp_path / "model.safetensors")
    with pytest.raises(InvalidValueError, match=message):
        save_full(build(), tmp_path / "other.safetensors")
    with pytest.raises(InvalidValueError, match=message):
        load_full(build(), tmp_path / "model.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_parameter_of_a_subclass_that_adds_nothing(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    model.weight = type("Mine", (nn.Parameter,), {})(torch.rand(2, 2))
    save_full(model, tmp_path / "model.safetensors")
    assert torch.equal(load_file(tmp_path / "model.safetensors")["weight"], model.weight)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Holder(torch.rand(3, dtype=torch.complex128)), "'p0' has dtype torch.complex128"),
        (Holder(__metadata__=torch.ones(2)), "'__metadata__' is the name of a tensor"),
    ],
)
def test_what_the_format_cannot_hold(model: nn.Module, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        save_full(model, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("buffer", [False, True])
def test_expanded_tensors(buffer: bool, tmp_path: Path) -> None:
    def build(tensor: torch.Tensor) -> Holder:
        return Holder(torch.zeros(2), b=tensor) if buffer else Holder(torch.zeros(2), tensor)

    save_full(build(torch.rand(3, 1).expand(3, 4)), tmp_path / "model.safetensors")
    plain, expanded = build(torch.zeros(3, 4)), build(torch.zeros(3, 1).expand(3, 4))
    load_full(plain, tmp_path)
    assert (plain.state_dict()["b" if buffer else "p1"].std(dim=1) == 0).all()
    expanded.p0.data.fill_(5.0)
    with pytest.raises(InvalidValueError, match="is expanded in the model"):
        load_full(expanded, tmp_path)
    assert (expanded.p0 == 5.0).all()  # nothing was written


def shared(value: float, *, untied: bool = False) -> nn.ModuleDict:
    """Two modules with one buffer."""
    buffer = torch.full((2,), value)
    parts = {"a": Holder(t=buffer), "b": Holder(t=buffer.clone() if untied else buffer)}
    return nn.ModuleDict(parts)


def test_shared_buffers(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_full(shared(3.0), path)
    assert list(load_file(path)) == ["a.t"]
    for model in (shared(1.0), shared(1.0, untied=True)):
        load_full(model, path)
        assert same(model, shared(3.0))
    model = shared(1.0)
    assert load_model(model, path) == (set(), [])
    assert same(model, shared(3.0))
    save_file({"a.t": torch.full((2,), 4.0), "b.t": torch.full((2,), 4.0)}, path)
    load_full(model, path)
    assert same(model, shared(4.0))
    save_file({"a.t": torch.full((2,), 4.0), "b.t": torch.full((2,), 5.0)}, path)
    with pytest.raises(InvalidValueError, match=r"one tensor in the model, but 'a.t' and 'b.t' differ"):
        load_full(model, path)


def test_shared_modules(tmp_path: Path) -> None:
    def build(*, untied: bool = False) -> nn.ModuleDict:
        norm = nn.BatchNorm1d(3)
        nn.init.normal_(norm.weight)
        norm.running_mean = torch.rand(3)
        return nn.ModuleDict({"a": norm, "b": nn.BatchNorm1d(3) if untied else norm})

    model = build()
    save_full(model, tmp_path / "model.safetensors")
    assert all(name.startswith("a.") for name in load_file(tmp_path / "model.safetensors"))
    for other in (build(), build(untied=True)):
        load_full(other, tmp_path)
        assert same(other, model)


def test_a_buffer_that_is_a_parameters_memory(tmp_path: Path) -> None:
    weights = [torch.full((2,), value) for value in (1.0, 2.0)]
    model, other = (Holder(weight, b=weight) for weight in weights)
    save_full(model, tmp_path / "model.safetensors")
    load_full(other, tmp_path)
    assert same(other, model)


def test_no_name_in_common(tmp_path: Path) -> None:
    save_full(Holder(torch.rand(2)), tmp_path / "model.safetensors")
    with pytest.raises(InvalidValueError, match=r"no name in common, as the file has 1 \(p0\)"):
        load_full(Holder(b=torch.rand(2)), tmp_path, strict=False)


def test_thousands_of_tensors(tmp_path: Path) -> None:
    model, other = (Holder(*torch.rand(5000, 3)) for _ in range(2))
    start = time.perf_counter()
    save_full(model, tmp_path / "model.safetensors")
    load_full(other, tmp_path)
    assert time.perf_counter() - start < 20  # 1.5 s on an idle machine
    assert same(other, model)
