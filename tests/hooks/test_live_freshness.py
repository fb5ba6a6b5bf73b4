"""Never stale, attacked: live engines whose weights change, against an oracle that knows no cache."""

import random
import threading

import pytest
from conftest import CHUNK
from engines import recorded
from waiting import until

from kvshare.core import policy
from kvshare.record import summary

PROMPT = 4 * CHUNK + 50
HITS = 4 * CHUNK
LONG = 2500  # tokens of an answer, so that a reset comes before its end
BYTES = 4 * 2 * 128 * 4  # of KV a token: layers, K and V, hidden size, fp32


class Replica:
    """An engine that is stamped and updated as ``KVShareServer`` does it."""

    def __init__(self, engine, weights):
        self.engine, self.weights = engine, weights
        self.version, self.policy = 0, None

    def ask(self, prompt, tokens=4):
        return self.engine.ask(prompt, self.policy or policy.private_policy(), tokens)

    def check(self, prompt):
        answer = self.ask(prompt)
        self.weights.check(self.version, prompt, answer)
        return answer.cached

    def update(self, version, run, fails=False):
        self.policy = None
        assert self.engine.reset()
        self.engine.load(self.weights.make(version))
        self.version = version
        if not fails:
            assert self.engine.reset()
            self.policy = policy.policy_id(run, version)


@pytest.fixture(scope="module")
def replicas(engines, weights):
    return [Replica(engine, weights) for engine in engines]


@pytest.fixture
def prompts(request):
    rng = random.Random(request.node.name)
    return [[rng.randrange(300, 1500) for _ in range(PROMPT)] for _ in range(6)]


def test_only_one_of_two_is_updated(replicas, prompts):
    one, other = replicas
    run, prompt = policy.new_run(), prompts[0]
    for replica in replicas:
        replica.update(1, run)
    assert one.check(prompt) == 0
    assert other.check(prompt) == HITS  # the same policy: shared
    one.update(2, run)
    assert one.check(prompt) == 0
    assert one.check(prompt) == HITS
    assert other.check(prompt) >= HITS  # still with its like
    other.update(2, run)
    assert other.check(prompt) == HITS


def test_update_that_fails_half_way(replicas, prompts):
    one, other = replicas
    run, prompt = policy.new_run(), prompts[0]
    other.update(3, run)
    one.update(3, run)
    assert other.check(prompt) == 0
    one.update(4, run, fails=True)
    assert one.check(prompt) == 0  # shares with nobody, not with itself either
    assert one.check(prompt) == 0
    one.update(3, run)
    assert one.check(prompt) == HITS


def test_request_under_way_across_a_reset(replicas, prompts):
    """vLLM itself would refuse the reset, and go on serving what it has."""
    engine = replicas[0].engine
    known, running = prompts[:2]
    engine.ask(known)
    assert engine.ask(known).cached >= HITS
    answers = []
    thread = threading.Thread(target=lambda: answers.append(engine.ask(running, tokens=LONG)))
    thread.start()
    until(lambda: engine.metric("vllm:num_requests_running"))
    assert engine.reset()
    assert thread.is_alive()
    assert engine.ask(known).cached == 0
    assert engine.ask(known).cached >= HITS
    thread.join()
    assert len(answers[0].tokens) == LONG
    assert engine.ask(running).cached == 0
    assert engine.ask(running).cached >= HITS


def test_local_tier_is_given_back(replicas, prompts, backend):
    if not backend.local_tier:
        pytest.skip(f"{backend.connector} keeps nothing in the engine")
    engine = replicas[0].engine
    for prompt in prompts:
        engine.ask(prompt)
    until(lambda: engine.local_tier() >= len(prompts) * HITS * BYTES)
    assert engine.reset()
    engine.ask(prompts[0])
    until(lambda: engine.local_tier() == HITS * BYTES)


def test_version_in_the_cache_salt_and_no_reset(replicas, weights, prompts):
    """The habit of SkyRL, prime-rl and torchtitan, in requests that nobody stamps."""
    replica, prompt = replicas[0], prompts[0]
    for version in (5, 6):
        replica.engine.load(weights.make(version))
        for cached in (0, HITS):
            answer = replica.engine.ask(prompt, tokens=4, cache_salt=f"version-{version}")
            weights.check(version, prompt, answer)
            assert answer.cached == cached
    replica.update(6, policy.new_run())


