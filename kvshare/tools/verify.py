"""Tests on two live vLLM servers that the second loads KV that the first has computed.

Counters alone prove little. vLLM's counters show what a lookup promised, and include KV of other weights. So each
answer is compared with a reference, which the server computes without any cache: same prompt, but a new policy and
salt. Token counts are differences of the servers' metrics, so the servers must be idle otherwise.

One prompt is new in each run. One more prompt per server is the same in all runs. KV that an earlier run has left of it
must not be served after the weights have changed.
"""

from __future__ import annotations

import json
import math
import random
import time
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple
from urllib.error import HTTPError

from kvshare.core import policy
from kvshare.core.errors import UserError
from kvshare.tools import vllm_http

TOKENS = 1100  # per prompt: four chunks of 256
ANSWER = 8  # tokens
ATTEMPTS = 5  # a store may take a moment to finish
EXACT = 1e-4  # log-probabilities that differ by less are equal
NOISE = 4  # or by less than so many times the difference that a local hit makes

COUNTERS = {  # all count prompt tokens
    "prompt": "vllm:prompt_tokens_total",
    "local": "vllm:prefix_cache_hits_total",
    "asked": "vllm:external_prefix_cache_queries_total",
    "found": "vllm:external_prefix_cache_hits_total",
    "loaded": "kvshare:loaded_tokens_total",
}
TRANSPORT = "kvshare:p2p_transport_info"


class Answer(NamedTuple):
    tokens: list[str]
    logprobs: list[float]
    seconds: float
    local: int = 0  # prompt tokens from vLLM's own prefix cache
    asked: int = 0  # prompt tokens that the connector was asked for; 0 without a connector
    found: int = 0  # prompt tokens that its lookup found
    loaded: int = 0  # prompt tokens that arrived; equal to found without kvshare's plugin

    def difference(self, other: Answer) -> float:
        """Largest difference of log-probabilities, up to the first token that differs. NaN counts as infinite."""
        worst = 0.0
        for token, other_token, a, b in zip(self.tokens, other.tokens, self.logprobs, other.logprobs, strict=True):
            apart = abs(a - b)
            worst = max(worst, math.inf if math.isnan(apart) else apart)
            if token != other_token:
                break
        return worst


class Server:
    """A vLLM server. The constructor and all methods raise UserError if it does not answer as vLLM does.

    Args:
        stamp: policy id to send with each request, as a rollout server does. None: the server decides.
    """

    def __init__(self, url: str, stamp: str | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._stamp = stamp
        try:
            model = json.loads(vllm_http.get(f"{self.url}/v1/models"))["data"][0]
            self.model, self.room = model["id"], model["max_model_len"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(f"{self.url} is not a vLLM server ({error}): give another address") from None

    def ask(self, prompt: list[int], salt: str | None = None) -> Answer:
        """Send a prompt of token ids. ``salt`` is its policy and cache salt; a new one keeps it from sharing KV."""
        salt = salt or self._stamp
        body: dict[str, Any] = {"model": self.model, "prompt": prompt, "max_tokens": ANSWER, "temperature": 0}
        body |= {"logprobs": 1, "ignore_eos": True, "return_tokens_as_token_ids": True}
        if salt:
            body |= {"cache_salt": salt, "kv_transfer_params": {policy.TAG: salt}}
        before, began = self._counts(), time.monotonic()
        try:
            logprobs = vllm_http.post(f"{self.url}/v1/completions", body)["choices"][0]["logprobs"]
        except HTTPError as error:
            raise UserError(f"{self.url} answers a prompt with {error.code} {error.reason}: see its log") from None
        except OSError as error:
            raise UserError(f"{self.url} stopped answering ({error}): see its log") from None
        seconds = time.monotonic() - began
        return Answer(logprobs["tokens"], logprobs["token_logprobs"], seconds, **self._counted(before, len(prompt)))

    def transport(self) -> str:
        """What UCX moves KV through between P2P replicas; empty with other backends."""
        try:
            found = vllm_http.labels(vllm_http.get(f"{self.url}/metrics"), TRANSPORT)
        except OSError as error:
            raise UserError(f"{self.url}/metrics does not answer ({error}): is it a vLLM server?") from None
        return "; ".join(sorted({labels["transport"] for labels in found}))

    def _counts(self) -> dict[str, int]:
        try:
            found = vllm_http.metrics(vllm_http.get(f"{self.url}/metrics"))
        except OSError as error:
            raise UserError(f"{self.url}/metrics does not answer ({error}): is it a vLLM server?") from None
        counts = {name: round(found.get(metric, 0)) for name, metric in COUNTERS.items()}
        if COUNTERS["loaded"] not in found:  # another connector, or no kvshare plugin
            counts["loaded"] = counts["found"]
        return counts

    def _counted(self, before: dict[str, int], tokens: int) -> dict[str, int]:
        """Increase of the counters since ``before``. They are updated shortly after the answer, so wait for them."""
        deadline = time.monotonic() + 10
        while True:
            grew = {name: now - before[name] for name, now in self._counts().items()}
            if grew.pop("prompt") >= tokens:
                return grew
            if time.monotonic() > deadline:
                raise UserError(f"{self.url} counts no prompt tokens: start it without --disable-log-stats")
            time.sleep(0.1)


EXIT_CODES = {"SHARING": 0, "NOT SHARING": 1, "DEGRADED": 3, "STALE": 4, "CORRUPT": 5, "DIFFERENT": 6}


@dataclass(frozen=True)
class Proof:
    verdict: str  # a key of EXIT_CODES
    why: str
    facts: dict[str, str]

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.verdict]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "exit_code": self.exit_code}


