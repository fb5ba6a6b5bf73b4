"""Runs everything on one machine: data, model, service, GRPO with two replicas, report."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

from rich.console import Console

from kvshare.core.errors import UserError
from kvshare.launch.preflight.record import move_earlier
from kvshare.record import report, token_sources
from kvshare.services.processes import Processes
from kvshare.tools import gsm8k, tiny_model

ROOT = Path(__file__).resolve().parents[2]
SHOTS = 17  # worked examples before each question: prompts of 1,100 tokens
SHOTS_WITH_TOOLS = 20  # prompts of 2,000 tokens
QUIET = {
    "LMCACHE_TRACK_USAGE": "false",
    "VLLM_NO_USAGE_STATS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
}

WITH_TOOLS = {
    "RECIPE": "gsm8k_tools_cpu",
    "LMCACHE_CHUNK_SIZE": "128",  # a turn is short
}

STAGES = {  # text in the training log -> what to print
    "kvshare launch:": "the service of the backend is up",
    "Started a local Ray instance": "Ray is up, verl's workers are starting",
    "(KVShareServer": "two vLLM replicas are starting",
    "ready to fit": "replicas are up, first step (the slow one)",
}


class Demo:
    """A run of one of the CPU launchers.

    Args:
        folder: for data, model, logs and the report.
        overrides: Hydra overrides for the training.
        backend: key of BACKENDS.
        tools: whether to train conversations with tools (config/gsm8k_tools_cpu.yaml).
    """

    def __init__(self, folder: Path, overrides: list[str], backend: str = "remote", tools: bool = False) -> None:
        self.folder = folder.resolve()
        self._tools = tools
        self._launcher = ROOT / f"run_qwen_{backend}_backend_cpu.sh"
        self.overrides = overrides
        self.log = self.folder / "training.log"
        self._out = Console(highlight=False, soft_wrap=True)
        self._began = time.monotonic()

    def say(self, text: str) -> None:
        seconds = int(time.monotonic() - self._began)
        self._out.print(f"[dim]{seconds // 60}:{seconds % 60:02}[/]  {text}")

    def run(self) -> dict[str, Any]:
        """Run the demo and return the report.

        Raises:
            UserError: kvshare does not run from a checkout of the project.
            DemoFailed: something did not start, or training failed.
        """
        if not self._launcher.exists():
            raise UserError("the demo runs from a clone of the project: git clone it, then make demo")
        move_earlier(self.folder)
        self._prepare()
        with Processes(("KVSHARE_DEMO", uuid4().hex)) as processes:
            environment = {
                **QUIET,
                "LMCACHE_LOG_LEVEL": "INFO",
                "START_SERVICES": os.environ.get("START_SERVICES", "1"),
                "KVSHARE_RUN_DIR": str(self.folder),
                "DATA_DIR": str(self.folder / "data"),
                "MODEL_PATH": str(self.folder / "model"),
                **(WITH_TOOLS if self._tools else {}),
                "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",
            }
            self.say(f"training starts; log: {self.log}")
            training = processes.start(["bash", str(self._launcher), *self.overrides], self.log, environment)
            for text in self._follow(training):
                self.say(text)
            if training.returncode:
                raise DemoFailed(f"training failed, exit code {training.returncode}", self.log)
        self.say("done, everything it started has ended")
        return report.write(self.folder)

    def _prepare(self) -> None:
        shots = SHOTS_WITH_TOOLS if self._tools else SHOTS
        data = gsm8k.generate(train=256, test=16, seed=0, tools=self._tools)
        gsm8k.write(data, self.folder / "data", shots, limit=32, tools=self._tools)
        self.say(f"data: generated word problems, {shots} worked examples before each question")
        tiny_model.make(self.folder / "model")
        self.say("model: Qwen2 with a million parameters, which mostly guesses the answers")

    def _follow(self, training: subprocess.Popen) -> Iterator[str]:
        """Yield a line for each stage and step as it is reached, until training ends."""
        stages, steps = dict(STAGES), 0
        while True:
            ended = training.poll() is not None
            text = self.log.read_text(errors="replace")
            for mark in [m for m in stages if m in text]:
                yield stages.pop(mark)
            lines = _metrics(self.folder)
            for data in lines[steps:]:
                yield _step(data)
            steps = len(lines)
            if ended:
                return
            time.sleep(1)


class DemoFailed(Exception):
    def __init__(self, what: str, log: Path) -> None:
        super().__init__(what)
        lines = log.read_text(errors="replace").splitlines()
        ours = [line for line in lines if line.startswith(("kvshare", "error "))]
        self.tail = ours or lines[-15:]
        self.log = log


def failures(result: dict[str, Any]) -> list[str]:
    """One line for each promise of the demo that a report does not keep."""
    tokens, pearson = result["tokens"], result["mismatch"]["pearson_min"]
    out = [f"replica {r['rank']} received no shared KV" for r in result["replica"] if not r["shared_hit"]]
    if (result["forecast"] or {}).get("evicted_between_turns"):  # with tools
        out += [] if tokens["restored_hit"] else ["no KV was evicted between turns and restored"]
        out += [] if result["conversations"]["moved"]["with_kv"] else ["no conversation moved with its KV"]
    if stale := token_sources.stale(tokens):
        out.append(f"{stale} tokens came from KV of other weights")
    if pearson is None or pearson < 0.999:
        out.append(f"rollout and actor disagree: correlation {pearson}")
    return out


def _metrics(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    data = [json.loads(line)["data"] for line in lines if line.endswith("}")]
    return [d for d in data if "training/global_step" in d]  # skip a validation before training


def _step(data: dict[str, Any]) -> str:
    return (
        f"step {data['training/global_step']}: {data['timing_s/step']:.0f} s, "
        f"reward {data['critic/score/mean']:.3f}, "
        f"{data.get('kvshare/shared_hit_tokens', 0):,} tokens shared, "
        f"rollout/actor correlation {data.get('training/rollout_actor_probs_pearson_corr', math.nan):.6f}"
    )
