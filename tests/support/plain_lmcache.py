"""LMCache as it is: its own keys, no reset, and entries that nobody checks. Only CPU support stays."""

from kvshare.hooks.lmcache import keys, remote_client, reset


def register():
    for module, names in (
        (keys, ("patch_token_database", "patch_adapter")),
        (reset, ("patch_adapter", "patch_connector", "patch_dynamic_connector")),
    ):
        for name in names:
            setattr(module, name, lambda module: None)
    remote_client._checksum = lambda key, data: bytes(remote_client.CHECKSUM)
