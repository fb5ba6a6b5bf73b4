"""Proof, on two live vLLM servers, that the second reads the KV that the first has computed.

Counters alone prove little: vLLM's count what a lookup promised, and KV of other weights as well. So each answer is
compared with one that is computed without any cache: the same prompt under a policy and a salt of its own. The
servers must be idle while they are asked: the counts are differences of their metrics.

One prompt is new in each run. Another, for each server, is the same in every run: what an earlier run has left of it
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

TOKENS = 1100  # of a prompt: four chunks of 256
ANSWER = 8  # tokens
ATTEMPTS = 5  # a store may take a moment to arrive
EXACT = 1e-4  # log-probabilities that differ by less are equal
NOISE = 4  # times what the engine's own prefix cache changes, likewise

COUNTERS = {  # tokens of prompts
    "prompt": "vllm:prompt_tokens_total",
    "local": "vllm:prefix_cache_hits_total",
    "asked": "vllm:external_prefix_cache_queries_total",
    "found": "vllm:external_prefix_cache_hits_total",
    "loaded": "kvshare:loaded_tokens_total",
}


class Answer(NamedTuple):
    tokens: list[str]
    logprobs: list[float]
    seconds: float
    local: int = 0  # prompt tokens from vLLM's own prefix cache
    asked: int = 0  # that the connector was asked for; 0 if there is none
    found: int = 0  # that it promised
    loaded: int = 0  # that arrived; what was promised, where kvshare's plugin does not count it

    def difference(self, other: Answer) -> float:
        """Largest difference of log-probabilities, as long as the tokens before are the same; NaN is infinite."""
        worst = 0.0
        for mine, yours, a, b in zip(self.tokens, other.tokens, self.logprobs, other.logprobs, strict=True):
            apart = abs(a - b)
            worst = max(worst, math.inf if math.isnan(apart) else apart)
            if mine != yours:
                break
        return worst


class Server:
    """A vLLM server.

    Args:
        stamp: policy of its requests, as a rollout server gives them one; None: what the server itself does.

    Raises:
        UserError: it is not there, or not vLLM; so do the methods.
    """

    def __init__(self, url: str, stamp: str | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._stamp = stamp
        try:
            model = json.loads(vllm_http.get(f"{self.url}/v1/models"))["data"][0]
            self.model, self.room = model["id"], model["max_model_len"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(f"{self.url} is no vLLM server ({error}): give the address of one") from None

    def ask(self, prompt: list[int], salt: str | None = None) -> Answer:
        """Args: prompt as token ids; salt: a policy of its own, which keeps it, and what it stores, to itself."""
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

    def _counts(self) -> dict[str, int]:
        try:
            found = vllm_http.metrics(vllm_http.get(f"{self.url}/metrics"))
        except OSError as error:
            raise UserError(f"{self.url}/metrics does not answer ({error}): is it a vLLM server?") from None
        counts = {name: round(found.get(metric, 0)) for name, metric in COUNTERS.items()}
        if COUNTERS["loaded"] not in found:  # another connector, or LMCache without kvshare
            counts["loaded"] = counts["found"]
        return counts

    def _counted(self, before: dict[str, int], tokens: int) -> dict[str, int]:
        """How much the counts grew; they come a little after the answer."""
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
    """Args: verdict, why."""


def verify(first: Server, second: Server) -> Proof:
    """What a user of both can count on; raises UserError if one cannot be asked."""
    verification = Verification(first, second)
    try:
        verdict, why = "SHARING", verification.run()
    except Fault as fault:
        verdict, why = fault.args
    return Proof(verdict, why, verification.facts)


class Verification:
    """What is found on the way is in ``facts``, whatever the verdict."""

    def __init__(self, first: Server, second: Server) -> None:
        self.facts: dict[str, str] = {}
        self._first, self._second = first, second
        self._length = min(TOKENS, first.room - ANSWER, second.room - ANSWER)
        self._tolerance = EXACT

    def run(self) -> str:
        """Why it is sharing. What makes answers wrong comes first.

        Raises:
            Fault: it is not, or not only that.
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
            raise Fault("NOT SHARING", f"the second finds nothing of what the first has computed: {HINT}")
        if not answer.loaded:
            raise Fault(
                "NOT SHARING", f"the second found {answer.found:,} tokens, and none of them arrived: {REJECTED}"
            )
        return f"the second read {answer.loaded:,} of {self._length:,} tokens, and answers as without"

    def _new(self) -> Answer:
        """The second's, to a prompt nobody knew and the first has computed."""
        for attempt in range(ATTEMPTS):
            prompt = _prompt(policy.private_policy(), self._length)
            self._first.ask(prompt)
            time.sleep(0.5 * attempt)
            answer = self._second.ask(prompt)
            if answer.loaded:
                break
        mine, its = self._reference(self._first, prompt), self._reference(self._second, prompt)
        apart = answer.difference(its)
        self.facts |= {
            "prompt": f"{self._length:,} tokens",
            "read by the second": f"{answer.loaded:,} of {answer.found:,} found, {answer.seconds * 1000:.0f} ms",
            "computed by the second": f"{self._length:,} tokens, {its.seconds * 1000:.0f} ms",
            "log-probabilities": f"differ by at most {apart:.1e} (equal up to {self._tolerance:.1e})",
        }
        if mine.difference(its) > self._tolerance:
            raise Fault("DIFFERENT", "without a cache the two answer differently: other weights, or another dtype")
        if apart > self._tolerance:
            raise Fault("CORRUPT", "the second reads something else than the first has computed")
        return answer

    def _old(self, place: str, server: Server) -> int:
        """Tokens that an earlier run has left in a server, or for it, of a prompt that is the same in every run."""
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
        """Computed without a cache. Asked again, the engine's own prefix cache shows what rounding is."""
        salt = policy.private_policy()
        reference, again = server.ask(prompt, salt), server.ask(prompt, salt)
        if reference.found or reference.local:
            found = reference.found + reference.local
            raise Fault("STALE", f"{server.url} gave {found:,} tokens to a policy that nobody has: its keys have none")
        self._tolerance = max(self._tolerance, NOISE * reference.difference(again))
        return reference


HINT = (
    "is it the same LMCache service for both, PYTHONHASHSEED=0 in the environment of both? "
    "Search their logs for 'degraded mode' and 'unhealthy'"
)
REJECTED = "it computed them itself, and its log says why (search for 'checksum' and 'until it is healthy')"


def _prompt(seed: str, length: int) -> list[int]:
    return random.Random(seed).choices(vllm_http.IDS, k=length)
