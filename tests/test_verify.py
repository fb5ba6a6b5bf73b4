"""``kvshare verify`` on the two live engines; what takes engines of its own is in verify.py (`make verify`)."""

import json
import subprocess
import sys

import pytest
from conftest import CHUNK

from kvshare import policy
from kvshare.services import free_port
from kvshare.verify import Answer

WHOLE = 4 * CHUNK


def verify(first, second, *options):
    """Exit code and JSON."""
    command = [sys.executable, "-m", "kvshare", "verify", first.url, second.url, "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    return done.returncode, json.loads(done.stdout)


def test_differences_count_up_to_the_first_token_that_differs():
    one = Answer(["a", "b", "c"], [-1.0, -2.0, -3.0], 0, 0, 0, 0)
    assert one.difference(one) == 0
    assert one.difference(one._replace(logprobs=[-1.0, -2.5, -3.0])) == 0.5
    assert one.difference(one._replace(tokens=["a", "x", "c"], logprobs=[-1.0, -2.25, -9.0])) == 0.25


@pytest.fixture(scope="module")
def pair(engines, weights):
    for engine in engines:
        engine.load(weights.make(0))
        assert engine.reset()
    return engines


@pytest.fixture
def stamp():
    return ("--policy", policy.private_policy())


def test_sharing(pair, stamp):
    code, found = verify(*pair, *stamp)
    assert (code, found["verdict"]) == (0, "SHARING")
    assert found["why"] == f"the second read {WHOLE:,} of 1,100 tokens, and answers as without"
    assert found["facts"]["left by an earlier run"].startswith("nothing")
    code, found = verify(*pair, *stamp)
    assert (code, found["verdict"]) == (0, "SHARING")
    assert found["facts"]["left by an earlier run"].endswith("right for these weights")


def test_not_sharing(pair, backend, stamp):
    backend.does = "refuse"
    try:
        code, found = verify(*pair, *stamp)
    finally:
        backend.does = "serve"
    assert (code, found["verdict"]) == (1, "NOT SHARING")


def test_what_arrives_is_wrong_and_thrown_away(pair, backend, stamp):
    pair[1].wait_until(lambda: verify(*pair, *stamp)[0] == 0)
    backend.does = "flip"
    try:
        code, found = verify(*pair, *stamp)
    finally:
        backend.does = "serve"
    assert (code, found["verdict"]) == (1, "NOT SHARING")


def test_different_weights(pair, weights, stamp):
    pair[1].load(weights.make(7))
    assert pair[1].reset()
    code, found = verify(*pair)
    assert (code, found["verdict"]) == (6, "DIFFERENT")


def test_nobody_is_there():
    url = f"http://127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "kvshare", "verify", url, url]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        f"kvshare: {url} does not answer ([Errno 111] Connection refused): give the address of a vLLM server\n"
    )
