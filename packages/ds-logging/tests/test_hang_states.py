import json

from ds_logging._comms.operation import Operation
from ds_logging._hang.states import RankState, state_of

NOW = 100_000_000_000


def op(kind="all_reduce", sequence=812, group="tp", ranks=(0, 1, 2), *, done=False, started_s=88, **more):
    fields = {"nbytes": 4096, "dtype": "float32", "latency_ms": None, "name": kind, **more}
    return Operation(kind, group, ranks, sequence, started_ns=started_s * 10**9, completed=done, **fields)


def test_json_round_trip():
    before = RankState(
        (op(), op("send", 4, "pp", (0, 1), peer=1, done=True), op(ranks=None, sequence=None)), NOW, "why"
    )
    assert RankState.from_json(json.loads(json.dumps(before.to_json()))) == before


def test_a_state_is_small_and_has_what_is_in_flight():
    operations = [op(sequence=number, done=number != 7) for number in range(1000)]
    operations += [op(sequence=number, group="dp", done=False) for number in range(500)]
    kept = state_of(operations, NOW).operations
    assert len(kept) < 60
    assert ("tp", 7) in {(one.group, one.sequence) for one in kept}
    assert {("tp", 999), ("dp", 0), ("dp", 499)} <= {(one.group, one.sequence) for one in kept}


def test_a_state_is_small_in_a_large_job():
    ranks = tuple(range(8192))
    text = json.dumps(RankState(tuple(op(sequence=number, ranks=ranks) for number in range(10)), NOW).to_json())
    assert len(text) < 4000
    assert RankState.from_json(json.loads(text)).operations[3].ranks == ranks