def test_kv_of_new_weights_under_an_old_policy_is_seen(replicas, weights, prompts):
    """The count by policy id cannot see it, the count by weights does: in LMCache, and in vLLM's own prefix cache."""
    replica, prompt = replicas[0], prompts[0]
    engine, start = replica.engine, len(replica.engine.events)
    for version in (7, 8):
        engine.load(weights.make(version))
        engine.reset(connector=False)
        engine.ask(prompt, "run-wrong")
    assert stale(engine.events[start:]) == (0, HITS)
    engine.load(weights.make(9))
    assert engine.ask(prompt, "run-wrong").cached == HITS  # nobody has reset vLLM's
    assert stale(engine.events[start:]) == (0, 2 * HITS)
    replica.update(9, policy.new_run())


def test_a_conversation_keeps_its_kv(replicas, prompts):
    """Freshness mode trajectory: across an update, and nobody else finds what it keeps, or what it computes then."""
    replica, prompt, run = replicas[0], prompts[0], policy.new_run()
    replica.update(30, run)
    began = replica.policy
    replica.check(prompt)
    replica.update(31, run)
    start = len(replica.engine.events)
    kept = {"cache_salt": f"{began}~talk", "configs": {policy.KEPT: began}}
    assert replica.engine.ask([*prompt, *prompt[:CHUNK]], began, **kept).cached == HITS
    tokens = summary.summarize(recorded(replica.engine.events[start:]), [], {"replicas": 1})["tokens"]
    assert (tokens["kept_hit"], tokens["stale_hit_by_weights"]) == (HITS, 0)
    assert "store" not in [event["op"] for event in replica.engine.events[start:]]
    assert replica.check(prompt) == 0
    assert replica.check(prompt) == HITS


def stale(events):
    """Tokens by policy id, and by weights."""
    tokens = summary.summarize(recorded(events), [], {"replicas": 2})["tokens"]
    return tokens["stale_hit"], tokens["stale_hit_by_weights"]


def test_fifty_updates(replicas, prompts, record_property):
    """Two engines, updated and asked in random order, with requests under way across the updates."""
    rng = random.Random(0)
    run, started = policy.new_run(), [len(r.engine.events) for r in replicas]
    hits = asked = updates = 0
    while updates < 50:
        replica = rng.choice(replicas)
        if rng.random() < 0.3:
            updates += 1
            across = threading.Thread(target=replica.ask, args=(rng.choice(prompts), 30))
            across.start()
            while across.is_alive() and not replica.engine.metric("vllm:num_requests_running"):
                pass  # stamps and resets must come in the order in which they are sent
            # Mostly what the other one has already, or will have.
            replica.update(10 + updates // 2, run, fails=rng.random() < 0.1)
            across.join()
        else:
            asked += 1
            hits += replica.check(rng.choice(prompts))
    events = [e for r, start in zip(replicas, started, strict=True) for e in r.engine.events[start:]]
    tokens = summary.summarize(recorded(events), [], {"replicas": 2})["tokens"]
    print(f"\n50 updates: {asked} requests checked, {hits} tokens hit, {tokens['shared_hit']} shared, 0 stale")
    assert (tokens["stale_hit"], tokens["stale_hit_by_weights"]) == (0, 0)
    assert len({event["weights"] for event in events if event["op"] == "load"}) > 10
    assert tokens["shared_hit"] > 0
    assert hits >= 10_000


def test_replica_is_killed_and_restarted(engines, start_engine, replicas, weights, prompts):
    """A restarted engine loads what lies at the model path: base weights, or a checkpoint written over them."""
    one, other = replicas
    run, prompt = policy.new_run(), prompts[0]
    one.update(80, run)
    one.check(prompt)
    other.engine.kill()
    weights.make(81, start_engine.model)  # now another checkpoint at the same path
    other.engine = engines[1] = start_engine(1, "again").wait()
    other.version, other.policy = 81, None
    assert other.check(prompt) == 0  # before its first update
    unstamped = other.engine.ask(prompt, tokens=4)
    assert unstamped.cached == 0
    weights.check(81, prompt, unstamped)
    other.update(80, run)
    assert other.check(prompt) == HITS  # at the same policy as the one that lived on
