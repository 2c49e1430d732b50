import random

import pytest
from ds_logging._comms.operation import Operation
from ds_logging._hang.reasons import explain_states, find_reasons
from ds_logging._hang.states import RankState, state_of

NOW = 100_000_000_000


def op(kind="all_reduce", sequence=812, group="tp", ranks=(0, 1, 2), *, done=False, started_s=88, **more):
    fields = {"nbytes": 4096, "dtype": "float32", "latency_ms": None, "name": kind, **more}
    return Operation(kind, group, ranks, sequence, started_ns=started_s * 10**9, completed=done, **fields)


def state(*operations):
    return RankState(operations, NOW)


def only(states, kind):
    findings = find_reasons(states)
    assert [finding.kind for finding in findings] == [kind]
    return findings[0]


def test_a_rank_behind_is_named_with_where_it_is():
    world = (0, 1, 2)
    states = {
        0: state(op("all_gather")),
        1: state(op("all_gather")),
        2: state(op("all_gather", 811, done=True), op("broadcast", 44, "dp", (2, 5))),
    }
    found = find_reasons({**states, 5: state(op("broadcast", 44, "dp", (2, 5), done=True))})
    assert (found[0].kind, found[0].ranks, found[0].waiting, found[0].group, found[0].sequence) == (
        *("behind", (2,)),
        *((0, 1), "tp", 812),
    )
    assert found[0].text == (
        "Rank 2 never entered all_gather 812 of group tp, in which ranks 0, 1 wait; "
        "it is in broadcast 44 of group dp for 12 s."
    )
    assert world == found[0].waiting + found[0].ranks


def test_a_rank_behind_outside_of_operations():
    states = {0: state(op()), 1: state(op()), 2: state(op(sequence=811, done=True))}
    found = only(states, "behind")
    assert found.text.endswith("it is in no operation, and its last was all_reduce 811 of group tp.")


def test_a_rank_that_has_entered_nothing_at_all_is_behind():
    found = only({0: state(op()), 1: state(op()), 2: state()}, "behind")
    assert found.ranks == (2,)
    assert "it has entered no operation" in found.text


def test_many_ranks_behind_are_said_in_one_sentence():
    ranks = tuple(range(1024))
    states = {rank: state(op(ranks=ranks)) for rank in ranks}
    for rank in range(100, 1024):
        states[rank] = state(op(sequence=811, ranks=ranks, done=True))
    found = only(states, "behind")
    assert found.ranks == ranks[100:]
    assert len(found.text) < 300
    assert "Ranks 100-1023 never entered" in found.text


def test_scattered_ranks_are_said_in_short():
    ranks = tuple(range(1024))
    states = {rank: state(op(ranks=ranks)) if rank % 8 else state() for rank in ranks}
    found = only(states, "behind")
    assert found.ranks == ranks[::8]
    assert found.text.startswith("Ranks 0, 8, 16, 24, 32, 40, ..., 1016 (128 ranks) never entered all_reduce 812")
    assert len(found.text) < 300


@pytest.mark.parametrize("odd", [0, 1, 2])
def test_another_operation_at_the_same_place(odd):
    states = {rank: state(op("broadcast" if rank == odd else "all_reduce")) for rank in range(3)}
    found = only(states, "kind_mismatch")
    assert (found.ranks, found.waiting) == ((odd,), (0, 1, 2))
    assert f"rank {odd} in broadcast" in found.text


@pytest.mark.parametrize("odd", [0, 1, 2])
@pytest.mark.parametrize(("change", "word"), [({"nbytes": 8}, "size"), ({"dtype": "bfloat16"}, "dtype")])
def test_other_sizes_or_dtypes_at_the_same_place(odd, change, word):
    states = {rank: state(op(**(change if rank == odd else {}))) for rank in range(3)}
    found = only(states, "shape_mismatch")
    assert found.ranks == (odd,)
    assert f"not the same {word}" in found.text
    assert str(next(iter(change.values()))) in found.text


@pytest.mark.parametrize("kind", ["all_to_all", "gather", "scatter", "barrier"])
def test_sizes_that_may_differ_are_no_mismatch(kind):
    states = {rank: state(op(kind, nbytes=rank)) for rank in range(3)}
    only(states, "network")


def test_a_mismatch_and_a_rank_behind():
    states = {0: state(op("broadcast")), 1: state(op()), 2: state(op(sequence=1, done=True))}
    assert [finding.kind for finding in find_reasons(states)] == ["kind_mismatch", "behind"]


def test_a_rank_that_does_not_answer():
    found = only({0: state(op()), 1: None, 2: state(op())}, "no_answer")
    assert (found.ranks, found.waiting) == ((1,), (0, 2))
    assert found.text.startswith("Rank 1 does not answer")
    assert "Ranks 0, 2 may wait for it in all_reduce 812 of group tp" in found.text


