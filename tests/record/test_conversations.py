"""Turns of conversations: what was new, what came again, what moved and what was interrupted."""

from test_report import RUN, load, request, store, summarize

from kvshare.record import page, summary


def turn(replica, prompt, cached=0, generated=10, policy="p", talk="a", number=0, finish="stop", **more):
    of = {"request": f"{talk}@{number}", "generated": generated, "finish": finish}
    return {**request(replica, policy, prompt, cached), **of, **more}


def conversations(*lines):
    return summarize(lines, [], RUN)["conversations"]


def test_a_turn_that_finds_its_kv_computes_only_what_is_new():
    # 299 tokens before it: 290 of the prompt, and 9 of 10 that were generated. The last one's KV is not computed.
    found = conversations(turn(0, 290), turn(0, 400, cached=299))
    assert found["amplification"] == 1.0
    assert found["stayed"] == {"requests": 1, "before": 299, "here": 299, "again": 0, "with_kv": 1}
    assert [(row["turn"], row["new"], row["computed"], row["local_hit"]) for row in found["turn"]] == [
        (1, 290, 290, 0),
        (2, 101, 101, 299),
    ]


def test_an_evicted_turn_computes_everything_again():
    found = conversations(turn(0, 290), turn(0, 400))
    assert found["amplification"] == round(400 / 101, 3)
    assert found["stayed"] == {"requests": 1, "before": 299, "here": 0, "again": 299, "with_kv": 0}


def test_restored_tokens_are_those_that_the_replica_stored_itself():
    loaded = {**load(0, "p", 1), "request": "a@1"}
    found = conversations(store(0, "p", 1), turn(0, 290), loaded, turn(0, 400, cached=256, number=1))
    assert (found["turn"][1]["restored_hit"], found["turn"][1]["local_hit"]) == (256, 0)
    assert found["stayed"]["again"] == 299 - 256


def test_a_conversation_moves_with_or_without_its_kv():
    loaded = {**load(1, "p", 1), "request": "a@1"}
    lines = [store(0, "p", 1), turn(0, 290), loaded, turn(1, 400, cached=256, number=1), turn(0, 290, talk="b")]
    found = conversations(*lines, turn(1, 400, talk="b"))
    assert found["moved"] == {"requests": 2, "before": 598, "here": 0, "again": 43 + 299, "with_kv": 1}
    assert found["turn"][1]["shared_hit"] == 256


def test_after_an_update_everything_is_new():
    found = conversations(turn(0, 290, policy="p0"), turn(1, 400, policy="p1"))
    assert found["amplification"] == 1.0
    assert (found["stayed"]["requests"], found["moved"]["requests"]) == (0, 0)


def test_an_interrupted_turn_goes_on_as_the_same_turn():
    found = conversations(turn(0, 290, finish="abort", generated=100), turn(0, 390, cached=384, generated=5))
    assert found["interrupted"] == {"requests": 1, "before": 389, "here": 384, "again": 5, "with_kv": 1}
    assert [row["turn"] for row in found["turn"]] == [1]


def test_a_request_that_was_aborted_before_it_ran_computed_nothing():
    lines = [turn(0, 290), turn(0, 400, finish="abort", generated=0), turn(0, 400, cached=299)]
    assert conversations(*lines)["interrupted"]["again"] == 0
    assert summarize(lines, [], RUN)["tokens"]["prompt"] == 690


def test_requests_without_a_conversation_have_no_turns():
    assert conversations(request(0, "p", 300), request(0, "p", 300))["turn"] == []


def test_words_and_table():
    report = summarize([turn(0, 290), turn(1, 400)], [], RUN)
    facts = summary.facts(report)
    assert facts["turns on another replica"] == (
        "1 times, 0 with their KV: 299 of 299 earlier tokens (100.0%) were computed again"
    )
    assert "interrupted, then continued" not in facts
    assert "| 2 | 1 | 101 | 400 | 400 |" in page.markdown(report)
    assert "By turn of a conversation" in page.html(report)
    assert "By turn" not in page.html(summarize([request(0, "p", 300)], [], RUN))
