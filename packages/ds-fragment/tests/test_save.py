"""What can be saved beside a module: mappings, pairs, a part by patterns, pipeline stages; and in the background."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ds_fragment import Shadow, attach, iter_full, load_full, save_full
from ds_fragment.checkpoint import disk
from ds_fragment.checkpoint.files import Reader
from fragment_oracle import assert_same, raised
from ranks import run_ranks
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module


class Net(nn.Module):
    """A tied weight, a LoRA pair, and a buffer."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(5, 3)
        self.lora_a, self.lora_b = nn.Linear(3, 2, bias=False), nn.Linear(2, 3, bias=False)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


LORA = {"lora_a.weight", "lora_b.weight"}


def sharded(seed: int = 0) -> Net:
    model = Net(seed)
    fully_shard(model)
    return model


def _kinds(rank: int, folder: str) -> None:
    model, path = sharded(), Path(folder, "m.safetensors")
    whole = dict(iter_full(model))

    def stored() -> dict[str, torch.Tensor]:
        dist.barrier()  # nobody writes the next one before all have read
        found = load_file(path)
        dist.barrier()
        return found

    save_full(model, path, include="*lora_*")
    found = stored()
    assert found.keys() == LORA
    for name in LORA:
        assert_same(found[name], whole[name], name)
    save_full(model, path, exclude=["*lora_*", "norm.*"])
    assert stored().keys() == {"embed.weight"}
    save_full(model, path, include=lambda name: name in ("head.weight", "norm.weight"))
    assert stored().keys() == {"head.weight", "norm.weight"}, "the name of a tied tensor that was chosen"
    renamed = ((f"adapter.{name}", param) for name, param in model.named_parameters() if "lora" in name)
    save_full(renamed, path)
    assert_same(stored()["adapter.lora_a.weight"], whole["lora_a.weight"])
    state = model.state_dict()
    save_full({**state, "more": torch.arange(3)}, path)
    found = stored()
    assert found.keys() == {*state, "more"}
    assert found["more"].dtype == torch.int64
    save_full({**state, "more": torch.arange(3)}, path, dtype=torch.bfloat16)
    for name, tensor in stored().items():
        assert tensor.dtype == (torch.bfloat16 if found[name].is_floating_point() else torch.int64), name
    shadow = Shadow(model)
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    save_full(shadow, path)
    assert_same(stored()["embed.weight"], whole["embed.weight"])


@pytest.mark.parametrize("ranks", [1, 2])
def test_mappings_pairs_patterns_and_shadows(tmp_path: Path, ranks: int) -> None:
    run_ranks(_kinds, ranks, str(tmp_path))


def _wrong(rank: int, folder: str) -> list[Any]:
    model, path = sharded(), Path(folder, "m.safetensors")
    twice = [("a", torch.ones(1)), ("a", torch.zeros(1))]
    own = nn.Linear(2, 2)  # on each rank with weights of its own, as experts are
    own.weight.data.fill_(rank)
    return [
        raised(call)
        for call in (
            lambda: save_full(model, path, include="*lroa*"),
            lambda: save_full(model, path, exclude=["norm.*", "haed*"]),
            lambda: save_full(model, path, include=lambda name: False),
            lambda: save_full(torch.ones(2), path),
            lambda: save_full([torch.ones(2)], path),
            lambda: save_full({"a": 1}, path),
            lambda: save_full(twice, path),
            lambda: save_full(own, path),
            lambda: save_full(model, Path(folder, "m.bin")),
            lambda: save_full({"a": torch.ones(2) if rank else torch.ones(3)}, path),
            lambda: save_full(model, path, max_shard_bytes=100 + rank),
            lambda: save_full(nn.Linear(2, 2, device="meta"), path),
            lambda: save_full(model, path, metadata={"step": 3}),
            lambda: save_full(model, path, metadata={"tied": "x"}),
        )
    ]


