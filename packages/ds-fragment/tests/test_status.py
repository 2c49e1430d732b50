"""Statuses: an error survives the wire by type, rank and text."""

from __future__ import annotations

import pytest
import torch
from ds_fragment import errors
from ds_fragment.collective import status
from ranks import run_ranks

TYPES = [
    errors.UnlinkedParameterError,
    errors.InvalidValueError,
    errors.StateKeyError,
    errors.StateNotReadyError,
    errors.UnusedGradientError,
    errors.GradientUnavailableError,
    errors.CheckpointError,
    errors.RankMismatchError,
    errors.EngineChangedError,
    errors.FragmentError,
]
FINE = torch.zeros(status.STATUS_BYTES, dtype=torch.uint8)


def decoded(*statuses: torch.Tensor) -> errors.FragmentError:
    with pytest.raises(errors.FragmentError) as caught:
        status.check(torch.stack(statuses))
    return caught.value


def sent_by(rank: int, error: Exception) -> torch.Tensor:
    encoded = status.encode(error)
    encoded[1:5] = torch.frombuffer(bytearray(rank.to_bytes(4, "little", signed=True)), dtype=torch.uint8)
    return encoded


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_keeps_its_type_and_text(kind: type[errors.FragmentError]) -> None:
    error = decoded(status.encode(kind("the reason")))
    assert type(error) is kind
    assert str(error) == "the reason"


def test_unused_counts_only_where_no_rank_has_another_error_or_a_piece() -> None:
    unused, unreduced = errors.UnusedGradientError("unused"), errors.GradientUnavailableError("unreduced")
    assert type(decoded(sent_by(1, unused), sent_by(0, unused))) is errors.UnusedGradientError
    assert str(decoded(sent_by(0, unused), sent_by(1, unreduced))) == "rank 1: unreduced"
    assert type(decoded(sent_by(0, unused), FINE)) is errors.GradientUnavailableError
    rows = torch.stack([sent_by(0, unused), FINE])
    for holders, kind in (
        ([True, True], errors.GradientUnavailableError),
        ([True, False], errors.UnusedGradientError),
    ):
        with pytest.raises(errors.FragmentError) as caught:
            status.check(rows, holders=holders)
        assert type(caught.value) is kind
        assert str(caught.value) == "rank 0: unused"


def test_every_error_of_the_package_has_a_code() -> None:
    public = {getattr(errors, name) for name in errors.__all__}
    assert public == set(TYPES)


def test_any_other_exception_becomes_a_fragment_error_with_its_name() -> None:
    error = decoded(status.encode(ZeroDivisionError("division by zero")))
    assert type(error) is errors.FragmentError
    assert str(error) == "ZeroDivisionError: division by zero"


def test_no_error_raises_nothing() -> None:
    status.check(torch.stack([FINE, FINE]))
    status.check(torch.stack([status.encode_sums([1, 2]), status.encode_sums([])]))


def test_the_lowest_rank_is_named() -> None:
    five, two = sent_by(5, errors.StateKeyError("five")), sent_by(2, errors.InvalidValueError("two"))
    assert str(decoded(FINE, five)) == "rank 5: five"
    error = decoded(five, FINE, two, five)
    assert type(error) is errors.InvalidValueError
    assert str(error) == "rank 2: two"


def test_what_is_about_all_ranks_names_none() -> None:
    assert str(decoded(sent_by(3, errors.RankMismatchError("different")))) == "different"


def test_an_error_that_came_from_another_rank_is_passed_on_as_it_came() -> None:
    first = decoded(sent_by(5, errors.StateKeyError("five")))
    again = decoded(status.encode(first))
    assert str(again) == str(first) == "rank 5: five"
    assert type(again) is errors.StateKeyError


@pytest.mark.parametrize("text", ["", "é", "ends in é", "日本", "x" * 2000, "é" * 2000, "日" * 2000, "a" + "é" * 2000])
def test_text_is_cut_between_characters_and_only_if_it_is_too_long(text: str) -> None:
    back = str(decoded(status.encode(errors.FragmentError(text))))
    assert text.startswith(back)
    assert "\ufffd" not in back
    assert back == text or len(back.encode()) > status.STATUS_BYTES - 16


def test_this_ranks_own_exception_is_the_cause() -> None:
    own = ValueError("mine")
    with pytest.raises(errors.FragmentError) as caught:
        status.check(torch.stack([status.encode(own)]), cause=own)
    assert caught.value.__cause__ is own


def test_a_status_is_aligned_and_carries_sums_as_a_digest() -> None:
    one, other = status.encode_sums([1, 2, 3]), status.encode_sums([1, 2, 3])
    assert torch.equal(one, other)
    for different in ([1, 2], [1, 2, 4], [3, 2, 1], [-1, 2, 3], [-2, 2, 3], []):
        assert not torch.equal(one, status.encode_sums(different))
    assert not torch.equal(status.encode_sums([-1]), status.encode_sums([-2]))
    assert one.shape == (status.STATUS_BYTES,)
    assert status.STATUS_BYTES % 16 == 0
    assert status.counts(torch.stack([one, status.encode_sums([])])) == [3, 0]


def test_sums_may_be_as_large_as_64_bits_hold() -> None:
    extremes = [-(2**63), 2**63 - 1]
    assert not torch.equal(status.encode_sums(extremes), status.encode_sums(extremes[::-1]))


def _the_rank_is_the_global_one(rank: int) -> str:
    encoded = status.encode(errors.FragmentError("x"))
    try:
        status.check(encoded.view(1, -1))
    except errors.FragmentError as error:
        return str(error)
    return ""


def test_the_rank_is_the_global_one() -> None:
    assert run_ranks(_the_rank_is_the_global_one, 2) == ["rank 0: x", "rank 1: x"]
