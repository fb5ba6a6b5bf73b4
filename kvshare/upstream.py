"""Wrap functions of other projects, and refuse to when they are not the functions we know."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import wrapt

KNOWN = {
    "lmcache": "0.4.4 - 0.5.6",
    "lmcache_ascend": "0.4.4",
    "nixl_cu12": "1.5",
    "nixl_cu13": "1.5",
    "vllm": "0.18 - 0.31",
    "verl": "0.9.1",
}


class UpstreamChanged(RuntimeError):
    """An upstream function no longer looks as the code that wraps it expects."""


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def wrap(module: Any, path: str, wrapper: Callable[..., Any], *parameters: str) -> None:
    """Wrap ``module.path`` with a wrapt wrapper, after ``check``."""
    check(module, path, *parameters)
    wrapt.wrap_function_wrapper(module, path, wrapper)


def check(module: Any, path: str, *parameters: str) -> None:
    """Raise UpstreamChanged unless ``module.path`` is there and takes ``parameters``."""
    package = module.__name__.split(".")[0]
    try:
        target = module
        for name in path.split("."):
            target = getattr(target, name)
        missing = [p for p in parameters if p not in inspect.signature(target).parameters]
    except AttributeError:
        missing = ["the function itself"]
    if missing:
        raise UpstreamChanged(
            f"{module.__name__}.{path} lacks {', '.join(missing)} in {package} {installed(package)}; "
            f"kvshare knows {package} {KNOWN[package]}: install one of those"
        )
