"""The exchange against dense tensors: random layouts over 1 to 4 ranks, thousands of them, bit for bit."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import pairwise, product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ds_fragment import kernels
from ds_fragment.collective import exchange, plan as planning
from ds_fragment.collective.agree import agree
from ds_fragment.collective.exchange import fetch, gather
from ds_fragment.collective.plan import Plan
from ds_fragment.collective.status import MAGIC
from ds_fragment.errors import FragmentError, InvalidValueError, RankMismatchError
from ds_fragment.layout import Fragment, Layout, flat_layout, mesh_layout, whole
from ds_fragment.sharding import Sharding, box
from fragment_oracle import assert_same, bits, raised
from ranks import run_ranks

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8, torch.int32, torch.float8_e4m3fn]


def noise(shape: torch.Size, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Random bytes: NaN payloads, infinities, subnormals and all."""
    raw = torch.randint(0, 256, (shape.numel() * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).view(shape) if shape.numel() else torch.empty(shape, dtype=dtype)


def random_layout(chance: random.Random, shape: torch.Size, ranks: int) -> Layout:
    kind = chance.choice(["flat", "ragged", "box", "mesh", "copies", "one"])
    numel = shape.numel()
    if kind == "flat":  # within a longer buffer, cut evenly, padding behind
        start = chance.randint(0, 9)
        return flat_layout(start, numel, -(-(start + numel + chance.randint(0, 9)) // ranks) or 1, ranks)
    if kind == "ragged":  # any cuts, in any order of ranks, some empty
        cuts = [0, *sorted(chance.randint(0, numel) for _ in range(ranks - 1)), numel]
        spans = [(a, b - a) for a, b in pairwise(cuts)]
        chance.shuffle(spans)
        return Layout((numel,), tuple(Fragment((a,), (n,)) if n else None for a, n in spans))
    if kind == "one" or not numel or not shape:
        holder = chance.randrange(ranks)
        everything = Fragment((0,) * len(shape), tuple(shape))
        return Layout(tuple(shape), tuple(everything if r == holder and numel else None for r in range(ranks)))
    mesh = (2, 2) if ranks == 4 and chance.random() < 0.6 else (ranks,)
    if kind == "copies":
        return mesh_layout(shape, mesh, [None] * len(mesh))
    dims: list[int | None] = [chance.randrange(len(shape)) for _ in mesh]
    if kind == "mesh" and len(mesh) == 2:
        dims[chance.randrange(2)] = None
    return mesh_layout(shape, mesh, dims, chance.sample(range(len(mesh)), len(mesh)))


def each(piece_of: Any) -> Any:
    """The pieces of some items, from a function that gives one."""
    return lambda items: [piece_of(item) for item in items]


def cut_by_hand(dense: torch.Tensor, layout: Layout, rank: int) -> torch.Tensor | None:
    """A rank's piece by fancy indexing, which the exchange does not use; sometimes in an odd memory order."""
    fragment = layout.fragments[rank]
    if fragment is None:
        return None
    numbers = torch.arange(layout.numel).view(layout.shape)
    for dim, (offset, size) in enumerate(zip(fragment.offset, fragment.size, strict=True)):
        numbers = numbers.index_select(dim, torch.arange(offset, offset + size))
    return bits(dense).reshape(-1)[numbers].view(dense.dtype)


GPUS = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]
WHERE = [("gloo", 2), ("gloo", 3), ("gloo", 4), pytest.param("nccl", 2, marks=GPUS)]


def where(backend: str, rank: int) -> tuple[Any, torch.device]:
    """A group of all ranks, and the device that it is for."""
    if backend == "nccl":
        torch.cuda.set_device(rank)
        return dist.new_group(backend="nccl"), torch.device("cuda", rank)
    return dist.group.WORLD, CPU


def drawn(chance: random.Random, generator: torch.Generator, group: Any, device: torch.device) -> tuple[Any, Any, Any]:
    """Up to 12 tensors, how each is cut, and this rank's pieces; thresholds for every way of travelling."""
    everyone, rank, ranks = group, group.rank(), group.size()
    denses, shardings, pieces = [], [], []
    for _ in range(chance.randint(0, 12)):
        shape = torch.Size(chance.choice([0, 1, 2, 3, 5, 8]) for _ in range(chance.randint(0, 3)))
        even = chance.random() < 0.3  # as most parameters are cut
        if even:
            shape = torch.Size((ranks * chance.choice([1, 4, 16]), chance.choice([1, 4])))
        dense = noise(shape, chance.choice(DTYPES), generator)
        if dense.nbytes >= 16 and chance.random() < 0.2:  # data that looks like an error
            bits(dense).view(-1).view(torch.uint8)[:16] = torch.tensor([MAGIC, -1]).view(torch.uint8)
        layout, group = mesh_layout(shape, (ranks,), [0]) if even else random_layout(chance, shape, ranks), everyone
        if chance.random() < 0.1:
            layout, group = whole(shape), None
        shardings.append(Sharding(shape, dense.dtype, device, layout, group))
        denses.append(dense)
        piece = cut_by_hand(dense, layout, rank if group is not None else 0)
        transposed = chance.random() < 0.5
        if piece is not None and piece.dim() == 2 and transposed:
            piece = piece.t().contiguous().t()
        pieces.append(None if piece is None else piece.to(device))
    # Every way of travelling, also for tensors as small as these.
    planning.IN_PLACE = dict.fromkeys(["cpu", "cuda"], chance.choice([0, 20, 1 << 20]))
    planning._PADDED = chance.choice([0, 1 << 20])
    exchange._SHARED = chance.choice([("cuda",), ("cpu", "cuda")])
    return denses, shardings, pieces


def _random_layouts(rank: int, ranks: int, backend: str, rounds: int) -> int:
    chance, generator = random.Random(ranks), torch.Generator().manual_seed(ranks)
    layouts, (group, device) = 0, where(backend, rank)
    for _ in range(rounds):
        denses, shardings, pieces = drawn(chance, generator, group, device)
        layouts += len(shardings)
        dst = chance.choice([None, chance.randrange(ranks)])
        plan = Plan(shardings, chance.choice([1, 200, 1 << 20, 1 << 20]))
        outs = [torch.empty_like(dense, device=device) for dense in denses] if chance.random() < 0.3 else None
        out = None if outs is None else outs.__getitem__
        got = [tensor for bucket in gather(plan, each(pieces.__getitem__), dst=dst, out=out) for tensor in bucket]
        assert len(got) == len(denses)
        for item, (tensor, dense) in enumerate(zip(got, denses, strict=True)):
            if dst is not None and rank != dst:
                assert tensor is None
            else:
                assert_same(tensor.cpu(), dense, (shardings[item].layout, dst))
                assert outs is None or tensor is outs[item]
                assert shardings[item].alone or pieces[item] is None or tensor.data_ptr() != pieces[item].data_ptr()
    return layouts


@pytest.mark.parametrize(("backend", "ranks"), [("gloo", 1), *WHERE])
def test_random_layouts_arrive_bit_for_bit(backend: str, ranks: int) -> None:
    counts = run_ranks(_random_layouts, ranks, ranks, backend, 200)
    assert counts[0] > 1000
    assert len(set(counts)) == 1


def _random_failures(rank: int, ranks: int, backend: str, rounds: int) -> list[Any]:
    chance, generator = random.Random(ranks), torch.Generator().manual_seed(ranks)
    found, (group, device) = [], where(backend, rank)
    for number in range(rounds):
        denses, shardings, pieces = drawn(chance, generator, group, device)
        plan = Plan(shardings, chance.choice([1, 200, 1 << 20]))
        dst = chance.choice([None, None, chance.randrange(ranks)])
        shared = [item for item, sharding in enumerate(shardings) if not sharding.alone]
        failing, at = chance.randrange(ranks), chance.choice(shared or [0])

        def locate(item: int, number: int = number, at: int = at, failing: int = failing, pieces: Any = pieces) -> Any:
            if rank == failing and item == at:
                raise InvalidValueError(f"round {number}")
            return pieces[item]

        if shared:
            found.append(raised(lambda plan=plan, locate=locate, dst=dst: list(gather(plan, each(locate), dst=dst))))
            assert found[-1] == ("InvalidValueError", f"rank {failing}: round {number}")
        got = [tensor for bucket in gather(plan, each(pieces.__getitem__)) for tensor in bucket]  # nothing is left
        for tensor, dense in zip(got, denses, strict=True):
            assert_same(tensor.cpu(), dense)
    return found


@pytest.mark.parametrize(("backend", "ranks"), WHERE)
def test_a_failure_in_random_layouts_is_everybodys(backend: str, ranks: int) -> None:
    found = run_ranks(_random_failures, ranks, ranks, backend, 150)
    assert len(found[0]) > 100
    assert all(mine == found[0] for mine in found)


def _one_by_one(rank: int, ranks: int, backend: str, rounds: int) -> tuple[int, list[Any]]:
    chance, generator = random.Random(ranks), torch.Generator().manual_seed(ranks)
    found, right, (group, device) = [], 0, where(backend, rank)
    for _ in range(rounds):
        for dense, sharding, piece in zip(*drawn(chance, generator, group, device), strict=True):
            if sharding.alone:
                continue
            failing = chance.randrange(ranks)
            error = InvalidValueError(f"round {right}")

            def locate(items: Any, piece: Any = piece, failing: int = failing, error: Exception = error) -> Any:
                if rank == failing:
                    raise error
                return [piece for _ in items]

            if dense.numel():
                told = raised(lambda sharding=sharding, locate=locate: fetch(sharding, locate))
                prepared = exchange._prepared(sharding)
                if isinstance(prepared, exchange._Direct) and failing not in prepared.senders:
                    assert (told is None) == (rank != failing)  # it has nothing to send, and tells nobody
                else:
                    found.append(told)
                    assert told == ("InvalidValueError", f"rank {failing}: {error}")
            assert_same(fetch(sharding, each(lambda _, piece=piece: piece)).cpu(), dense)
            right += 1
    return right, found


@pytest.mark.parametrize(("backend", "ranks"), WHERE)
def test_one_by_one_they_arrive_bit_for_bit_and_so_does_an_error(backend: str, ranks: int) -> None:
    found = run_ranks(_one_by_one, ranks, ranks, backend, 60)
    assert found[0][0] > 250
    assert len(found[0][1]) > 100
    assert all(mine == found[0] for mine in found)


def _busy_stream(rank: int, rounds: int) -> list[int]:
    group, device = where("nccl", rank)
    shape = torch.Size((3, 1 << 20))  # rank 0 has two rows, so that it is packed; with two others it is under way
    layout = mesh_layout(shape, (2,), [0])
    plan = Plan([Sharding(shape, torch.float32, device, layout, group) for _ in range(6)], 40 << 20)
    for number in range(rounds):

        def locate(items: Any, number: int = number) -> Any:
            """Fresh rows in as much memory as the whole takes, which is free again before a busy stream wrote them."""
            (item,) = items
            torch.cuda._sleep(50_000_000)
            return [torch.empty(shape, device=device)[: 2 - rank].fill_(100 * number + 2 * item + rank)]

        torch.cuda.empty_cache()
        got = [tensor for bucket in gather(plan, locate) for tensor in bucket if tensor is not None]
        for item, tensor in enumerate(got):
            rows = [[100 * number + 2 * item + sender] for sender in (0, 0, 1)]
            assert torch.equal(tensor, torch.tensor(rows, device=device).float().expand(shape)), (number, item)
    return [len(bucket.items) for bucket in plan.buckets]


@pytest.mark.parametrize("rounds", [pytest.param(3, marks=GPUS)])
def test_what_a_busy_stream_has_yet_to_pack_is_not_written_over(rounds: int) -> None:
    assert run_ranks(_busy_stream, 2, rounds) == [[1] * 6] * 2


def _cut_is_what_was_gathered(rank: int) -> None:
    """Sharding.cut, which writing uses, gives the piece that reading would send."""
    chance, generator = random.Random(7), torch.Generator().manual_seed(7)
    for _ in range(300):
        shape = torch.Size(chance.choice([0, 1, 2, 3, 5]) for _ in range(chance.randint(0, 3)))
        dense = noise(shape, torch.float32, generator)
        sharding = Sharding(shape, dense.dtype, CPU, random_layout(chance, shape, 4), dist.group.WORLD)
        mine, by_hand = sharding.cut(dense), cut_by_hand(dense, sharding.layout, rank)
        assert (mine is None) == (by_hand is None)
        if mine is not None:
            assert_same(mine, by_hand)
            assert mine.data_ptr() >= dense.data_ptr()  # a view


def test_cut_is_what_was_gathered() -> None:
    run_ranks(_cut_is_what_was_gathered, 4)


def test_box_is_a_view_of_the_slices() -> None:
    dense = torch.arange(60.0).view(3, 4, 5)
    fragment = Fragment((1, 0, 2), (2, 4, 3))
    assert torch.equal(box(dense, (3, 4, 5), fragment), dense[1:3, 0:4, 2:5])
    assert torch.equal(box(dense, (60,), Fragment((7,), (9,))), dense.view(-1)[7:16])


def simple_places(count: int, numel: int, group: Any, ranks: int) -> list[Sharding]:
    layout = flat_layout(0, numel, -(-numel // ranks), ranks)
    return [Sharding(torch.Size((numel,)), torch.float32, CPU, layout, group) for _ in range(count)]


def test_buckets_keep_the_order_and_the_limit() -> None:
    shardings = [Sharding(torch.Size((n,)), torch.float32, CPU, whole((n,)), None) for n in (1, 2, 3, 50, 1, 1, 0, 9)]
    plan = Plan(shardings, bucket_bytes=24)
    assert [item for bucket in plan.buckets for item in bucket.items] == list(range(8))
    assert [bucket.items for bucket in plan.buckets] == [[0, 1, 2], [3], [4, 5, 6], [7]]


def _two_buckets_at_a_time(rank: int, in_place: int) -> None:
    under_way: set[Any] = set()

    class Counted(exchange.InFlight):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            under_way.add(self)

        def finish(self) -> Any:
            under_way.discard(self)
            return super().finish()

    planning.IN_PLACE = {"cpu": in_place}
    exchange.InFlight = Counted
    shardings = [simple_places(1, numel, dist.group.WORLD, 2)[0] for _ in range(12) for numel in (8, 8, 16)]
    plan = Plan(shardings, bucket_bytes=128)
    assert len(plan.buckets) > 5
    for turn, bucket in enumerate(gather(plan, each(lambda item: torch.full((shardings[item].shape[0] // 2,), 1.0)))):
        assert len(under_way) == (1 if turn + 1 < len(plan.buckets) else 0)  # the next one is on its way
        assert sum(shardings[item].nbytes for item in plan.buckets[turn].items) <= plan.bucket_bytes
        assert all(tensor is not None and bool((tensor == 1).all()) for tensor in bucket)


@pytest.mark.parametrize("in_place", [1 << 20, 0, 33])
def test_two_buckets_are_in_memory(in_place: int) -> None:
    run_ranks(_two_buckets_at_a_time, 2, in_place)


def failing_locate(at: int, error: Exception, size: int) -> Any:
    def locate(item: int) -> torch.Tensor:
        if item == at:
            raise error
        return torch.ones(size)

    return locate


def _every_failure_is_everybodys(rank: int, in_place: int) -> list[Any]:
    planning.IN_PLACE = {"cpu": in_place}
    found = []
    plan = Plan(simple_places(7, 8, dist.group.WORLD, 2), bucket_bytes=128 if in_place else 64)
    assert len(plan.buckets) == 4
    for at, dst in product(range(7), [None, 0, 1]):
        locate = (
            failing_locate(at, InvalidValueError(f"item {at}"), 4) if rank == 1 else failing_locate(-1, OSError(), 4)
        )
        found.append(raised(lambda locate=locate, dst=dst: list(gather(plan, each(locate), dst=dst))))
        # Nothing is left behind: the next exchange is the right one.
        (*_, last) = gather(plan, each(lambda item: torch.full((4,), 5.0)))
        assert_same(last[-1], torch.full((8,), 5.0))
    return found


@pytest.mark.parametrize("in_place", [1 << 20, 0])
def test_a_failure_at_any_item_is_raised_on_every_rank(in_place: int) -> None:
    mine, other = run_ranks(_every_failure_is_everybodys, 2, in_place)
    assert mine == other
    assert mine == [("InvalidValueError", f"rank 1: item {at}") for at in range(7) for _ in range(3)]


def _only_one_rank_knows(rank: int, groups: int) -> list[Any]:
    """A whole that one rank lacks is nobody else's business until a later bucket carries the word."""
    world = dist.group.WORLD
    others = [world, dist.new_group([0, 1])][:groups]
    found = []
    for at, count in product([0, 3, 11], [12, 13]):
        shardings = [simple_places(1, 8, others[item % groups], 2)[0] for item in range(count)]
        shardings[at] = Sharding(torch.Size((8,)), torch.float32, CPU, whole((8,)), None)
        plan = Plan(shardings, bucket_bytes=1)
        assert len(plan.buckets) == count
        held = lambda item, shardings=shardings: torch.ones(8 if shardings[item].group is None else 4)  # noqa: E731
        bad = lambda item, at=at, held=held: None if item == at else held(item)  # noqa: E731
        found.append(raised(lambda plan=plan, locate=bad if rank else held: list(gather(plan, each(locate)))))
        for group in others:
            total = torch.ones(())
            dist.all_reduce(total, group=group)
            assert total == 2
    return found


@pytest.mark.parametrize("groups", [1, 2])
def test_what_one_rank_lacks_reaches_the_others_with_a_later_bucket(groups: int) -> None:
    mine, other = run_ranks(_only_one_rank_knows, 2, groups)
    text = "rank 1: item {}: 0 elements are here where the layout says 8"
    assert other == [("FragmentError", text.format(at)) for at in (0, 0, 3, 3, 11, 11)]
    # Nothing follows item 11 of 12: there is nobody to tell.
    assert [e for i, e in enumerate(mine) if i != 4] == [e for i, e in enumerate(other) if i != 4]
    assert mine[4] is None


def _wrong_sizes(rank: int) -> list[Any]:
    plan = Plan(simple_places(1, 8, dist.group.WORLD, 2), 1 << 20)
    wrong: list[torch.Tensor | None] = [torch.ones(3), torch.ones(5), None]

    def read(piece: torch.Tensor | None) -> Any:
        return raised(lambda: list(gather(plan, each(lambda _: torch.ones(4) if rank else piece))))

    return [read(piece) for piece in wrong]


def test_a_piece_of_the_wrong_size_is_an_error_on_every_rank() -> None:
    mine, other = run_ranks(_wrong_sizes, 2)
    assert mine == other
    assert [text for _, text in mine] == [
        f"rank 0: item 0: {held} elements are here where the layout says 4" for held in (3, 5, 0)
    ]


def _cannot_be_sent(rank: int) -> list[Any]:
    """A shard that is as large as it should be, and that nothing can be read from."""
    found = []
    for in_place in (0, 1 << 20):
        planning.IN_PLACE = {"cpu": in_place}
        ragged = Sharding(torch.Size((7,)), torch.float32, CPU, flat_layout(0, 7, 4, 2), dist.group.WORLD)
        shardings = [*simple_places(1, 8, dist.group.WORLD, 2), ragged, *simple_places(1, 8, dist.group.WORLD, 2)]
        for at, dst in product(range(3), [None, 0, 1]):

            def locate(item: int, at: int = at, shardings: Any = shardings) -> torch.Tensor:
                return torch.ones(shardings[item].held, device="meta" if rank == 1 and item == at else "cpu")

            for bucket_bytes in (1, 1 << 20):
                plan = Plan(shardings, bucket_bytes)
                told = raised(lambda plan=plan, locate=locate, dst=dst: list(gather(plan, each(locate), dst=dst)))
                found.append((told or ("", ""))[1][:8])
            if dst is None:
                told = raised(lambda one=shardings[at], at=at, locate=locate: fetch(one, lambda _: [locate(at)]))
                found.append((told or ("", ""))[1][:8])
        (*_, last) = gather(Plan(shardings, 1), each(lambda item, s=shardings: torch.ones(s[item].held)))
        assert_same(last[-1], torch.ones(8))
    return found


def test_a_shard_that_cannot_be_sent_is_an_error_on_every_rank() -> None:
    mine, other = run_ranks(_cannot_be_sent, 2)
    assert mine == other == ["rank 1: "] * 42


def _left_early(rank: int) -> None:
    plan = Plan(simple_places(6, 8, dist.group.WORLD, 2), bucket_bytes=32)
    for turn in range(20):
        for bucket in gather(plan, each(lambda item: torch.full((4,), float(item)))):
            if turn % 6 == int(bucket[0][0]):
                break
        total = torch.ones(())
        dist.all_reduce(total)
        assert total == 2


def test_leaving_early_on_every_rank_leaves_nothing_behind() -> None:
    run_ranks(_left_early, 2)


def subgroups() -> tuple[Any, Any]:
    """My pair and my row of the ranks 0..3, as a two by two mesh."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    rows = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    return pairs[dist.get_rank() // 2], rows[dist.get_rank() % 2]


def _several_groups(rank: int) -> list[Any]:
    pair, row = subgroups()
    shardings = [simple_places(1, 8, group, group.size())[0] for group in (pair, dist.group.WORLD, row, pair)]
    value = {pair: 10.0 + rank // 2, row: 20.0 + rank % 2, dist.group.WORLD: 30.0}

    def locate(item: int) -> torch.Tensor:
        sharding = shardings[item]
        return torch.full((8 // sharding.group.size(),), value[sharding.group])

    for bucket_bytes in (1, 64, 1 << 20):
        plan = Plan(shardings, bucket_bytes)
        got = [tensor for bucket in gather(plan, each(locate)) for tensor in bucket]
        for tensor, sharding in zip(got, shardings, strict=True):
            assert_same(tensor, torch.full((8,), value[sharding.group]))
        # A receiver outside of some groups: those deliver to nobody, and nobody waits.
        got = [tensor for bucket in gather(plan, each(locate), dst=1) for tensor in bucket]
        assert all((tensor is not None) == (rank == 1) for tensor in got)
        if rank == 1:
            assert_same(got[0], torch.full((8,), 10.0))
            assert_same(got[2], torch.full((8,), 21.0))

    # A failure in one pair reaches whoever shares a later bucket with it.
    plan = Plan(shardings, 1)

    def bad(item: int) -> torch.Tensor:
        if item == 0:
            raise FragmentError("here")
        return locate(item)

    return [raised(lambda: list(gather(plan, each(bad if rank == 3 else locate))))]


def test_several_groups_at_once() -> None:
    found = run_ranks(_several_groups, 4)
    assert found == [[("FragmentError", "rank 3: here")]] * 4


def _agree(rank: int, ranks: int) -> list[Any]:
    world = [dist.group.WORLD]
    agree(None, world, CPU)
    agree(None, world, CPU, [1, -(2**63), 2**63 - 1])
    found = []
    for failing in range(ranks):
        error = ValueError("bad") if rank == failing else None
        found.append(raised(lambda error=error: agree(error, world, CPU, [1] if error is None else [])))
    many = list(range(1000))
    for at in (0, 1, 126, 500, 999):
        mine = [*many[:at], -1, *many[at + 1 :]] if rank == ranks - 1 else many
        found.append(raised(lambda mine=mine: agree(None, world, CPU, mine, lambda i: f"thing {i}")))
    found.append(raised(lambda: agree(None, world, CPU, [rank] * 5, lambda i: f"thing {i}")))
    found.append(raised(lambda: agree(None, world, CPU, [1] * (1 + rank))))
    return found


@pytest.mark.parametrize("ranks", [2, 3])
def test_agree_raises_the_same_on_every_rank(ranks: int) -> None:
    found = run_ranks(_agree, ranks, ranks)
    assert all(one == found[0] for one in found)
    failing, different = found[0][:ranks], found[0][ranks:]
    assert failing == [("FragmentError", f"rank {rank}: ValueError: bad") for rank in range(ranks)]
    assert {kind for kind, _ in different} == {RankMismatchError.__name__}
    for at, (_, text) in zip((0, 1, 126, 500, 999), different, strict=False):
        assert f"different values for thing {at}:" in text
    assert "thing 0, thing 1, thing 2 and 2 more" in different[5][1]
    assert str(list(range(1, ranks + 1))) in different[6][1]


def _agree_over_a_mesh(rank: int) -> list[Any]:
    pair, row = subgroups()
    found = []
    for failing in range(4):
        error = InvalidValueError("bad") if rank == failing else None
        found.append(raised(lambda error=error: agree(error, [pair, row], CPU)))
    # A number that is the pair's own differs between the pairs, and that is right.
    agree(None, [pair, row], CPU, [rank // 2, rank % 2, 7], scopes=[[pair], [row], [pair, row]])
    number = [rank // 2, rank % 2, int(rank == 3)]
    found.append(raised(lambda: agree(None, [pair, row], CPU, number, "{}".format, [[pair], [row], [pair, row]])))
    return found


def test_agree_carries_an_error_over_both_axes_of_a_mesh() -> None:
    found = run_ranks(_agree_over_a_mesh, 4)
    assert all(one == found[0] for one in found)
    assert found[0][:4] == [("InvalidValueError", f"rank {rank}: bad") for rank in range(4)]
    assert found[0][4][0] == "RankMismatchError"
    assert "values for 2" in found[0][4][1]


def test_agree_without_a_group_is_about_this_rank_alone() -> None:
    agree(None, [], CPU, [1, 2, 3])
    with pytest.raises(InvalidValueError, match=r"^bad$"):
        agree(InvalidValueError("bad"), [], CPU)


def test_gather_without_a_process_group() -> None:
    dense = [torch.arange(5.0), torch.tensor(3.0), torch.empty(0, 2)]
    shardings = [Sharding(t.shape, t.dtype, CPU, whole(t.shape), None) for t in dense]

    def tensors() -> Iterator[torch.Tensor | None]:
        for bucket in gather(Plan(shardings, 1), each(dense.__getitem__)):
            yield from bucket

    for got, expected in zip(tensors(), dense, strict=True):
        assert got is not None
        assert_same(got, expected)
        assert got is not expected
    with pytest.raises(FragmentError, match="2 elements are here where the layout says 5"):
        list(gather(Plan(shardings[:1], 1), each(lambda _: torch.ones(2))))


def test_copy_casts_to_nearest_even_and_takes_nothing() -> None:
    kernels.copy([], [])
    source = torch.tensor([1.0, 1.00390625, 1.01171875, float("nan"), -0.0])
    target = torch.empty(5, dtype=torch.bfloat16)
    kernels.copy([target], [source])
    assert torch.equal(bits(target)[:3], torch.tensor([0x3F80, 0x3F80, 0x3F82], dtype=torch.int16))
    assert target[3].isnan()
    assert bits(target)[4] == -0x8000
