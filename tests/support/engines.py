"""A real vLLM server with LMCache for tests, and the events its worker sends."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import zmq
from waiting import until

from kvshare.core import policy, ports
from kvshare.record import events, worker_events
from kvshare.services.processes import Processes
from kvshare.tools import vllm_http

SUPPORT = Path(__file__).parent


@dataclass
class Answer:
    tokens: list[str]
    logprobs: list[float]
    cached: int  # prompt tokens vLLM did not compute: its own prefix cache's and the connector's


class Engine:
    """``python -m vllm.entrypoints.openai.api_server`` on a free port; answers are exact (fp32, greedy).

    Args:
        rank: which replica it plays in the event log lines of ``events``.
        environment: on top of the tests' own.
        host: address it listens on.
        inside: command to run it with, e.g. in another network namespace.
        connector: vLLM's name for it; None: without one.
        options: more of vLLM's.
    """

    def __init__(
        self,
        processes: Processes,
        rank: int,
        model: Path,
        log: Path,
        environment: dict[str, str],
        host: str = "127.0.0.1",
        inside: tuple[str, ...] = (),
        connector: str | None = "LMCacheConnectorV1",
        options: tuple[str, ...] = (),
    ) -> None:
        self.events: list[dict[str, Any]] = []
        self.followers: list[Callable[[dict[str, Any]], None]] = []  # called with each event
        self._marks: set[str] = set()
        self._rank = rank
        address = f"ipc://{log}.events" if inside else f"ipc://@kvshare-test-{uuid4().hex}"  # @ is of one namespace
        threading.Thread(target=self._listen, args=(address,), daemon=True).start()
        self.log = log
        self.url = f"http://{host}:{(port := ports.free_port())}"
        internal = ports.free_port()
        self._worker = f"http://127.0.0.1:{internal + 1}"  # LMCache's own API of worker 0
        command = [*inside, sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        command += ["--served-model-name", "tiny", "--host", host, "--port", str(port), "--dtype", "float32"]
        command += ["--max-model-len", "4096", "--enforce-eager", "--enable-prompt-tokens-details", *options]
        command += ["--enable-server-load-tracking"]
        command += ["--worker-extension-cls", "worker.Probe"]
        if connector:
            transfer = {"kv_connector": connector, "kv_role": "kv_both", "kv_load_failure_policy": "recompute"}
            command += ["--kv-transfer-config", json.dumps(transfer)]
        settings = {
            "PYTHONHASHSEED": "0",
            "VLLM_SERVER_DEV_MODE": "1",  # serves /reset_prefix_cache
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
            "LMCACHE_MAX_LOCAL_CPU_SIZE": "0.2",
            "LMCACHE_BLOCKING_TIMEOUT_SECS": os.environ.get("LMCACHE_BLOCKING_TIMEOUT_SECS", "3"),
            "LMCACHE_LOG_LEVEL": "INFO",
            "LMCACHE_INTERNAL_API_SERVER_ENABLED": "true",
            "LMCACHE_INTERNAL_API_SERVER_PORT_START": str(internal),
            worker_events.ADDRESS: address,
        }
        paths = str(SUPPORT), environment.get("PYTHONPATH"), os.environ.get("PYTHONPATH")
        path = os.pathsep.join(filter(None, paths))
        self._processes = processes
        self.process = processes.start(command, log, {**settings, **environment, "PYTHONPATH": path})

    def wait(self) -> Engine:
        """Until it is healthy; fails at once, with the log's end, when it has died."""
        until(self._healthy, self.process, self.log)
        return self

    def _healthy(self) -> bool:
        try:
            vllm_http.get(f"{self.url}/health")
        except OSError:
            return False
        return True

    def ready(self, ranks: int = 1) -> bool:
        """Whether LMCache is, in its workers."""
        return {event["rank"] for event in self.events if event["op"] == "ready"} == set(range(ranks))

    def ask(
        self,
        prompt: list[int],
        stamp: str | None = None,
        tokens: int = 8,
        configs: dict[str, str] | None = None,
        request: str | None = None,
        **more: Any,
    ) -> Answer:
        """Returns when all events of the request are in ``events``, and its stores have ended.

        Args:
            prompt: token ids.
            stamp: policy id, given to LMCache and vLLM as the rollout server does it.
            configs: more request configs for LMCache.
            request: its id in the events; None: a new one.
            more: of the request's body.
        """
        request = request or uuid4().hex
        body = {"model": "tiny", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "logprobs": 1}
        body |= {"ignore_eos": True, "return_tokens_as_token_ids": True}
        params = {worker_events.REQUEST: request, **(configs or {})}
        if stamp:
            params[policy.TAG] = body["cache_salt"] = stamp
        answer = self._post("/v1/completions", {**body, **more, "kv_transfer_params": params})
        self.settle(lambda event: event.get("request") == request)
        logprobs = answer["choices"][0]["logprobs"]
        details = answer["usage"].get("prompt_tokens_details") or {}
        return Answer(logprobs["tokens"], logprobs["token_logprobs"], details.get("cached_tokens") or 0)

    def ask_together(self, count: int, *args: Any) -> list[Answer]:
        """Send the same request ``count`` times; none is scheduled before all have come."""
        self._post("/pause?mode=keep&clear_cache=false", {})
        with ThreadPoolExecutor(count) as pool:
            asked = [pool.submit(self.ask, *args) for _ in range(count)]
            try:
                until(lambda: json.loads(vllm_http.get(f"{self.url}/load"))["server_load"] == count, self.process)
            finally:
                self._post("/resume", {})
        return [one.result() for one in asked]

    def hits(self, since: int) -> int:
        """Tokens loaded since ``since = len(engine.events)``."""
        return sum(sum(e["tokens"]) for e in self.events[since:] if e["op"] == "load")

    def settle(self, mine: Callable[[dict], bool] = lambda event: True) -> None:
        """Wait for all events that the worker has sent, and for the end of all stores, or of some."""
        name = uuid4().hex
        self._rpc("send_mark", name=name)
        until(lambda: name in self._marks, self.process)

        def ended() -> bool:
            operations = [event["op"] for event in list(self.events) if mine(event)]
            return operations.count("store") == operations.count("stored")

        until(ended, self.process)

    def reset(self, connector: bool = True) -> bool:
        return self._post(f"/reset_prefix_cache?reset_external={str(connector).lower()}", {})["success"]

    def sleep(self) -> None:
        """As verl does it, between two rollouts."""
        self._post("/sleep?level=1", {})
        self._rpc("destroy_kv")

    def wake(self) -> None:
        self._post("/wake_up", {})

    def abort_all(self) -> None:
        """As verl's rollout server does it, and its resume."""
        self._post("/pause?mode=abort&clear_cache=true", {})
        self._post("/resume", {})

    def load(self, weights: Path) -> None:
        """Replace the weights of the live engine."""
        self._rpc("reload_weights", weights_path=str(weights))

    def metric(self, name: str) -> float:
        """Of vLLM."""
        return vllm_http.metrics(vllm_http.get(f"{self.url}/metrics"))[name]

    def local_tier(self) -> float:
        """Bytes in LMCache's local CPU tier."""
        return vllm_http.metrics(vllm_http.get(f"{self._worker}/metrics")).get("lmcache:local_cache_usage", 0)

    def kept(self) -> dict[str, int]:
        """What its connector keeps for requests (worker.py)."""
        return self._rpc("kept")["results"][0]

    def kill(self) -> None:
        self._processes.kill(self.process)

    def _listen(self, address: str) -> None:
        socket = zmq.Context.instance().socket(zmq.PULL)
        socket.bind(address)
        while True:
            event = json.loads(socket.recv())
            if event["op"] == "mark":
                self._marks.add(event["name"])
                continue
            for follow in self.followers:
                follow(event)
            self.events.append({**event, "time": time.time(), "replica": self._rank})

    def _rpc(self, method: str, **kwargs: str) -> Any:
        """Call a method of the worker, after all that it was asked before."""
        return self._post("/collective_rpc", {"method": method, "kwargs": kwargs})

    def _post(self, path: str, body: dict) -> Any:
        return vllm_http.post(self.url + path, body)


def recorded(sent: list[dict[str, Any]]) -> list[events.Event]:
    """What the record holds of events that workers sent: all but ``stored``."""
    return events.convert(event for event in sent if event["op"] != "stored")
