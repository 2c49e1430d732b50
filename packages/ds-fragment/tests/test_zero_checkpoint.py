"""Folders in DeepSpeed's layout, made here: right ones, damaged ones, and ones that want to run something.

Those that DeepSpeed itself saved are in tests-integration/deepspeed/test_zero_checkpoint.py.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ds_fragment import commands, load_full
from ds_fragment.checkpoint.writer import Entry
from ds_fragment.errors import CheckpointError, InvalidValueError
from ds_fragment.zero_checkpoint import consolidate, iter_zero_checkpoint, workers, zero_to_fp32
from ds_fragment.zero_checkpoint.arguments import bytes_of, dtype_of
from ds_fragment.zero_checkpoint.sources import Piece, Source
from ds_fragment.zero_checkpoint.unpickle import Opaque, Stored, read_pt
from safetensors import safe_open

RANKS = 3
SHAPES = [{"a.weight": (7, 5), "b.weight": (2, 3, 4)}, {"scale": (1,), "a.bias": (7,), "none": (0, 4)}]


def values() -> dict[str, torch.Tensor]:
    """The parameters that are trained."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for group in SHAPES for name, shape in group.items()}


def moments(value: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"exp_avg": value * 0.5, "exp_avg_sq": value.square()}


def model_state(**more: Any) -> dict[str, Any]:
    """What DeepSpeed saves of the model, but for the weights."""
    trained = {name: tensor.bfloat16() for name, tensor in values().items()}
    module = OrderedDict(trained, frozen=torch.arange(6.0).view(2, 3).t().bfloat16(), seen=torch.tensor([2**40]))
    module["again"] = module["a.weight"]
    shapes = [OrderedDict((name, torch.Size(shape)) for name, shape in group.items()) for group in SHAPES]
    state = {"module": module, "buffer_names": ["seen"], "param_shapes": shapes, "shared_params": {"again": "a.weight"}}
    return {**state, "global_steps": 4, "ds_version": "0.19.8", "ds_config": {}, **more}


