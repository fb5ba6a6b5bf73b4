"""Real vLLM processes sharing through a real server: kvshare's, or LMCache's multi-process one (--backend mp)."""

import json
import random

import pytest
from conftest import CHUNK
from engines import recorded
from plain_keys import plugin_path

from kvshare.record import summary

WHOLE = 4 * CHUNK


@pytest.fixture
def prompt(request):
    rng = random.Random(request.node.name)
    return [rng.randrange(300, 1500) for _ in range(WHOLE + 50)]


def same(one, other):
    assert one.tokens == other.tokens
    assert max(abs(a - b) for a, b in zip(one.logprobs, other.logprobs, strict=True)) < 1e-5


def test_second_engine_reads_what_the_first_computed(engines, prompt):
    first, second = engines
    starts = len(first.events), len(second.events)
    cold = first.ask(prompt, "run-1")
    warm = second.ask(prompt, "run-1")
    same(cold, warm)
    assert second.hits(starts[1]) == WHOLE
    events = first.events[starts[0] :] + second.events[starts[1] :]
    result = summary.summarize(recorded(events), [], {"replicas": 2})
    assert result["replica"][1]["shared_hit"] == WHOLE
    assert result["prefill_amplification"] == 1.0
    assert result["tokens"]["stale_hit"] == 0


@pytest.mark.parametrize("prompt_logprobs", [0, 1])
def test_requests_that_opt_out_of_cached_kv_load_none(engines, prompt, prompt_logprobs):
    """vLLM needs every prompt token computed for prompt log-probabilities; with a load its engine dies."""
    for engine in engines:
        start = len(engine.events)
        cold = engine.ask(prompt, "run-1")
        again = engine.ask(prompt, "run-1", prompt_logprobs=prompt_logprobs)
        same(cold, again)
        assert again.cached == 0
        assert engine.hits(start) == (0 if engine is engines[0] else WHOLE)


def test_what_the_engine_has_itself_is_not_moved(engines, backend, prompt):
    """Samples that come together store their prompt once, and later ones load nothing."""
    if backend.connector == "LMCacheMPConnector":
        pytest.skip("here the server sees to it")
    first, _ = engines
    start = len(first.events)
    answers = first.ask_together(4, prompt, "run-1")
    answers.append(first.ask([*prompt[: WHOLE + 10], *range(300, 340)], "run-1"))
    for answer in answers[1:4]:
        same(answers[0], answer)
    stored = [key for event in first.events[start:] if event["op"] == "store" for key in event["keys"]]
    assert len(stored) == len(set(stored)) == 4
    assert first.hits(start) == 0
    assert sorted(answer.cached >= WHOLE for answer in answers) == [False, True, True, True, True]


def test_samples_that_come_together_load_their_prompt_once(engines, prompt):
    first, second = engines
    cold = first.ask(prompt, "run-1")
    start = len(second.events)
    for answer in second.ask_together(4, prompt, "run-1"):
        same(cold, answer)
        assert answer.cached >= WHOLE
    assert second.hits(start) == WHOLE


def test_another_policy_finds_nothing(engines, prompt):
    first, second = engines
    cold = first.ask(prompt, "run-1")
    start = len(second.events)
    same(cold, second.ask(prompt, "run-2"))
    assert second.hits(start) == 0
    same(cold, first.ask(prompt, "run-2"))


def test_another_cache_salt_finds_nothing(engines, prompt):
    """Another tenant's, or another version's of the weights."""
    first, second = engines
    cold = first.ask(prompt, "run-1", cache_salt="a")
    start = len(second.events)
    same(cold, second.ask(prompt, "run-1", cache_salt="b"))
    assert second.hits(start) == 0
    same(cold, second.ask(prompt, "run-1", cache_salt="a"))
    assert second.hits(start) == WHOLE


def test_another_configuration_finds_nothing(engines, start_engine, prompt):
    rope = json.dumps({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}})
    other = start_engine(1, "rope", "--hf-overrides", rope).wait()
    engines[0].ask(prompt, "run-1")
    cold = other.ask(prompt, "run-1")
    assert other.hits(0) == 0
    other.reset(connector=False)
    same(cold, other.ask(prompt, "run-1"))
    assert other.hits(0) == WHOLE
    other.kill()


def test_what_was_stored_before_sleep_is_found_after_it_by_its_policy_alone(engines, prompt):
    engine, other = engines
    cold = engine.ask(prompt, "run-1")
    engine.sleep()
    same(cold, other.ask(prompt, "run-1"))  # a replica that sleeps disturbs no other
    engine.wake()
    start = len(engine.events)
    same(cold, engine.ask(prompt, "run-1"))
    assert engine.hits(start) == WHOLE
    engine.sleep()
    engine.wake()
    start = len(engine.events)
    same(cold, engine.ask(prompt, "run-2"))
    same(cold, engine.ask(prompt))  # without a policy: vLLM resets the connector when it sleeps
    assert engine.hits(start) == 0


def test_unstamped_requests_never_cross_a_reset(engines, prompt):
    first = engines[0]
    cold = first.ask(prompt)
    start = len(first.events)
    first.reset(connector=False)
    same(cold, first.ask(prompt))
    assert first.hits(start) == WHOLE
    start = len(first.events)
    assert first.reset()
    same(cold, first.ask(prompt))
    assert first.hits(start) == 0
    start = len(first.events)
    first.reset(connector=False)
    same(cold, first.ask(prompt))  # shares with itself again
    assert first.hits(start) == WHOLE


@pytest.mark.slow  # it starts an engine of its own
def test_staleness_is_measured(engines, start_engine, weights, prompt, tmp_path):
    """0 with the policy in the keys; not 0 when it is taken out of them: both counts can see it."""
    plain = start_engine(0, "plain", PYTHONPATH=plugin_path(tmp_path)).wait()
    assert _stale(engines[0], prompt) == (0, 0)
    assert _stale(plain, prompt) == (WHOLE, 0)  # the weights did not change
    assert _stale(plain, prompt[1:] + prompt[:1], weights.make(1)) == (WHOLE, WHOLE)
    plain.kill()


def _stale(engine, prompt, changed=None):
    """Stale tokens by policy id and by weights, of a prompt that is asked for under two policies."""
    start = len(engine.events)
    engine.ask(prompt, "run-1")
    if changed:
        engine.load(changed)
    engine.ask(prompt, "run-2")
    tokens = summary.summarize(recorded(engine.events[start:]), [], {"replicas": 1})["tokens"]
    return tokens["stale_hit"], tokens["stale_hit_by_weights"]
