"""What tests add to vLLM's worker (``--worker-extension-cls``)."""

import gc

from kvshare.record import worker_events

KEPT = {
    "LMCacheConnectorV1Impl": ("load_specs", "_request_trackers", "_requests_priority", "_unfinished_requests"),
    "LMCacheEngine": ("lookup_pins",),
    "LMCacheLookupClient": ("reqs_status",),
    "LMConnector": ("_puts",),
    "RemoteBackend": ("put_tasks", "kvshare_puts"),
}


class Probe:
    def send_mark(self, name: str) -> None:
        """Send an event that follows all events which the worker has sent so far."""
        worker_events.sender().send({"op": "mark", "name": name})

    def destroy_kv(self) -> None:
        """What vLLM's sleep mode does on a GPU. On CPU it does nothing."""
        for layer in self.model_runner.kv_caches:
            layer.fill_(7)

    def kept(self) -> dict[str, int]:
        """Entries of what LMCache, and kvshare in it, keep for requests in this process."""
        gc.unfreeze()  # vLLM freezes what is there when it has started
        found = dict.fromkeys((f"{owner}.{name}" for owner, names in KEPT.items() for name in names), 0)
        owners = [owner for owner in gc.get_objects() if type(owner).__name__ in KEPT]
        assert {type(owner).__name__ for owner in owners} == set(KEPT)
        for owner in owners:
            of = type(owner).__name__
            for name in KEPT[of]:
                found[f"{of}.{name}"] += len(getattr(owner, name, ()))
        return found
