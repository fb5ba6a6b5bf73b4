"""Call a hook when its upstream module is imported. If the hook raises, every later import of that module fails too."""

from __future__ import annotations

import importlib
import sys
from functools import partial
from typing import Any

import wrapt


def when_imported(module: str, hook: str) -> None:
    """Import ``hook`` ("module:function" in kvshare.hooks) and call it when ``module`` is imported."""
    wrapt.register_post_import_hook(partial(_call, hook), module)


def _call(hook: str, module: Any) -> None:
    name, function = hook.split(":")
    try:
        getattr(importlib.import_module(f"kvshare.hooks.{name}"), function)(module)
    except Exception as error:
        sys.meta_path.insert(0, _Refused(module.__name__, error))
        raise


class _Refused:
    """Raises a hook's error on later imports of its module. wrapt calls a hook once, so they would go unpatched."""

    def __init__(self, module: str, error: Exception) -> None:
        self._module, self._error = module, error

    def find_spec(self, name: str, *_: Any) -> None:
        if name == self._module:
            raise self._error
