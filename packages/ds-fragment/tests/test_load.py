"""Files that other people wrote: their names, aliases, dtypes, folders and faults."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ds_fragment import iter_full, load_full, save_full
from ds_fragment.checkpoint import files
from ds_fragment.errors import CheckpointError, InvalidValueError
from fragment_oracle import assert_same, raised
from ranks import run_ranks
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import fully_shard


class Net(nn.Module):
    """A tied weight, and a buffer."""

    base_model_prefix = "model"

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "norm": nn.BatchNorm1d(3)})
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.model["embed"].weight


def contents() -> dict[str, torch.Tensor]:
    """What a file has for a `Net`, under the model's names."""
    state = {name: torch.randn(tensor.shape) for name, tensor in Net().state_dict().items() if tensor.ndim}
    del state["head.weight"]
    return {**state, "model.norm.num_batches_tracked": torch.tensor(3)}


def assert_holds(model: nn.Module, stored: dict[str, torch.Tensor]) -> None:
    found = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    for name, tensor in stored.items():
        assert_same(found[name], tensor, name)


RENAMINGS = {
    "module": lambda name: f"module.{name}",
    "orig_mod": lambda name: f"_orig_mod.{name}",
    "compile of DDP": lambda name: f"_orig_mod.module.{name}",
    "DDP of compile": lambda name: f"module._orig_mod.{name}",
    "FSDP1": lambda name: f"_fsdp_wrapped_module.{name}",
    "blocks": lambda name: name.replace("norm.", "norm._checkpoint_wrapped_module."),
    "Fabric": lambda name: f"_forward_module.{name}",
    "without the base's prefix": lambda name: name.removeprefix("model."),
    "an alias alone": lambda name: name.replace("model.embed.weight", "head.weight"),
}


@pytest.mark.parametrize("how", RENAMINGS)
def test_names_in_the_file(tmp_path: Path, how: str) -> None:
    stored, model = contents(), Net()
    save_file({RENAMINGS[how](name): tensor for name, tensor in stored.items()}, tmp_path / "m.safetensors")
    load_full(model, tmp_path / "m.safetensors")
    assert_holds(model, stored)


@pytest.mark.parametrize("function", [False, True])
def test_names_that_the_user_maps(tmp_path: Path, function: bool) -> None:
    stored, model = contents(), Net()
    old = {f"old/{name}": tensor for name, tensor in stored.items()}
    save_file({**old, "scratch": torch.ones(2)}, tmp_path / "m.safetensors")
    if function:
        load_full(model, tmp_path / "m.safetensors", map_names=lambda name: None if name == "scratch" else name[4:])
    else:
        names = {f"old/{name}": name for name in stored}
        with pytest.raises(InvalidValueError, match=r"missing none, unexpected 1 \(scratch\)"):
            load_full(model, tmp_path / "m.safetensors", map_names=names)
        load_full(model, tmp_path / "m.safetensors", map_names=names, strict=False)
    assert_holds(model, stored)


def test_a_file_of_a_tied_model_for_an_untied_one(tmp_path: Path) -> None:
    tied, untied = Net(), Net()
    untied.head.weight = nn.Parameter(torch.zeros(5, 3))
    save_full(tied, tmp_path / "m.safetensors")
    load_full(untied, tmp_path / "m.safetensors")
    assert_same(untied.head.weight.detach(), tied.head.weight.detach())
    assert_same(untied.model["embed"].weight.detach(), tied.head.weight.detach())


