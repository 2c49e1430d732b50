import inspect
import itertools
import threading

import pytest
import torch
from ds_loader import EmptyLoaderError, LoaderWarning, OneShotLoaderError, RepeatingLoader, dataloader
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset


def take(loader, count):
    return [as_list(batch) for batch in itertools.islice(loader, count)]


def as_list(batch):
    return batch.tolist() if isinstance(batch, torch.Tensor) else batch


class Recorder:
    """Remembers the epochs that it was told."""

    def __init__(self):
        self.epochs = []

    def set_epoch(self, epoch):
        self.epochs.append(epoch)


class Numbers(Recorder, Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return index


class Sampler(Recorder):
    def __iter__(self):
        return iter(range(4))

    def __len__(self):
        return 4


class BatchSampler(Recorder):
    def __init__(self, sampler):
        super().__init__()
        self.sampler = sampler

    def __iter__(self):
        return iter([[0, 1], [2, 3]])

    def __len__(self):
        return 2


class Stream(IterableDataset):
    def __init__(self, count):
        self.count = count

    def __iter__(self):
        return iter(range(self.count))


class FreshEveryTime:
    def __iter__(self):
        yield from "abc"


ONE_ORDER = pytest.mark.filterwarnings("ignore:.*cannot be changed from here:ds_loader.LoaderWarning")


def test_the_module_holds_the_one_name():
    assert dataloader.__all__ == ["RepeatingLoader"]
    assert next(iter(inspect.signature(RepeatingLoader).parameters)) == "loader"
    loader = RepeatingLoader([1])
    assert iter(loader) is loader
    assert loader.loader == [1]


@ONE_ORDER
@pytest.mark.parametrize(
    ("source", "epoch"),
    [
        ([1, 2, 3], [1, 2, 3]),
        ((1, 2), [1, 2]),
        (range(2), [0, 1]),
        (FreshEveryTime(), ["a", "b", "c"]),
        (DataLoader(range(5), batch_size=2), [[0, 1], [2, 3], [4]]),
        (DataLoader(range(5), batch_size=2, drop_last=True), [[0, 1], [2, 3]]),
        (DataLoader(range(2), batch_size=None), [0, 1]),
        (DataLoader(Stream(3), batch_size=2), [[0, 1], [2]]),
    ],
)
def test_it_never_ends(source, epoch):
    assert take(RepeatingLoader(source), 3 * len(epoch) + 1) == [*epoch, *epoch, *epoch, epoch[0]]


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("persistent", [False, True])
def test_with_workers(persistent):
    loader = RepeatingLoader(DataLoader(range(4), batch_size=2, num_workers=1, persistent_workers=persistent))
    assert take(loader, 5) == [[0, 1], [2, 3], [0, 1], [2, 3], [0, 1]]


def test_epoch_and_batch():
    loader = RepeatingLoader(["a", "b"])
    seen = [(loader.epoch, loader.batch)]
    for _ in range(5):
        next(loader)
        seen.append((loader.epoch, loader.batch))
    assert seen == [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 1)]


@ONE_ORDER
def test_len_is_that_of_one_epoch():
    assert len(RepeatingLoader(DataLoader(range(5), batch_size=2))) == 3
    with pytest.raises(TypeError, match=r"FreshEveryTime.* has no length"):
        len(RepeatingLoader(FreshEveryTime()))
    assert RepeatingLoader(FreshEveryTime())  # true without a length


# set_epoch


def test_sampler_and_dataset_are_told_every_epoch_once():
    dataset, sampler = Numbers(), Sampler()
    take(RepeatingLoader(DataLoader(dataset, batch_size=2, sampler=sampler)), 5)
    assert dataset.epochs == [0, 1, 2]
    assert sampler.epochs == [0, 1, 2]


def test_batch_sampler_and_its_sampler_are_told():
    inner = Sampler()
    outer = BatchSampler(inner)
    take(RepeatingLoader(DataLoader(range(4), batch_sampler=outer)), 3)
    assert outer.epochs == [0, 1]
    assert inner.epochs == [0, 1]


def test_a_loader_that_counts_epochs_itself_is_told():
    class Own(Recorder):
        def __iter__(self):
            return iter([1])

    own = Own()
    take(RepeatingLoader(own), 2)
    assert own.epochs == [0, 1]


def reference_of_distributed(rank, epochs, size=10, batch_size=2):
    """The loop that every PyTorch example writes by hand."""
    sampler = DistributedSampler(range(size), num_replicas=2, rank=rank, shuffle=True, seed=3)
    loader = DataLoader(range(size), batch_size=batch_size, sampler=sampler)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for batch in loader:
            yield batch.tolist()


def distributed(rank, size=10, batch_size=2):
    sampler = DistributedSampler(range(size), num_replicas=2, rank=rank, shuffle=True, seed=3)
    return RepeatingLoader(DataLoader(range(size), batch_size=batch_size, sampler=sampler))


def test_distributed_ranks_cover_every_epoch_in_another_order():
    streams = {rank: take(distributed(rank), 9) for rank in (0, 1)}
    for rank, stream in streams.items():
        assert stream == list(reference_of_distributed(rank, 3))
    epochs = [
        [n for rank in (0, 1) for batch in streams[rank][3 * epoch : 3 * epoch + 3] for n in batch]
        for epoch in range(3)
    ]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 3
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_a_rank_goes_past_the_epoch_without_the_others():
    done = []

    def middle_stage():  # asks alone; the other rank never does
        done.append(take(distributed(1), 10))

    thread = threading.Thread(target=middle_stage, daemon=True)
    thread.start()
    thread.join(timeout=30)
    assert done == [list(itertools.islice(reference_of_distributed(1, 4), 10))]
    assert not torch.distributed.is_initialized()


