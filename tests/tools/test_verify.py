"""What ``kvshare verify`` concludes, from made-up servers; from real ones: verify.py (`make verify`)."""

import subprocess
import sys

import pytest

from kvshare.core.ports import free_port
from kvshare.tools import verify
from kvshare.tools.verify import Answer

HIT = Answer(["a"], [-1.0], 0.1, asked=1100, found=1024, loaded=1024)
MISS = HIT._replace(found=0, loaded=0)
WRONG = [-2.0]


class Server:
    """Answers ``kinds[kind]``, MISS by default, to: new and known prompts, and with a salt."""

    room = 4096

    def __init__(self, **kinds):
        self.url, self._kinds = "http://it", kinds
        known = (verify._prompt(f"kvshare verify, {place}", verify.TOKENS) for place in ("first", "second"))
        self._known = set(map(tuple, known))

    def transport(self):
        return ""

    def ask(self, prompt, salt=None):
        kind = "salted" if salt else "known" if tuple(prompt) in self._known else "new"
        return self._kinds.get(kind, MISS)


@pytest.mark.parametrize(
    ("kinds", "verdict"),
    [
        ({"new": HIT}, "SHARING"),
        ({}, "NOT SHARING"),
        ({"new": HIT._replace(loaded=0)}, "NOT SHARING"),
        ({"new": MISS._replace(asked=0)}, "DEGRADED"),
        ({"new": HIT, "known": HIT}, "SHARING"),
        ({"new": HIT, "known": HIT._replace(logprobs=WRONG)}, "STALE"),
        ({"known": MISS._replace(local=1024, logprobs=WRONG)}, "STALE"),
        ({"new": HIT, "salted": HIT}, "STALE"),
        ({"new": HIT._replace(logprobs=WRONG)}, "CORRUPT"),
        ({"new": HIT._replace(logprobs=[float("nan")])}, "CORRUPT"),
    ],
)
def test_verdict(kinds, verdict, monkeypatch):
    monkeypatch.setattr(verify.time, "sleep", lambda seconds: None)
    assert verify.verify(Server(), Server(**{"new": HIT, **kinds} if kinds else {})).verdict == verdict


def test_other_weights():
    other = HIT._replace(logprobs=WRONG)
    second = Server(new=other, known=other, salted=other._replace(found=0))
    assert verify.verify(Server(), second).verdict == "DIFFERENT"


def test_differences_count_up_to_the_first_token_that_differs():
    one = Answer(["a", "b", "c"], [-1.0, -2.0, -3.0], 0)
    assert one.difference(one) == 0
    assert one.difference(one._replace(logprobs=[-1.0, -2.5, -3.0])) == 0.5
    assert one.difference(one._replace(tokens=["a", "x", "c"], logprobs=[-1.0, -2.25, -9.0])) == 0.25


def test_nobody_is_there():
    url = f"http://127.0.0.1:{free_port()}"
    done = subprocess.run([sys.executable, "-m", "kvshare", "verify", url, url], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        f"kvshare: {url} is not a vLLM server (<urlopen error [Errno 111] Connection refused>): give another address\n"
    )
