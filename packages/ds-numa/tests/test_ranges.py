from __future__ import annotations

import random

import pytest
from ds_numa import format_ranges, parse_range, parse_range_list
from ds_numa.errors import CoreListError


def test_one_number_and_one_range() -> None:
    assert list(parse_range("3")) == [3]
    assert list(parse_range(" 0-2 ")) == [0, 1, 2]
    assert parse_range("5-5") == range(5, 6)


@pytest.mark.parametrize("text", ["0-1,4", "4,0-1", "4, 0 - 1", "1,4,0"])
def test_a_list_may_come_in_any_order(text: str) -> None:
    assert parse_range_list(text) == [0, 1, 4]


@pytest.mark.parametrize(
    ("text", "problem", "fix"),
    [
        ("3-1", "runs backwards", "write 1-3"),
        ("a", "'a' is no number", "write 4 or 0-3"),
        ("-1", "'-1' is no number", "write 4 or 0-3"),
        ("1-2-3", "'1-2-3' is no number", "write 4 or 0-3"),
        ("0-", "'0-' is no number", "write 4 or 0-3"),
        ("1_0", "'1_0' is no number", "write 4 or 0-3"),
        ("²", "'²' is no number", "write 4 or 0-3"),
        ("0-99999999999", "99999999999 is past", "write a smaller one"),
    ],
)
@pytest.mark.parametrize(("parse", "argument"), [(parse_range, "rng"), (parse_range_list, "range_str")])
def test_a_bad_range_names_argument_value_and_fix(
    parse: object, argument: str, text: str, problem: str, fix: str
) -> None:
    with pytest.raises(CoreListError) as caught:
        parse(text)  # type: ignore[operator]
    for part in (argument, repr(text), problem, fix):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [("", "is empty"), ("  ", "is empty"), ("0,,1", "between two commas"), ("0-3,", "between two commas")],
)
def test_an_empty_part_is_an_error(text: str, problem: str) -> None:
    with pytest.raises(CoreListError, match=problem) as caught:
        parse_range_list(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(("text", "twice"), [("0,0", "0"), ("0-4,3-6", "3-4"), ("8,0-8", "8")])
def test_a_number_that_comes_twice_is_an_error(text: str, twice: str) -> None:
    with pytest.raises(CoreListError, match=f"names {twice} twice"):
        parse_range_list(text)


def test_errors_are_value_errors() -> None:
    with pytest.raises(ValueError, match="runs backwards"):
        parse_range("3-1")


def test_format_and_parse_are_inverse() -> None:
    dice = random.Random(0)
    for _ in range(200):
        numbers = sorted(dice.sample(range(64), dice.randint(1, 40)))
        text = format_ranges(dice.sample(numbers, len(numbers)))
        assert parse_range_list(text) == numbers
        # Oracle for the shortest form: one part for each number whose predecessor is absent.
        assert len(text.split(",")) == sum(number - 1 not in numbers for number in numbers)
