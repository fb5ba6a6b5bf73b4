import msgspec
import pytest

from kvshare.core.errors import UserError
from kvshare.record import events, page, report, rows, summary

RUN = {"backend": "remote", "device": "cpu", "replicas": 2}


def summarize(lines, metrics, run, baseline=None):
    """The report of what event logs and verl's log hold, as dicts."""

    def steps(logged):
        return msgspec.convert(logged, list[rows.Logged])

    return summary.summarize(events.convert(lines), steps(metrics), run, baseline and steps(baseline))


def store(replica, policy, *keys, time=0):
    return {"op": "store", "time": time, "replica": replica, "policy": policy, "keys": list(keys)}


def load(replica, policy, *keys, tokens=256, expected=None):
    sizes = [tokens] * len(keys)
    expected = sum(sizes) if expected is None else expected
    return {
        "op": "load",
        "time": 1,
        "replica": replica,
        "policy": policy,
        "keys": list(keys),
        "tokens": sizes,
        "expected": expected,
    }


def request(replica, policy, prompt, cached=0):
    return {"op": "request", "time": 2, "replica": replica, "policy": policy, "prompt": prompt, "cached": cached}


def tokens(*lines):
    return summarize(lines, [], RUN)["tokens"]


def test_shared_local_and_computed():
    lines = [
        store(0, "p", 1, 2),
        request(0, "p", 600),  # computed all of it
        load(1, "p", 1, 2),
        request(1, "p", 600, cached=512),  # from replica 0
        request(1, "p", 600, cached=512),  # from vLLM's own prefix cache
        load(0, "p", 1, 2),
        request(0, "p", 600, cached=512),  # its own KV, through LMCache
    ]
    assert tokens(*lines) == {
        "prompt": 2400,
        "computed": 864,
        "local_hit": 512,
        "restored_hit": 512,
        "shared_hit": 512,
        "unknown_hit": 0,
        "stale_hit": 0,
        "stale_hit_by_weights": 0,
        "kept_hit": 0,
    }


def test_load_that_did_not_arrive_is_computed():
    counted = tokens(store(0, "p", 1, 2), load(1, "p", 1, expected=512), request(1, "p", 600, cached=512))
    assert counted["shared_hit"] == 256
    assert counted["computed"] == 344


def test_preempted_request_counts_once():
    again = {**load(1, "p", 1), "request": "r"}
    counted = tokens(store(0, "p", 1), again, again, request(1, "p", 300, cached=256))
    assert (counted["shared_hit"], counted["computed"]) == (256, 44)


def test_key_of_two_policies_is_stale():
    counted = tokens(store(0, "p0", 1), load(1, "p1", 1), request(1, "p1", 300, cached=256))
    assert counted["stale_hit"] == 256


def test_key_of_two_weights_is_stale_whatever_the_policy_says():
    """The two counts do not know of each other: each sees what the other cannot."""
    old, new = {"epoch": 1, "weights": "a"}, {"epoch": 7, "weights": "b"}
    wrong_policy = tokens({**store(0, "p", 1), **old}, {**load(1, "p", 1), **new})
    assert (wrong_policy["stale_hit"], wrong_policy["stale_hit_by_weights"]) == (0, 256)
    equal = tokens({**store(0, "p", 1), **old}, {**load(1, "p", 1), "epoch": 7, "weights": "a"})
    assert equal["stale_hit_by_weights"] == 0  # epochs are counted in each worker
    prefix = {"op": "staleprefix", "time": 0, "replica": 1, "request": "r", "policy": "p", "tokens": 128}
    assert tokens(prefix)["stale_hit_by_weights"] == 128
    assert "STALE: the KV of 128 tokens" in summary.verdict(summarize([prefix], [], RUN))


def test_kept_kv_is_not_stale_and_is_told():
    old, new = {"epoch": 1, "weights": "a"}, {"epoch": 2, "weights": "b"}
    asked = [{**request(1, "p", 300, cached=256), "generated": 10, "versions": versions} for versions in (1, 2, 2)]
    lines = [{**store(0, "p", 1), **old}, {**load(1, "p", 1), **new, "kept": True}, *asked]
    report = summarize(lines, [], {**RUN, "freshness": "trajectory"})
    assert (report["tokens"]["kept_hit"], report["tokens"]["stale_hit_by_weights"]) == (256, 0)
    assert report["generated"] == {"1": 10, "2": 20}
    said = "trajectory: tokens generated 10 from KV of 1, 20 from KV of 2 versions; 256 prompt tokens kept"
    assert summary.facts(report)["freshness"] == said


