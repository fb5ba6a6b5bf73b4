"""Real vLLM processes sharing through a real lmcache_server."""

import random
import shutil

import pytest
from conftest import ROOT
from engines import Engine

from kvshare import report

CHUNK = 256
WHOLE = 4 * CHUNK


@pytest.fixture(scope="module")
def engines(processes, lmcache_server, model, tmp_path_factory):
    """Two engines with kvshare, and a third whose keys have lost the policy."""
    folder = tmp_path_factory.mktemp("engines")
    # A path that lmcache_server's own key format could not carry: with @, and too long.
    path = folder / "qwen@tiny" / ("long-" * 20)
    shutil.copytree(model, path)
    config = str(ROOT / "config" / "remote_backend_config.yaml")
    environment = {"LMCACHE_CONFIG_FILE": config, "LMCACHE_REMOTE_URL": f"lm://{lmcache_server}"}
    plain = {**environment, "PYTHONPATH": str(_plugin_that_takes_the_policy_out(folder))}
    started = [
        Engine(processes, rank, path, folder / f"{rank}.log", env)
        for rank, env in enumerate((environment, environment, plain))
    ]
    return [engine.wait() for engine in started]


def _plugin_that_takes_the_policy_out(folder):
    """A vLLM plugin on PYTHONPATH under which all policies share their keys."""
    plugin = folder / "plugin"
    info = plugin / "plain_keys-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plain-keys\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nplain = plain_keys:register\n")
    code = "def register():\n    import kvshare.policy as p\n    p.fold = lambda chunk_hash, policy: chunk_hash\n"
    (plugin / "plain_keys.py").write_text(code)
    return plugin


@pytest.fixture
def prompt(request):
    rng = random.Random(request.node.name)
    return [rng.randrange(300, 1500) for _ in range(WHOLE + 50)]


def same(one, other):
    assert one[0] == other[0]
    assert max(abs(a - b) for a, b in zip(one[1], other[1], strict=True)) < 1e-5


def test_second_engine_reads_what_the_first_computed(engines, prompt):
    first, second, _ = engines
    starts = len(first.events), len(second.events)
    cold = first.ask(prompt, "run-1")
    warm = second.ask(prompt, "run-1")
    same(cold, warm)
    assert second.hits(starts[1]) == WHOLE
    events = first.events[starts[0] :] + second.events[starts[1] :]
    result = report.summarize(events, [], {"replicas": 2})
    assert result["replica"][1]["shared_hit"] == WHOLE
    assert result["prefill_amplification"] == 1.0
    assert result["tokens"]["stale_hit"] == 0


def test_another_policy_finds_nothing(engines, prompt):
    first, second, _ = engines
    cold = first.ask(prompt, "run-1")
    start = len(second.events)
    same(cold, second.ask(prompt, "run-2"))
    assert second.hits(start) == 0
    same(cold, first.ask(prompt, "run-2"))


def test_unstamped_requests_never_cross_a_reset(engines, prompt):
    first, _, _ = engines
    cold = first.ask(prompt)
    start = len(first.events)
    first.reset(connector=False)
    same(cold, first.ask(prompt))
    assert first.hits(start) == WHOLE
    start = len(first.events)
    first.reset(connector=True)
    same(cold, first.ask(prompt))
    assert first.hits(start) == 0
    start = len(first.events)
    same(cold, first.ask(prompt))  # shares with itself again
    assert first.hits(start) == WHOLE


@pytest.mark.parametrize(("rank", "stale"), [(0, 0), (2, WHOLE)])
def test_staleness_is_measured(engines, prompt, rank, stale):
    """0 with the policy in the keys; not 0 when it is taken out of them: the count can see it."""
    engine = engines[rank]
    start = len(engine.events)
    engine.ask(prompt, "run-1")
    engine.ask(prompt, "run-2")
    result = report.summarize(engine.events[start:], [], {"replicas": 1})
    assert result["tokens"]["stale_hit"] == stale
    assert ("STALE" in report.verdict({**result, "tokens": {**result["tokens"], "prompt": 1}})) == bool(stale)
