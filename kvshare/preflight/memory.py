"""Memory the run needs."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvshare import services
from kvshare.preflight.job import Job


def memory(job: Job) -> Iterator[str]:
    """How much KV a step may store, and whether the server keeps as much."""
    data = job.config.data
    try:
        a_token = kv_bytes(json.loads((Path(job.config.actor_rollout_ref.model.path) / "config.json").read_text()))
    except (OSError, ValueError, KeyError, TypeError):  # on the hub, or no model of that kind
        return
    a_token *= 2 if job.rollout.dtype == "float32" else 1
    whole = data.max_prompt_length // job.lmcache.chunk_size * job.lmcache.chunk_size
    stored = job.stored_bytes = data.train_batch_size * whole * a_token
    status = os.environ.get(services.SERVER_STATUS)
    if job.backend == "remote" and status and Path(status).is_file():
        limit = json.loads(Path(status).read_text())["limit"]
        if limit < stored:
            keeps, needs = f"{limit / 2**30:.2f} GiB", f"{stored / 2**30:.2f} GiB"
            yield (
                f"kvshare server keeps {keeps}, a step stores up to {needs}: prefixes may be evicted before others "
                f"read them: start it with --memory {math.ceil(stored / 2**30 * 1.2)}"
            )


def kv_bytes(model: dict[str, Any]) -> int:
    """Bytes of KV a token in 16 bits, from a Hugging Face ``config.json``."""
    heads = model["num_attention_heads"]
    head_size = model.get("head_dim") or model["hidden_size"] // heads
    return 2 * model["num_hidden_layers"] * model.get("num_key_value_heads", heads) * head_size * 2
