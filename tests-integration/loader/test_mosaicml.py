"""MosaicML's StreamingDataset, in DataLoader and StreamingDataLoader, on several worlds."""

from __future__ import annotations

import importlib.util
import itertools
import multiprocessing
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

if importlib.util.find_spec("streaming") is None or importlib.util.find_spec("transformers") is None:
    pytest.skip("needs mosaicml-streaming and transformers", allow_module_level=True)

from ds_loader import LoaderStateError, LoaderWarning, RepeatingLoader
from loops import check_back_and_forth, check_epochs, check_resume, plain, repeated, take
from ranks import run_ranks
from torch.utils.data import DataLoader


def imported() -> Any:
    """``streaming``, which imports torchvision for its datasets of images, also where nobody reads an image.

    Two empty modules stand in for it meanwhile. Transformers, which looks for torchvision, is imported before.
    """
    if importlib.util.find_spec("torchvision") is None:
        importlib.import_module("transformers.feature_extraction_utils")
        importlib.import_module("transformers.tokenization_utils_base")
        names = ("", ".datasets", ".transforms", ".transforms.functional")
        stubs: dict[str, Any] = {f"torchvision{name}": types.ModuleType(f"torchvision{name}") for name in names}
        stubs["torchvision.datasets"].VisionDataset = object
        stubs["torchvision.transforms.functional"].to_tensor = None
        sys.modules.update(stubs)
        try:
            return importlib.import_module("streaming")
        finally:
            for name in stubs:
                del sys.modules[name]
    return importlib.import_module("streaming")


streaming = imported()
clean_stale_shared_memory = importlib.import_module("streaming.base.util").clean_stale_shared_memory

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process:DeprecationWarning"),  # workers are forked beside threads
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
SIZE, BATCH = 26, 3
KINDS = {"DataLoader": DataLoader, "StreamingDataLoader": streaming.StreamingDataLoader}


@pytest.fixture(autouse=True)
def _clean_shared_memory() -> Iterator[None]:
    clean_stale_shared_memory()
    yield
    clean_stale_shared_memory()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = str(tmp_path_factory.mktemp("shards"))
    with streaming.MDSWriter(out=out, columns={"x": "int"}, size_limit=300) as writer:
        for x in range(SIZE):
            writer.write({"x": x})
    assert len(list(Path(out).glob("*.mds"))) >= 3
    return out


def loader_of(folder: str, kind: Any = DataLoader, *, shuffle: bool = True, batch: int = BATCH, **options: Any) -> Any:
    dataset = streaming.StreamingDataset(local=folder, shuffle=shuffle, batch_size=batch, shuffle_seed=7)
    return kind(dataset, batch_size=batch, **options)


def by_hand(make: Any, epochs: int = 3) -> list[list[Any]]:
    """The dataset counts its epochs by itself."""
    loader = make()
    found = [[plain(batch) for batch in loader] for _ in range(epochs)]
    del loader
    clean_stale_shared_memory()
    return found


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_resuming_at_every_stop(folder: str, kind: Any, shuffle: bool) -> None:
    def make() -> Any:
        return loader_of(folder, kind, shuffle=shuffle)

    epochs = by_hand(make)
    assert (epochs[0] == epochs[1]) is not shuffle
    check_epochs(make, epochs)
    check_resume(make, epochs, range(0, 2 * len(epochs[0]) + 1, 3))


@pytest.mark.parametrize(("kind", "persistent"), [(DataLoader, True), (streaming.StreamingDataLoader, False)])
def test_workers(folder: str, kind: Any, persistent: bool) -> None:
    def make() -> Any:
        return loader_of(folder, kind, num_workers=2, persistent_workers=persistent)

    epochs = by_hand(make)
    check_epochs(make, epochs)
    check_resume(make, epochs, [1, len(epochs[0])])


@pytest.mark.parametrize("make", [loader_of, lambda folder: streaming.StreamingDataset(local=folder, batch_size=1)])
def test_going_back_and_forth(folder: str, make: Any) -> None:
    check_back_and_forth(lambda: make(folder), by_hand(lambda: make(folder)))


def test_another_batch_size_of_the_dataset_is_told(folder: str) -> None:
    dataset = streaming.StreamingDataset(local=folder, batch_size=4)
    with pytest.warns(LoaderWarning, match="batch_size is 4 in the StreamingDataset and 2 in the loader"):
        RepeatingLoader(DataLoader(dataset, batch_size=2))


def test_other_data_is_refused(folder: str, tmp_path: Path) -> None:
    with streaming.MDSWriter(out=str(tmp_path), columns={"x": "int"}) as writer:
        writer.write({"x": 1})
    first = repeated(loader_of(folder))
    take(first, 1)
    other = repeated(loader_of(str(tmp_path)))
    with pytest.raises(LoaderStateError, match="length: 26 in the state, 1 here"):
        other.load_state_dict(first.state_dict())


# On other worlds: each rank is a process, which finds its world in the environment


def batches_of_rank(rank: int, folder: str, batch: int, workers: int, state: Any, count: int) -> Any:
    """The next batches, and the state behind them."""
    multiprocessing.current_process()._config["daemon"] = False  # so that it may start workers
    context = "fork" if workers else None  # a server of forks would import the library without its stand-ins
    loader = repeated(loader_of(folder, batch=batch, num_workers=workers, multiprocessing_context=context))
    if state is not None:
        loader.load_state_dict(state)
    found = take(loader, count)
    state = loader.state_dict()
    loader.close()
    return found, state


def epochs_of_rank(rank: int, folder: str, batch: int, epochs: int) -> Any:
    loader = loader_of(folder, batch=batch)
    return [[plain(each) for each in loader] for _ in range(epochs)]


def numbers(batches: list[Any]) -> list[int]:
    return [x for batch in batches for x in batch["x"]]


def test_in_other_processes_with_workers(folder: str) -> None:
    hand = run_ranks(epochs_of_rank, 2, folder, BATCH, 2)
    stream = [list(itertools.chain(*of_rank)) for of_rank in hand]
    clean_stale_shared_memory()
    first = run_ranks(batches_of_rank, 2, folder, BATCH, 2, None, 3)
    assert [found for found, _ in first] == [batches[:3] for batches in stream]
    clean_stale_shared_memory()
    second = run_ranks(batches_of_rank, 2, folder, BATCH, 2, first[0][1], 4)
    assert [found for found, _ in second] == [batches[3:7] for batches in stream]


@pytest.mark.parametrize(("before", "after", "batch"), [(1, 2, 3), (2, 1, 2)])
def test_on_another_world_the_rest_of_the_epoch_goes_on(folder: str, before: int, after: int, batch: int) -> None:
    steps = 2
    first = run_ranks(batches_of_rank, before, folder, BATCH, 0, None, steps)
    seen = [x for found, _ in first for x in numbers(found)]
    clean_stale_shared_memory()
    left = SIZE - len(seen)
    steps = -(-left // (after * batch))
    rest = [found for found, _ in run_ranks(batches_of_rank, after, folder, batch, 0, first[0][1], steps + 2)]
    handed = seen + [x for found in rest for x in numbers(found[:steps])]
    assert set(handed) == set(range(SIZE))
    assert len(handed) - SIZE < after  # what evens out the ranks
    clean_stale_shared_memory()
    hand = run_ranks(epochs_of_rank, after, folder, batch, 2)
    assert [found[steps:] for found in rest] == [of_rank[1][:2] for of_rank in hand]
