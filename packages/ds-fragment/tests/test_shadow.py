"""`Shadow`: a moving average on the shards, swapped in and out, saved and resumed, against dense tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ds_fragment import FlatPartition, Shadow, attach, iter_full, load_full, map_shards, save_full
from ds_fragment.errors import FragmentError, InvalidValueError
from fragment_oracle import assert_same, ragged, raised
from ranks import run_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard

safetensors = pytest.importorskip("safetensors.torch")

ENGINES = ["fsdp2", "flat", "plain"]


def make(engine: str, seed: int = 0) -> tuple[nn.Module, Any]:
    """A model, and what keeps its partition alive."""
    model = ragged(torch.bfloat16 if engine == "flat" else torch.float32, seed, fsdp2=engine != "flat")
    kept: Any = None
    if engine == "flat":
        kept = FlatPartition(model.parameters())
    elif engine == "fsdp2":
        fully_shard(model, reshard_after_forward=False)
    attach(model)
    return model, kept


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    return {str(name): tensor.clone() for name, tensor in iter_full(model)}


def step(model: nn.Module, turn: int) -> None:
    map_shards(model, lambda _, shard: shard.mul_(0.5).add_(turn))


def assert_all(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert_same(tensor, expected[name], name)


def _follows(rank: int, engine: str, folder: str) -> None:
    model, kept = make(engine)
    shadow, narrow = Shadow(model), Shadow(model, dtype=torch.bfloat16)
    dense, low = whole(model), {name: tensor.bfloat16() for name, tensor in whole(model).items()}
    for turn in range(3):
        step(model, turn)
        shadow.update(0.9)
        narrow.update(0.5)
        for name, tensor in whole(model).items():
            dense[name].lerp_(tensor, 1.0 - 0.9)
            low[name].lerp_(tensor.bfloat16(), 0.5)
    value = whole(model)
    data = torch.ones(77, 5, dtype=torch.bfloat16 if engine == "flat" else torch.float32)
    before = model(data)
    for each, expected in ((shadow, dense), (narrow, {name: tensor.float() for name, tensor in low.items()})):
        with each.swapped():
            found = whole(model)
            for name, tensor in found.items():  # torch fuses a multiply-add here, and not there
                rtol = 1e-2 if each is narrow or tensor.dtype == torch.bfloat16 else 1e-6  # what is frozen stays bf16
                torch.testing.assert_close(tensor, expected[name].to(tensor.dtype), rtol=rtol, atol=1e-6)
            assert not torch.equal(model(data), before), "the model computes with the shadow"
            if kept is not None:
                for name, param in model.named_parameters():
                    assert_same(param.detach(), found[name].bfloat16(), name)
        assert_all(whole(model), value)
        assert torch.equal(model(data), before)
        with pytest.raises(ZeroDivisionError), each.swapped():
            _ = 1 / 0
        assert_all(whole(model), value)
        path = Path(folder, "shadow.safetensors")
        save_full(model, path, values=each)
        if rank == 0:
            stored = safetensors.load_file(path)
            assert_all({name: stored[name] for name in found}, found)
    save_full(model, Path(folder, "model.safetensors"))
    load_full(model, Path(folder, "shadow.safetensors"))
    assert_all(whole(model), found)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_it_follows_and_takes_the_place(ranks: int, engine: str, tmp_path: Path) -> None:
    run_ranks(_follows, ranks, engine, str(tmp_path))


def _order(rank: int, folder: str) -> list[Any]:
    model, _ = make("fsdp2")
    shadow = Shadow(model)
    told = [raised(shadow.restore)]
    shadow.swap()
    told += [raised(call) for call in (shadow.swap, lambda: shadow.update(0.5), shadow.state_dict)]
    told.append(raised(lambda: save_full(model, Path(folder, "m.safetensors"), values=shadow)))
    shadow.restore()
    told += [raised(lambda: shadow.update(1.5))]
    other, _ = make("fsdp2")
    told.append(raised(lambda: save_full(other, Path(folder, "m.safetensors"), values=shadow)))
    assert not Path(folder, "m.safetensors").exists()
    return told


def test_calls_out_of_order_are_errors_on_every_rank(tmp_path: Path) -> None:
    zero, one = run_ranks(_order, 2, str(tmp_path))
    texts = [text.replace("rank 1: ", "").replace("rank 0: ", "") for _, text in zero]
    assert [text.replace("rank 1: ", "").replace("rank 0: ", "") for _, text in one] == texts
    assert texts[0] == "restore() of a Shadow that is not swapped in: call swap() first"
    assert texts[1] == "swap() of a Shadow that is swapped in: call restore() first"
    assert texts[2].startswith("update() of a Shadow that is swapped in")
    assert texts[3].startswith("state_dict() of a Shadow that is swapped in")
    assert texts[4].startswith("save_full(values=shadow) of a Shadow that is swapped in")
    assert texts[5] == "decay is 1.5, expected a number from 0 to 1"
    assert texts[6].startswith("values has no shadow of parameter 'tiny'")


def _changed(rank: int) -> list[Any]:
    model, _ = make("plain")
    shadow = Shadow(model)
    fully_shard(model)
    told = [raised(call) for call in (lambda: shadow.update(0.5), shadow.swap, lambda: shadow.load_state_dict({}))]
    larger = nn.Sequential(nn.Linear(2, 2))
    fully_shard(larger)
    shadow = Shadow(larger)
    larger.append(nn.Linear(2, 2))
    told += [raised(call) for call in (lambda: shadow.update(0.5), shadow.swap)]
    half = nn.Linear(2, 2)
    shadow = Shadow(half)
    half.double()
    return [*told, raised(shadow.swap)]


def test_a_model_that_changed_is_an_error_on_every_rank() -> None:
    for told in zip(*run_ranks(_changed, 2), strict=True):
        assert {kind for kind, _ in told} == {"InvalidValueError"}
        assert all(text.endswith("make a new Shadow") for _, text in told), told


def _resumed(rank: int, folder: str) -> list[Any]:
    model, _ = make("fsdp2")
    shadow = Shadow(model)
    step(model, 1)
    shadow.update(0.9)
    path = Path(folder, f"{rank}.pt")
    torch.save(shadow.state_dict(), path)
    with shadow.swapped():
        expected = whole(model)
    other, _ = make("fsdp2", seed=1)
    again = Shadow(other)
    again.load_state_dict(torch.load(path))
    with again.swapped():
        assert_all(whole(other), expected)
    saved = torch.load(path)
    told = [raised(lambda: again.load_state_dict(torch.load(Path(folder, f"{1 - rank}.pt"))))]
    told.append(raised(lambda: again.load_state_dict({**saved, "what": "grad"} if rank else saved)))
    cut = {**saved, "shards": {**saved["shards"], "weight": torch.ones(1)}}
    told.append(raised(lambda: again.load_state_dict(cut if rank else saved)))
    told.append(raised(lambda: again.load_state_dict({} if rank else saved)))
    with again.swapped():
        assert_all(whole(other), expected)
    return told


def test_it_resumes_on_the_same_layout_only(tmp_path: Path) -> None:
    zero, one = run_ranks(_resumed, 2, str(tmp_path))
    assert zero == one
    assert {kind for kind, _ in zero} == {"InvalidValueError"}
    for (_, text), part in zip(
        zero, ["does not fit", "of a shadow of 'grad'", "has a shard", "has no 'what'"], strict=True
    ):
        assert part in text


def test_parameters_without_names_and_kinds_that_are_not_averaged() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 3.0]))
    shadow = Shadow([weight])
    assert list(shadow.state_dict()["shards"]) == ["0"]
    with pytest.raises(InvalidValueError, match=r"a shadow of 0 would average torch\.int64 as torch\.int64"):
        Shadow([torch.ones(2, dtype=torch.int64)])
    with pytest.raises(InvalidValueError, match="would average"):
        Shadow([weight], dtype=torch.int8)
    with pytest.raises(FragmentError):
        Shadow([weight], "exp_avg")


def test_state_has_a_shadow_too() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    attach(model, optimizer)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    shadow = Shadow(model, "exp_avg")
    kept = optimizer.state[model.weight]["exp_avg"]
    before = kept.clone()
    kept.zero_()
    with shadow.swapped():
        assert_same(kept, before)
    assert not kept.any()
    with pytest.raises(InvalidValueError, match="values is a shadow of 'exp_avg', expected one of 'value'"):
        save_full(model, Path("m.safetensors"), values=shadow)
