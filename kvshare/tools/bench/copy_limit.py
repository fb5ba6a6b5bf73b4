"""Measures how fast this machine copies memory to its device, an upper limit for loading KV.

To run only this: ``python -m kvshare.tools.bench.copy_limit``.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SIZE = 256 * 2**20  # bytes
REPEAT = 11


def measure() -> tuple[str, float]:
    """What was copied, and bytes per second. Runs in its own process, which leaves no context on the device."""
    out = subprocess.run([sys.executable, "-m", __name__], check=True, capture_output=True, text=True).stdout
    what, rate = json.loads(out.splitlines()[-1])
    return what, rate


def machine() -> str:
    """Number of cores and the processor, in words."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    return f"{os.cpu_count()} cores of {cpu}"


def _main() -> None:
    import torch

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    source = torch.ones(SIZE, dtype=torch.uint8, pin_memory=device is not None)
    target = torch.zeros(SIZE, dtype=torch.uint8, device=device or "cpu")
    seconds = []
    for _ in range(REPEAT):
        began = time.perf_counter()
        target.copy_(source, non_blocking=True)
        if device:
            torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - began)
    what = f"pinned host to {_name(device)}" if device else "memory to memory"
    print(json.dumps((what, SIZE / statistics.median(seconds))))


def _name(device: Any) -> str:
    import torch

    return str(getattr(torch, device.type).get_device_name())


if __name__ == "__main__":
    _main()
