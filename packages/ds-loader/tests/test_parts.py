import torch
from ds_loader._parts import epoch_setters, own_generators, parts_of
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler


def test_parts_are_found_once():
    sampler = RandomSampler(range(3))
    batch_sampler = BatchSampler(sampler, 2, False)
    loader = DataLoader(range(3), batch_sampler=batch_sampler)
    parts = parts_of(loader)
    assert parts[:3] == [loader, batch_sampler, sampler]
    assert isinstance(parts[3], SequentialSampler)
    assert parts[4] == range(3)
    plain = DataLoader(range(3), batch_size=2)
    assert [type(part).__name__ for part in parts_of(plain)] == [
        "DataLoader",
        "BatchSampler",
        "SequentialSampler",
        "range",
    ]
    numbers = [1]
    assert parts_of(numbers) == [numbers]


def test_epoch_setters_ignores_what_cannot_be_called():
    class Odd:
        set_epoch = 3

    class Good:
        def set_epoch(self, epoch):
            return epoch + 1

    assert [setter(4) for setter in epoch_setters([Odd(), Good(), 7])] == [5]


def test_a_generator_used_twice_is_saved_once():
    generator = torch.Generator()
    loader = DataLoader(range(3), shuffle=True, generator=generator)
    assert own_generators(parts_of(loader)) == [generator]


def test_only_random_samplers_without_a_generator_get_one():
    torch.manual_seed(0)
    shuffled = DataLoader(range(3), shuffle=True)
    (given,) = own_generators(parts_of(shuffled))
    assert shuffled.sampler.generator is given
    assert own_generators(parts_of(shuffled)) == [given]
    assert own_generators(parts_of(DataLoader(range(3)))) == []
    state = torch.get_rng_state()
    own_generators(parts_of(DataLoader(range(3))))
    assert torch.equal(torch.get_rng_state(), state)


def test_generators_of_datasets_count_for_streams_only():
    class Map(torch.utils.data.Dataset):
        generator = torch.Generator()

    class Stream(IterableDataset):
        generator = torch.Generator()

        def __iter__(self):
            return iter([])

    assert own_generators([Map()]) == []
    assert own_generators([Stream()]) == [Stream.generator]