def test_versions_in_flight():
    ends = [{"op": "step", "time": 2, "replica": "trainer", "step": number} for number in (1, 2)]
    lines = [request(0, "p1", 300), request(1, "p2", 300), request(1, "private-1", 300), ends[0]]
    lines += [request(0, "p2", 300), ends[1]]
    metrics = [{rows.STEP: 1}, {rows.STEP: 2, rows.SPANS: 2, rows.BEHIND: 3}]
    report = summarize(lines, metrics, RUN)
    assert [row["policies"] for row in report["step"]] == [2, 1]
    assert summary.facts(report)["versions in flight"] == (
        "requests of up to 2 ended in one step; trajectories span up to 2 and begin up to 3 before the trainer's (verl)"
    )
    one_at_a_time = summarize([*lines[1:2], ends[0]], [{rows.STEP: 1, rows.SPANS: 1, rows.BEHIND: 0}], RUN)
    assert "versions in flight" not in summary.facts(one_at_a_time)
    fully_async = summarize([], [{rows.STEP: 1, rows.PASSED: 1}], RUN)
    assert summary.facts(fully_async)["versions in flight"] == "trajectories span up to 2 (verl)"


def test_replicas_that_only_validate_are_not_missed():
    run = {**RUN, "backend": "no connector", "replicas": 3, "standby": 1}
    assert summarize([request(1, "p", 300)], [], run)["unseen"] == [2]


def test_kv_that_nobody_stored_is_unknown():
    assert tokens(load(1, "p", 7), request(1, "p", 300, cached=256))["unknown_hit"] == 256


def test_amplification_is_per_policy():
    both = [store(replica, "p0", 1, 2) for replica in (0, 1)]
    once = [store(0, "p1", 3, 4), load(1, "p1", 3, 4)]
    result = summarize([*both, *once, request(0, "p0", 600), request(1, "p1", 600, 512)], [], RUN)
    assert result["prefill_amplification"] == 1.5
    assert [p["prefill_amplification"] for p in result["policy"]] == [2.0, 1.0]


def test_rows_of_many_policies_are_bounded_and_none_is_lost():
    lines = [
        line
        for n in range(1000)
        for line in (store(0, f"run-{n}", n), load(1, f"run-{n}", n), request(1, f"run-{n}", 512, 256))
    ]
    policies = summarize(lines, [], RUN)["policy"]
    assert len(policies) == rows.MOST_ROWS + 1
    assert (policies[0]["policy"], policies[-1]["policy"]) == ("earlier", "run-999")
    assert sum(policy["shared_hit"] for policy in policies) == 1000 * 256
    assert {policy["prefill_amplification"] for policy in policies} == {1.0}


def test_lost_events_are_in_the_verdict():
    result = summarize([request(0, "p", 300), {"op": "lost", "time": 0, "replica": 0, "events": 1234}], [], RUN)
    assert "1,234 EVENTS WERE LOST: the counts are too low" in summary.verdict(result)
    assert 'class="alarm"' in page.html(result)


def mismatch(*steps):
    return [{"training/global_step": i, rows.PEARSON: p, rows.DIFFERENCE: d} for i, (p, d) in enumerate(steps, 1)]


def test_mismatch_is_the_worst_step_next_to_the_first():
    result = summarize([], mismatch((1.0, 1e-9), (0.69, 0.2)), RUN)
    assert result["mismatch"] == {
        "pearson_min": 0.69,
        "pearson_floor": 1.0,
        "probs_diff_max": 0.2,
        "probs_diff_floor": 1e-9,
        "floor": "first step",
    }
    assert result["steps"] == 2


def test_baseline_is_the_noise_floor():
    result = summarize([], mismatch((1.0, 1e-9)), RUN, baseline=mismatch((1.0, 1e-9), (0.999, 3e-9)))
    assert (result["mismatch"]["pearson_floor"], result["mismatch"]["probs_diff_floor"]) == (0.999, 3e-9)


def test_baseline_says_that_it_is_one():
    result = summarize([request(0, "p", 300)], [], {**RUN, "backend": "no connector"})
    assert "baseline" in summary.verdict(result)


def test_every_policy_has_its_row():
    lines = [store(0, "run-1", 1), load(1, "run-1", 1), request(1, "run-1", 512, 256), request(0, "private-a", 300)]
    rows = [line for line in page.markdown(summarize(lines, [], RUN)).splitlines() if "| run-1 |" in line]
    assert rows == ["| run-1 | 512 | 256 | 0 | 0 | 256 | 0 | 1.000 |"]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], "No request was recorded"),
        ([request(0, "p", 100)], "no prompt fills a chunk, the longest has 100 tokens of 256"),
        ([request(0, "p", 100), request(1, "p", 256)], "nothing was stored, though prompts of up to 256 tokens fill"),
        ([store(0, "p", 1), request(0, "p", 300)], "no prefix was asked of two of them"),
        ([store(0, "p", 1), store(1, "p", 1), request(0, "p", 300)], "computed the same prefixes 2.0 times"),
        ([store(0, "p", 1), load(1, "p", 1), request(1, "p", 512, 256)], "50.0% of prompt tokens"),
        ([store(0, "p0", 1), load(1, "p1", 1), request(1, "p1", 512, 256)], "STALE"),
        ([{"op": "degraded", "time": 0, "replica": 1}], "NOT SHARING: LMCache did not start in replica 1"),
    ],
)
def test_verdict(lines, words):
    assert words in summary.verdict(summarize(lines, [], {**RUN, "chunk_size": 256}))


