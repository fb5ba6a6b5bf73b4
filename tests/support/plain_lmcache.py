"""LMCache as it is: its own keys, no reset, and entries that nobody checks. Only CPU support stays."""

from types import SimpleNamespace

from kvshare.core import lm_protocol
from kvshare.hooks.lmcache import keys, reset


def register():
    for module, names in (
        (keys, ("patch_token_database", "patch_adapter")),
        (reset, ("patch_adapter", "patch_connector", "patch_dynamic_connector")),
    ):
        for name in names:
            setattr(module, name, lambda module: None)
    lm_protocol.hasher = lambda key: SimpleNamespace(update=len, digest=lambda: bytes(lm_protocol.CHECKSUM))
