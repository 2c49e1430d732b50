"""The conformance kit itself: its oracle against torch, its verdicts, its table, and an engine that is wrong."""

from __future__ import annotations

import pytest
import torch
from ds_fragment import testing
from ds_fragment.testing import CELLS, Cell, Engine, Oracle, Record, Table, Training, adam, batch, net, run_conformance
from ds_fragment.testing._judge import Verdict, together


def test_the_oracle_is_torchs_adam() -> None:
    oracle, model = Oracle(3, 2, torch.float32), net(3).double()
    optimizer = adam(model.parameters())
    for turn in range(3):
        optimizer.zero_grad()
        outputs = [model(batch(turn, part).double()) for part in range(2)]
        sum(out.square().mean() / 2 for out in outputs).backward()
        for out, right in zip(outputs, oracle.forward(turn), strict=True):
            torch.testing.assert_close(out.float(), right.float())
        oracle.backward()
        grads = {name: param.grad for name, param in model.named_parameters() if param.grad is not None}
        assert oracle.grad.keys() == grads.keys()
        optimizer.step()
        oracle.step()
    for name, param in model.named_parameters():
        torch.testing.assert_close(param.detach().float(), oracle.value[name].float())


@pytest.mark.parametrize(
    ("verdicts", "result"),
    [
        ([Verdict("equal", digest="a"), Verdict("equal", digest="a")], "equal"),
        ([Verdict("equal", digest="a"), Verdict("equal", digest="b")], "different"),
        ([Verdict("error", "StateKeyError"), Verdict("error", "StateKeyError")], "error"),
        ([Verdict("error", "StateKeyError"), Verdict("error", "InvalidValueError")], "different"),
        ([Verdict("equal"), Verdict("error", "StateKeyError")], "different"),
        ([Verdict("equal"), Verdict("untyped", "KeyError: 1")], "untyped"),
        ([Verdict("hang", "no answer"), Verdict("untyped", "KeyError: 1")], "hang"),
    ],
)
def test_verdicts_of_ranks(verdicts: list[Verdict], result: str) -> None:
    assert together(verdicts).result == result


def test_a_table_is_written_and_read_back() -> None:
    cell = Cell("grad", "read one", "step")
    table = Table([Record("mine", "2 ranks", cell, "error", "GradientUnavailableError")]) + Table(
        [Record("mine", "2 ranks", Cell("grad", "read one", "fresh"), "different", "stale")]
    )
    assert Table.from_json(table.to_json()).records == table.records
    assert [str(record.cell) for record in table.defects()] == ["grad/read one/fresh"]
    assert "| mine | 2 ranks | `!   G  ` |" in table.to_markdown()


def _plain(seed: int) -> Training:
    model = net(seed)
    return Training(model, adam(model.parameters()))


def test_plain_values_are_right_and_the_same_with_a_table_for_each_rank() -> None:
    engine = Engine("plain", _plain, world_size=1)
    table = run_conformance(engine, [cell for cell in CELLS if cell.quantity == "value"])
    assert set(table.counts()) == {"equal"}, table.defects()


class _Wrong(Training):
    """Computes with other weights than those that are read and written."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 1.01


def test_an_engine_that_is_wrong_is_found_out() -> None:
    def build(seed: int) -> Training:
        model = net(seed)
        return _Wrong(model, adam(model.parameters()))

    table = run_conformance(Engine("wrong", build, world_size=1), [Cell("value", "read one", "forward")])
    assert "before the operation" in table.defects()[0].detail


def test_another_number_of_ranks_is_an_error() -> None:
    with pytest.raises(ValueError, match="takes 2 ranks, and there are 1"):
        run_conformance(Engine("two", _plain))


def test_every_public_name_is_there() -> None:
    assert all(hasattr(testing, name) for name in testing.__all__)