def optimizer_state(flats: list[torch.Tensor], states: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    groups = [{"lr": 0.1, "betas": (0.9, 0.999), "params": [index]} for index in range(len(flats))]
    state = {index: {"step": torch.tensor(4.0), **each} for index, each in enumerate(states)}
    return {"state": state, "param_groups": groups}


def save_zero2(folder: Path, align: int = 1) -> Path:
    """Flat groups, each parameter padded to ``align`` elements, cut into equal partitions; the last ones shortened."""
    tag = folder / "global_step4"
    tag.mkdir(parents=True)
    (folder / "latest").write_text("global_step4")
    torch.save(model_state(), tag / "mp_rank_00_model_states.pt")
    params = values()
    flat: dict[str, list[torch.Tensor]] = {"": [], "exp_avg": [], "exp_avg_sq": []}
    gaps = []
    for group in SHAPES:
        names = list(group)
        gaps.append([-params[name].numel() % align if name != names[-1] else 0 for name in names])
        for key in flat:
            padded = []
            for name, gap in zip(names, gaps[-1], strict=True):
                value = params[name] if not key else moments(params[name])[key]
                padded += [value.flatten(), torch.full((gap,), math.nan)]
            flat[key].append(torch.cat(padded))
    for rank in range(RANKS):
        mine: dict[str, list[torch.Tensor]] = {key: [] for key in flat}
        paddings = []
        for key, groups in flat.items():
            for whole in groups:
                part = -(-whole.numel() // RANKS)
                mine[key].append(whole[rank * part : (rank + 1) * part].clone())
                if not key:
                    paddings.append(part - mine[key][-1].numel())
        states = [{key: mine[key][i] for key in ("exp_avg", "exp_avg_sq")} for i in range(len(SHAPES))]
        optimizer = {
            "base_optimizer_state": optimizer_state(mine[""], states),
            "single_partition_of_fp32_groups": mine[""],
            "group_paddings": paddings,
            "param_alignment_paddings": gaps,
            "partition_count": [RANKS] * len(SHAPES),
            "zero_stage": 2,
        }
        torch.save({"optimizer_state_dict": optimizer}, tag / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return tag


def save_zero3(folder: Path) -> Path:
    """Each parameter cut into equal parts."""
    tag = folder / "global_step4"
    tag.mkdir(parents=True)
    (folder / "latest").write_text("global_step4")
    state = model_state()
    frozen = state["module"]["frozen"].float()
    for rank in range(RANKS):
        module = {name: each if name == "seen" else torch.empty(0) for name, each in state["module"].items()}
        fragments = {"frozen": part(frozen, rank), "empty": torch.empty(0)}
        more = {"module": module, "frozen_param_fragments": fragments}
        more["frozen_param_shapes"] = {"frozen": torch.Size([3, 2]), "empty": torch.Size([2, 0])}
        torch.save({**state, **more}, tag / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        flats, states = [], []
        for group in SHAPES:
            mine = {name: values()[name] for name in group}
            flats.append(torch.cat([part(value, rank) for value in mine.values()]))
            keys = ("exp_avg", "exp_avg_sq")
            states.append({key: torch.cat([part(moments(v)[key], rank) for v in mine.values()]) for key in keys})
        optimizer = {
            "optimizer_state_dict": optimizer_state(flats, states),
            "fp32_flat_groups": flats,
            "partition_count": RANKS,
            "zero_stage": 3,
        }
        torch.save({"optimizer_state_dict": optimizer}, tag / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return tag


def part(value: torch.Tensor, rank: int) -> torch.Tensor:
    size = -(-value.numel() // RANKS)
    return torch.cat([value.flatten(), torch.full((RANKS,), math.nan)])[rank * size : (rank + 1) * size].clone()


def check(folder: Path, frozen_dtype: torch.dtype = torch.bfloat16) -> None:
    found = dict(iter_zero_checkpoint(folder))
    expected = values()
    assert found.pop("again") is found["a.weight"]
    assert found.pop("frozen").tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    assert found.pop("seen").tolist() == [2**40]
    found.pop("empty", None)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(tensor.dtype == torch.float32 for tensor in found.values())


def save_experts(folder: Path) -> dict[str, torch.Tensor]:
    """Two ranks with two experts each; an expert has a weight with two names, a frozen parameter and a buffer."""
    folder.mkdir()
    prefix, expected = "layer.deepspeed_moe.experts.deepspeed_experts", {"dense": torch.randn(3)}
    names = [f"{prefix}.{expert}" for expert in range(2)]
    shapes = [{"dense": (3,)}, {f"{name}.weight": (2, 2) for name in names}]
    state = {
        "module": {"dense": expected["dense"].bfloat16()},
        "buffer_names": [f"{name}.seen" for name in names],
        "param_shapes": shapes,
        "shared_params": {f"{name}.again": f"{name}.weight" for name in names},
    }
    torch.save(state, folder / "mp_rank_00_model_states.pt")
    for expert in range(4):
        name = f"{prefix}.{expert}"
        mine = {"weight": torch.randn(2, 2), "frozen": torch.randn(2), "seen": torch.tensor(expert)}
        mine["again"] = mine["weight"]
        expected |= {f"{name}.{key}": value for key, value in mine.items()}
        lp = {f"{name}.{key}": mine[key].bfloat16() for key in ("weight", "again")}
        rest = {f"{name}.{key}": mine[key] for key in ("frozen", "seen")}
        torch.save({**lp, **rest}, folder / f"layer_0_expert_{expert}_mp_rank_00_model_states.pt")
    for rank in range(2):
        dense = expected["dense"][2 * rank : 2 * rank + 2].clone()
        experts = torch.cat([expected[f"{prefix}.{2 * rank + each}.weight"].flatten() for each in range(2)])
        optimizer = {
            "base_optimizer_state": optimizer_state([dense, experts], [{}, {}]),
            "single_partition_of_fp32_groups": [dense, experts],
            "group_paddings": [rank, 0],
            "partition_count": [2, 1],
        }
        torch.save({"optimizer_state_dict": optimizer}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return expected


def test_experts(tmp_path: Path) -> None:
    expected = save_experts(tmp_path / "saved")
    found = dict(iter_zero_checkpoint(tmp_path / "saved"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    trained = dict(iter_zero_checkpoint(tmp_path / "saved", exclude_frozen_parameters=True))
    assert trained.keys() == {name for name in expected if not name.endswith("frozen")}
    (tmp_path / "saved" / "layer_0_expert_2_mp_rank_00_model_states.pt").unlink()
    with pytest.raises(CheckpointError, match=r"has no layer_\*_expert_\*_model_states.pt with '.*experts.2.weight'"):
        consolidate(tmp_path / "saved", tmp_path / "out")


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118  (not a dict)


@pytest.mark.parametrize("align", [1, 4])
def test_zero2(align: int, tmp_path: Path) -> None:
    save_zero2(tmp_path / "saved", align)
    check(tmp_path / "saved")


def test_zero3(tmp_path: Path) -> None:
    save_zero3(tmp_path / "saved")
    check(tmp_path / "saved")


@pytest.mark.parametrize("save", [save_zero2, save_zero3])
@pytest.mark.parametrize("processes", [1, 2])
def test_files(save: Callable[[Path], Path], processes: int, tmp_path: Path) -> None:
    tag = save(tmp_path / "saved")
    told: list[tuple[int, int]] = []
    summary = consolidate(
        tag,
        tmp_path / "new" / "folder",
        optimizer=True,
        max_shard_bytes=150,
        processes=processes,
        metadata={"made": "here"},
        progress=lambda done, total: told.append((done, total)),
    )
    index = json.loads(summary.path.read_text())
    assert (summary.path.name, index["metadata"]["made"]) == ("model.safetensors.index.json", "here")
    found: dict[str, torch.Tensor] = {}
    for name in set(index["weight_map"].values()):
        found |= read(summary.path.with_name(name))[0]
    assert len(found) == summary.parameters
    assert all(torch.equal(found[name], value) for name, value in values().items())
    assert found["frozen"].dtype == torch.float32
    assert json.loads(index["metadata"]["tied"]) == {"again": "a.weight"}
    beside = summary.path.with_name(index["metadata"]["optimizer"] + ".index.json")
    index = json.loads(beside.read_text())
    state: dict[str, torch.Tensor] = {}
    for name in set(index["weight_map"].values()):
        state |= read(summary.path.with_name(name))[0]
    for name, value in values().items():
        for key, expected in moments(value).items():
            assert value.numel() == 0 or torch.equal(state[f"{name}/{key}"], expected)
    assert state["scale/step"].tolist() == 4.0
    groups = json.loads(index["metadata"]["param_groups"])
    assert [(group["lr"], group["betas"], group["params"]) for group in groups] == [
        (0.1, [0.9, 0.999], list(names)) for names in SHAPES
    ]
    assert told[-1] == (summary.nbytes, summary.nbytes)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert len(list(summary.path.parent.iterdir())) == summary.files + 2  # two indices, nothing left behind


def test_the_file_is_loaded_into_a_model(tmp_path: Path) -> None:
    save_zero2(tmp_path / "saved")
    path = tmp_path / "model.safetensors"
    assert consolidate(tmp_path / "saved", path, dtype=torch.bfloat16).path == path
    model = torch.nn.Module()
    model.a = torch.nn.Linear(5, 7, dtype=torch.bfloat16)
    load_full(model, path, strict=False)
    assert torch.equal(model.a.weight, values()["a.weight"].bfloat16())


def test_frozen_parameters_are_left_out(tmp_path: Path) -> None:
    save_zero2(tmp_path / "saved")
    consolidate(tmp_path / "saved", tmp_path / "model.safetensors", exclude_frozen_parameters=True, dtype=None)
    found, _ = read(tmp_path / "model.safetensors")
    assert found.keys() == {*values(), "seen"}
    assert {tensor.dtype for tensor in found.values()} == {torch.float32, torch.int64}


class Runs:
    """Unpickling it would run a program."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("place", ["model", "optimizer", "module", "shape", "storage"])
@pytest.mark.parametrize("function", [os.system, eval, exec, subprocess.check_call, getattr, torch.load])
def test_nothing_is_run(place: str, function: Any, tmp_path: Path) -> None:
    tag, mark = save_zero2(tmp_path / "saved"), tmp_path / "mark"
    argument: Any = {os.system: f"touch {mark}", subprocess.check_call: ["touch", str(mark)]}.get(
        function, f"open({str(mark)!r}, 'w')"
    )
    runs = Runs(function, argument)
    path = tag / ("zero_pp_rank_1_mp_rank_00_optim_states.pt" if place == "optimizer" else "mp_rank_00_model_states.pt")
    state = torch.load(path)
    if place == "module":
        state["module"]["extra_state"] = runs
    elif place == "shape":
        state["param_shapes"][0]["a.weight"] = runs
    elif place == "storage":
        state["module"]["frozen"] = Runs(torch._utils._rebuild_tensor_v2, runs, 0, (1,), (1,), False, OrderedDict())
    else:
        state["client"] = runs
    torch.save(state, path)
    if place in ("shape", "storage"):
        with pytest.raises(CheckpointError, match="damaged"):
            consolidate(tmp_path / "saved", tmp_path / "out")
    else:
        consolidate(tmp_path / "saved", tmp_path / "out")
    assert not mark.exists()


def test_what_is_not_a_tensor_is_inert(tmp_path: Path) -> None:
    class_of_a_stranger = Runs(argparse.Namespace, 1, 2)
    numbers = {
        "size": torch.Size([2]),
        "dtype": torch.bfloat16,
        "set": {1},
        "bytes": b"\x00\xff",
        "array": bytearray(b"\xff"),
        "tuple": (1, None),
    }
    torch.save({"stranger": class_of_a_stranger, **numbers}, tmp_path / "a.pt")
    found = read_pt(tmp_path / "a.pt")
    stranger = found.pop("stranger")
    assert isinstance(stranger, Opaque)
    assert stranger.args == (1, 2)
    assert found == numbers


def test_no_memory_is_taken_for_a_number(tmp_path: Path) -> None:
    torch.save(Runs(bytearray, 1 << 50), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"a.pt' is damaged: TypeError"):
        read_pt(tmp_path / "a.pt")


def test_tensors_of_every_kind(tmp_path: Path) -> None:
    base = torch.arange(24.0)
    tensors = {
        "view": base.view(4, 6)[1:3, 2:],
        "transposed": base.view(4, 6).t(),
        "expanded": torch.ones(1).expand(3),
        "empty": torch.empty(0, 2),
        "number": torch.tensor(3),
        "bool": torch.tensor([True, False]),
        "parameter": torch.nn.Parameter(base.half()),
        "complex": torch.view_as_complex(base.clone().view(12, 2)),
        "fp8": base.to(torch.float8_e4m3fn),
        "uint16": torch.arange(3).to(torch.uint16),
    }
    saved = {"module": tensors, "buffer_names": [], "param_shapes": None}
    torch.save(saved, tmp_path / "mp_rank_00_model_states.pt")
    found = dict(iter_zero_checkpoint(tmp_path))
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].contiguous().view(-1).view(torch.uint8), raw(tensor)), name


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def rank_file(tag: Path, rank: int = 1) -> Path:
    return next(tag.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"))


def model_file(tag: Path) -> Path:
    return tag / "mp_rank_00_model_states.pt"


def truncate(path: Path, size: int | None = None) -> None:
    os.truncate(path, path.stat().st_size // 2 if size is None else size)


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    state = torch.load(path)
    change(state)
    torch.save(state, path)


def corrupt_pickle(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(b"param_shapes")] ^= 1
    path.write_bytes(data)


def inner_state(state: Any) -> Any:
    return state["optimizer_state_dict"]["base_optimizer_state"]["state"][0]


def other_step(state: Any) -> None:
    inner_state(state)["step"] += 1


def other_shape(state: Any) -> None:
    state["param_shapes"][0]["b.weight"] = torch.Size([2, 3, 3])


def shorter(state: Any) -> None:
    groups = state["optimizer_state_dict"]["single_partition_of_fp32_groups"]
    groups[0] = groups[0][:-1].clone()


def ranks_of(count: int) -> Callable[[Any], None]:
    return lambda state: state["optimizer_state_dict"].update(partition_count=[count, count])


DAMAGED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated optimizer": (lambda tag: truncate(rank_file(tag)), "zero_pp_rank_1_.*pt' is cut short"),
    "truncated model": (lambda tag: truncate(model_file(tag)), "mp_rank_00_model_states.pt' is cut short"),
    "empty file": (lambda tag: truncate(rank_file(tag, 2), 0), r"zero_pp_rank_2_.*pt' is empty \(0 bytes\)"),
    "zeros": (lambda tag: rank_file(tag).write_bytes(bytes(999)), "rank_1_.*' is not a file of torch.save"),
    "old format": (
        lambda tag: torch.save({}, rank_file(tag), _use_new_zipfile_serialization=False),
        "rank_1_.*' has the format of torch before 1.6",
    ),
    "bad checksum": (lambda tag: corrupt_pickle(model_file(tag)), "model_states.pt' is damaged: BadZipFile"),
    "missing rank": (lambda tag: rank_file(tag).unlink(), "zero_pp_rank_1_mp_rank_00_optim_states.pt' is missing"),
    "missing last rank": (lambda tag: rank_file(tag, 2).unlink(), "rank_0_.*of 3 data-parallel ranks.* of 2: some are"),
    "missing model": (lambda tag: model_file(tag).unlink(), "mp_rank_00_model_states.pt' is missing"),
    "no optimizer": (lambda tag: [rank_file(tag, rank).unlink() for rank in range(RANKS)], r"no \*_optim_states.pt"),
    "of two saves": (
        lambda tag: shutil.copy(rank_file(tag), tag / f"bf16_{rank_file(tag).name}"),
        "'bf16_zero_pp_rank_1_.* and 'zero_pp_rank_1_.* are of the same rank",
    ),
    "other ranks": (
        lambda tag: edit(rank_file(tag), ranks_of(2)),
        "rank_1_.* of 2 data-parallel ranks.*different saves",
    ),
    "other step": (lambda tag: edit(rank_file(tag), other_step), "rank_1_.*optimizer step 5, .*rank_0_.* of step 4"),
    "other shapes": (lambda tag: edit(model_file(tag), other_shape), "group 0, but its parameters have 53: .*rank_0_"),
    "short partition": (lambda tag: edit(rank_file(tag, 0), shorter), "rank_0_.*' has 19 elements of group 0, other"),
    "short last one": (lambda tag: edit(rank_file(tag, 2), shorter), "'b.weight' needs elements .*rank_2_"),
    "no group": (
        lambda tag: edit(model_file(tag), lambda state: state["param_shapes"].pop()),
        "model_states.pt' has the shapes of 1 groups",
    ),
    "not a model": (lambda tag: torch.save({}, model_file(tag)), "model_states.pt' is not the model state"),
    "not an optimizer": (lambda tag: torch.save([1], rank_file(tag)), "rank_1_.* is not the optimizer state of a ZeRO"),
    "tensor parallel": (
        lambda tag: shutil.copy(model_file(tag), tag / "mp_rank_01_model_states.pt"),
        "mp_rank_01_model_states.pt' is of another tensor- or pipeline-parallel rank",
    ),
    "pipeline": (
        lambda tag: (tag / "layer_01-model_00-model_states.pt").touch(),
        "layer_01-.*another tensor",
    ),
    "latest names nothing": (
        lambda tag: (tag.parent / "latest").write_text("x"),
        "latest' names 'x', but .*step4",
    ),
    "latest is empty": (lambda tag: (tag.parent / "latest").write_text(""), "latest' is empty: pass tag=..., one of"),
    "no latest": (
        lambda tag: (tag.parent / "latest").unlink(),
        "no file 'latest': pass tag=..., one of .*step4",
    ),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_folder_is_named(what: str, tmp_path: Path) -> None:
    damage, message = DAMAGED[what]
    damage(save_zero2(tmp_path / "saved"))
    with pytest.raises(CheckpointError, match=message):
        consolidate(tmp_path / "saved", tmp_path / "out")
    assert not (tmp_path / "out").exists()


DAMAGED_ZERO3: dict[str, tuple[Callable[[Any], Any], str, str]] = {
    "other step": (lambda state: state.update(global_steps=5), "model", "zero_pp_rank_1_.* is of step 5, .* of step 4"),
    "no frozen": (
        lambda state: state["frozen_param_fragments"].pop("frozen"),
        "model",
        "rank_1_.*has not all of its values",
    ),
    "short frozen": (
        lambda state: state["frozen_param_fragments"].update(frozen=torch.ones(1)),
        "model",
        "zero_pp_rank_1_.* has not all of its values of the frozen parameter 'frozen'",
    ),
    "short": (
        lambda state: state["optimizer_state_dict"]["fp32_flat_groups"].__setitem__(0, torch.ones(3)),
        "optim",
        "rank_1_.*' has flat weights of .3, 4. elements",
    ),
}


@pytest.mark.parametrize("what", DAMAGED_ZERO3)
def test_a_damaged_folder_of_zero3_is_named(what: str, tmp_path: Path) -> None:
    change, kind, message = DAMAGED_ZERO3[what]
    tag = save_zero3(tmp_path / "saved")
    edit(next(tag.glob(f"*zero_pp_rank_1_*{kind}*")), change)
    with pytest.raises(CheckpointError, match=message):
        consolidate(tmp_path / "saved", tmp_path / "out")


def test_a_parameter_without_values_is_named(tmp_path: Path) -> None:
    tag = save_zero3(tmp_path / "saved")
    for path in tag.glob("*model_states.pt"):
        edit(path, lambda state: state["module"].update(forgotten=torch.empty(0)))
    with pytest.raises(CheckpointError, match=r"'forgotten' is in the module of .*, but nothing in"):
        consolidate(tmp_path / "saved", tmp_path / "out")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["model.safetensors"], "looks like a model in safetensors files"),
        (["__0_0.distcp", ".metadata"], "of torch.distributed.checkpoint"),
        (["pytorch_model.bin"], "looks like a state dict of torch.save"),
        (["zero_pp_rank_0_mp_rank_00_optim_states.pt"], "optimizer states only"),
        (["something"], r"it holds \['something'\]"),
        ([], "it holds nothing"),
    ],
)
def test_another_folder_says_what_it_looks_like(names: list[str], message: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=f"'{tmp_path}' has no file 'latest': .*{message}"):
        consolidate(tmp_path, tmp_path / "out")


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"checkpoint_dir is .*nowhere', which is not a folder"):
        consolidate(tmp_path / "nowhere", tmp_path / "out")
    save_zero2(tmp_path / "saved")
    with pytest.raises(CheckpointError, match=r"tag is 'x', but .*: there are \['global_step4'\]"):
        consolidate(tmp_path / "saved", tmp_path / "out", tag="x")


def test_without_zero(tmp_path: Path) -> None:
    state = model_state(param_shapes=None, shared_params=None, optimizer={"state": {}, "param_groups": []})
    torch.save(state, tmp_path / "mp_rank_00_model_states.pt")
    found = dict(iter_zero_checkpoint(tmp_path))
    assert found["again"] is found["a.weight"]
    with pytest.raises(CheckpointError, match=r"without ZeRO: .*Leave optimizer=True out"):
        consolidate(tmp_path, tmp_path / "out", optimizer=True)
    state["optimizer"]["fp32_groups_flat"] = [torch.ones(1)]
    torch.save(state, tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointError, match="fp32 weights are in the optimizer state, which does not say whose"):
        consolidate(tmp_path, tmp_path / "out")


def test_a_universal_checkpoint_of_tensor_parallel_ranks(tmp_path: Path) -> None:
    """Its parameters are whole, those of the module are not."""
    for rank in range(2):
        state = model_state(shared_params={"again": "a.weight"})
        del state["module"]["frozen"]
        state["param_shapes"][0]["a.weight"] = torch.Size([7, 3])
        torch.save(state, tmp_path / f"mp_rank_0{rank}_model_states.pt")
    for name, value in values().items():
        (tmp_path / "zero" / name).mkdir(parents=True)
        torch.save({"param": value, "cat_dim": 1}, tmp_path / "zero" / name / "fp32.pt")
    found = dict(iter_zero_checkpoint(tmp_path))
    assert all(torch.equal(found[name], value) for name, value in values().items())
    torch.save(model_state(), tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointError, match=r"'frozen' is in the module of .*, but nothing in"):
        consolidate(tmp_path, tmp_path / "out")
    shutil.rmtree(tmp_path / "zero" / "scale")
    with pytest.raises(CheckpointError, match=r"zero/scale/fp32.pt' is missing"):
        consolidate(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("processes", [1, 2])
def test_state_that_is_not_of_the_elements_is_named(processes: int, tmp_path: Path) -> None:
    tag = save_zero2(tmp_path / "saved")
    for rank in range(RANKS):
        edit(
            rank_file(tag, rank),
            lambda state: state["optimizer_state_dict"]["base_optimizer_state"]["state"][0].update(
                row=torch.ones(2, 2)
            ),
        )
    with pytest.raises(CheckpointError, match=r"rank_0_.* has 'row' of 'a.weight' as a tensor of shape \(2, 2\)"):
        consolidate(tmp_path / "saved", tmp_path / "out", optimizer=True, processes=processes)
    assert not (tmp_path / "out").exists()


def test_a_process_that_is_killed_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = {f"layer{i}": torch.randn(64) for i in range(3000)}
    torch.save({"module": params, "param_shapes": None}, tmp_path / "mp_rank_00_model_states.pt")
    started: list[subprocess.Popen[bytes]] = []
    start = workers._start
    monkeypatch.setattr(workers, "_start", lambda stack: started.append(start(stack)) or started[-1])
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match=r"process 1 of those that write died \(exit code -9\)"):
        consolidate(
            tmp_path, out, max_shard_bytes=1500 * 256, processes=2, progress=lambda done, total: started[1].kill()
        )
    assert all(process.poll() is not None for process in started)
    assert not list(out.iterdir())


def test_an_error_of_a_process_comes_back(tmp_path: Path) -> None:
    gone = Stored(str(tmp_path / "gone.pt"), 0, torch.float32, torch.Size([2]), (1,))
    sources: list[Source | float] = [
        Source(name, gone.shape, gone.dtype, (Piece(gone, 0, 2),)) for name in ("one", "two")
    ]
    entries = [Entry(name, gone.dtype, gone.shape) for name in ("one", "two")]
    job = workers.Job(workers.Part(tmp_path / "m.safetensors", sources, entries, {}), None, 8, "0123abcd")
    with pytest.raises(CheckpointError, match=r"gone.pt' cannot be read"):
        workers.run(job, job.writer(), 2, lambda done: None)
    assert not list(tmp_path.iterdir())


def test_a_file_that_shrinks_is_named(tmp_path: Path) -> None:
    tag = save_zero2(tmp_path / "saved")
    tensors = iter_zero_checkpoint(tmp_path / "saved")
    next(tensors)
    truncate(rank_file(tag, 0), 64)
    with pytest.raises(CheckpointError, match=r"zero_pp_rank_0_.* ends before byte .*: it is cut short"):
        dict(tensors)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_shard_bytes": 0}, "max_shard_bytes is 0"),
        ({"processes": -1}, "processes is -1"),
        ({"output": "nowhere/model.safetensors"}, "folder does not exist"),
        ({"output": "saved/latest"}, "which is a file"),
        ({"output": "saved/folder.safetensors"}, "which is a folder"),
    ],
)
def test_arguments(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_zero2(tmp_path / "saved")
    (tmp_path / "saved" / "folder.safetensors").mkdir()
    output = tmp_path / arguments.pop("output", "out")
    with pytest.raises(InvalidValueError, match=message):
        consolidate(tmp_path / "saved", output, **arguments)


def command(*arguments: str) -> int:
    return commands.main(["consolidate", *arguments])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tag = save_zero3(tmp_path / "saved")
    out = tmp_path / "out"
    assert (
        command(str(tmp_path / "saved"), str(out), "--optimizer", "--dtype", "bfloat16", "--max-shard-size", "1MB") == 0
    )
    told = capsys.readouterr()
    assert told.out.startswith(f"{out / 'model.safetensors'}: 8 tensors, ")
    assert read(out / "model.safetensors")[0]["scale"].dtype == torch.bfloat16
    truncate(rank_file(tag))
    assert command(str(tmp_path / "saved"), str(out), "--quiet") == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("ds-fragment: '")
    assert "Traceback" not in told.err
    assert command(str(tmp_path / "saved"), str(out), "--max-shard-size", "5 apples") == 2
    assert "the size is '5 apples'" in capsys.readouterr().err


def test_sizes_and_dtypes() -> None:
    assert [bytes_of(size) for size in ("5GB", "500 MiB", 7, "7")] == [5 * 10**9, 500 << 20, 7, 7]
    assert dtype_of("torch.float32") is dtype_of("fp32") is dtype_of(torch.float32) is torch.float32
    with pytest.raises(InvalidValueError, match="the size is '0'"):
        bytes_of("0")
    with pytest.raises(InvalidValueError, match=r"dtype is torch.int64, expected one of float32, float16"):
        dtype_of(torch.int64)


@pytest.mark.parametrize("save", [save_zero2, save_zero3])
def test_the_functions_of_deepspeed(save: Callable[[Path], Path], tmp_path: Path) -> None:
    save(tmp_path / "saved")
    found = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(tmp_path / "saved")
    assert found["again"] is found["a.weight"]
    zero_to_fp32.convert_zero_checkpoint_to_state_dict(
        tmp_path / "saved", tmp_path / "out", "bf16", safe_serialization=True
    )
    assert torch.equal(read(tmp_path / "out" / "model.safetensors")[0]["a.weight"], values()["a.weight"].bfloat16())
    zero_to_fp32.convert_zero_checkpoint_to_fp32_state_dict(tmp_path / "saved", tmp_path / "out")
    pickled = torch.load(tmp_path / "out" / "pytorch_model.bin")
    assert pickled.keys() == found.keys()
    assert pickled["again"].data_ptr() == pickled["a.weight"].data_ptr()
    assert all(torch.equal(pickled[name], found[name].to(pickled[name].dtype)) for name in found)
    with pytest.raises(InvalidValueError, match=r"output_dir is .*latest', which is a file"):
        zero_to_fp32.convert_zero_checkpoint_to_fp32_state_dict(tmp_path / "saved", tmp_path / "saved" / "latest")
    with pytest.raises(CheckpointError, match=r"has no \*_optim_states.pt"):
        zero_to_fp32.get_optim_files(tmp_path)


def test_memory_is_that_of_the_largest_parameter(tmp_path: Path) -> None:
    """256 MiB in tensors of 4 MiB."""
    params = {f"layer{i}": torch.randn(1 << 20) for i in range(64)}
    torch.save({"module": params, "param_shapes": None}, tmp_path / "mp_rank_00_model_states.pt")
    del params
    program = (
        "import resource, sys\n"
        "from ds_fragment.zero_checkpoint import consolidate\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "consolidate(sys.argv[1], sys.argv[2])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    arguments = [sys.executable, "-c", program, str(tmp_path), str(tmp_path / "out")]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=100, check=True)
    assert int(done.stdout) < 32 << 10  # KiB


def test_errors_travel(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_pt(tmp_path / "nothing.pt")
    assert str(pickle.loads(pickle.dumps(caught.value))) == f"'{tmp_path / 'nothing.pt'}' is missing"


def test_metadata_that_a_file_cannot_have(tmp_path: Path) -> None:
    with pytest.raises(InvalidValueError, match="metadata has 'tied', which a save sets itself"):
        consolidate(tmp_path, tmp_path / "m.safetensors", metadata={"tied": "x"})
    with pytest.raises(InvalidValueError, match="metadata has 'step': 3, expected strings"):
        consolidate(tmp_path, tmp_path / "m.safetensors", metadata={"step": 3})  # type: ignore[dict-item]
