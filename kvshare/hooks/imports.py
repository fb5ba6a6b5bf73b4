"""Call a hook when the module it is for is imported; if it refuses, that module cannot be imported any more."""

from __future__ import annotations

import importlib
import sys
from functools import partial
from typing import Any

import wrapt


def when_imported(module: str, hook: str) -> None:
    """Call ``hook``, "module:function" in kvshare.hooks, which is imported only then."""
    wrapt.register_post_import_hook(partial(_call, hook), module)


def _call(hook: str, module: Any) -> None:
    name, function = hook.split(":")
    try:
        getattr(importlib.import_module(f"kvshare.hooks.{name}"), function)(module)
    except Exception as error:
        sys.meta_path.insert(0, _Refused(module.__name__, error))
        raise


class _Refused:
    """wrapt forgets the hooks of a module it has called, and would let a second import of it through without them."""

    def __init__(self, module: str, error: Exception) -> None:
        self._module, self._error = module, error

    def find_spec(self, name: str, *_: Any) -> None:
        if name == self._module:
            raise self._error
