"""What an Ascend machine needs outside of pip's sight: CANN, the driver, and LMCache-Ascend that loads."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

from kvshare.core.errors import UserError

DEV = Path("/dev")
CONNECTOR = "LMCacheAscendConnectorV1Dynamic"
"""vllm-ascend's own LMCacheAscendConnector dies at its first step with vLLM 0.23, see tests/npu/test_connector.py."""

TRANSFER_CHANNELS = ("hccl", "hixl")
"""LMCache-Ascend 0.4.4's own; it has none of LMCache's."""


def missing() -> Iterator[str]:
    """One line for each part that is not there."""
    yield from _toolkit()
    yield from _driver()


def _toolkit() -> Iterator[str]:
    home = os.environ.get("ASCEND_HOME_PATH") or os.environ.get("ASCEND_TOOLKIT_HOME")
    if not home:
        yield (
            "CANN is not set up, neither ASCEND_HOME_PATH nor ASCEND_TOOLKIT_HOME is set: "
            "source set_env.sh of the toolkit (docs/npu.md)"
        )
        return
    folders = (Path(home) / "lib64", Path(home) / f"{platform.machine()}-linux" / "lib64")
    if not any((folder / "libascendcl.so").exists() for folder in folders):
        yield f"CANN at {home} has no lib64/libascendcl.so: install the toolkit there, or source another's set_env.sh"


def _driver() -> Iterator[str]:
    if not any(DEV.glob("davinci[0-9]*")):
        yield (
            f"no NPU, {DEV}/davinci* does not exist: install the Ascend driver; "
            "into a container the devices must be passed (docs/npu.md)"
        )
    if not shutil.which("npu-smi"):
        yield "npu-smi is not on PATH, verl asks it for the driver's version: install the driver, or mount npu-smi"


def load_lmcache() -> None:
    """Import LMCache-Ascend, which adds its settings to LMCache's.

    Raises:
        UserError: it does not load.
    """
    try:
        import lmcache_ascend  # noqa: F401
    except Exception as error:  # a library of CANN, torch_npu, or what it patches in LMCache and vLLM
        text = " ".join(str(error).split())
        raise UserError(
            f"lmcache_ascend does not load ({type(error).__name__}: {text}): "
            "build it again in this environment (docs/npu.md)"
        ) from None