def test_ranks_that_do_not_answer_are_joined():
    states = {rank: None if rank > 3 else state(op(ranks=tuple(range(64)))) for rank in range(64)}
    found = only(states, "no_answer")
    assert found.ranks == tuple(range(4, 64))
    assert found.text.startswith("Ranks 4-63 do not answer")


def test_a_silent_rank_outside_the_stuck_group():
    states = {0: state(op(ranks=(0, 1))), 1: state(op(sequence=1, ranks=(0, 1), done=True)), 2: None}
    findings = find_reasons(states)
    assert [(finding.kind, finding.ranks) for finding in findings] == [("no_answer", (2,)), ("behind", (1,))]
    assert "may wait" not in findings[0].text


def test_a_rank_that_cannot_say():
    states = {0: state(op()), 1: state(op()), 2: RankState((), NOW, "RuntimeError: no recorder")}
    found = only(states, "error")
    assert (found.ranks, found.waiting) == ((2,), (0, 1))
    assert "RuntimeError: no recorder" in found.text


def test_all_ranks_in_step_wait_for_the_network():
    states = {rank: state(op(started_s=88 + rank)) for rank in range(3)}
    found = only(states, "network")
    assert (found.ranks, found.waiting) == ((), (0, 1, 2))
    assert "rank 0 for 12 s" in found.text


def test_a_rank_that_has_gone_on_is_not_behind():
    states = {0: state(op(done=True), op(sequence=813)), 1: state(op()), 2: state(op())}
    found = only(states, "network")
    assert (found.sequence, found.waiting) == (812, (1, 2))
    assert "rank 0 completed it" in found.text


def test_only_the_first_operation_in_flight_counts():
    ahead = [op(sequence=number) for number in range(812, 840)]
    found = only({0: state(*ahead), 1: state(*ahead[:1]), 2: state(op(sequence=811, done=True))}, "behind")
    assert (found.sequence, found.ranks) == (812, (2,))


def test_two_groups_used_in_different_orders():
    a, b = {"group": "A", "ranks": (0, 1)}, {"group": "B", "ranks": (0, 1)}
    states = {
        0: state(op(sequence=3, **a), op(sequence=6, done=True, **b)),
        1: state(op(sequence=2, done=True, **a), op(sequence=7, **b)),
    }
    findings = find_reasons(states)
    assert [finding.kind for finding in findings] == ["deadlock", "behind", "behind"]
    assert findings[0].ranks == (0, 1)
    assert findings[0].text == (
        "Deadlock: rank 0 in all_reduce 3 of group A, which waits for rank 1 in all_reduce 7 of group B, which waits "
        "for rank 0. The ranks use these groups in different orders."
    )


@pytest.mark.parametrize("length", range(2, 7))
@pytest.mark.parametrize("seed", range(3))
def test_a_ring_of_groups_is_a_deadlock_of_all_its_ranks(length, seed):
    """Rank i waits in the group of i and i + 1, where its neighbour has not come."""
    order = list(range(length))
    random.Random(seed).shuffle(order)
    states = {}
    for place, rank in enumerate(order):
        pair = tuple(sorted((rank, order[(place + 1) % length])))
        states[rank] = state(op(sequence=5, group=f"g{place}", ranks=pair))
    states[99] = state(op(sequence=1, group="other", ranks=(99, 0)))  # waits for the ring, and is no part of it
    deadlocks = [finding for finding in find_reasons(states) if finding.kind == "deadlock"]
    assert len(deadlocks) == 1
    assert set(deadlocks[0].ranks) == set(order)


def test_a_chain_is_no_deadlock_and_its_end_comes_first():
    states = {
        0: state(op(group="g0", ranks=(0, 1))),
        1: state(op(group="g1", ranks=(1, 2))),
        2: state(op(group="g2", ranks=(2, 3))),
        3: state(),
    }
    findings = find_reasons(states)
    assert [finding.kind for finding in findings] == ["behind"] * 3
    assert findings[0].ranks == (3,)


def p2p(kind, peer, sequence=4, **more):
    return op(kind, sequence, "pp", (0, 1), peer=peer, **more)


def test_a_receive_without_a_send():
    found = only({0: state(p2p("send", 1, 3, done=True)), 1: state(p2p("recv", 0))}, "unmatched_p2p")
    assert (found.ranks, found.waiting, found.sequence) == ((0,), (1,), 4)
    assert found.text == (
        "Rank 1 is in recv 4 from rank 0 of group pp for 12 s; rank 0 has not sent it; "
        "it is in no operation, and its last was send 3 to rank 1 of group pp."
    )


def test_a_send_without_a_receive():
    found = only({0: state(p2p("send", 1)), 1: state(p2p("recv", 0, 3, done=True))}, "unmatched_p2p")
    assert (found.ranks, found.waiting) == ((1,), (0,))
    assert "rank 1 does not receive it" in found.text