def test_verdict_of_one_replica():
    lines = [store(0, "p", 1), request(0, "p", 300)]
    assert "there is one replica" in summary.verdict(summarize(lines, [], {"replicas": 1}))
    unknown = summarize([request(0, "p", 9)], [], RUN)  # an old run.json, without chunk_size
    assert "nothing was stored; the longest prompt has 9" in summary.verdict(unknown)


def test_replica_whose_lmcache_comes_late_is_said_to_share():
    up = [{"op": op, "time": time, "replica": 1} for time, op in enumerate(["degraded", "ready", "ready"])]
    result = summarize(up, [], RUN)
    assert (result["degraded"], result["late"]) == ([], [1])
    assert "came up late in replica 1" in page.markdown(result)
    assert summarize([*up, {**up[0], "time": 9}], [], RUN)["degraded"] == [1]  # it was started again


def test_report_of_a_killed_run(tmp_path):
    (tmp_path / "run.json").write_text('{"backend": "remote", "device": "cpu", "replicas": 2}')
    (tmp_path / "events-0.jsonl").write_text('{"op": "request", "time": 1, "replica": 0, "policy": "p", "pro')
    assert report.write(tmp_path)["tokens"]["prompt"] == 0
    assert "remote on cpu, 2 replicas" in (tmp_path / "report.md").read_text()


def test_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no run\.json"):
        report.read(tmp_path)


def end(step, time, server=None):
    return {"op": "step", "time": time, "replica": "trainer", "step": step, "server": server}


def test_silence_of_a_replica_counts_until_the_last_step():
    """At the end of a run verl kills its servers one by one, and the router after them."""

    def told(time, *silent):
        return {"op": "routing", "time": time, "replica": "router", "silent": silent}

    def said(*lines):
        return "the router hears nothing of the replica at 1" in page.markdown(summarize(lines, [], RUN))

    assert said(told(1, "1"))  # the run ended in its first step
    assert said(told(1, "1"), end(1, 2))
    assert not said(told(1, "1"), end(1, 2), told(3), end(2, 4))
    assert not said(told(1), end(1, 2), told(3, "1"))


def at(time, event):
    return {**event, "time": time}


TWO_STEPS = [
    at(1, store(0, "p0", 1)),
    at(2, load(1, "p0", 1)),
    at(3, request(1, "p0", 512, 256)),
    end(1, 4, {"bytes": 100, "limit": 1000, "evicted": 0, "evicted_bytes": 20, "refused": 0}),
    at(5, store(0, "p1", 2)),
    at(6, request(0, "p1", 300)),
    end(2, 7, {"bytes": 200, "limit": 1000, "evicted": 0, "evicted_bytes": 40, "refused": 0}),
    at(8, request(0, "p2", 999)),  # of a step that has not ended
]


def logged(*rewards):
    return [{"training/global_step": i, "critic/score/mean": r} for i, r in enumerate(rewards, 1)]


def test_a_step_is_what_came_since_the_one_before():
    one, two = summarize(TWO_STEPS, logged(0.25, 0.75), RUN)["step"]
    assert (one["prompt"], one["computed"], one["shared_hit"], one["reward"]) == (512, 256, 256, 0.25)
    assert [r["prompt"] for r in one["replica"]] == [0, 512]
    assert (two["prompt"], two["computed"], two["shared_hit"], two["reward"]) == (300, 300, 0, 0.75)
    assert (one["hit_rate"], two["hit_rate"]) == (0.5, 0.0)
    assert two["server"]["bytes"] == 200


def test_time_saved_is_what_computing_would_have_taken_less_the_loads():
    prefills = [{**request(0, "p", 1000), "prefill": rate} for rate in (None, 800.0, 1000.0)]
    loads = [{**load(1, "p", 1, 2), "seconds": 0.1}]
    result = summarize([store(0, "p", 1, 2), *prefills, *loads], [], RUN)
    assert result["prefill_tokens_per_second"] == 1000
    assert result["time_saved_seconds"] == pytest.approx(0.512 - 0.1)
    assert summarize(prefills[:1], [], RUN)["time_saved_seconds"] is None


def test_forecast_stands_next_to_what_was_measured():
    forecast = {"shareable_tokens_a_step": 130, "local_tokens_a_step": 0, "stored_bytes_a_step": 99, "verdict": "v"}
    result = summarize(TWO_STEPS, logged(0, 0), {**RUN, "forecast": forecast})
    assert list(summary.against_forecast(result).values()) == [(130, 128), (0, 0), (99, 120)]
    assert summary.facts(result)["tokens shared between replicas a step"] == "forecast 130, measured 128"
    result["forecast"]["at_most"] = True
    assert summary.facts(result)["tokens shared between replicas a step"] == "forecast at most 130, measured 128"


def test_replica_without_event_log_is_named():
    result = summarize([request(0, "p", 300)], [], {**RUN, "replicas": 3})
    assert result["unseen"] == [1, 2]
    assert "NOT SEEN: replica 1, 2" in summary.verdict(result)
