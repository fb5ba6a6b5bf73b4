"""Wrap or replace upstream functions. Raise UpstreamChanged if kvshare does not know the installed function."""

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
    known_by: Iterable[str]  # the parameters or digests that were checked
    undo: Callable[[], None]


PATCHES: list[Patch] = []
"""All patches in this process."""


def wrap(module: Any, path: str, wrapper: Callable[..., Any], parameter: str, *parameters: str) -> None:
    """Wrap ``module.path`` with ``wrapper``, a function as wrapt calls it: (wrapped, instance, args, kwargs).

    Args:
        parameter, parameters: those of ``module.path`` that the wrapper uses; "self" if it uses only the instance.
    """
    check.parameters(module, path, parameter, *parameters)
    put(module, path, wrapt.FunctionWrapper(wrapt.resolve_path(module, path)[2], wrapper), (parameter, *parameters))


def replace(module: Any, path: str, function: Any, digests: Digests) -> None:
    """Replace ``module.path`` with ``function``. The digest of the replaced source must be in ``digests``."""
    check.source(module, path, digests)
    put(module, path, function, digests)


def put(module: Any, path: str, value: Any, known_by: Iterable[str]) -> None:
    """Set ``module.path`` to ``value`` without a check. For compiled code, check the function that calls it first."""
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
    """Mark a hook that correctness does not need: if upstream has changed, log ``loss`` and undo the hook's patches."""

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
