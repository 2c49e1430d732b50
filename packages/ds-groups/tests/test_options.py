"""Options of groups: checked at bind, compared by value, copied for every group."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from ds_groups import GroupOptions, ParallelTopology, TopologyError
from ds_groups._options import Settings, settings_of
from ranks import run_ranks


class Config:
    """As an extension class: no copy protocol, attributes only."""

    def __init__(self):
        self.max_ctas = 0
        self.net_name = None

    def __reduce_ex__(self, protocol):
        raise TypeError("cannot pickle")


class Options(Config):
    def __init__(self):
        super().__init__()
        self.config = Config()
        self.is_high_priority_stream = False
        self.global_ranks_in_group = []
        self.group_name = ""
        self._timeout = timedelta(0)


class NoCopy(Options):
    def __init__(self, argument):
        super().__init__()


def options_with(ctas):
    options = Options()
    options.config.max_ctas = ctas
    return options


def test_options_are_compared_by_value():
    first, second, third = (settings_of(GroupOptions(pg_options=options_with(ctas))) for ctas in (4, 4, 8))
    assert first == second != third
    assert hash(first) == hash(second)
    assert settings_of(GroupOptions(pg_options=lambda: options_with(4))) == first
    assert first.as_dict()["pg_options"]["config"]["max_ctas"] == 4
    written = options_with(4)
    written.global_ranks_in_group, written.group_name = [0, 1], "mine"  # as PyTorch does
    assert settings_of(GroupOptions(pg_options=written)) == first


def test_every_group_gets_a_copy():
    given = options_with(4)
    settings = settings_of(GroupOptions(pg_options=given))
    made = [settings.make_pg_options() for _ in range(2)]
    assert len({id(given), *map(id, made)}) == 3
    assert len({id(given.config), *(id(copy.config) for copy in made)}) == 3
    assert [copy.config.max_ctas for copy in made] == [4, 4]
    given.config.max_ctas = 9
    assert made[0].config.max_ctas == 4


def test_options_that_cannot_be_copied():
    with pytest.raises(TopologyError, match="pg_options of type NoCopy cannot be copied"):
        settings_of(GroupOptions(pg_options=NoCopy(1)), "axes['ep']: ")
    settings_of(GroupOptions(pg_options=lambda: NoCopy(1)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (GroupOptions(backend=3), "backend must be a name"),
        (GroupOptions(backend=""), "backend must be a name"),
        (GroupOptions(timeout="30"), "timeout must be seconds or a timedelta, got '30'"),
        (GroupOptions(timeout=True), "timeout must be seconds or a timedelta, got True"),
        (GroupOptions(timeout=0), "timeout must be positive and finite, got 0"),
        (GroupOptions(timeout=float("nan")), "timeout must be positive and finite"),
        (GroupOptions(timeout=timedelta(seconds=-1)), "timeout must be positive and finite"),
        (GroupOptions(warm_up=1), "warm_up must be True or False, got 1"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(TopologyError, match=message):
        settings_of(options)


def test_times_are_equal_by_value():
    assert settings_of(GroupOptions(timeout=30)) == settings_of(GroupOptions(timeout=timedelta(seconds=30)))
    assert Settings().plain
    assert settings_of(GroupOptions(warm_up=True)).plain  # it is no other group
    assert not settings_of(GroupOptions(timeout=30)).plain


def test_an_axis_takes_the_rest_from_all():
    base = GroupOptions("gloo", 30, None, True)
    assert GroupOptions(timeout=5).over(base) == GroupOptions("gloo", 5, None, True)
    assert GroupOptions(warm_up=False).over(base) == GroupOptions("gloo", 30, None, False)


def wrong_binds(rank):
    plan = ParallelTopology(2, tp=2)
    messages = []
    for options in (
        {"backend": "bogus"},
        {"backend": "cpu:gloo,cuda"},
        {"axes": {"zz": GroupOptions()}},
        {"axes": {"tp": {"timeout": 3}}},
        {"axes": {"tp": GroupOptions(timeout=-1)}},
        {"axes": {"dp_cp": GroupOptions(), ("cp", "dp"): GroupOptions()}},
        {"pg_options": SimpleNamespace(a=1)},
        {"axes": {"tp": GroupOptions(backend="nccl", pg_options=SimpleNamespace(a=1))}},
    ):
        with pytest.raises(TopologyError) as caught:
            plan.bind(**options)
        messages.append(str(caught.value))
    return messages


def test_wrong_options_at_bind():
    for found in run_ranks(wrong_binds, 2):
        expected = [
            "backend='bogus': 'bogus' is not known to PyTorch",
            "backend='cpu:gloo,cuda'",
            "axis 'zz' is not known",
            "axes['tp'] must be a GroupOptions, got {'timeout': 3}",
            "axes['tp']: timeout must be positive",
            "axes[('cp', 'dp')] names an axis a second time",
            "PyTorch ignores them for the gloo backend",
            "axes['tp']: pg_options must be a torch.distributed.ProcessGroupNCCL.Options",
        ]
        assert all(part in message for part, message in zip(expected, found, strict=True))


def per_axis(rank):
    plan = ParallelTopology(4, tp=2, ep=2)
    bound = plan.bind(timeout=20, axes={"ep": GroupOptions(timeout=7), "edp": GroupOptions(warm_up=True)})
    bound.create()
    assert len(bound) == 3  # tp, dp, and ep apart from tp
    times = {}
    for axis in ("tp", "dp", "ep", "edp"):
        backend = bound.group(axis)._get_backend(dist.distributed_c10d.torch.device("cpu"))
        times[axis] = backend.options._timeout.total_seconds()
    assert bound.group("ep") is not bound.group("tp")  # the same ranks, other options
    assert bound.group("edp") is bound.group("dp")
    bound.close()
    return times


def test_options_of_an_axis():
    assert run_ranks(per_axis, 4) == [{"tp": 20.0, "dp": 20.0, "ep": 7.0, "edp": 20.0}] * 4


def warm(rank, wrong):
    from ds_groups import GroupCreationError

    count = []
    reduce = dist.all_reduce

    def spy(value, group=None):
        count.append(dist.get_process_group_ranks(group))
        reduce(value, group=group)
        if wrong:
            value += 1

    dist.all_reduce = spy
    bound = ParallelTopology(4, tp=2).bind(timeout=20, warm_up=True)
    if wrong:
        with pytest.raises(GroupCreationError, match="reduces wrongly on cpu: the sum of a one from every rank is 3"):
            bound.group("tp")
        return None
    bound.create()
    bound.group("tp")
    ParallelTopology(4, tp=2).bind(timeout=20, warm_up=True).group("tp")
    return count


def test_warm_up_uses_a_group_once():
    assert [sorted(count) for count in run_ranks(warm, 4, False)] == [
        [[0, 1], [0, 2]],
        [[0, 1], [1, 3]],
        [[0, 2], [2, 3]],
        [[1, 3], [2, 3]],
    ]


def test_warm_up_checks_the_sum():
    assert run_ranks(warm, 4, True) == [None] * 4
