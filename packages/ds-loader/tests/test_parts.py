import random

import torch
from ds_loader._parts import parts_of
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, Sampler, Subset


class Epochs:
    def __init__(self):
        self.told = []

    def set_epoch(self, epoch):
        self.told.append(epoch)


class Data(Epochs, Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return index


class Order(Epochs, Sampler):
    def __iter__(self):
        return iter(range(3))

    def __len__(self):
        return 3


class Wrapper:
    """A loader of nobody's library, around another."""

    def __init__(self, inner):
        self.whatever_it_is_called = inner

    def __iter__(self):
        return iter(self.whatever_it_is_called)


def told(loader, epoch=4):
    for set_epoch in parts_of(loader).epoch_setters():
        set_epoch(epoch)


def test_parts_are_found_once_outer_ones_first():
    sampler = Order()
    batch_sampler = BatchSampler(sampler, 2, False)
    dataset = Data()
    loader = DataLoader(dataset, batch_sampler=batch_sampler)
    found = parts_of(loader).found
    for part in (loader, batch_sampler, sampler, dataset):
        assert sum(other is part for other in found) == 1
    assert found[0] is loader
    assert [part for part in found if part in (batch_sampler, sampler)] == [batch_sampler, sampler]
    told(loader)
    assert sampler.told == dataset.told == [4]


def test_parts_are_found_at_any_depth():
    sampler, dataset = Order(), Data()
    loader = DataLoader(Subset(Subset(dataset, [0, 1, 2]), [2, 1, 0]), sampler=sampler)
    told(Wrapper(Wrapper(Wrapper(loader))))
    assert sampler.told == dataset.told == [4]


def test_parts_are_found_in_lists_dicts_and_slots():
    class Slotted:
        __slots__ = ("order", "unset")

        def __init__(self, order):
            self.order = order

        def __iter__(self):
            return iter(self.order)

    in_list, in_dict, in_slot = Order(), Order(), Order()
    told(Wrapper(Wrapper({"a": in_dict})))
    told(Wrapper([in_list, 3]))
    told(Wrapper(Slotted(in_slot)))
    assert in_list.told == in_dict.told == in_slot.told == [4]


def test_a_cycle_of_parts_ends():
    inner = Order()
    outer = Wrapper(inner)
    inner.back = outer
    told(outer)
    assert inner.told == [4]


def test_what_cannot_be_called_and_classes_are_no_epoch_setters():
    class Odd(Order):
        set_epoch = 3

    assert list(parts_of(Wrapper(Odd())).epoch_setters()) == []
    assert list(parts_of(Wrapper(Order)).epoch_setters()) == []


def test_a_sequence_has_no_parts():
    numbers = [1]
    assert parts_of(numbers).found == [numbers]


def test_a_generator_used_twice_is_held_once():
    generator = torch.Generator()
    parts = parts_of(DataLoader(range(3), shuffle=True, generator=generator))
    assert (parts.own, parts.unseeded) == ([generator], [])


def test_random_samplers_without_a_generator_are_left_without():
    shuffled = DataLoader(range(3), shuffle=True)
    parts = parts_of(shuffled)
    assert shuffled.sampler.generator is None
    assert (parts.own, parts.unseeded) == ([], [shuffled.sampler])
    plain = parts_of(DataLoader(range(3)))
    assert (plain.own, plain.unseeded) == ([], [])
    own = RandomSampler(range(3), generator=torch.Generator())
    assert parts_of(DataLoader(range(3), sampler=own)).own == [own.generator]


def test_generators_are_found_under_any_name():
    class Shuffler(Order):
        def __init__(self):
            super().__init__()
            self.dice = random.Random(3)
            self.more = {"g": torch.Generator()}

    sampler = Shuffler()
    assert parts_of(Wrapper(DataLoader(range(3), sampler=sampler))).own == [sampler.dice, sampler.more["g"]]


def test_generators_of_datasets_count_for_streams_only():
    class Map(Data):
        generator = None

        def __init__(self):
            super().__init__()
            self.generator = torch.Generator()

    class Stream(IterableDataset):
        def __init__(self):
            self.generator = torch.Generator()

        def __iter__(self):
            return iter([])

    stream = Stream()
    assert parts_of(DataLoader(Map())).own == []
    assert parts_of(DataLoader(Subset(Map(), [0]))).own == []
    assert parts_of(DataLoader(stream)).own == [stream.generator]


def test_an_iterator_that_was_begun_is_found():
    loader = DataLoader(range(3), num_workers=1, persistent_workers=True)
    assert parts_of(loader).live == []
    loader._iterator = iter(DataLoader(range(3)))  # which a loader with persistent workers begins anew
    assert parts_of(loader).live == []
    loader.iterator = begun = iter(DataLoader(range(3)))
    assert parts_of(loader).live == [begun]


def test_a_model_that_a_dataset_keeps_is_no_part():
    class Model(torch.nn.Sequential):
        epochs = ()

        def set_epoch(self, epoch):
            self.epochs += (epoch,)

    class Encoded(torch.utils.data.Dataset):
        model = None

        def __len__(self):
            return 3

        def __getitem__(self, index):
            return index

    dataset = Encoded()
    dataset.model = Model()
    loader = DataLoader(dataset)
    assert dataset.model not in parts_of(loader).found
