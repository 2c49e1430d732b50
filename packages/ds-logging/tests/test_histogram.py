import json
import math
import random
import statistics

import pytest
from ds_logging._comms.histogram import RATIO, Histogram


def filled(values):
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    return histogram


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("percent", [0, 1, 25, 50, 90, 99, 99.9, 100])
def test_percentiles_are_within_half_a_bucket(seed, percent):
    draw = random.Random(seed)
    values = [draw.lognormvariate(0, 3) for _ in range(1000)]
    wanted = sorted(values)[max(1, math.ceil(1000 * percent / 100)) - 1]
    found = filled(values).percentile(percent)
    assert found == pytest.approx(wanted, rel=RATIO**0.5 - 1)
    assert min(values) <= found <= max(values)


def test_count_sum_minimum_and_maximum_are_exact():
    values = [0.5, 0.0, 7.25, 1e-9, 123456.0]
    histogram = filled(values)
    assert (histogram.count, histogram.total) == (5, math.fsum(values))
    assert (histogram.minimum, histogram.maximum) == (0.0, 123456.0)
    assert histogram.percentile(1) == 0.0
    assert histogram.percentile(100) == 123456.0


def test_one_value_is_all_its_percentiles():
    assert [filled([3.7]).percentile(percent) for percent in (0, 50, 100)] == [3.7] * 3
    assert [filled([3.7] * 9).percentile(percent) for percent in (0, 50, 100)] == [3.7] * 3


def test_nothing_has_no_percentile():
    assert Histogram().percentile(50) is None


def test_memory_is_bounded_for_any_values():
    histogram = filled(10.0**exponent * step for exponent in range(-300, 300) for step in (1, 3, 7))
    assert len(histogram.buckets) < 1000
    assert histogram.count == 1800


def test_merging_is_counting_all_in_one():
    draw = random.Random(3)
    first, second = ([draw.expovariate(0.1) for _ in range(size)] for size in (100, 37))
    merged = filled(first)
    merged.merge(filled(second))
    whole = filled(first + second)
    assert merged.buckets == whole.buckets
    assert (merged.count, merged.minimum, merged.maximum) == (137, whole.minimum, whole.maximum)
    assert merged.total == pytest.approx(statistics.fmean(first + second) * 137)


@pytest.mark.parametrize("values", [[], [0.0], [1.0, 2.0, 1e5]])
def test_json_round_trip(values):
    histogram = filled(values)
    again = Histogram.from_json(json.loads(json.dumps(histogram.to_json(), allow_nan=False)))
    assert all(getattr(again, name) == getattr(histogram, name) for name in Histogram.__slots__)
