"""Writes ``run.json``, the facts about a run that its report needs."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from kvshare.core import freshness, server_status, versions
from kvshare.core.job import Job
from kvshare.core.versions import installed
from kvshare.record import event_log, ucx

OF_A_RUN = ("run.json", "metrics.jsonl", event_log.FILES, ucx.FILES, "report.*")


def record(job: Job, folder: Path) -> None:
    """Write ``run.json`` to ``folder``."""
    move_earlier(folder)
    (folder / "run.json").write_text(json.dumps(describe(job), indent=2) + "\n")


def move_earlier(folder: Path) -> None:
    """Make ``folder``, or move the files of an earlier run there to ``earlier-<time>``."""
    folder.mkdir(parents=True, exist_ok=True)
    if old := [path for pattern in OF_A_RUN for path in folder.glob(pattern)]:
        aside = folder / f"earlier-{time.strftime('%Y%m%d-%H%M%S')}"
        aside.mkdir(exist_ok=True)
        for path in old:
            path.rename(aside / path.name)


def describe(job: Job) -> dict[str, Any]:
    return {
        "backend": job.backend if job.shares else "no connector",
        "device": job.device,
        "replicas": job.replicas,
        "standby": job.standby,
        "trainer": job.facts.get("trainer"),
        "model": str(job.config.actor_rollout_ref.model.path),
        "chunk_size": job.lmcache.chunk_size,
        "forecast": job.forecast.record() if job.forecast else None,
        "server_status": os.environ.get(server_status.VARIABLE),
        "freshness": freshness.of(os.environ).mode,
        "adv_estimator": str(job.config.algorithm.adv_estimator),
        "versions": {name: installed(name) for name in versions.MAIN},
    }
