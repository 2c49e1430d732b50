"""Lightning's loaders: those that Fabric sets up, CombinedLoader, and a RepeatingLoader in its Trainer."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ds_loader import LoaderStateError, LoaderWarning, RepeatingLoader
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, Sampler, SubsetRandomSampler

if importlib.util.find_spec("lightning") is None or importlib.util.find_spec("torchdata") is None:
    pytest.skip("needs Lightning and torchdata", allow_module_level=True)
sys.path.insert(0, str(Path(__file__).parent))

from ranks import run_ranks
from wrapper_loops import (
    GlobalSampler,
    HearingStream,
    KeepingStream,
    by_hand,
    require_resumes,
    require_shuffled,
    rest_of_epoch,
    seed_all,
    stored,
    take,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*set_vital:UserWarning"),  # torchdata calls it
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # and Lightning that one
]

SIZE = 11
EPOCHS = 3


def fabric() -> Any:
    from lightning.fabric import Fabric

    devices = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    made = Fabric(accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto")
    made.launch()
    return made


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class EpochSampler(Sampler[int]):
    """Shuffles by the epoch that it is told."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(SIZE, generator=seeded(self.epoch)).tolist())

    def __len__(self) -> int:
        return SIZE


def stateful(data: Any, **options: Any) -> Any:
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader(data, **options)


ALONE: dict[str, Callable[[], Any]] = {
    "generator": lambda: DataLoader(range(SIZE), 2, sampler=RandomSampler(range(SIZE), generator=seeded())),
    "epoch": lambda: DataLoader(range(SIZE), 2, sampler=EpochSampler()),
    "drop last": lambda: DataLoader(range(SIZE), 2, sampler=EpochSampler(), drop_last=True),
    "distributed": lambda: DataLoader(range(SIZE), 2, sampler=DistributedSampler(range(SIZE), 2, 1)),
    "workers": lambda: DataLoader(range(SIZE), 2, sampler=EpochSampler(), num_workers=2),
    "stateful": lambda: stateful(range(SIZE), batch_size=2, sampler=EpochSampler()),
    "keeping stream": lambda: stateful(KeepingStream(SIZE), batch_size=2),
}


def set_up(make: Callable[[], Any], seed: int) -> Any:
    seed_all(seed)
    return fabric().setup_dataloaders(make())


@pytest.mark.parametrize("kind", ALONE)
def test_what_fabric_sets_up_has_the_order_of_a_loop_by_hand_and_every_stop_resumes_in_it(kind: str) -> None:
    given = ALONE[kind]()
    hears = getattr(given.dataset, "set_epoch", None)  # Fabric tells samplers alone
    want = by_hand(fabric().setup_dataloaders(given), EPOCHS, hears)
    per_epoch = len(want) // EPOCHS
    stops = range(2 * per_epoch + 1) if kind != "workers" else (1, per_epoch)
    require_resumes(lambda seed: set_up(ALONE[kind], seed), want, stops)
    orders = [[batch for at, batch in want if at == epoch] for epoch in range(EPOCHS)]
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize(
    "make",
    [
        lambda: DataLoader(range(SIZE), 2, shuffle=True),
        lambda: DataLoader(range(SIZE), 2, sampler=GlobalSampler(SIZE)),
    ],
)
def test_an_order_of_the_global_generators_changes_and_resumes(make: Callable[[], Any]) -> None:
    want = take(RepeatingLoader(set_up(make, 0)), 18)
    require_shuffled(want, range(SIZE))
    require_resumes(lambda seed: set_up(make, seed), want, range(13))


# On two ranks Fabric divides each of them by a sampler of its own.
ON_RANKS: dict[str, Callable[[], Any]] = {
    "shuffle": lambda: DataLoader(range(SIZE), 2, shuffle=True),
    "in order": lambda: DataLoader(range(SIZE), 2),
    "epoch": lambda: DataLoader(range(SIZE), 2, sampler=EpochSampler()),
    "generator": lambda: DataLoader(range(SIZE), 2, sampler=SubsetRandomSampler(range(SIZE), generator=seeded())),
    "stream": lambda: DataLoader(HearingStream(SIZE), 2),
}