def test_what_cannot_be_saved_is_the_same_error_on_every_rank(tmp_path: Path) -> None:
    zero, one = run_ranks(_wrong, 2, str(tmp_path))
    assert zero == one
    texts = [text for _, text in zero]
    expected = (
        "include or exclude has '*lroa*', which matches no name",
        "include or exclude has 'haed*', which matches no name",
        "include or exclude has '<lambda>', which matches no name",
        "what is a Tensor, expected a module, a mapping, pairs or a Shadow",
        "what holds a Tensor, expected (name, tensor) pairs",
        "what has a int under the name 'a', expected a tensor",
        "'a' is the name of two tensors",
        "'weight' differs on ranks 0 and 1, which hold the same part of it",
        "expected a name that ends in .safetensors",
        "'a' is a tensor of ranks [0] and another of ranks [1]",
        "the ranks gave different values for max_shard_bytes",
        "'weight' is on the meta device",
        "metadata has 'step': 3, expected strings",
        "metadata has 'tied', which a save sets itself",
    )
    for text, words in zip(texts, expected, strict=True):
        assert words in text
    assert not list(tmp_path.iterdir())


class Whole(nn.Module):
    """Two stages in one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(5, 3), nn.Sequential(nn.Linear(3, 7), nn.BatchNorm1d(7))


def _stages(rank: int, folder: str, max_shard_bytes: int) -> None:
    """Ranks 0 and 1 have the first stage, 2 and 3 the second."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stages", "shards"))["shards"]
    model, path = Whole(), Path(folder, "model.safetensors")
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    delattr(model, "second" if rank < 2 else "first")
    fully_shard(model, mesh=mesh)
    told = []
    saving = save_full(
        model, path, max_shard_bytes=max_shard_bytes, progress=lambda *now: told.append(now), background=True
    )
    saving.wait()
    assert bool(told) == (rank in (0, 2))
    with Reader(path) as reader:
        assert reader.path.name == "model.safetensors.index.json"
        assert len(reader.paths) == (2 if max_shard_bytes > 100 else 6)
        assert set(reader.shapes) == set(whole)
        for name in reader.shapes:
            assert_same(reader.tensor(name), whole[name], name)
    before = dict(iter_full(model))
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    load_full(model, path)
    for name, tensor in iter_full(model):
        assert_same(tensor, before[name], name)
    everything = Whole()
    fully_shard(everything)
    load_full(everything, path)
    for name, tensor in iter_full(everything):
        assert_same(tensor, whole[name], name)


@pytest.mark.parametrize("max_shard_bytes", [1 << 30, 70])
def test_pipeline_stages_write_their_own_files_under_one_index(tmp_path: Path, max_shard_bytes: int) -> None:
    run_ranks(_stages, 4, str(tmp_path), max_shard_bytes)


