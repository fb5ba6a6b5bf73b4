"""Checks what an Ascend machine needs and pip cannot install: CANN, the driver and a working LMCache-Ascend."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

from kvshare.core.errors import UserError

DEV = Path("/dev")
CONNECTOR = "LMCacheAscendConnectorV1Dynamic"
"""vllm-ascend's own LMCacheAscendConnector crashes at its first step with vLLM 0.23 (tests/npu/test_connector.py)."""

TRANSFER_CHANNELS = ("hccl", "hixl")
"""The channels of LMCache-Ascend 0.4.4. It supports none of LMCache's own channels."""


def missing() -> Iterator[str]:
    """Yield one line for each part that is missing."""
    yield from _toolkit()
    yield from _driver()


def _toolkit() -> Iterator[str]:
    home = os.environ.get("ASCEND_HOME_PATH") or os.environ.get("ASCEND_TOOLKIT_HOME")
    if not home:
        yield (
            "CANN is not set up, neither ASCEND_HOME_PATH nor ASCEND_TOOLKIT_HOME is set: "
            "source the toolkit's set_env.sh (docs/npu.md)"
        )
        return
    folders = (Path(home) / "lib64", Path(home) / f"{platform.machine()}-linux" / "lib64")
    if not any((folder / "libascendcl.so").exists() for folder in folders):
        yield f"CANN at {home} has no lib64/libascendcl.so: install the toolkit there, or source another set_env.sh"


def _driver() -> Iterator[str]:
    if not any(DEV.glob("davinci[0-9]*")):
        yield (
            f"no NPU, {DEV}/davinci* does not exist: install the Ascend driver; "
            "for a container, pass the devices into it (docs/npu.md)"
        )
    if not shutil.which("npu-smi"):
        yield "npu-smi is not on PATH, and verl reads the driver version from it: install the driver, or mount npu-smi"


def load_lmcache() -> None:
    """Import LMCache-Ascend, which adds its own keys to LMCache's settings.

    Raises:
        UserError: the import fails.
    """
    try:
        import lmcache_ascend  # noqa: F401
    except Exception as error:  # from CANN libraries, torch_npu, or its patches of LMCache and vLLM
        text = " ".join(str(error).split())
        raise UserError(
            f"lmcache_ascend does not load ({type(error).__name__}: {text}): "
            "rebuild it in this environment (docs/npu.md)"
        ) from None
