"""Add ``kvshare:loaded_tokens_total`` to vLLM's metrics: the prompt tokens that LMCacheConnectorV1 has loaded.

And, with P2P, ``kvshare:p2p_transport_info``, whose label ``transport`` says what UCX moves them through.

vLLM's own ``external_prefix_cache_hits`` counts the tokens that a lookup found, even if the load then failed and vLLM
computed them. The new count uses vLLM's path for connector statistics: worker, scheduler, API server.
"""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from kvshare.hooks.lmcache import events
from kvshare.hooks.patch import optional, replace
from kvshare.record import ucx


class Loads(KVConnectorStats):
    """``data``: {"loaded": tokens, "transport": of P2P, in words}."""

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        loaded = self.data.get("loaded", 0) + other.data.get("loaded", 0)
        return Loads({"loaded": loaded, "transport": other.data.get("transport") or self.data.get("transport")})

    def reduce(self) -> dict[str, int | float]:
        return {"loaded tokens": self.data["loaded"]}

    def reset(self) -> None:
        self.data = {}

    def is_empty(self) -> bool:
        return not self.data.get("loaded")


class LoadMetrics(KVConnectorPromMetrics):
    def __init__(self, config: Any, metric_types: Any, labelnames: list[str], labelvalues: dict[int, list]) -> None:
        super().__init__(config, metric_types, labelnames, labelvalues)
        what = "Prompt tokens that LMCache has loaded. Failed loads do not count."
        counter = self._counter_cls(name="kvshare:loaded_tokens", documentation=what, labelnames=labelnames)
        self._transport: Any = self._gauge_cls(
            name="kvshare:p2p_transport_info",
            documentation="What UCX moves KV through.",
            labelnames=[*labelnames, "transport"],
        )
        self._labels = labelvalues
        self._loaded: Any = {engine: counter.labels(*values) for engine, values in labelvalues.items()}

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        self._loaded[engine_idx].inc(max(0, transfer_stats_data["loaded"]))  # see take_loaded
        if transport := transfer_stats_data.get("transport"):
            self._transport.labels(*self._labels[engine_idx], transport).set(1)


@optional("vLLM's metrics lack kvshare:loaded_tokens_total")
def patch_connector(module: Any) -> None:
    """vLLM's ``LMCacheConnectorV1`` inherits these methods from its base class, where they return None."""
    known = "0.23.0, 0.24.0, 0.31.0"
    for name, function, digest in (
        ("get_kv_connector_stats", _get_stats, "d23c80328555"),
        ("build_kv_connector_stats", classmethod(lambda cls, data=None: Loads(data or {})), "2eb4ec762ed4"),
        ("build_prom_metrics", classmethod(lambda cls, *args: LoadMetrics(*args)), "e2cba1b2de67"),
    ):
        replace(module, f"LMCacheConnectorV1.{name}", function, {digest: known})


def _get_stats(connector: Any) -> Loads | None:
    loaded = events.take_loaded()
    return Loads({"loaded": loaded, "transport": ucx.own()}) if loaded else None