def _tied_stages(rank: int, folder: str) -> None:
    """The first and the last stage each have the tied layer."""
    path = Path(folder, "m.safetensors")

    def stage(seed: int, *layers: str) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.ModuleDict()
        for name in layers:
            torch.manual_seed(seed + (name == "last"))
            model[name] = nn.Linear(3, 3)
        model["tied"].register_buffer("scale", torch.ones(2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for name, param in model.named_parameters():  # in the place of a step
            momentum = torch.full_like(param, float(len(name)))
            optimizer.state[param] = {"momentum_buffer": momentum}
        attach(model, optimizer)
        return model, optimizer

    model, _ = stage(0, "first", "tied") if rank == 0 else stage(0, "tied", "last")
    save_full(model, path, optimizer=True)
    dist.barrier()
    whole, optimizer = stage(7, "first", "tied", "last")
    with torch.no_grad():
        for state in optimizer.state.values():
            state["momentum_buffer"].zero_()
    load_full(whole, path, optimizer=True)
    for name, param in model.named_parameters():
        assert_same(whole.get_parameter(name).detach(), param.detach(), name)
    for name, param in whole.named_parameters():
        assert bool((optimizer.state[param]["momentum_buffer"] == len(name)).all())
    with Reader(path) as reader:
        assert sorted(reader.shapes).count("tied.weight") == 1
    load_full(model, path, optimizer=True)
    model["tied"].scale.fill_(rank)
    told = raised(lambda: save_full(model, path))
    assert told is not None
    assert "'tied.scale' differs on ranks 0 and 1" in told[1]


def test_what_several_stages_have_is_stored_once(tmp_path: Path) -> None:
    run_ranks(_tied_stages, 2, str(tmp_path))


def _stage_fails(rank: int, folder: str) -> tuple[str, str] | None:
    """The rank that writes the second stage cannot."""
    path = Path(folder, "model.safetensors")
    save_full({f"{rank}": torch.ones(4)}, path)
    if rank == 1:

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        disk.write_tensor = full
    told = raised(lambda: save_full({f"{rank}": torch.zeros(4)}, path))
    with Reader(path) as reader:
        assert all(bool((reader.tensor(name) == 1).all()) for name in ("0", "1"))
    return told


def test_a_stage_that_cannot_be_written_is_everybodys_error(tmp_path: Path) -> None:
    zero, one = run_ranks(_stage_fails, 2, str(tmp_path))
    assert zero == one is not None
    assert "No space left" in zero[1] or "rank 1 could not write its part" in zero[1]


def _background(rank: int, folder: str) -> None:
    model, path = sharded(), Path(folder, "m.safetensors")
    whole = {name: tensor.clone() for name, tensor in iter_full(model)}
    gate = threading.Event()
    create = disk.create

    def slow(path: Path) -> Any:
        assert gate.wait(30)
        return create(path)

    disk.create = slow
    saving = save_full(model, path, background=True)
    assert saving.done() == (rank != 0)
    assert not path.exists()
    with torch.no_grad():  # training goes on
        for param in model.parameters():
            param.zero_()
        model.norm.running_mean.fill_(7.0)
    gate.set()
    saving.wait()
    saving.wait()
    assert saving.done()
    found = load_file(path)
    for name, tensor in whole.items():
        assert_same(found[name], tensor, name)
    assert not bool(found["norm.running_mean"].any())

    later = threading.Event()

    def refuses(path: Path) -> Any:
        assert later.wait(30)
        raise OSError(28, "No space left on device")

    disk.create = refuses
    failed = save_full(model, path, background=True)
    disk.create = create
    later.set()
    told = raised(lambda: save_full(model, path))
    assert told is not None
    assert told[0] == "FragmentError"
    assert "an earlier save_full(background=True) failed: rank 0: OSError: [Errno 28] No space left" in told[1]
    assert raised(failed.wait) == ("FragmentError", "rank 0: OSError: [Errno 28] No space left on device")
    save_full(model, path)  # which says it no more
    assert bool((load_file(path)["norm.running_mean"] == 7).all())


@pytest.mark.parametrize("ranks", [1, 2])
def test_in_the_background(tmp_path: Path, ranks: int) -> None:
    run_ranks(_background, ranks, str(tmp_path))


def _never_waits(rank: int, folder: str) -> None:
    save_full({"a": torch.ones(1 << 20)}, Path(folder, "m.safetensors"), background=True)


def test_a_program_that_ends_has_its_files(tmp_path: Path) -> None:
    run_ranks(_never_waits, 2, str(tmp_path))
    assert bool(load_file(tmp_path / "m.safetensors")["a"].all())


def test_names_of_tied_tensors_of_a_state_dict(tmp_path: Path) -> None:
    save_full(Net().state_dict(), tmp_path / "m.safetensors")
    with Reader(tmp_path / "m.safetensors") as reader:
        assert json.loads(reader.metadata["tied"]) == {"head.weight": "embed.weight"}
        assert "head.weight" not in reader.shapes


def _beside_a_plan(rank: int, folder: str) -> None:
    """A norm that no tensor-parallel plan names: ranks 0 and 2 share one copy of it, ranks 1 and 3 another."""
    mesh, path = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp")), Path(folder, "m.safetensors")

    def build(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        layers = {"norm": nn.LayerNorm(4), "up": nn.Linear(4, 6), "down": nn.Linear(6, 4)}
        model = nn.Sequential(OrderedDict(layers))
        model.norm.weight.data.normal_()
        parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(model, mesh=mesh["fsdp"])
        return model, torch.optim.AdamW(model.parameters())

    model, optimizer = build(0)
    model(torch.full((3, 4), float(rank // 2))).square().sum().backward()
    optimizer.step()
    attach(model, optimizer)
    save_full(model, path, optimizer=True)
    values, moments = dict(iter_full(model)), dict(iter_full(model, "exp_avg"))
    stored = load_file(path)
    assert stored.keys() == values.keys()
    other, fresh = build(1 + rank)
    with pytest.warns(UserWarning, match=r"ranks hold 1 \(norm.weight\) apart") if rank == 0 else nullcontext():
        load_full(other, path, optimizer=fresh)
    for name, tensor in iter_full(other):
        assert_same(tensor, stored[name], name)
    for name, tensor in iter_full(other, "exp_avg"):
        assert_same(tensor, moments[name], name)
    with torch.no_grad():
        model.norm.weight.mul_(1 + rank % 2)  # now they are different tensors
    told = raised(lambda: save_full(model, path))
    assert told is not None
    assert "'norm.weight' differs on ranks 0 and 1, which hold the same part of it" in told[1]


def test_what_is_beside_a_tensor_parallel_plan(tmp_path: Path) -> None:
    run_ranks(_beside_a_plan, 4, str(tmp_path))


def _on_gpus(rank: int, folder: str, background: bool, backend: str) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cuda", (2,))
    path = Path(folder, "m.safetensors")

    def build(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = nn.Sequential(*(nn.Linear(1000, 999) if at % 2 else nn.Linear(999, 1000) for at in range(6))).cuda()
        fully_shard(model, mesh=mesh)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        attach(model, optimizer)
        return model, optimizer

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model(torch.ones(4, 999, device="cuda")).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = build(0)
    step(model, optimizer)
    before = {name: tensor.cpu() for name, tensor in iter_full(model)}
    moments = {name: tensor.cpu() for name, tensor in iter_full(model, "exp_avg")}
    saving = save_full(model, path, optimizer=True, background=background)
    step(model, optimizer)  # at once: what was copied must not change
    after = {name: tensor.cpu() for name, tensor in iter_full(model)}
    if saving is not None:
        saving.wait()
    stored = load_file(path)
    for name, tensor in before.items():
        assert_same(stored[name], tensor, name)
    other, fresh = build(1)
    load_full(other, path, optimizer=fresh)
    for name, tensor in iter_full(other, "exp_avg"):
        assert_same(tensor.cpu(), moments[name], name)
    step(other, fresh)
    for name, tensor in iter_full(other):
        assert_same(tensor.cpu(), after[name], name)
    dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("background", [False, True], ids=["foreground", "background"])
@pytest.mark.parametrize("backend", ["nccl", "cuda:nccl,cpu:gloo"])
def test_on_gpus(tmp_path: Path, background: bool, backend: str) -> None:
    run_ranks(_on_gpus, 2, str(tmp_path), background, backend, timeout=120, init=False)


def _over_gloo(rank: int, folder: str) -> None:
    """Parameters on GPUs, and a group that moves the memory of CPUs."""
    torch.cuda.set_device(rank)
    torch.manual_seed(0)
    model, path = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)), Path(folder, "m.safetensors")
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fully_shard(model.cuda(), mesh=init_device_mesh("cuda", (2,)))
    save_full(model, path)
    dist.barrier()
    for name, tensor in load_file(path).items():
        assert_same(tensor, whole[name], name)
    load_full(model, path)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_parameters_on_gpus_over_gloo(tmp_path: Path) -> None:
    run_ranks(_over_gloo, 2, str(tmp_path))
