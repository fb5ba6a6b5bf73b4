"""The metrics that kvshare adds to vLLM's, as /metrics has them."""

from types import SimpleNamespace

import vllm.v1.metrics.loggers  # noqa: F401  vLLM's modules import each other: this one must come first
from prometheus_client import Counter, Gauge, Histogram, generate_latest

from kvshare.hooks.lmcache.loaded_tokens import LoadMetrics, Loads
from kvshare.tools import vllm_http

TYPES = {kind: kind for kind in (Counter, Gauge, Histogram)}


def test_tokens_and_transport():
    config = SimpleNamespace(kv_transfer_config=object())
    metrics = LoadMetrics(config, TYPES, ["model_name", "engine"], {0: ["qwen", "0"]})
    first, second = (
        Loads({"loaded": 5, "transport": "cma/memory on one host"}),
        Loads({"loaded": 2, "transport": ""}),
    )
    metrics.observe(first.aggregate(second).data)
    text = generate_latest().decode()
    assert vllm_http.metrics(text)["kvshare:loaded_tokens_total"] == 7
    (labels,) = vllm_http.labels(text, "kvshare:p2p_transport_info")
    assert labels["transport"] == "cma/memory on one host"
