"""A vLLM server's HTTP interface, one request at a time, and its Prometheus metrics.

Many at once are bench/endpoint.py's, with aiohttp: with httpx, which does both, 64 streams had their first token 0.6 s
later (2 cores).
"""

from __future__ import annotations

import json
import urllib.request
from collections import defaultdict
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

IDS = range(300, 1500)  # of prompt tokens: every vocabulary has them, and they are no special ones


def get(url: str, seconds: float = 300) -> str:
    """Raises OSError: nobody answers, or (HTTPError) with an error."""
    with urllib.request.urlopen(url, timeout=seconds) as response:
        return response.read().decode()


def post(url: str, body: dict[str, Any], seconds: float = 300) -> Any:
    """What it answers, read as JSON; None if that is nothing. Raises as ``get`` does."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=seconds) as response:
        text = response.read()
    return json.loads(text) if text else None


def metrics(text: str) -> dict[str, float]:
    """What /metrics answers: each metric, added up over its labels, and ``name:source`` where it has that label."""
    sums: dict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            sums[sample.name] += sample.value
            if source := sample.labels.get("source"):
                sums[f"{sample.name}:{source}"] += sample.value
    return dict(sums)


def labels(text: str, name: str) -> list[dict[str, str]]:
    """Labels of each sample of a metric, in what /metrics answers."""
    samples = (s for family in text_string_to_metric_families(text) for s in family.samples)
    return [sample.labels for sample in samples if sample.name == name]
