"""Proof, on two live vLLM servers, that the second reads the KV that the first has computed.

Hit counters alone prove little: they also count loads that failed, and KV of other weights. So each answer is
compared with one that is computed without any cache: the same prompt under a policy and a salt of its own. The
servers must be idle while they are asked: the counts are differences of vLLM's metrics.

Some prompts are new in each run. One for each server is the same in every run: what an earlier run has left of it must
not be served after the weights have changed.
"""

from __future__ import annotations

import json
import random
import time
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from kvshare import policy
from kvshare.errors import UserError

TOKENS = 1100  # of a prompt: four chunks of 256
ANSWER = 8  # tokens
ATTEMPTS = 5  # a store may take a moment to arrive
EXACT = 1e-4  # log-probabilities that differ by less are equal
NOISE = 4  # times what the engine's own prefix cache changes, likewise


class Answer(NamedTuple):
    tokens: list[str]
    logprobs: list[float]
    seconds: float
    hits: int  # prompt tokens from the connector
    local: int  # from vLLM's own prefix cache
    asked: int  # tokens the connector was asked for; 0 if there is none

    def difference(self, other: Answer) -> float:
        """Largest difference of log-probabilities, as long as the tokens before are the same."""
        worst = 0.0
        for mine, yours, a, b in zip(self.tokens, other.tokens, self.logprobs, other.logprobs, strict=True):
            worst = max(worst, abs(a - b))
            if mine != yours:
                break
        return worst


class Endpoint:
    """An OpenAI-compatible vLLM server.

    Args:
        stamp: policy of its requests, as a rollout server gives them one; None: what the server itself does.
    """

    def __init__(self, url: str, stamp: str | None = None) -> None:
        self._stamp = stamp
        self.url = url.rstrip("/").removesuffix("/v1")
        (self.model, self.room), *_ = [(m["id"], m.get("max_model_len") or TOKENS) for m in self._models()]

    def _models(self) -> list[dict[str, Any]]:
        models = json.loads(self._open("/v1/models")).get("data")
        if not models:
            raise UserError(f"{self.url} serves no model: give the address of a vLLM server")
        return models

    def ask(self, prompt: list[int], salt: str | None = None) -> Answer:
        """Args: prompt as token ids; salt: a policy of its own, which keeps it, and what it stores, to itself."""
        salt = salt or self._stamp
        body: dict[str, Any] = {"model": self.model, "prompt": prompt, "max_tokens": ANSWER, "temperature": 0}
        body |= {"logprobs": 1, "ignore_eos": True, "return_tokens_as_token_ids": True}
        if salt:
            body |= {"cache_salt": salt, "kv_transfer_params": {policy.TAG: salt}}
        before, began = self._counts(), time.monotonic()
        logprobs = json.loads(self._open("/v1/completions", body))["choices"][0]["logprobs"]
        seconds = time.monotonic() - began
        grew = self._counted(before, len(prompt))
        return Answer(logprobs["tokens"], logprobs["token_logprobs"], seconds, *grew)

    def _counts(self) -> list[int]:
        names = ("external_prefix_cache_hits", "prefix_cache_hits", "external_prefix_cache_queries", "prompt_tokens")
        text = self._open("/metrics")
        return [round(_metric(text, f"vllm:{name}_total")) for name in names]

    def _counted(self, before: list[int], tokens: int) -> list[int]:
        """How much the counts grew; they come a little after the answer."""
        deadline = time.monotonic() + 10
        while True:
            *grew, prompt = [now - then for now, then in zip(self._counts(), before, strict=True)]
            if prompt >= tokens:
                return grew
            if time.monotonic() > deadline:
                raise UserError(f"{self.url} counts no prompt tokens: start it without --disable-log-stats")
            time.sleep(0.1)

    def _open(self, path: str, body: dict[str, Any] | None = None) -> str:
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return response.read().decode()
        except urllib.error.HTTPError as error:
            raise UserError(f"{self.url}{path} answers {error.code} {error.reason}: is it a vLLM server?") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise UserError(f"{self.url} does not answer ({reason}): give the address of a vLLM server") from None


def _metric(text: str, name: str) -> float:
    """Sum of a Prometheus counter's samples."""
    lines = [line for line in text.splitlines() if line.startswith((name + " ", name + "{"))]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


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


EXIT_CODES = {"SHARING": 0, "NOT SHARING": 1, "DEGRADED": 3, "STALE": 4, "CORRUPT": 5, "DIFFERENT": 6}