@pytest.mark.parametrize("kind", ["recv", "send"])
def test_both_wait_for_each_other(kind):
    states = {0: state(p2p(kind, 1)), 1: state(p2p(kind, 0))}
    findings = find_reasons(states)
    assert [finding.kind for finding in findings] == ["deadlock", "unmatched_p2p", "unmatched_p2p"]
    assert set(findings[0].ranks) == {0, 1}


def test_a_send_that_is_under_way():
    only({0: state(p2p("send", 1)), 1: state(p2p("recv", 0))}, "network")
    only({0: state(p2p("send", 1, done=True)), 1: state(p2p("recv", 0))}, "network")


def test_a_send_and_its_receive_of_different_sizes():
    found = only({0: state(p2p("send", 1)), 1: state(p2p("recv", 0, nbytes=8))}, "shape_mismatch")
    assert found.ranks == (0, 1)


def test_a_receive_from_a_silent_rank():
    found = only({0: None, 1: state(p2p("recv", 0))}, "no_answer")
    assert (found.ranks, found.waiting) == ((0,), (1,))
    assert "recv 4 from rank 0 of group pp" in found.text


def test_a_receive_from_anybody_and_a_batch_blame_nobody():
    states = {0: state(p2p("recv", None)), 1: state(op("batch_isend_irecv", ranks=(0, 1)))}
    assert [(finding.kind, finding.ranks) for finding in find_reasons(states)] == [("waiting", ())] * 2


@pytest.mark.parametrize("kind", ["barrier", "all_gather_object"])
def test_an_operation_without_a_number(kind):
    states = {0: state(op(kind, None)), 1: state(op(kind, None)), 2: state(op(kind, None, done=True))}
    found = only(states, "behind")
    assert (found.ranks, found.waiting, found.sequence) == ((2,), (0, 1), None)
    assert found.text == (
        f"Rank 2 is not in {kind} of group tp, in which ranks 0, 1 wait; "
        f"it is in no operation, and its last was {kind} of group tp."
    )
    only({rank: state(op(kind, None)) for rank in range(3)}, "network")
    only({0: state(op(kind, None)), 1: state(op(kind, None)), 2: None}, "no_answer")


def test_a_barrier_against_a_collective_is_a_deadlock():
    states = {0: state(op("barrier", None, ranks=(0, 1))), 1: state(op(sequence=9, ranks=(0, 1)))}
    findings = find_reasons(states)
    assert [finding.kind for finding in findings] == ["deadlock", "behind", "behind"]
    assert "rank 0 in barrier of group tp" in findings[0].text


def test_a_group_whose_ranks_only_some_know():
    states = {0: state(op()), 1: state(op(ranks=None)), 2: state(op(sequence=811, ranks=None, done=True))}
    assert only(states, "behind").ranks == (2,)


def test_nothing_in_flight():
    states = {rank: state(op(done=True)) for rank in range(3)}
    assert find_reasons(states) == []
    assert explain_states(states) == "3 of 3 ranks answer.\n- No rank waits in an operation that was recorded."


def test_the_text_is_short_however_much_is_wrong():
    states = {}
    for pair in range(200):
        group = {"group": f"tp{pair}", "ranks": (2 * pair, 2 * pair + 1)}
        states[2 * pair], states[2 * pair + 1] = state(op(**group)), state()
    lines = explain_states(states).splitlines()
    assert len(lines) < 30
    assert lines[0] == "400 of 400 ranks answer."
    assert lines[-1] == "- ... and 175 more"


@pytest.mark.parametrize("seed", range(30))
def test_simulated_training_finds_the_rank_that_stopped(seed):
    """All ranks run one program over overlapping groups, with waiting; one of them stops somewhere."""
    draw = random.Random(seed)
    groups = {"world": tuple(range(6)), "a": (0, 1, 2), "b": (3, 4, 5), "c": (0, 3), "d": (1, 4), "e": (2, 5)}
    program = [draw.choice(sorted(groups)) for _ in range(60)]
    stopped, at = draw.randrange(6), draw.randrange(5, 30)
    numbers, history, blocked = dict.fromkeys(groups, 0), {rank: [] for rank in range(6)}, set()
    for step, name in enumerate(program):
        ranks, numbers[name] = groups[name], numbers[name] + 1
        here = [r for r in ranks if r not in blocked and not (r == stopped and step >= at)]
        finished = len(here) == len(ranks)
        for r in here:
            history[r].append(op("all_gather", numbers[name], name, ranks, done=finished, started_s=step))
            if not finished:
                blocked.add(r)
    states = {rank: state_of(ops, NOW) for rank, ops in history.items()}
    findings = find_reasons(states)
    assert findings[0].kind == "behind"
    assert findings[0].ranks == (stopped,)
    assert not [finding for finding in findings if finding.kind in ("deadlock", "network", "kind_mismatch")]
    states[stopped] = None
    assert (find_reasons(states)[0].kind, find_reasons(states)[0].ranks) == ("no_answer", (stopped,))