def test_a_file_of_an_untied_model_for_a_tied_one(tmp_path: Path) -> None:
    stored, model = contents(), Net()
    save_file({**stored, "head.weight": stored["model.embed.weight"].clone()}, tmp_path / "same.safetensors")
    load_full(model, tmp_path / "same.safetensors")
    assert_holds(model, stored)
    save_file({**stored, "head.weight": torch.zeros(5, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(InvalidValueError, match=r"one tensor in the model, but 'head.weight' and 'model.embed.weight'"):
        load_full(model, tmp_path / "other.safetensors")
    assert_holds(model, stored)


@pytest.mark.parametrize("name", ["model", "adapter_model", "anything"])
@pytest.mark.parametrize("shards", [1 << 30, 40])
def test_folders_and_indexes(tmp_path: Path, name: str, shards: int) -> None:
    model = Net()
    save_full(model, tmp_path / f"{name}.safetensors", max_shard_bytes=shards)
    (tmp_path / "config.json").write_text("{}")
    paths: list[Path] = [tmp_path, tmp_path / f"{name}.safetensors"]
    if shards == 40:
        paths.append(tmp_path / f"{name}.safetensors.index.json")
    for path in paths:
        other = Net()
        with torch.no_grad():
            other.head.weight.zero_()
        load_full(other, path)
        assert_holds(other, dict(model.state_dict()))


def test_a_cached_repository(tmp_path: Path) -> None:
    model, root = Net(), tmp_path / "models--me--net"
    for revision in ("aaaa", "bbbb"):
        (root / "snapshots" / revision).mkdir(parents=True)
        save_full(Net(), root / "snapshots" / revision / "model.safetensors")
    with pytest.raises(CheckpointError, match="which has 2 snapshots"):
        load_full(model, root)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("bbbb")
    assert files.find(root).parent.name == "bbbb"
    load_full(model, root)


FOLDERS = {
    "latest": "looks like a DeepSpeed checkpoint; ds_fragment.zero_checkpoint",
    ".metadata": "torch.distributed.checkpoint",
    "pytorch_model.bin": "pytorch_model.bin, a pickle",
    "readme.txt": "it has readme.txt",
}


@pytest.mark.parametrize("file", FOLDERS)
def test_folders_of_something_else(tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_text("x")
    with pytest.raises(CheckpointError, match="a folder without safetensors files") as caught:
        load_full(Net(), tmp_path)
    assert FOLDERS[file] in str(caught.value)


def test_a_folder_with_two_models(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_full(Net(), tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"2 models: name one of a.safetensors, b.safetensors"):
        load_full(Net(), tmp_path)


def _damage(path: Path, how: str) -> str:
    """Damage a sharded save; returns the name of the file that an error has to name."""
    index = path / "model.safetensors.index.json"
    shard = sorted(path.glob("*00002-of*.safetensors"))[0]
    if how == "no shard":
        shard.unlink()
    elif how == "half a shard":
        shard.write_bytes(shard.read_bytes()[:-8])
    elif how == "empty":
        shard.write_bytes(b"")
    elif how == "index":
        shard = index
        index.write_text(index.read_text()[:40])
    elif how == "elsewhere":
        shard = index
        text = json.loads(index.read_text())
        text["weight_map"] = dict.fromkeys(text["weight_map"], "../model.safetensors")
        index.write_text(json.dumps(text))
    elif how == "wrong shard":
        text = json.loads(index.read_text())
        first, second, *_ = text["weight_map"]
        text["weight_map"][first] = text["weight_map"][second]
        index.write_text(json.dumps(text))
        return text["weight_map"][second]
    return shard.name


def _damaged(rank: int, folder: str, how: str) -> tuple[str, str] | None:
    model, path = Net(), Path(folder)
    fully_shard(model)
    save_full(model, path / "model.safetensors", max_shard_bytes=40)
    before = {name: tensor.clone() for name, tensor in iter_full(model)}
    if rank == 0:
        (path / "name").write_text(_damage(path, how))
    dist.barrier()
    told = raised(lambda: load_full(model, path))
    for name, tensor in iter_full(model):
        assert_same(tensor, before[name], name)
    return told


@pytest.mark.parametrize("how", ["no shard", "half a shard", "empty", "index", "elsewhere", "wrong shard"])
def test_damaged_files_are_named_on_every_rank(tmp_path: Path, how: str) -> None:
    zero, one = run_ranks(_damaged, 2, str(tmp_path), how)
    assert zero == one is not None
    assert zero[0] == "CheckpointError"
    assert (tmp_path / "name").read_text() in zero[1]


CASTS: list[tuple[Any, torch.dtype, torch.dtype, str]] = [
    ([1.5, -2.0], torch.float32, torch.bfloat16, ""),
    ([1.0 + 2**-20], torch.float32, torch.bfloat16, "rounded"),
    ([1e30], torch.float32, torch.float16, "cannot hold 1.0"),
    ([1e300], torch.float64, torch.float32, "cannot hold 1"),
    ([float("inf"), float("nan")], torch.float32, torch.float16, ""),
    ([448.0, 0.5], torch.float32, torch.float8_e4m3fn, ""),
    ([1e9], torch.float32, torch.float8_e5m2, "cannot hold"),
    ([300.7], torch.float32, torch.int8, "cannot hold 300.7"),
    ([3.0], torch.float32, torch.int8, ""),
    ([300], torch.int64, torch.int8, "cannot hold 300"),
    ([-1], torch.int64, torch.uint8, "cannot hold -1"),
    ([-1], torch.int64, torch.uint64, "cannot hold -1"),
    ([2**24 + 1], torch.int64, torch.float32, "cannot hold 16777217"),
    ([2**24], torch.int64, torch.float32, ""),
    ([1, 0], torch.int64, torch.bool, ""),
    ([2], torch.int64, torch.bool, "cannot hold 2"),
    ([True], torch.bool, torch.float32, ""),
    ([1 + 2j], torch.complex64, torch.float32, "is torch.complex64 in the file"),
    ([1.0], torch.float32, torch.complex64, ""),
    ([1.0], torch.float16, torch.bfloat16, ""),
    ([1.0 + 2**-10], torch.float16, torch.bfloat16, "rounded"),
]


@pytest.mark.parametrize(("values", "stored", "held", "expected"), CASTS, ids=lambda value: str(value).split(".")[-1])
def test_a_cast_loses_nothing_in_silence(
    tmp_path: Path, values: Any, stored: torch.dtype, held: torch.dtype, expected: str
) -> None:
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(len(values)).to(held), requires_grad=False)
    exact = torch.tensor(values, dtype=torch.float64 if isinstance(values[0], float) else None).to(stored)
    save_file({"w": exact}, tmp_path / "m.safetensors")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        told = raised(lambda: load_full(model, tmp_path / "m.safetensors"))
    if expected in ("", "rounded"):
        assert told is None
        assert_same(model.w.detach(), exact.to(held))
        assert [str(each.message) for each in caught if "rounded: 1 (w)" in str(each.message)] == [
            str(each.message) for each in caught
        ]
        assert bool(caught) == (expected == "rounded")
    else:
        assert told is not None
        assert told[0] == "InvalidValueError"
        assert expected in told[1]
        assert not bool(model.w.to(torch.complex64).any()), "nothing is written"


def _everything(rank: int, folder: str) -> tuple[str, str] | None:
    """Everything that is wrong comes in one message, though each rank sees values of its own shards alone."""
    small = nn.ModuleDict({"x": nn.Linear(4, 4), "y": nn.Linear(4, 4).half(), "z": nn.Linear(2, 2)})
    for each in small.values():
        fully_shard(each)
    if rank == 0:
        wide = torch.zeros(4, 4)
        wide[3, 3] = 1e9  # which rank 1 holds
        tensors = {
            "x.weight": torch.zeros(4, 3),
            "x.bias": torch.zeros(4),
            "y.weight": wide,
            "y.bias": torch.zeros(4),
            "z.weight": torch.zeros(2, 2),
            "more": torch.zeros(1),
        }
        save_file(tensors, Path(folder, "m.safetensors"))
    dist.barrier()
    before = {name: tensor.clone() for name, tensor in iter_full(small)}
    told = raised(lambda: load_full(small, Path(folder, "m.safetensors")))
    for name, tensor in iter_full(small):
        assert_same(tensor, before[name], name)
    return told


def test_all_that_is_wrong_is_in_one_message(tmp_path: Path) -> None:
    zero, one = run_ranks(_everything, 2, str(tmp_path))
    assert zero == one is not None
    for words in (
        "missing 1 (z.bias), unexpected 1 (more)",
        "'x.weight' has shape (4, 3) in the file and (4, 4) in the model",
        "'y.weight' is torch.float16 in the model, which cannot hold 1000000000.0 (torch.float32) of the file",
    ):
        assert words in zero[1]


def _reads_its_own(rank: int, folder: str) -> int:
    """How many elements a rank reads."""
    model = nn.Linear(8, 6, bias=False)
    fully_shard(model)
    save_full(model, Path(folder, "m.safetensors"))
    read = []
    fragment = files.Reader.fragment

    def counted(self: files.Reader, *args: Any) -> torch.Tensor:
        found = fragment(self, *args)
        read.append(found.numel())
        return found

    files.Reader.fragment = counted  # type: ignore[method-assign]
    files.Reader.tensor = None  # type: ignore[method-assign,assignment]
    load_full(model, Path(folder, "m.safetensors"))
    return sum(read)


def test_each_rank_reads_its_own_shards(tmp_path: Path) -> None:
    assert run_ranks(_reads_its_own, 3, str(tmp_path)) == [16, 16, 16]


def test_what_is_left_out_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, stored = Net(), contents()
    del stored["model.norm.bias"]
    save_file({**stored, "more": torch.ones(1)}, tmp_path / "m.safetensors")
    with caplog.at_level("INFO", "ds.fragment"):
        load_full(model, tmp_path / "m.safetensors", strict=False)
    assert "is loaded in part: missing 1 (model.norm.bias), unexpected 1 (more)" in caplog.text
    assert_holds(model, stored)


def test_arguments_are_named(tmp_path: Path) -> None:
    path, model = tmp_path / "m.safetensors", Net()
    save_full(model, path)
    wrong: list[Any] = [
        (
            lambda: load_full(model, path, map_names="x"),
            "map_names is a str, expected a mapping of names or a function",
        ),
        (lambda: load_full(model, path, map_names=lambda name: 3), "map_names gives 3 for 'model.embed.weight'"),
        (lambda: load_full(model, 5), "path is a int, expected a path of a file"),
        (lambda: load_full([], path), "model is a list, expected a torch.nn.Module"),
        (lambda: save_full(model, None), "path is a NoneType, expected a path of a file"),
        (lambda: save_full(model, path, include=5), "include is a int, expected patterns of names or a function"),
        (lambda: save_full(model, path, exclude=[]), "exclude is empty, expected patterns of names, or None"),
        (lambda: save_full(model, path, max_shard_bytes="5GB"), "max_shard_bytes is '5GB', expected a positive number"),
        (lambda: save_full(model, path, dtype="bf16"), "dtype is 'bf16', expected a floating-point dtype"),
        (lambda: save_full(model, path, metadata=[1]), "metadata is a list, expected a mapping of strings"),
        (lambda: save_full(model, path, optimizer=5), "optimizer is a int, expected torch.optim optimizers"),
    ]
    for call, words in wrong:
        told = raised(call)
        assert told is not None, words
        assert words in told[1]


def test_names_that_the_model_ignores(tmp_path: Path) -> None:
    model, stored = Net(), contents()
    model._keys_to_ignore_on_load_unexpected = [r"rotary\.inv_freq"]
    save_file({**stored, "model.rotary.inv_freq": torch.ones(2)}, tmp_path / "m.safetensors")
    load_full(model, tmp_path / "m.safetensors")
    save_file({**stored, "model.other": torch.ones(2)}, tmp_path / "m.safetensors")
    with pytest.raises(InvalidValueError, match=r"unexpected 1 \(model.other\)"):
        load_full(model, tmp_path / "m.safetensors")