def verify(first: Endpoint, second: Endpoint) -> Proof:
    """What a user of both can count on; raises UserError if one cannot be asked."""
    return _Verification(first, second).run()


class _Verification:
    def __init__(self, first: Endpoint, second: Endpoint) -> None:
        self._first, self._second = first, second
        self._length = min(TOKENS, first.room - ANSWER, second.room - ANSWER)
        self._facts: dict[str, str] = {}
        self._tolerance = EXACT

    def run(self) -> Proof:
        for endpoint in (self._first, self._second):
            answer = endpoint.ask(_prompt(policy.private_policy(), self._length))
            if not answer.asked:
                return self._found("DEGRADED", f"{endpoint.url} has no KV connector (--kv-transfer-config)")
        old, new = self._old(), self._new()
        # What is wrong on its way is wrong for the old as well.
        return old if old and new.verdict != "CORRUPT" else new

    def _old(self) -> Proof | None:
        """A prompt for each of them that is the same in every run: what is left of it must be of these weights."""
        left = []
        for place, endpoint in (("first", self._first), ("second", self._second)):
            prompt = _prompt(f"kvshare verify, {place}", self._length)
            reference = self._reference(endpoint, prompt)
            if reference.hits:
                return self._found(
                    "STALE", f"{endpoint.url} gave {reference.hits:,} tokens to a policy that nobody has: keys lack it"
                )
            answer = endpoint.ask(prompt)
            left.append(answer.hits + answer.local)
            if left[-1] and self._differ(answer, reference):
                return self._found(
                    "STALE",
                    f"{endpoint.url} has {left[-1]:,} tokens of an earlier run, and with them it does not answer "
                    f"as its weights do: log-probabilities differ by {answer.difference(reference):.1e}",
                )
        self._facts["left by an earlier run"] = f"{left[0]:,} and {left[1]:,} tokens, right for these weights"
        if not any(left):
            self._facts["left by an earlier run"] = "nothing: run it again after the weights have changed"
        return None

    def _new(self) -> Proof:
        """A prompt nobody knows: the first computes it, the second reads it."""
        for attempt in range(ATTEMPTS):
            prompt = _prompt(policy.private_policy(), self._length)
            self._first.ask(prompt)
            time.sleep(0.5 * attempt)
            answer = self._second.ask(prompt)
            if answer.hits:
                break
        mine, its = self._reference(self._first, prompt), self._reference(self._second, prompt)
        self._facts |= {
            "prompt": f"{len(prompt):,} tokens",
            "read by the second": f"{answer.hits:,} tokens, {answer.seconds * 1000:.0f} ms",
            "computed by the second": f"{len(prompt):,} tokens, {its.seconds * 1000:.0f} ms",
            "log-probabilities": f"differ by at most {answer.difference(its):.1e} (equal up to {self._tolerance:.1e})",
        }
        if self._differ(mine, its):
            return self._found(
                "DIFFERENT", "without a cache the two answer differently: other weights, or another dtype"
            )
        if not answer.hits:
            return self._found("NOT SHARING", f"the second finds nothing of what the first has computed: {HINT}")
        if self._differ(answer, its):
            return self._found("CORRUPT", "the second reads something else than the first has computed")
        return self._found(
            "SHARING", f"the second read {answer.hits:,} of {len(prompt):,} tokens, and answers as without"
        )

    def _reference(self, endpoint: Endpoint, prompt: list[int]) -> Answer:
        """Computed without a cache. Asked again, the engine's own prefix cache shows what rounding is."""
        salt = policy.private_policy()
        reference, again = endpoint.ask(prompt, salt), endpoint.ask(prompt, salt)
        self._tolerance = max(self._tolerance, NOISE * reference.difference(again))
        return reference

    def _differ(self, one: Answer, other: Answer) -> bool:
        return one.difference(other) > self._tolerance

    def _found(self, verdict: str, why: str) -> Proof:
        return Proof(verdict, why, self._facts)


HINT = (
    "is it the same LMCache service for both, PYTHONHASHSEED=0 in the environment of both? "
    "Search their logs for 'degraded mode' and 'unhealthy'"
)


def _prompt(seed: str, length: int) -> list[int]:
    """Token ids that every vocabulary has."""
    rng = random.Random(seed)
    return [rng.randrange(300, 1500) for _ in range(length)]
