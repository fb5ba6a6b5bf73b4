"""Wrap or replace functions of other projects, and refuse to where they are not the functions we know."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import wrapt

from kvshare.hooks import check
from kvshare.hooks.check import Digests, UpstreamChanged

logger = logging.getLogger(__name__)


class Patch(NamedTuple):
    module: Any
    path: str
    known_by: Iterable[str]  # parameters, or digests
    undo: Callable[[], None]


PATCHES: list[Patch] = []
"""All of this process."""


def wrap(module: Any, path: str, wrapper: Callable[..., Any], parameter: str, *parameters: str) -> None:
    """Let ``wrapper``, one of wrapt's, call ``module.path``, which must take the parameters that it relies on.

    "self" is one: a wrapper may rely on nothing but the instance.
    """
    check.parameters(module, path, parameter, *parameters)
    put(module, path, wrapt.FunctionWrapper(wrapt.resolve_path(module, path)[2], wrapper), (parameter, *parameters))


def replace(module: Any, path: str, function: Any, digests: Digests) -> None:
    """Put ``function`` in the place of ``module.path``, whose source must be one of ``digests``."""
    check.source(module, path, digests)
    put(module, path, function, digests)


def put(module: Any, path: str, value: Any, known_by: Iterable[str]) -> None:
    """What ``wrap`` and ``replace`` do after their check; alone for what has neither parameters nor source to check."""
    owner, name, _ = wrapt.resolve_path(module, path)
    inherited = name not in vars(owner)
    undo = (
        functools.partial(delattr, owner, name)
        if inherited
        else functools.partial(setattr, owner, name, vars(owner)[name])
    )
    setattr(owner, name, value)
    PATCHES.append(Patch(module, path, known_by, undo))


def optional(loss: str) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """A hook without which no KV is stale or wrong: if upstream has changed, log ``loss`` and leave it as it is."""

    def decorate(hook: Callable[[Any], None]) -> Callable[[Any], None]:
        @functools.wraps(hook)
        def all_or_nothing(module: Any) -> None:
            before = len(PATCHES)
            try:
                hook(module)
            except UpstreamChanged as changed:
                for patch in reversed([patch for patch in PATCHES[before:] if patch.module is module]):
                    patch.undo()
                    PATCHES.remove(patch)
                logger.error("%s: %s", loss, changed)

        return all_or_nothing

    return decorate
