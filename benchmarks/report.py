"""How long a report takes, and how much memory: `python benchmarks/report.py --requests 1000000 --steps 1000`.

Writes the record of a GRPO run that did not happen, and runs `kvshare report` on it: 8 samples of each prompt, prompts
of 4 to 12 chunks. The first sample's replica stores them, and each further replica loads them once.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from kvshare.record.event_log import FILES, LogFile
from kvshare.record.events import Event, Load, Request, Step, Store
from kvshare.record.rows import DIFFERENCE, PEARSON, STEP

CHUNK, SAMPLES = 256, 8
OTHER_METRICS = 100  # that verl logs each step, and a report does not use


def write(folder: Path, requests: int, steps: int, replicas: int) -> None:
    run = {"backend": "remote", "device": "cpu", "replicas": replicas}
    (folder / "run.json").write_text(json.dumps(run))
    logs = {writer: LogFile(folder, writer) for writer in [*range(replicas), "trainer"]}
    with (folder / "metrics.jsonl").open("w") as metrics:
        for step in range(1, steps + 1):
            prompts = requests // SAMPLES * step // steps - requests // SAMPLES * (step - 1) // steps
            lines: dict[int | str, bytes] = {}
            for event in of_step(step, prompts, replicas):
                lines[event.replica] = lines.get(event.replica, b"") + msgspec.json.encode(event) + b"\n"
            for writer, data in lines.items():
                logs[writer].append(data)
            logged = {
                STEP: step,
                "critic/score/mean": step / steps,
                PEARSON: 1.0,
                DIFFERENCE: 1e-9,
                "timing_s/step": 9.0,
            }
            logged |= {f"timing_per_token_ms/metric_{number}": random.random() for number in range(OTHER_METRICS)}
            metrics.write(json.dumps({"step": step, "data": logged}) + "\n")


def of_step(step: int, prompts: int, replicas: int) -> Iterator[Event]:
    now, policy = 1e9 + step, f"0123456789abcdef-{step}"
    for _ in range(prompts):
        now += 0.5 / prompts
        keys = [random.getrandbits(64) for _ in range(random.randint(4, 12))]
        prompt, holders = len(keys) * CHUNK + 100, set[int]()
        for _ in range(SAMPLES):
            replica = random.randrange(replicas)
            if not holders:
                yield Store(time=now, replica=replica, policy=policy, keys=keys)
            elif replica not in holders:
                tokens, name = [CHUNK] * len(keys), f"{random.getrandbits(128):x}"
                yield Load(
                    time=now, replica=replica, policy=policy, keys=keys, tokens=tokens, expected=sum(tokens),
                    seconds=0.01, request=name,
                )  # fmt: skip
            cached = len(keys) * CHUNK if holders else 0
            holders.add(replica)
            yield Request(time=now, replica=replica, policy=policy, prompt=prompt, cached=cached, prefill=9e3)
    yield Step(time=now + 0.1, replica="trainer", step=step)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--requests", type=int, default=1_000_000)
    arguments.add_argument("--steps", type=int, default=1_000)
    arguments.add_argument("--replicas", type=int, default=8)
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, **vars(options))
        record = sum(path.stat().st_size for path in folder.glob(FILES))
        metrics = (folder / "metrics.jsonl").stat().st_size
        began = time.monotonic()
        subprocess.run([sys.executable, "-m", "kvshare", "report", name], check=True)
        seconds = time.monotonic() - began
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        sizes = {path.name: f"{path.stat().st_size / 2**10:,.0f} KiB" for path in folder.glob("report.*")}
    print(f"{options}: record {record / 2**20:,.0f} MiB, metrics {metrics / 2**20:,.0f} MiB")
    cpu, peak = used.ru_utime + used.ru_stime, used.ru_maxrss / 2**10
    print(f"report: {seconds:.1f} s ({cpu:.1f} s of a core), at most {peak:,.0f} MiB of memory; {sizes}")


if __name__ == "__main__":
    main()