# Sources that are no good


@ONE_ORDER
@pytest.mark.parametrize(
    "source",
    [[], DataLoader(range(3), batch_size=4, drop_last=True), DataLoader(Stream(0)), ""],
)
def test_an_empty_source(source):
    loader = RepeatingLoader(source)
    for _ in range(2):
        with pytest.raises(EmptyLoaderError, match="gave no batch in epoch 0"):
            next(loader)
    with pytest.raises(EmptyLoaderError):  # a loop must not end in silence
        for _ in loader:
            pass


@pytest.mark.parametrize(
    "source", [(n for n in range(3)), iter([1]), map(str, [1]), zip([1], [2], strict=True), itertools.count()]
)
def test_one_shot_sources_are_refused_at_once(source):
    with pytest.raises(OneShotLoaderError, match="can be iterated only once"):
        RepeatingLoader(source)


@ONE_ORDER
def test_an_own_one_shot_source_is_found_out_in_the_second_epoch():
    class OneShot:
        def __init__(self):
            self.left = [1, 2]

        def __iter__(self):
            return self

        def __next__(self):
            if not self.left:
                raise StopIteration
            return self.left.pop()

    loader = RepeatingLoader(OneShot())
    assert [next(loader), next(loader)] == [2, 1]
    for _ in range(2):
        with pytest.raises(OneShotLoaderError, match="gave batches before, but none in epoch 1"):
            next(loader)


@ONE_ORDER
def test_an_iterator_that_starts_anew_is_fine():
    class Restarting:
        def __iter__(self):
            self.left = [1, 2]
            return self

        def __next__(self):
            if not self.left:
                raise StopIteration
            return self.left.pop()

    assert take(RepeatingLoader(Restarting()), 5) == [2, 1, 2, 1, 2]


@pytest.mark.parametrize("source", [3, None, object()])
def test_what_cannot_be_iterated(source):
    with pytest.raises(TypeError, match="loader must be iterable"):
        RepeatingLoader(source)


@pytest.mark.parametrize("error", [EmptyLoaderError, OneShotLoaderError])
def test_no_error_is_a_stop_iteration(error):
    assert not issubclass(error, StopIteration)
    assert issubclass(error, (ValueError, TypeError))


@ONE_ORDER
def test_after_an_exception_the_same_batch_is_tried_again():
    class Flaky(Numbers):
        fails = 1

        def __getitem__(self, index):
            if index == 2 and self.fails:
                self.fails -= 1
                raise OSError("disk")
            return index

    def generator_based():
        dataset = Flaky()

        class Source:
            def __iter__(self):
                for index in range(4):
                    yield dataset[index]

        return Source()

    for source, batches in (
        (DataLoader(Flaky(), batch_size=2), [[0, 1], [2, 3], [0, 1]]),
        (generator_based(), [0, 1, 2, 3, 0]),
    ):
        loader = RepeatingLoader(source)
        seen = []
        while len(seen) < len(batches):
            try:
                seen.append(as_list(next(loader)))
            except OSError:
                seen_at_error = len(seen)
        assert seen == batches
        assert 0 < seen_at_error < len(batches)


@ONE_ORDER
def test_nothing_is_loaded_before_the_first_batch_is_asked_for():
    class Source:
        begun = 0

        def __iter__(self):
            self.begun += 1
            return iter([1, 2])

    source = Source()
    loader = RepeatingLoader(source)
    assert source.begun == 0
    take(loader, 2)
    assert source.begun == 1


# What it tells at construction


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (FreshEveryTime(), "^FreshEveryTime: the order of FreshEveryTime cannot be changed from here"),
        (DataLoader(Stream(3)), "^DataLoader: the order of Stream cannot be changed from here"),
    ],
)
def test_an_order_that_cannot_be_changed_is_told_once(source, message):
    with pytest.warns(LoaderWarning, match=message) as told:
        loader = RepeatingLoader(source)
    assert len(told) == 1
    assert told[0].filename == __file__
    take(loader, 5)  # warnings are errors


@pytest.mark.parametrize(
    "source", [[1], (1,), range(3), "ab", Sampler(), DataLoader(Numbers()), DataLoader(range(3), shuffle=True)]
)
def test_an_order_that_can_be_changed_or_is_what_it_is_warns_of_nothing(source):
    take(RepeatingLoader(source), 7)


def test_batches_that_come_as_workers_finish_them_are_told():
    source = DataLoader(range(3), num_workers=2, in_order=False)
    with pytest.warns(LoaderWarning, match="cannot resume exactly, because in_order=False"):
        RepeatingLoader(source)


def test_set_epoch_may_be_off_or_a_function():
    dataset, told = Numbers(), []
    take(RepeatingLoader(DataLoader(dataset), set_epoch="off"), 9)
    assert dataset.epochs == []
    take(RepeatingLoader(DataLoader(dataset), set_epoch=told.append), 9)
    assert (dataset.epochs, told) == ([], [0, 1, 2])