class Fault(Exception):
    """A failed test. Args: verdict, why."""


def verify(first: Server, second: Server) -> Proof:
    """Test whether ``second`` reuses KV of ``first``. Raises UserError if a server does not answer."""
    verification = Verification(first, second)
    try:
        verdict, why = "SHARING", verification.run()
    except Fault as fault:
        verdict, why = fault.args
    return Proof(verdict, why, verification.facts)


class Verification:
    """One run of the test. ``facts`` has all measurements, whatever the verdict."""

    def __init__(self, first: Server, second: Server) -> None:
        self.facts: dict[str, str] = {}
        self._first, self._second = first, second
        self._length = min(TOKENS, first.room - ANSWER, second.room - ANSWER)
        self._tolerance = EXACT

    def run(self) -> str:
        """Run the test and return the reason for the verdict SHARING. Wrong answers are reported before missing hits.

        Raises:
            Fault: any other verdict.
        """
        for server in (self._first, self._second):
            if not server.ask(_prompt(policy.private_policy(), self._length)).asked:
                raise Fault("DEGRADED", f"{server.url} has no KV connector (--kv-transfer-config)")
        answer = self._new()
        left = [self._old(place, server) for place, server in (("first", self._first), ("second", self._second))]
        self.facts["left by an earlier run"] = (
            f"{left[0]:,} and {left[1]:,} tokens, right for these weights"
            if any(left)
            else "nothing: run it again after the weights have changed"
        )
        if not answer.found:
            raise Fault("NOT SHARING", f"the second finds no KV of the first: {HINT}")
        if not answer.loaded:
            raise Fault(
                "NOT SHARING", f"the second found {answer.found:,} tokens, and none of them arrived: {REJECTED}"
            )
        if transport := self._second.transport():
            self.facts["moved by"] = transport
        return f"the second loaded {answer.loaded:,} of {self._length:,} tokens, and answers as it does without a cache"

    def _new(self) -> Answer:
        """The second server's answer to a new prompt that the first server has just computed."""
        for attempt in range(ATTEMPTS):
            prompt = _prompt(policy.private_policy(), self._length)
            self._first.ask(prompt)
            time.sleep(0.5 * attempt)
            answer = self._second.ask(prompt)
            if answer.loaded:
                break
        of_first, of_second = self._reference(self._first, prompt), self._reference(self._second, prompt)
        apart = answer.difference(of_second)
        self.facts |= {
            "prompt": f"{self._length:,} tokens",
            "read by the second": f"{answer.loaded:,} of {answer.found:,} found, {answer.seconds * 1000:.0f} ms",
            "computed by the second": f"{self._length:,} tokens, {of_second.seconds * 1000:.0f} ms",
            "log-probabilities": f"differ by at most {apart:.1e} (equal up to {self._tolerance:.1e})",
        }
        if of_first.difference(of_second) > self._tolerance:
            raise Fault(
                "DIFFERENT", "without a cache the two answer differently: they have other weights or another dtype"
            )
        if apart > self._tolerance:
            raise Fault("CORRUPT", "the second loads other KV than the first has computed")
        return answer

    def _old(self, place: str, server: Server) -> int:
        """Tokens of an earlier run that a server finds, of the prompt that is the same in all runs."""
        prompt = _prompt(f"kvshare verify, {place}", self._length)
        reference, answer = self._reference(server, prompt), server.ask(prompt)
        left, apart = answer.loaded + answer.local, answer.difference(reference)
        if left and apart > self._tolerance:
            raise Fault(
                "STALE",
                f"{server.url} has {left:,} tokens of an earlier run, and with them it does not answer as its weights "
                f"do: log-probabilities differ by {apart:.1e}",
            )
        return left

    def _reference(self, server: Server, prompt: list[int]) -> Answer:
        """The answer without a cache. Asking again gives a local hit, whose difference shows the rounding errors."""
        salt = policy.private_policy()
        reference, again = server.ask(prompt, salt), server.ask(prompt, salt)
        if reference.found or reference.local:
            found = reference.found + reference.local
            raise Fault("STALE", f"{server.url} found {found:,} tokens under a new policy: its keys ignore the policy")
        self._tolerance = max(self._tolerance, NOISE * reference.difference(again))
        return reference


HINT = (
    "do both use the same LMCache service, and have PYTHONHASHSEED=0 in their environment? "
    "Search their logs for 'degraded mode' and 'unhealthy'"
)
REJECTED = "it computed them itself, and its log says why (search for 'checksum' and 'until it is healthy')"


def _prompt(seed: str, length: int) -> list[int]:
    return random.Random(seed).choices(vllm_http.IDS, k=length)
