import gc
import threading
import tracemalloc

import pytest
from ds_logging._comms.op_stats import OpKey
from ds_logging._comms.op_table import MAX_KEYS, OTHER, OpTable
from ds_logging.comms_logging import CommsLogger


def test_later_names_are_counted_under_one_and_one_warning_says_so(caplog):
    comms = CommsLogger(max_names=3)
    for number in range(10):
        comms.append("all_reduce", f"op{number}", 1.0, 1000, group_size=2)
    comms.append("all_reduce", "op1", 1.0, 1000, group_size=2)  # a known one keeps its name
    assert comms.get_operation_names() == ["op0", "op1", "op2", OTHER]
    assert comms.get_operation_summary("op1")[1000]["count"] == 2
    other = comms.get_operation_summary(OTHER)[1024]
    assert (other["count"], other["total_bytes"]) == (7, 7000)
    assert other["busbw_avg_gbps"] == pytest.approx(other["tput_avg_gbps"])  # the formula is still known
    assert comms.get_total_operations() == 11
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "3 record names" in caplog.text


def test_a_key_that_was_counted_keeps_being_counted():
    table = OpTable(window=4, max_sizes=2, max_names=2)
    key = OpKey("a", "all_reduce", 3, 2)
    table.add(key, 1.0)
    for size in range(100, 200):
        table.add(key._replace(msg_size=size), 1.0)
    assert table.add(key, 1.0) == key
    assert table.snapshot()[0].count == 2


@pytest.mark.parametrize("what", ["record_name", "raw_name", "group", "group_size", "dtype", "ranks", "msg_size"])
def test_memory_is_bounded_for_any_number_of(what, caplog):
    table = OpTable(window=16, max_sizes=1024, max_names=1024)
    gc.collect()
    tracemalloc.start()

    def count(start, stop):
        for number in range(start, stop):
            value = number if what in ("msg_size", "group_size") else (number,) if what == "ranks" else str(number)
            table.add(OpKey("a", "all_reduce", 8, 2)._replace(**{what: value}), 1.0)

    count(0, 2 * MAX_KEYS)
    before = tracemalloc.get_traced_memory()[0]
    count(2 * MAX_KEYS, 4 * MAX_KEYS)
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 64_000  # 8 bytes for each of 8192 further ones would be more
    stats = table.snapshot()
    assert sum(one.count for one in stats) == 4 * MAX_KEYS
    assert len(stats) <= MAX_KEYS + 64
    if what not in ("msg_size",):
        assert len(caplog.records) == 1


def test_all_is_counted_where_everything_differs():
    table = OpTable(window=16, max_sizes=8, max_names=8)
    total = 0
    for number in range(6000):
        total += number
        table.add(OpKey(f"n{number % 11}", f"r{number % 7}", number, number % 13, f"g{number % 17}"), None)
    stats = table.snapshot()
    assert len(stats) <= MAX_KEYS + 64
    assert (sum(one.count for one in stats), sum(one.total_bytes for one in stats)) == (6000, total)


def test_threads_lose_nothing():
    table = OpTable(window=4, max_sizes=4, max_names=4)

    def work(name):
        for number in range(500):
            table.add(OpKey(name, "all_reduce", number, 2), 1.0)

    threads = [threading.Thread(target=work, args=(f"t{number}",)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(one.count for one in table.snapshot()) == 8 * 500
