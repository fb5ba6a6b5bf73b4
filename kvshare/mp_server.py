"""Runs ``lmcache server`` with kvshare's hook: ``python -m kvshare.mp_server`` and its arguments."""

from __future__ import annotations

import sys

from kvshare.hooks.imports import when_imported


def main() -> None:
    when_imported("lmcache.v1.multiprocess.modules.engine_driven_transfer", "lmcache.mp_server:patch_module")
    from lmcache.cli.main import main as lmcache

    lmcache(["server", *sys.argv[1:]])


if __name__ == "__main__":
    main()
