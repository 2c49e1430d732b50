"""What `show` and `diff` say of checkpoints, beside torch and safetensors on whole tensors."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from ds_fragment.checkpoint import inspect
from ds_fragment.checkpoint.inspect import Difference, diff, show
from ds_fragment.errors import CheckpointError

save_file = pytest.importorskip("safetensors.torch").save_file

NAN, INF = math.nan, math.inf
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect, "_CHUNK", 7)


def saved(path: Path, metadata: dict[str, str] | None = None, **tensors: torch.Tensor) -> Path:
    save_file({name.replace("__", "."): tensor for name, tensor in tensors.items()}, path, metadata)
    return path


def only(a: Path, b: Path) -> Difference:
    (found,) = diff(a, b).found
    return found


def test_show_lists_names_shapes_dtypes_bytes_and_files(tmp_path: Path) -> None:
    tensors = {f"layers.{i}.weight": torch.randn(i, 5) for i in (10, 2, 0)}
    scalar, half = torch.tensor(3), torch.randn(4).bfloat16()
    save_file(tensors, tmp_path / "model-1.safetensors")
    save_file({"step": scalar, "norm.weight": half}, tmp_path / "model-2.safetensors", {"made": "by hand"})
    weights = {**dict.fromkeys(tensors, "model-1.safetensors"), "step": "model-2.safetensors"}
    index = {"metadata": {"total_size": 1}, "weight_map": {**weights, "norm.weight": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for path in (tmp_path, tmp_path / "model.safetensors", tmp_path / "model.safetensors.index.json"):
        contents = show(path, norms=True)
        assert [each.name for each in contents.tensors] == [
            "layers.0.weight",
            "layers.2.weight",
            "layers.10.weight",
            "norm.weight",
            "step",
        ]
        for each in contents.tensors:
            whole = {**tensors, "step": scalar, "norm.weight": half}[each.name]
            assert each.shape == tuple(whole.shape)
            assert f"torch.{each.dtype}" == str(whole.dtype)
            assert each.nbytes == whole.nbytes
            assert each.file == index["weight_map"][each.name]  # type: ignore[index]
            assert each.norm == pytest.approx(float(whole.double().norm()), rel=1e-12)
        assert contents.totals() == {
            "bfloat16": (1, 4, 8),
            "float32": (3, 60, 240),
            "int64": (1, 1, 8),
            "all": (5, 65, 256),
        }
        assert contents.metadata["made"] == "by hand"
        assert "metadata: made = by hand" in str(contents)
        assert "all: 5 tensors, 65 elements, 256 bytes" in str(contents)
        assert json.loads(json.dumps(contents.to_dict()))["totals"]["all"]["bytes"] == 256
    assert all(each.norm is None for each in show(tmp_path).tensors)
    assert "norm" not in str(show(tmp_path)).splitlines()[0].split()


def test_show_says_what_is_tied_and_what_the_optimizer_has(tmp_path: Path) -> None:
    groups = [{"params": ["w"], "lr": 0.1}, {"params": [], "lr": 0.2}]
    state = {"w/exp_avg": torch.zeros(3), "w/step": torch.tensor(1.0), "b/step": torch.tensor(1.0)}
    save_file(state, tmp_path / "model-x.optimizer", {"param_groups": json.dumps(groups)})
    metadata = {"tied": json.dumps({"alias": "w"}), "optimizer": "model-x.optimizer"}
    contents = show(saved(tmp_path / "model.safetensors", metadata, w=torch.zeros(3)))
    assert contents.tied == {"alias": "w"}
    assert contents.optimizer is not None
    assert contents.optimizer.states == {"exp_avg": 1, "step": 2}
    assert contents.optimizer.nbytes == 20
    assert contents.optimizer.param_groups == [{"params": 1, "lr": 0.1}, {"params": 0, "lr": 0.2}]
    assert "tied: alias is w" in str(contents)
    assert "optimizer: group 0 of 1 parameter: lr = 0.1" in str(contents)
    (tmp_path / "model-x.optimizer").unlink()
    assert "model-x.optimizer" in str(show(tmp_path).optimizer)
    assert "optimizer: " in str(show(tmp_path))


@pytest.mark.parametrize("key", ["tied", "optimizer"])
def test_metadata_that_is_no_save_s_is_an_error_or_said(tmp_path: Path, key: str) -> None:
    path = saved(tmp_path / "m.safetensors", {key: "../x"}, w=torch.zeros(1))
    if key == "tied":
        with pytest.raises(CheckpointError, match=r"'tied' = '../x', expected a JSON dict"):
            show(path)
    else:
        assert "expected a file beside it" in str(show(path))


@pytest.mark.parametrize("special", [NAN, INF, -INF])
def test_norms_that_are_not_finite(tmp_path: Path, special: float) -> None:
    value = torch.ones(30)
    value[11] = special
    contents = show(saved(tmp_path / "m.safetensors", w=value), norms=True)
    assert contents.tensors[0].norm == pytest.approx(abs(special), nan_ok=True)
    assert json.loads(json.dumps(contents.to_dict(), allow_nan=False))["tensors"][0]["norm"] == str(abs(special))


@pytest.mark.parametrize("dtype", [*DTYPES, *INTEGERS], ids=str)
def test_equal_files_are_equal_and_one_changed_element_is_found(tmp_path: Path, dtype: torch.dtype) -> None:
    value = (3 * torch.randn(5, 4, 3)).to(dtype)
    a, b = (saved(tmp_path / f"{name}.safetensors", w=value, scalar=value[0, 0, 0].clone()) for name in "ab")
    found = diff(a, b)
    assert found.equal
    assert str(found).endswith("equal: 2 tensors")
    other = value.clone()
    other[3, 2, 1] = ~value[3, 2, 1] if dtype == torch.bool else value[3, 2, 1].double() + 2
    saved(b, w=other, scalar=value[0, 0, 0].clone())
    one = only(a, b)
    assert (one.name, one.kind, one.elements, one.where) == ("w", "values", 1, (3, 2, 1))
    assert one.largest == float((other[3, 2, 1].double() - value[3, 2, 1].double()).abs())
    assert one.values == (str(value[3, 2, 1].item()), str(other[3, 2, 1].item()))


def test_many_differences_are_counted_and_the_largest_is_found(tmp_path: Path) -> None:
    value, other = torch.randn(9, 5), torch.randn(9, 5)
    other[2] = value[2]
    one = only(saved(tmp_path / "a.safetensors", w=value), saved(tmp_path / "b.safetensors", w=other))
    distance = (value.double() - other.double()).abs()
    assert one.elements == 40
    assert one.largest == float(distance.max())
    assert one.where == tuple(int(i) for i in torch.unravel_index(distance.argmax(), distance.shape))


@pytest.mark.parametrize(
    ("x", "y", "elements", "largest"),
    [
        (NAN, NAN, 0, None),
        (NAN, 1.0, 1, INF),
        (INF, INF, 0, None),
        (INF, -INF, 1, INF),
        (0.0, -0.0, 1, 0.0),
        (1.0, 1.5, 1, 0.5),
    ],
)
def test_values_are_compared_bit_by_bit(
    tmp_path: Path, x: float, y: float, elements: int, largest: float | None
) -> None:
    a, b = (saved(tmp_path / f"{n}.safetensors", w=torch.tensor([5.0, v])) for n, v in (("a", x), ("b", y)))
    found = diff(a, b)
    assert [(one.elements, one.largest) for one in found.found] == ([(elements, largest)] if elements else [])
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_nan_of_other_bits_differs(tmp_path: Path) -> None:
    bits = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    one = only(saved(tmp_path / "a.safetensors", w=bits[:1]), saved(tmp_path / "b.safetensors", w=bits[1:]))
    assert (one.elements, one.largest) == (1, 0.0)


@pytest.mark.parametrize(("x", "y"), [(2**53 + 1, 2**53), (-(2**63), 2**63 - 1)])
def test_large_integers_are_compared_exactly(tmp_path: Path, x: int, y: int) -> None:
    one = only(
        saved(tmp_path / "a.safetensors", w=torch.tensor(x)), saved(tmp_path / "b.safetensors", w=torch.tensor(y))
    )
    assert (one.largest, one.where) == (float(abs(x - y)), ())


def test_names_shapes_and_dtypes_that_differ(tmp_path: Path) -> None:
    a = saved(tmp_path / "a.safetensors", mine=torch.ones(2), shape=torch.ones(2, 3), dtype=torch.tensor([1.0, 0.1]))
    b = saved(
        tmp_path / "b.safetensors", yours=torch.ones(3), shape=torch.ones(3, 2), dtype=torch.tensor([1, 0.1]).half()
    )
    found = diff(a, b)
    assert [(one.name, one.kind, one.elements) for one in found.found] == [
        ("dtype", "dtype", 1),
        ("mine", "only in A", 0),
        ("shape", "shape", 0),
        ("yours", "only in B", 0),
    ]
    assert found.found[0].largest == pytest.approx(
        float(torch.tensor(0.1).double() - torch.tensor(0.1).half().double())
    )
    lines = str(found).splitlines()
    assert "only in A: mine float32 (2,)" in lines
    assert "shape: shape float32 (2, 3) in A, float32 (3, 2) in B" in lines
    assert lines[-1] == "different: 4 of 4 tensors"
    exact = diff(saved(a, w=torch.ones(2)), saved(b, w=torch.ones(2).half()))
    assert [(one.kind, one.elements) for one in exact.found] == [("dtype", 0)]


def test_tied_names_are_followed(tmp_path: Path) -> None:
    value = torch.randn(3)
    tied = saved(tmp_path / "a.safetensors", {"tied": json.dumps({"head": "embed"})}, embed=value)
    assert diff(tied, saved(tmp_path / "b.safetensors", head=value.clone(), embed=value)).equal
    assert diff(tied, saved(tmp_path / "b.safetensors", {"tied": json.dumps({"embed": "head"})}, head=value)).equal
    assert only(tied, saved(tmp_path / "b.safetensors", head=value + 1, embed=value)).name == "head"


def test_optimizer_states_are_compared_if_asked_for(tmp_path: Path) -> None:
    paths = []
    for name, step in (("a", 1.0), ("b", 2.0)):
        save_file({"w/step": torch.tensor(step)}, tmp_path / f"{name}.optimizer")
        metadata = {"optimizer": f"{name}.optimizer"}
        paths.append(saved(tmp_path / f"{name}.safetensors", metadata, w=torch.zeros(1)))
    assert diff(*paths).equal
    (one,) = diff(*paths, optimizer=True).found
    assert (one.name, one.largest) == ("w/step", 1.0)
    with pytest.raises(CheckpointError, match="has no optimizer state"):
        diff(paths[0], saved(tmp_path / "c.safetensors", w=torch.zeros(1)), optimizer=True)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), ()])
def test_tensors_without_elements_or_dimensions(tmp_path: Path, shape: tuple[int, ...]) -> None:
    a, b = (saved(tmp_path / f"{name}.safetensors", w=torch.ones(shape)) for name in "ab")
    assert diff(a, b).equal
    assert show(a, norms=True).tensors[0].norm == float(torch.ones(shape).norm())


def test_no_more_than_a_chunk_is_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect, "_CHUNK", 1 << 10)
    seen: list[int] = []
    same = inspect._same
    monkeypatch.setattr(inspect, "_same", lambda a, b: (seen.append(a.nbytes), same(a, b))[1])
    value = torch.randn(1 << 10, 64)
    a, b = (saved(tmp_path / f"{name}.safetensors", w=value) for name in "ab")
    assert diff(a, b).equal
    assert len(seen) == 64
    assert max(seen) == 4 << 10