def ranks_of_fabric(rank: int) -> Any:
    warnings.simplefilter("ignore")
    out = {}
    for kind, make in ON_RANKS.items():
        given = make()
        hears = getattr(given.dataset, "set_epoch", None)
        want = out[kind] = by_hand(fabric().setup_dataloaders(given), EPOCHS, hears)
        require_resumes(lambda seed, make=make: set_up(make, seed), want, range(2 * len(want) // EPOCHS + 1))
    return out


def test_two_ranks_of_fabric_have_the_orders_of_loops_by_hand() -> None:
    one, other = run_ranks(ranks_of_fabric, 2)
    for kind in ON_RANKS:
        for epoch in range(EPOCHS):
            samples = [sample % 100 for at, batch in one[kind] + other[kind] if at == epoch for sample in batch]
            assert set(samples) == set(range(SIZE))
            assert len(samples) == (12 if kind != "stream" else 2 * SIZE)


ELASTIC = ("shuffle", "epoch", "generator")


def step(rank: int, size: int, states: dict[str, Any]) -> Any:
    """By kind: the samples of a step on this rank, from a state on, and the state then."""
    out = {}
    for kind in ELASTIC:
        batches = RepeatingLoader(of_size(kind, size))
        if states:
            batches.load_state_dict(states[kind])
            assert batches.verify().lost == 0
        seen = [sample for _, batch in take(batches, 1) for sample in batch]
        out[kind] = (seen, stored(batches.state_dict()))
    return out


def of_size(kind: str, size: int) -> Any:
    seed_all(0)
    given = ON_RANKS[kind]()
    return fabric().setup_dataloaders(DataLoader(given.dataset, size, sampler=given.sampler))


def test_other_ranks_go_on_with_what_nobody_saw() -> None:
    first = run_ranks(step, 2, 2, {})
    second = run_ranks(step, 3, 1, {kind: first[1][kind][1] for kind in ELASTIC})
    for kind in ELASTIC:
        seen = [sample for of_rank in (*first, *second) for sample in of_rank[kind][0]]
        assert len(seen) == len(set(seen)) == 2 * 2 + 3 * 1
        batches = RepeatingLoader(of_size(kind, 3))
        if kind == "shuffle":  # on one rank Fabric leaves PyTorch's RandomSampler in place
            with pytest.raises(LoaderStateError, match=r"the first batch of epoch 0 has other samples"):
                batches.load_state_dict(second[0][kind][1])
            continue
        batches.load_state_dict(second[0][kind][1])
        assert Counter(seen + rest_of_epoch(batches)) == Counter(range(SIZE))


# CombinedLoader


def combined(mode: str) -> Callable[[int], Any]:
    from lightning.pytorch.utilities import CombinedLoader

    def make(seed: int) -> Any:
        seed_all(seed)
        return CombinedLoader(
            {
                "short": DataLoader(range(5), 2, sampler=RandomSampler(range(5), generator=seeded(1))),
                "long": DataLoader(range(10, 18), 2, sampler=RandomSampler(range(8), generator=seeded(2))),
            },
            mode,
        )

    return make


MODES = {"min_size": 3, "max_size": 4, "max_size_cycle": 4, "sequential": 7}


@pytest.mark.parametrize("mode", MODES)
def test_a_combined_loader_has_the_order_of_a_loop_by_hand_and_every_stop_resumes_in_it(mode: str) -> None:
    make = combined(mode)
    want = by_hand(make(0), EPOCHS)
    assert len(RepeatingLoader(make(0))) == MODES[mode]  # it has not been iterated yet
    assert len(want) == EPOCHS * MODES[mode]
    require_resumes(make, want, range(2 * MODES[mode] + 1))


@pytest.mark.parametrize("mode", MODES)
def test_the_loaders_that_it_combines_are_shuffled_anew(mode: str) -> None:
    from lightning.pytorch.utilities import CombinedLoader

    def make(seed: int) -> Any:
        seed_all(seed)
        return CombinedLoader([DataLoader(range(8), 2, shuffle=True), DataLoader(range(8), 2, shuffle=True)], mode)

    batches = RepeatingLoader(make(0))
    length = len(batches)
    want = take(batches, 3 * length)
    epochs = [[batch for at, batch in want if at == epoch] for epoch in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    for epoch in epochs:
        given = [sample for batch, *_ in epoch for sample in _flat(batch)]
        assert Counter(given) == Counter([*range(8), *range(8)])
    require_resumes(make, want, range(2 * length + 1))


def _flat(batch: Any) -> list[int]:
    return [sample for item in batch for sample in _flat(item)] if isinstance(batch, list) else [batch]


def test_a_combined_loader_of_endless_parts_has_no_length() -> None:
    from lightning.pytorch.utilities import CombinedLoader

    batches = RepeatingLoader(CombinedLoader([DataLoader(HearingStream(4), 2)], "max_size"))
    with pytest.raises(TypeError, match="has no length"):
        len(batches)
    assert take(batches, 3) == [(0, [[[0, 1]], 0, 0]), (0, [[[2, 3]], 1, 0]), (1, [[[100, 101]], 0, 0])]


def test_a_combined_loader_with_other_parts_does_not_take_a_state() -> None:
    batches = RepeatingLoader(combined("sequential")(0))
    take(batches, 1)
    with pytest.raises(LoaderStateError, match="length: 7 in the state, 4 here"):
        RepeatingLoader(combined("max_size")(0)).load_state_dict(batches.state_dict())


# Trainer


def trained(batches: RepeatingLoader[Any], steps: int, folder: Path, **options: Any) -> Any:
    """The batches that a model is trained with, and the trainer."""
    from lightning.pytorch import LightningModule, Trainer

    seen: list[Any] = []

    class Model(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def training_step(self, batch: Any, step: int) -> Any:
            seen.append(batch.tolist())
            return self.layer(batch[:, None].float()).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-6)

    trainer = Trainer(
        accelerator="cpu",
        max_epochs=-1,
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(Model(), batches, **options)
    return seen, trainer


@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
def test_a_trainer_sees_a_new_order_every_epoch_and_its_checkpoint_has_the_place(tmp_path: Path) -> None:
    make = ALONE["epoch"]
    loader = make()
    want = [batch for _, batch in by_hand(loader, 3, loader.sampler.set_epoch)]
    seen, _ = trained(RepeatingLoader(make()), 16, tmp_path)
    assert seen == want[:16]
    seen, trainer = trained(RepeatingLoader(make()), 8, tmp_path)
    trainer.save_checkpoint(tmp_path / "at.ckpt")
    rest, trainer = trained(RepeatingLoader(make()), 16, tmp_path, ckpt_path=tmp_path / "at.ckpt", weights_only=False)
    assert seen + rest == want[:16]


def test_nothing_is_warned_about() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", LoaderWarning)
        for kind in ALONE:
            RepeatingLoader(set_up(ALONE[kind], 0))
        for mode in MODES:
            RepeatingLoader(combined(mode)(0))
