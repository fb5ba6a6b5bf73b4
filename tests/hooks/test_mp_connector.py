"""The multi-process connector's bookkeeping: LMCache's and vLLM's real classes, no process."""

import threading
from types import SimpleNamespace

import pytest
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.v1.request import Request

from kvshare import vllm_plugin
from kvshare.core import policy
from kvshare.hooks.lmcache import keys, mp_connector, mp_transfers


@pytest.fixture
def engine(monkeypatch):
    vllm_plugin.register()
    monkeypatch.setattr(mp_connector, "engine", keys.EnginePolicy())
    return mp_connector.engine


def request(stamp=None, salt=None, **more):
    configs = {policy.TAG: stamp} if stamp else {}
    params = SamplingParams(extra_args={"kv_transfer_params": configs})
    made = Request("r", list(range(600)), params, None, cache_salt=salt, **more)
    mp_connector.engine.added(made)
    return made


def track(*args, **more):
    from lmcache.integration.vllm.lmcache_mp_metadata import LMCacheMPRequestTracker

    return LMCacheMPRequestTracker(request(*args, **more))


class Connector:
    """The part of LMCache's connector that a reset touches."""

    def __init__(self, *trackers):
        self.request_trackers = {str(i): tracker for i, tracker in enumerate(trackers)}
        self.freed = []
        self.scheduler_adapter = SimpleNamespace(
            lmcache_tokens_per_chunk=256,
            cleanup_lookup_result=lambda request_id: None,
            free_lookup_locks=lambda *args, cache_salt, **more: self.freed.append((args[1], args[2], cache_salt)),
        )

    def reset(self):
        return mp_connector._reset_cache(self)


def test_stamp_is_the_salt(engine):
    assert track("p", "p").cache_salt == track("p", "p").cache_salt != track("q", "q").cache_salt
    assert track("p", "p.mine").cache_salt != track("p", "p").cache_salt
    assert track("p").request_configs[policy.TAG] == "p"


def test_configuration_is_in_the_salt(engine):
    before = [track(), track("p")]
    engine.config = "another rope_theta"
    assert not {one.cache_salt for one in before} & {track().cache_salt, track("p").cache_salt}


def test_unstamped_is_this_engines_until_a_reset(engine):
    before = track().cache_salt
    assert before == track().cache_salt != track(None, "mine").cache_salt
    Connector().reset()
    assert before != track().cache_salt == track().cache_salt
    lora = track(lora_request=LoRARequest("a/b@c", 1, "/path")).cache_salt
    assert lora != track().cache_salt


def test_stamped_before_a_reset_and_scheduled_after_it(engine):
    """Also when the stamp is a policy that only this replica has: it has one until its first update."""
    from lmcache.integration.vllm.lmcache_mp_metadata import LMCacheMPRequestTracker

    waiting = [request("p", "p"), request(policy.private_policy()), request()]
    known = {LMCacheMPRequestTracker(one).cache_salt for one in waiting}
    Connector().reset()
    now = [LMCacheMPRequestTracker(one).cache_salt for one in waiting]
    assert len(known | set(now)) == 6
    assert policy.is_private(LMCacheMPRequestTracker(waiting[0]).request_configs[policy.TAG])
    assert track("p", "p").request_configs[policy.TAG] == "p"


def test_reset_takes_back_what_was_promised(engine):
    waiting, running = track("p", "p"), track("p", "p")
    states = type(waiting.state)
    running.state, waiting.num_lmcache_hit_tokens = states.READY, 512
    connector = Connector(waiting, running)
    promised = waiting.cache_salt
    assert connector.reset() is True
    assert connector.freed == [(0, 512, promised)]
    assert (waiting.state, waiting.num_lmcache_hit_tokens) == (states.BYPASS_LMCACHE, 0)
    assert running.state is states.READY
    assert len({promised, waiting.cache_salt, running.cache_salt}) == 3
    assert policy.is_private(running.request_configs[policy.TAG])


def test_settings_come_from_lmcaches_file_unless_given(engine, monkeypatch):
    monkeypatch.setattr(engine, "loaded", lambda config: None)
    monkeypatch.delenv("LMCACHE_CONFIG_FILE", raising=False)
    monkeypatch.setenv("LMCACHE_REMOTE_URL", "tcp://there:1")
    monkeypatch.setenv("LMCACHE_BLOCKING_TIMEOUT_SECS", "3")
    assert configured({}) == {
        "lmcache.mp.server_urls": "tcp://there:1",
        "lmcache.mp.mq_timeout": 3.0,
        "lmcache.mp.heartbeat_interval": 3.0,
        "lmcache.mp.mp_transfer_mode": "engine_driven",
    }
    given = {"lmcache.mp.port": 7, "lmcache.mp.mq_timeout": 9, "lmcache.mp.mp_transfer_mode": "auto"}
    assert configured(given) == {**given, "lmcache.mp.heartbeat_interval": 3.0}


def configured(extra):
    transfer = SimpleNamespace(kv_connector_extra_config=dict(extra))
    config = SimpleNamespace(kv_transfer_config=transfer)
    mp_connector._init(lambda *args: None, None, (config, None), {})
    return transfer.kv_connector_extra_config


class Future:
    def __init__(self, result=None):
        self.value = result

    def query(self):
        return self.value is not None

    def result(self, timeout):
        return self.value


@pytest.mark.parametrize(
    ("future", "healthy", "outcome"),
    [
        (Future(True), True, [True]),
        (Future(False), True, [False]),  # the server could not
        (Future(), True, []),  # under way
        (Future(), False, [False]),  # the server is gone, LMCache does not wait either
        (None, True, [False]),  # not even submitted
    ],
)
def test_what_has_arrived(future, healthy, outcome):
    seen = []
    ended = mp_transfers.Transfer(future, seen.append).settle(healthy)
    assert (seen, ended) == (outcome, bool(outcome))


def test_vllm_asks_what_has_arrived(engine):
    """By get_transfer_results() since vLLM 0.30; LMCache answers that with get_finished()."""
    from lmcache.integration.vllm.lmcache_mp_connector import LMCacheMPConnector
    from lmcache.integration.vllm.vllm_multi_process_adapter import LMCacheMPWorkerAdapter

    seen = []
    adapter = object.__new__(LMCacheMPWorkerAdapter)
    adapter.dispatcher, adapter.store_futures, adapter.retrieve_futures = None, {}, {}
    adapter._dropped_retrieves, adapter._health_event = set(), threading.Event()
    adapter.finished_stores, adapter.previously_finished, adapter._returned_finished = set(), set(), set()
    adapter._health_event.set()
    adapter.kvshare_replaced = []
    adapter.kvshare_transfers = [mp_transfers.Transfer(Future(True), seen.append)]
    connector = object.__new__(LMCacheMPConnector)
    connector.worker_adapter, connector.lazy_offload, connector._can_store = adapter, False, True
    connector._report_request_errors = False
    connector.get_transfer_results(set())
    assert (seen, adapter.kvshare_transfers) == ([True], [])


def test_closed_connection_is_a_dead_server():
    health = threading.Event()
    health.set()
    queue = SimpleNamespace(kvshare_health=health, kvshare_closed=0)
    mp_transfers._disconnected(lambda: None, queue, (), {})
    assert not health.is_set()
    assert queue.kvshare_closed == 1
