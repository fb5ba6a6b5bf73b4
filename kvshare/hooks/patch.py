"""Wrap functions of other projects, and refuse to when they are not the functions we know."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import wrapt

from kvshare.core import versions


class UpstreamChanged(RuntimeError):
    """An upstream function no longer looks as the code that wraps it expects."""


def wrap(module: Any, path: str, wrapper: Callable[..., Any], *parameters: str) -> None:
    """Wrap ``module.path`` with a wrapt wrapper, after ``check``."""
    check(module, path, *parameters)
    wrapt.wrap_function_wrapper(module, path, wrapper)


def check(module: Any, path: str, *parameters: str) -> None:
    """Raise UpstreamChanged unless ``module.path`` is there and takes ``parameters``."""
    package = module.__name__.split(".")[0]
    project = package.partition("_cu1")[0].replace("_", "-")  # nixl_cu12 is nixl
    try:
        target = module
        for name in path.split("."):
            target = getattr(target, name)
        missing = [p for p in parameters if p not in inspect.signature(target).parameters]
    except AttributeError:
        missing = ["the function itself"]
    if missing:
        raise UpstreamChanged(
            f"{module.__name__}.{path} lacks {', '.join(missing)} in {package} {versions.installed(project)}; "
            f"kvshare knows {package} {versions.known(project)}: install one of those"
        )
