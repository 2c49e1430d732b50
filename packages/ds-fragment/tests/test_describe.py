"""Who holds what, in words, as a table and as a picture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ds_fragment import FlatPartition, describe
from ds_fragment.layout import Fragment
from ranks import run_ranks
from torch import nn


def _three_ranks(rank: int) -> tuple[str, str]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 7)).bfloat16()
    partition = FlatPartition(model.parameters())  # 46 elements, 16 a rank
    described = describe(model)
    assert len(described) == 4
    weight = described[2]
    assert (weight.name, weight.shape, weight.engine, weight.master) == ("1.weight", (7, 3), "flat partition", "fp32")
    assert weight.ranks == (0, 1, 2)
    assert weight.fragments == (None, Fragment((0,), (14,)), Fragment((14,), (7,)))
    assert partition.partition_size == 16
    return str(described), str(describe(model[1].weight))


def test_a_flat_partition() -> None:
    tables = run_ranks(_three_ranks, 3)
    first, one = tables[1]
    lines = first.splitlines()
    assert lines[0].split()[0] == "parameter"
    assert [line.split("  ")[0] for line in lines[2:]] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert "elements[0:14]" in lines[4]
    assert "nothing" in lines[2]
    assert "this rank holds: elements[0:14]" in one


def test_plain_parameters() -> None:
    assert describe(nn.Linear(2, 2).bfloat16().weight).master == "upcast"
    found = describe(nn.Linear(2, 2))
    assert [parameter.holds for parameter in found] == ["all", "all"]
    assert found[0].master == "fp32"
    with pytest.raises(TypeError, match="param is a str"):
        describe("weight")


def _picture(rank: int, path: str) -> None:
    from ds_fragment import plot_partition

    model = nn.Sequential(nn.Linear(50, 30), nn.Linear(30, 7))
    partition = FlatPartition(model.parameters())
    assert partition.rank == rank
    if rank == 0:
        plot_partition(model, path)


def test_the_picture_shows_both_ranks(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("matplotlib.image")
    run_ranks(_picture, 2, str(tmp_path / "partition.png"))
    pixels = torch.from_numpy(image.imread(tmp_path / "partition.png")[..., :3])
    colours = [torch.tensor(colour) for colour in ((31, 119, 180), (255, 127, 14))]  # tab10: ranks 0 and 1
    shares = [((pixels - colour / 255).abs().amax(dim=-1) < 0.02).float().mean().item() for colour in colours]
    assert all(share > 0.02 for share in shares), shares
