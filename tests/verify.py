"""``kvshare verify`` on engines that are set up wrong, each in its way (`make verify`, about five minutes)."""

from pathlib import Path

import pytest
from plain_keys import plugin_path
from test_verify import verify


@pytest.fixture(scope="module")
def plain(start_engine, tmp_path_factory):
    """LMCache without kvshare's keys, reset and checksums."""
    folder = tmp_path_factory.mktemp("plain")
    path = plugin_path(folder, (Path(__file__).parent / "plain_lmcache.py").read_text())
    pair = [start_engine(rank, f"plain-{rank}", PYTHONPATH=path) for rank in range(2)]
    yield [engine.wait() for engine in pair]
    for engine in pair:
        engine.kill()


def test_sharing_then_stale(plain, weights):
    assert verify(*plain)[0] == 0
    code, found = verify(*plain)
    assert (code, found["verdict"]) == (0, "SHARING")
    assert "right for these weights" in found["facts"]["left by an earlier run"]
    for engine in plain:
        engine.load(weights.make(1))
        assert engine.reset()
    code, found = verify(*plain)
    assert (code, found["verdict"]) == (4, "STALE")


def test_corrupt(plain, weights, backend):
    for engine in plain:
        engine.load(weights.make(0))
    backend.does = "reverse"
    code, found = verify(*plain)
    backend.does = "serve"
    assert (code, found["verdict"]) == (5, "CORRUPT")


def test_no_hash_seed(start_engine):
    pair = [start_engine(rank, f"no-seed-{rank}", PYTHONHASHSEED="random") for rank in range(2)]
    code, found = verify(*[engine.wait() for engine in pair])
    assert (code, found["verdict"]) == (1, "NOT SHARING")
    for engine in pair:
        engine.kill()


def test_degraded(start_engine, backend, monkeypatch):
    """No connector."""
    monkeypatch.setattr(backend, "connector", None)
    bare = start_engine(0, "bare").wait()
    code, found = verify(bare, bare)
    assert (code, found["verdict"]) == (3, "DEGRADED")
    bare.kill()
