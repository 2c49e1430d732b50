"""Ranks that wait for each other are told where they part, and no trace is left of having watched."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ds_z3leaf import LeafHangError, LeafTypeError, LeafValueError, mark_leaves, watch
from ds_z3leaf._rehearse.index import ModuleIndex
from ds_z3leaf._watch.diagnosis import Verdict, diagnose
from ds_z3leaf._watch.history import History, Report
from ranks import RankError, run_ranks
from torch import nn

WIDTH = 2


class Expert(nn.Linear):
    """Waits in its forward for the other ranks of its own group, as a gather does."""

    group: Any = None

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.group is not None:
            dist.all_reduce(torch.zeros(1), group=self.group)
        return super().forward(x)


class Moe(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, WIDTH)
        self.experts = nn.ModuleList(Expert() for _ in range(4))

    def forward(self, x: torch.Tensor, *chosen: int) -> torch.Tensor:
        x = x + self.router(x)
        for index in chosen:
            x = x + self.experts[index](x)
        return x


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(WIDTH, WIDTH)
        self.block = Moe()
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: torch.Tensor, *chosen: int) -> torch.Tensor:
        return self.head(self.block(self.inp(x), *chosen)).sum()


# ------------------------------------------------------------------------------------------- comparing, without ranks


def told(net: Net, calls: list[tuple[int, ...]], kept: int = 1000, at: str | None = None) -> Report:
    """The report of a rank that has made these calls; it stops in the first module named `at`."""
    from ds_z3leaf._watch.recorder import Recorder
    from ds_z3leaf._watch.watcher import _gathered

    class Stop(Exception):
        pass

    def stop(module: nn.Module, args: Any) -> None:
        raise Stop

    index = ModuleIndex(net)
    history = History(_gathered(net, index)[0], threading.get_ident(), kept)
    with Recorder(index, history.write):
        for number, chosen in enumerate(calls):
            last = number == len(calls) - 1
            handle = net.get_submodule(at).register_forward_pre_hook(stop) if last and at is not None else None
            try:
                net(torch.ones(1, WIDTH), *chosen)
            except Stop:
                assert handle is not None
                handle.remove()
    return history.report(index.digest(), 1.0)


def compare(net: Net, *reports: Report) -> Verdict:
    from ds_z3leaf._watch.watcher import _gathered

    index = ModuleIndex(net)
    counted, leaves = _gathered(net, index)
    return diagnose(dict(enumerate(reports)), range(len(reports)), index, counted, leaves)


def test_the_first_difference_and_the_leaf_around_it_are_named() -> None:
    net = Net()
    same = [(0, 1), (2, 3)]
    verdict = compare(
        net, told(net, [*same, (0, 3)], at="block.experts.3"), told(net, [*same, (0, 2)], at="block.experts.2")
    )
    assert verdict.parted
    cause, *lines = verdict.text.splitlines()
    assert "in 'block' (Moe), rank 0 calls 'block.experts.3' (Expert) where rank 1 calls 'block.experts.2'" in cause
    assert "Make 'block' (Moe) a leaf" in cause
    assert "names='block'" in cause
    assert [line.split(":")[0] for line in lines] == ["  rank 0", "  rank 1"]
    assert "in the forward of 'block.experts.3' (Expert)" in lines[0]


def test_a_rank_that_has_gone_on_does_not_hide_the_difference() -> None:
    net = Net()
    verdict = compare(net, told(net, [(0,), (1, 2)], at="block.experts.1"), told(net, [(0,), ()], at="head"))
    assert "in 'block' (Moe), rank 0 calls 'block.experts.1' (Expert) where rank 1 ends 'block' (Moe)" in verdict.text
    assert "Make 'block' (Moe) a leaf" in verdict.text


def test_a_rank_that_is_behind_has_not_parted() -> None:
    net = Net()
    verdict = compare(net, told(net, [(0,)], at="block.experts.0"), told(net, [(0,), (1,)]))
    assert not verdict.parted
    assert verdict.text.startswith("No call of a module for a while, but all ranks called the same modules")
    failed = told(net, [(0, 1)], at="block.experts.0")
    assert not compare(net, failed, told(net, [(0, 1)])).parted, "what an exception leaves is no step on"


def test_inside_a_leaf_ranks_may_differ() -> None:
    net = Net()
    mark_leaves(net, names="block")
    verdict = compare(net, told(net, [(0,), (1,), ()], at="head"), told(net, [(2, 3), (0, 1, 2), ()], at="head"))
    assert not verdict.parted
    verdict = compare(
        net, told(net, [(0,), (1,)], at="block.experts.1"), told(net, [(2, 3), (0,)], at="block.experts.0")
    )
    assert verdict.parted
    assert "'block' (Moe) is a leaf already, in which no engine gathers: a collective of" in verdict.text


def test_what_is_kept_no_more_is_said() -> None:
    net = Net()
    reports = [told(net, [chosen, *[(0,)] * 9], kept=20, at="head") for chosen in ((0, 1), (0,))]
    verdict = compare(net, *reports)
    assert verdict.parted
    assert "They parted before the calls that are kept" in verdict.text
    reports = [told(net, [(0,)] * 9 + [chosen], kept=20, at="head") for chosen in ((0, 1), (0, 2))]
    assert "rank 0 calls 'block.experts.1' (Expert) where rank 1 calls 'block.experts.2'" in compare(net, *reports).text


def test_models_that_differ_are_not_compared() -> None:
    net, other = Net(), Net()
    other.more = nn.Linear(1, 1)
    assert "have different modules" in compare(net, told(net, [(0,)]), told(other, [(1,)])).text


def test_a_report_survives_the_store() -> None:
    report = told(Net(), [(0,)], at="block.experts.0")
    assert Report.unpack(report.pack()) == report


# ----------------------------------------------------------------------------------------------------------- on ranks


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.levelno, record.getMessage()))


def net_with_groups(seconds: float) -> Net:
    from datetime import timedelta

    torch.manual_seed(0)
    net = Net()
    for expert in net.block.experts:
        expert.group = dist.new_group(timeout=timedelta(seconds=seconds))
    return net


def clean(net: nn.Module) -> bool:
    hooks = any(module._forward_pre_hooks or module._forward_hooks for module in net.modules())
    return not hooks and "ds_z3leaf.watch" not in {thread.name for thread in threading.enumerate()}


def hang(rank: int, on_hang: Any, timeout: float) -> dict[str, Any]:
    handler = Lines()
    logging.getLogger("ds.z3leaf").addHandler(handler)
    net = net_with_groups(3.0)
    started = time.monotonic()
    try:
        with watch(net, timeout=timeout, on_hang=on_hang):
            net(torch.ones(1, WIDTH), 0)
            net(torch.ones(1, WIDTH), *((1,) if rank == 0 else (2,)))
    except RuntimeError as error:
        raised: RuntimeError = error
    return {
        "type": type(raised).__name__,
        "text": str(raised),
        "cause": type(raised.__cause__).__name__,
        "lines": handler.lines,
        "clean": clean(net),
        "seconds": time.monotonic() - started,
    }


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_rank_names_the_modules_the_ranks_and_the_leaf(world_size: int) -> None:
    for found in run_ranks(hang, world_size, "raise", 1.0):
        assert found["type"] == "LeafHangError"
        assert found["cause"] == "RuntimeError"
        assert "Make 'block' (Moe) a leaf" in found["text"]
        others = "rank 1 calls" if world_size == 2 else "ranks 1, 2 call"
        assert f"rank 0 calls 'block.experts.1' (Expert) where {others} 'block.experts.2' (Expert)" in found["text"]
        assert found["lines"] == [(logging.ERROR, found["text"])]
        assert found["clean"]


def test_a_collective_that_fails_before_the_timeout_is_explained() -> None:
    for found in run_ranks(hang, 2, "raise", 100.0):
        assert found["type"] == "LeafHangError"
        assert "Make 'block' (Moe) a leaf" in found["text"]
        assert found["clean"]


def test_on_hang_log_only_logs() -> None:
    for found in run_ranks(hang, 2, "log", 1.0):
        assert found["type"] == "RuntimeError"
        assert [level for level, _ in found["lines"]] == [logging.ERROR]
        assert found["clean"]


def hang_long(rank: int) -> None:
    import ds_z3leaf._watch.watcher as watcher

    watcher._GRACE = 1.0
    net = net_with_groups(50.0)
    # The rank that ends last sees the other one's connection close, and may leave the block by that.
    with contextlib.suppress(LeafHangError), watch(net, timeout=1.0, on_hang="exit"):
        net(torch.ones(1, WIDTH), 1 if rank == 0 else 2)


def test_on_hang_exit_ends_the_process() -> None:
    started = time.monotonic()
    with pytest.raises(RankError, match=r"no answer within .* \(exit code 1\)"):
        run_ranks(hang_long, 2)
    assert time.monotonic() - started < 20


def pass_through(rank: int) -> dict[str, Any]:
    handler = Lines()
    logging.getLogger("ds.z3leaf").addHandler(handler)
    net = net_with_groups(30.0)
    seen: dict[str, Any] = {}
    with watch(net, timeout=30.0):
        net(torch.ones(1, WIDTH), 0).backward()
    seen["trained"] = clean(net)
    try:
        with watch(net, timeout=30.0):
            raise KeyError("of the user")
    except KeyError as error:
        seen["unchanged"] = error.__cause__ is None and clean(net)
    with watch(net, group=dist.new_group([0])):  # rank 0 is alone in it, rank 1 is not in it
        seen["apart"] = clean(net)
    dist.barrier()
    with watch(net, timeout=0.5):  # a pause is no hang
        net(torch.ones(1, WIDTH), 0)
        time.sleep(1.5 if rank == 0 else 0.0)
        net(torch.ones(1, WIDTH), 3)
    seen["lines"] = [text.splitlines()[0] for level, text in handler.lines if level == logging.WARNING]
    seen["errors"] = [text for level, text in handler.lines if level > logging.WARNING]
    seen["clean"] = clean(net)
    dist.barrier()
    return seen


def test_nothing_else_is_touched() -> None:
    for rank, seen in enumerate(run_ranks(pass_through, 2)):
        assert seen["trained"]
        assert seen["unchanged"]
        assert seen["apart"]
        assert seen["errors"] == []
        assert seen["clean"]
        if rank == 0:
            assert seen["lines"] == [
                "No call of a module for a while, but all ranks called the same modules: no leaf is missing."
            ]


def fsdp_units(rank: int) -> tuple[str, str]:
    from datetime import timedelta

    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    net = Net()
    group = dist.new_group(timeout=timedelta(seconds=3))
    mesh = dist.device_mesh.DeviceMesh.from_group(group, "cpu")
    for index, expert in enumerate(net.block.experts):
        expert.weight = nn.Parameter(torch.ones(WIDTH, WIDTH + 0 * index))
        fully_shard(expert, mesh=mesh)
    fully_shard(net, mesh=mesh)
    try:
        with watch(net, timeout=1.0):
            net(torch.ones(1, WIDTH), *((0,) if rank == 0 else (1, 2))).backward()
            dist.barrier(group)
    except LeafHangError as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def test_fsdp2_with_a_unit_for_each_expert() -> None:
    for kind, text in run_ranks(fsdp_units, 2):
        assert kind == "LeafHangError"
        assert "rank 0 calls 'block.experts.0'" in text
        assert "Make 'block' (Moe) a leaf" in text


def test_alone_it_does_nothing() -> None:
    net = Net()
    with watch(net):
        assert not net._forward_pre_hooks
        net(torch.ones(1, WIDTH), 0)


def test_arguments() -> None:
    with pytest.raises(LeafTypeError, match="model"):
        watch("net")  # type: ignore[arg-type]
    with pytest.raises(LeafTypeError, match="timeout is a str: pass seconds"):
        watch(Net(), timeout="1")  # type: ignore[arg-type]
    with pytest.raises(LeafValueError, match="timeout is 0: pass a number of seconds above 0"):
        watch(Net(), timeout=0)
    with pytest.raises(LeafValueError, match="on_hang is 'kill': pass 'raise', 'exit' or 'log'"):
        watch(Net(), on_hang="kill")  # type: ignore[arg-type]


def _enter_twice(rank: int) -> tuple[str, int]:
    model = nn.Linear(1, 1)
    outer = watch(model)
    with outer, pytest.raises(LeafValueError, match="entered already") as caught, outer:
        pass
    return str(caught.value), len(model._forward_pre_hooks)


def test_a_watch_is_entered_once_at_a_time() -> None:
    assert [hooks for _, hooks in run_ranks(_enter_twice, 2)] == [0, 0]
