"""Checkpoints of real engines, consolidated without DeepSpeed, against DeepSpeed's result and the engine's values."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("needs DeepSpeed", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parent))

import ds_fragment
import torch
import torch.distributed as dist
from ds_fragment.zero_checkpoint import consolidate
from engines import ENV, TIMEOUT, Case, Net, make_engine, train
from oracles import differing, same
from ranks import run_ranks
from safetensors import safe_open
from test_moe import EAGER, EXPERT_RANKS, backward, make_mixture

STATES = ("exp_avg", "exp_avg_sq", "step")
DEEPSPEED = tuple(int(part) for part in importlib.metadata.version("deepspeed").partition("+")[0].split("."))
LOCAL = 2  # experts of a rank
# What a program without DeepSpeed makes of a folder.
PROGRAM = """
import sys
sys.modules["deepspeed"] = None  # importing it is an error
import torch
from ds_fragment.zero_checkpoint import consolidate, iter_zero_checkpoint
_, folder, out, optimizer = sys.argv
torch.save(dict(iter_zero_checkpoint(folder)), out + "/all.pt")
consolidate(folder, out, optimizer=optimizer == "True")
assert [name for name in sys.modules if name.partition(".")[0] == "deepspeed"] == ["deepspeed"]
"""


class Buffered(Net):
    """With buffers, one of integers, and one that is not saved."""

    def __init__(self, width: int = 1) -> None:
        super().__init__(width)
        self.register_buffer("seen", torch.arange(2**40, 2**40 + 3))
        self.register_buffer("mean", torch.randn(4))
        self.register_buffer("scratch", torch.randn(4), persistent=False)


def saved(rank: int, case: Case, folder: str, universal: bool) -> None:
    """Train, save; keep the engine's true values, its optimizer state, its buffers and DeepSpeed's own result."""
    engine = make_engine(case, net=Buffered)
    ds_fragment.attach(engine)
    for step in range(2):
        train(engine, step)
    engine.save_checkpoint(folder, tag="step2")
    found = {what: whole(engine, what) for what in ("value", *(STATES if case.stage != "none" else ()))}
    found["buffers"] = {name: engine.module.get_buffer(name).clone() for name in ("seen", "mean")}
    found["deepspeed"] = {}
    if rank == 0:
        if universal:
            convert(Path(folder))
        elif case.stage not in ("bf16opt", "none"):
            from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

            found["deepspeed"] = get_fp32_state_dict_from_zero_checkpoint(folder)
    torch.save(found, f"{folder}/truth-{rank}.pt")
    dist.barrier()
    engine.destroy()


def whole(engine: Any, what: str) -> dict[str, torch.Tensor]:
    params = dict(engine.module.named_parameters())
    if what != "value":
        params = {name: param for name, param in params.items() if param.requires_grad}
    return {name: tensor.clone() for name, tensor in ds_fragment.iter_full(list(params.items()), what)}


def convert(folder: Path) -> None:
    """Make DeepSpeed's universal checkpoint in the place of its own."""
    from deepspeed.checkpoint.ds_to_universal import main

    workers = {"num_extract_workers": 1, "num_merge_workers": 1}
    flags = {"keep_temp_folder": False, "strict": True, "inject_missing_state": True}
    where = {"input_folder": str(folder / "step2"), "output_folder": str(folder / "universal")}
    main(Namespace(**where, **workers, **flags))
    (folder / "latest").write_text("universal")


