"""What was made last is kept as long as there is room."""

from __future__ import annotations

from ds_fragment._recent import Recent


def test_what_was_not_asked_for_the_longest_goes_first() -> None:
    recent = Recent[str](most=5)
    for key in "abc":
        recent.put(key, key.upper(), 2)  # with the third there are six
    assert [recent.get(key) for key in "abc"] == [None, "B", "C"]
    assert recent.get("b") == "B"
    recent.put("d", "D", 1)
    recent.put("e", "E", 1)
    assert [recent.get(key) for key in "bcde"] == ["B", None, "D", "E"]


def test_a_value_in_the_place_of_another_takes_its_room_alone() -> None:
    recent = Recent[int](most=4)
    recent.put("a", 1, 2)
    for size in (1, 2, 2):
        recent.put("b", size, size)
    assert [recent.get("a"), recent.get("b"), len(recent)] == [1, 2, 2]


def test_a_single_value_may_be_larger() -> None:
    recent = Recent[int](most=4)
    recent.put("a", 1, 1)
    recent.put("b", 2, 100)
    assert [recent.get("a"), recent.get("b")] == [None, 2]
    recent.clear()
    assert len(recent) == 0
    recent.put("c", 3, 4)
    assert recent.get("c") == 3
