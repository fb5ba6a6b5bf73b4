"""``kvshare verify`` on real engines, set up well and wrong, each in its way (`make verify`)."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import ROOT
from engines import Engine
from plain_keys import plugin_path
from waiting import until

from kvshare.core import policy

WHOLE = "1,024"  # of 1,100 tokens: four chunks


def verify(first, second, *options):
    """Exit code, verdict, why, and the facts as the user sees them."""
    command = [sys.executable, "-m", "kvshare", "verify", first.url, second.url, *options]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True)
    print(done.stdout, done.stderr)
    found = json.loads(done.stdout)
    assert found["exit_code"] == done.returncode
    return done.returncode, found["verdict"], found["why"], found["facts"]


def update(pair, weights, version):
    for engine in pair:
        engine.load(weights.make(version))
        assert engine.reset()


@pytest.fixture(scope="module")
def pair(start_engine):
    return [engine.wait() for engine in [start_engine(0, "0"), start_engine(1, "1")]]


@pytest.fixture(scope="module")
def plain(processes, backend, weights, tmp_path_factory):
    """LMCache without kvshare's keys, reset and checksums. Its own keys have no room for a long path."""
    folder = tmp_path_factory.mktemp("plain")
    path = plugin_path(folder, (ROOT / "tests" / "support" / "plain_lmcache.py").read_text())
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        model, environment = weights.make(0, Path(short)), backend.environment | {"PYTHONPATH": path}
        engines = [Engine(processes, rank, model, folder / f"{rank}.log", environment) for rank in range(2)]
        yield [engine.wait() for engine in engines]
        for engine in engines:
            engine.kill()


def test_sharing(pair):
    code, verdict, why, facts = verify(*pair)
    assert (code, verdict) == (0, "SHARING")
    assert why == f"the second loaded {WHOLE} of 1,100 tokens, and answers as it does without a cache"
    assert facts["left by an earlier run"].startswith("nothing")
    code, verdict, _, facts = verify(*pair)
    assert (code, verdict) == (0, "SHARING")
    assert facts["left by an earlier run"].endswith("right for these weights")


def test_server_is_down(pair, backend):
    with backend.absent():
        assert verify(*pair, "--policy", policy.private_policy())[:2] == (1, "NOT SHARING")


def test_what_arrives_is_wrong_and_thrown_away(pair, backend):
    stamp = "--policy", policy.private_policy()
    until(lambda: verify(*pair, *stamp)[0] == 0)
    backend.does = "flip"
    code, verdict, why, _ = verify(*pair, "--policy", policy.private_policy())
    backend.does = "serve"
    assert (code, verdict) == (1, "NOT SHARING")
    assert why.startswith(f"the second found {WHOLE} tokens, and none of them arrived")


def test_no_hash_seed(pair, start_engine):
    other = start_engine(1, "no-seed", PYTHONHASHSEED="random").wait()
    assert verify(pair[0], other)[:2] == (1, "NOT SHARING")
    other.kill()


def test_weights_change_and_nothing_is_stale(pair, weights):
    stamp = policy.new_run()
    assert verify(*pair, "--policy", policy.policy_id(stamp, 0))[:2] == (0, "SHARING")
    update(pair, weights, 1)
    code, verdict, _, facts = verify(*pair, "--policy", policy.policy_id(stamp, 1))
    assert (code, verdict) == (0, "SHARING")
    assert facts["left by an earlier run"].startswith("nothing")
    assert verify(*pair)[:2] == (1, "NOT SHARING")  # unstamped: no two engines at the same weights


def test_different_weights(pair, weights):
    update(pair[1:], weights, 7)
    assert verify(*pair, "--policy", policy.private_policy())[:2] == (6, "DIFFERENT")
    for engine in pair:
        engine.kill()


def test_no_connector(start_engine, backend, monkeypatch):
    monkeypatch.setattr(backend, "connector", None)
    bare = start_engine(0, "bare").wait()
    assert verify(bare, bare)[:2] == (3, "DEGRADED")
    bare.kill()


def test_plain_lmcache_after_a_weight_update(plain, weights):
    assert verify(*plain)[:2] == (0, "SHARING")
    code, verdict, _, facts = verify(*plain)
    assert (code, verdict) == (0, "SHARING")
    assert "right for these weights" in facts["left by an earlier run"]
    update(plain, weights, 1)
    code, verdict, why, _ = verify(*plain)
    assert (code, verdict) == (4, "STALE")
    assert "tokens of an earlier run, and with them it does not answer as its weights do" in why


def test_corrupt(plain, weights, backend):
    update(plain, weights, 0)
    backend.does = "swap"
    code, verdict, *_ = verify(*plain)
    backend.does = "serve"
    assert (code, verdict) == (5, "CORRUPT")


def test_keys_without_policy(start_engine, tmp_path):
    engine = start_engine(0, "plain-keys", PYTHONPATH=plugin_path(tmp_path)).wait()
    code, verdict, why, _ = verify(engine, engine)
    assert (code, verdict) == (4, "STALE")
    assert "under a new policy" in why
    engine.kill()