def consolidated(folder: Path, out: Path, optimizer: bool = True) -> tuple[dict[str, torch.Tensor], ...]:
    """What a process without DeepSpeed makes: all names, the file's tensors, the optimizer's."""
    out.mkdir()
    command = [sys.executable, "-c", PROGRAM, str(folder), str(out), str(optimizer)]
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    model = tensors(out / "model.safetensors")
    with safe_open(out / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    return torch.load(out / "all.pt"), model, tensors(out / metadata["optimizer"]) if optimizer else {}


def tensors(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)


def compare(case: Case, truth: dict[str, dict[str, torch.Tensor]], found: tuple[dict[str, torch.Tensor], ...]) -> None:
    everything, model, state = found
    tied = everything.pop("tied.weight")
    assert same(tied, everything["c.weight"])
    assert everything["frozen"].dtype == case.lp
    expected = {**truth["value"], **truth["buffers"]}
    expected["frozen"] = expected["frozen"].to(case.lp)  # nobody keeps it in fp32
    assert not differing(everything, expected)
    assert not differing(model, {name: fp32(tensor) for name, tensor in everything.items()})
    assert not differing(state, {f"{name}/{key}": truth[key][name] for key in STATES for name in truth[key]})
    theirs = truth["deepspeed"]
    theirs.pop("seen", None)  # DeepSpeed before 0.19.8 makes it fp32, which cannot hold it
    ours = {**everything, "tied.weight": tied, "mean": fp32(everything["mean"])}
    assert set(ours) - set(theirs) <= ({"seen"} if case.stage != "zero1" else {"seen", "frozen"}) or not theirs
    assert not differing({name: ours[name] for name in theirs}, theirs)


def fp32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype.is_floating_point else tensor


CASES = [
    (Case("zero1"), 2),
    (Case("zero1", "bf16"), 3),
    (Case("zero2", "bf16", gas=2), 2),
    (Case("zero2", "fp16", zero={"round_robin_gradients": True}), 3),
    (Case("zero2", offload=True), 2),
    (Case("zero3"), 1),
    (Case("zero3", "bf16"), 3),
    (Case("zero3", "bf16", zero={"sub_group_size": 60}, zero_init=True), 2),
    (Case("zero3", offload=True), 2),
    (Case("bf16opt", "bf16"), 3),
]


@pytest.mark.parametrize(("case", "ranks"), CASES, ids=str)
def test_what_engines_save(case: Case, ranks: int, tmp_path: Path) -> None:
    run_ranks(saved, ranks, case, str(tmp_path / "saved"), False, env=ENV, timeout=TIMEOUT)
    truth = torch.load(tmp_path / "saved" / "truth-0.pt")
    compare(case, truth, consolidated(tmp_path / "saved", tmp_path / "out"))


ALIGNED = [
    Case("zero1", "bf16", zero={"parameter_alignment": True, "round_robin_gradients": True}),
    Case("zero2", "bf16", offload=True, zero={"parameter_alignment": True}),
]


@pytest.mark.skipif(DEEPSPEED < (0, 19, 7), reason="DeepSpeed aligns parameters from 0.19.7 on")
@pytest.mark.parametrize("case", ALIGNED, ids=str)
def test_gaps_between_parameters(case: Case, tmp_path: Path) -> None:
    run_ranks(saved, 3, case, str(tmp_path / "saved"), False, env=ENV, timeout=TIMEOUT)
    truth = torch.load(tmp_path / "saved" / "truth-0.pt")
    compare(case, truth, consolidated(tmp_path / "saved", tmp_path / "out"))


@pytest.mark.parametrize(("case", "ranks"), [(Case("zero1", "bf16"), 3), (Case("zero3", "bf16"), 2)], ids=str)
def test_universal(case: Case, ranks: int, tmp_path: Path) -> None:
    run_ranks(saved, ranks, case, str(tmp_path / "saved"), True, env=ENV, timeout=TIMEOUT)
    truth = torch.load(tmp_path / "saved" / "truth-0.pt")
    compare(case, truth, consolidated(tmp_path / "saved", tmp_path / "out"))


def test_universal_of_round_robin_is_refused(tmp_path: Path) -> None:
    case = Case("zero2", "bf16", zero={"round_robin_gradients": True})
    run_ranks(saved, 2, case, str(tmp_path / "saved"), True, env=ENV, timeout=TIMEOUT)
    with pytest.raises(ds_fragment.FragmentError, match=r"universal' was made from .* with round_robin_gradients"):
        ds_fragment.zero_checkpoint.consolidate(tmp_path / "saved", tmp_path / "out")


def test_without_zero(tmp_path: Path) -> None:
    case = Case("none")
    run_ranks(saved, 2, case, str(tmp_path / "saved"), False, env=ENV, timeout=TIMEOUT)
    truth = torch.load(tmp_path / "saved" / "truth-0.pt")
    compare(case, {**truth, **{key: {} for key in STATES}}, consolidated(tmp_path / "saved", tmp_path / "out", False))


def mixture_saved(rank: int, case: Case, folder: str) -> None:
    engine = make_mixture(case)
    ds_fragment.attach(engine)
    for step in range(2):
        backward(engine, step)
        engine.step()
    engine.save_checkpoint(folder, tag="step2")
    torch.save({what: whole(engine, what) for what in ("value", *STATES)}, f"{folder}/truth-{rank}.pt")
    engine.destroy()


DATA_FIRST = {"use_data_before_expert_parallelism": True}


@pytest.mark.parametrize("case", [Case("zero1"), Case("zero2", "bf16"), Case("zero1", config=DATA_FIRST)], ids=str)
def test_experts(case: Case, tmp_path: Path) -> None:
    """Each expert-parallel rank has experts of its own under the same names: they come out under those of all."""
    run_ranks(mixture_saved, 4, case, str(tmp_path / "saved"), env=EAGER, timeout=TIMEOUT)
    everything, model, state = consolidated(tmp_path / "saved", tmp_path / "out")
    expected: dict[str, dict[str, torch.Tensor]] = {}
    for rank in range(4):
        found = torch.load(tmp_path / "saved" / f"truth-{rank}.pt")
        for key, tensors in found.items():
            names = {name: globally(name, rank // 2 if case.config else rank % EXPERT_RANKS) for name in tensors}
            expected.setdefault(key, {}).update((names[name], tensor) for name, tensor in tensors.items())
    assert len({name for name in everything if "experts" in name}) == 2 * LOCAL * EXPERT_RANKS
    assert not differing(everything, expected["value"])
    assert not differing(model, expected["value"])
    assert not differing(state, {f"{name}/{key}": expected[key][name] for key in STATES for name in expected[key]})


def globally(name: str, expert_rank: int) -> str:
    first, found, rest = name.partition(".deepspeed_experts.")
    return f"{first}{found}{expert_rank * LOCAL + int(rest[0])}{rest[1:]}" if found else name


def test_hyperparameters(tmp_path: Path) -> None:
    run_ranks(saved, 2, Case("zero2"), str(tmp_path / "saved"), False, env=ENV, timeout=TIMEOUT)
    consolidated(tmp_path / "saved", tmp_path / "out")
    (path,) = (tmp_path / "out").glob("*.optimizer")
    with safe_open(path, "pt") as file:
        groups = json.loads(file.metadata()["param_groups"])
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0]
    assert groups[0]["params"] == ["a.weight", "b.weight", "c.weight"]
    assert groups[1]["betas"] == [0.9, 0.999]


def functions_saved(rank: int, case: Case, folder: str) -> None:
    """The functions of `deepspeed.utils.zero_to_fp32` and ours, with the same arguments."""
    engine = make_engine(case, net=Buffered)
    train(engine, 0)
    engine.save_checkpoint(folder, tag="step1")
    if rank == 0:
        from deepspeed.utils import zero_to_fp32 as theirs
        from ds_train_utils import zero_to_fp32 as ours

        for frozen in (False, True):
            one = theirs.get_fp32_state_dict_from_zero_checkpoint(folder, exclude_frozen_parameters=frozen)
            two = ours.get_fp32_state_dict_from_zero_checkpoint(folder, exclude_frozen_parameters=frozen)
            one.pop("seen"), two.pop("seen")
            assert not differing(two, one)
            lazy = ours.get_fp32_state_dict_from_zero_checkpoint(folder, "step1", frozen, lazy_mode=True)
            lazy.pop("seen")
            assert not differing({name: tensor.contiguous() for name, tensor in lazy.items()}, one)
            assert {name: (each.shape, each.dtype) for name, each in lazy.items()} == {
                name: (each.shape, each.dtype) for name, each in one.items()
            }
        for name, size in (("ours", 500), ("theirs", None), ("ours", None)):
            module = {"theirs": theirs, "ours": ours}[name]
            module.convert_zero_checkpoint_to_fp32_state_dict(folder, f"{folder}/{name}-{size}", size)
        whole_files = [torch.load(f"{folder}/{name}-None/pytorch_model.bin") for name in ("theirs", "ours")]
        assert list(whole_files[0]) == list(whole_files[1])
        shards: dict[str, torch.Tensor] = {}
        index = json.loads(Path(folder, "ours-500", "pytorch_model.bin.index.json").read_text())
        for file in sorted(set(index["weight_map"].values())):
            part = torch.load(f"{folder}/ours-500/{file}")
            assert {name for name, at in index["weight_map"].items() if at == file} == set(part)
            shards |= part
        assert len(set(index["weight_map"].values())) > 1
        for found in (shards, whole_files[1]):
            assert found.pop("seen").dtype == torch.int64
            found["frozen"] = found["frozen"].to(whole_files[0]["frozen"].dtype)  # not fp32 in DeepSpeed before 0.19.8
            assert not differing(found, without(whole_files[0]))
        models = [module.load_state_dict_from_zero_checkpoint(Buffered(), folder) for module in (theirs, ours)]
        assert not differing(without(models[1].state_dict()), without(models[0].state_dict()))
        tag = f"{folder}/step1"
        stage = 3 if case.is_zero3 else 2
        assert ours.get_optim_files(tag) == theirs.get_optim_files(tag)
        assert ours.get_model_state_files(tag) == theirs.get_model_state_files(tag)
        assert ours.get_model_state_file(tag, stage) == theirs.get_model_state_file(tag, stage)
    dist.barrier()
    engine.destroy()


def without(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in state.items() if name != "seen"}


@pytest.mark.parametrize("case", [Case("zero2", "bf16"), Case("zero3", "bf16")], ids=str)
def test_the_functions_of_deepspeed(case: Case, tmp_path: Path) -> None:
    run_ranks(functions_saved, 2, case, str(tmp_path), env=ENV, timeout=TIMEOUT)


def goes_on(rank: int, folder: str, first: Case, second: Case) -> None:
    """A checkpoint of one engine, consolidated, loaded into another and trained further."""
    engine = make_engine(first)
    ds_fragment.attach(engine)
    for step in range(2):
        train(engine, step)
    engine.save_checkpoint(f"{folder}/deepspeed", tag="step2")
    truth = {what: whole(engine, what) for what in ("value", *STATES)}
    for step in range(2, 4):
        train(engine, step)
    later = whole(engine, "value")
    engine.destroy()
    if rank == 0:
        consolidate(f"{folder}/deepspeed", f"{folder}/out", optimizer=True)
    dist.barrier()
    other = make_engine(second, lr=0.9)
    ds_fragment.attach(other)
    train(other, 7)
    ds_fragment.load_full(other, f"{folder}/out", optimizer=True)
    for what, tensors_of in truth.items():
        assert not differing(whole(other, what), tensors_of), what
    for step in range(2, 4):
        train(other, step)
    assert not differing(whole(other, "value"), later)
    other.destroy()


@pytest.mark.parametrize(("first", "second"), [("zero2", "zero3"), ("zero3", "zero1")])
def test_a_consolidated_run_goes_on_in_another_engine(tmp_path: Path, first: str, second: str) -> None:
    cases = Case(first, "bf16"), Case(second, "bf16")
    run_ranks(goes_on, 2, str(tmp_path), *cases, env=ENV, timeout=TIMEOUT)
