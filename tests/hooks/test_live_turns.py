"""Conversations on real engines: what a turn has generated is found by the next one, also on another replica."""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import CHUNK
from test_live_engines import same
from waiting import until

from kvshare.core import policy

PROMPT, GENERATED = 4 * CHUNK + 50, 2 * CHUNK
COMPUTED = PROMPT + GENERATED - 1  # the last token's KV is not
LONG = 1500  # tokens of an answer of which the end of the last chunk is less than a tenth
ANSWER = 2500  # so long that something comes between
GENERATION = "vllm:generation_tokens_total"
ALWAYS, IF_ABORTED = ({policy.STORE: value} for value in (policy.ALWAYS, policy.IF_ABORTED))


@pytest.fixture
def prompt(request):
    rng = random.Random(request.node.name)
    return [rng.randrange(300, 700) for _ in range(PROMPT)]


def next_turn(prompt, answer):
    """The prompt of a turn after ``answer``."""
    return [*prompt, *(int(token.removeprefix("token_id:")) for token in answer.tokens), *range(300, 340)]


def chunks(tokens):
    """Those of ``tokens`` that are in whole chunks."""
    return tokens // CHUNK * CHUNK


def stored(engine, start, tokens):
    """The keys stored since ``start``, once all chunks of so many tokens are."""

    def keys():
        events = engine.events[start:]
        done = {event["end"] for event in events if event["op"] == "stored"}
        return chunks(tokens) in done and [k for e in events if e["op"] == "store" for k in e["keys"]]

    return until(keys, engine.process)


@pytest.mark.parametrize("where", ["evicted", "moved"])
def test_next_turn_computes_only_what_is_new(engines, prompt, where):
    first, second = engines
    start = len(first.events)
    answer = first.ask(prompt, "run-1", tokens=GENERATED, configs=ALWAYS)
    stored(first, start, COMPUTED)
    turn = next_turn(prompt, answer)
    cold = second.ask(turn, "run-2")
    if where == "evicted":
        first.reset(connector=False)
    engine = first if where == "evicted" else second
    start = len(engine.events)
    again = engine.ask(turn, "run-1")
    same(cold, again)
    assert again.cached == engine.hits(start) == chunks(COMPUTED)


def test_each_chunk_is_stored_once_and_only_for_who_asks(engines, prompt):
    first, _ = engines
    for policy_id, configs, tokens in (
        ("run-1", ALWAYS, COMPUTED),
        ("run-2", None, PROMPT),
        ("run-3", IF_ABORTED, PROMPT),
    ):
        start = len(first.events)
        first.ask(prompt, policy_id, tokens=GENERATED, configs=configs)
        keys = stored(first, start, tokens)
        assert len(keys) == len(set(keys)) == tokens // CHUNK


def test_an_answer_from_before_a_reset_is_not_stored(engines, prompt):
    """After a reset the weights may change, and the rest of the answer is of both."""
    first, _ = engines
    start = len(first.events)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(first.ask, prompt, "run-1", ANSWER, ALWAYS)
        stored(first, start, PROMPT)
        first.reset()
        asked.result()
    first.ask(prompt[::-1], "run-2")  # the engine runs a further step, in which it would store
    assert len([e for e in first.events[start:] if e["op"] == "store" and e["policy"] != "run-2"]) == 1


def interrupted(engine, prompt):
    """The number of events before an answer, and what it had when it was aborted. None if it had ended before."""
    start, before = len(engine.events), engine.metric(GENERATION)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(engine.ask, prompt, "run-1", ANSWER, IF_ABORTED)
        until(lambda: engine.metric(GENERATION) - before > LONG, engine.process)
        engine.abort_all()
        partial = asked.result()
    return (start, partial) if len(partial.tokens) < ANSWER else None


@pytest.mark.parametrize("where", ["same", "moved"])
def test_an_interrupted_answer_goes_on_with_its_kv(engines, prompt, where):
    """verl aborts, clears the engine's caches, and asks for the prompt with what was generated, there or elsewhere."""
    first, second = engines
    start, partial = until(lambda: interrupted(first, prompt))
    computed = PROMPT + len(partial.tokens) - 1
    stored(first, start, computed)
    engine, turn = first if where == "same" else second, next_turn(prompt, partial)
    again = engine.ask(turn, "run-1")
    same(engine.ask(turn, "run-2"), again)
    assert again.cached == chunks(computed)
    assert computed - again.cached <= computed / 10  # without: all
