"""What tests add to vLLM's worker (``--worker-extension-cls``)."""

from kvshare.record import worker_events


class Marks:
    def send_mark(self, name: str) -> None:
        """Send an event that follows all events which the worker has sent so far."""
        worker_events.sender().send({"op": "mark", "name": name})

    def destroy_kv(self) -> None:
        """What vLLM's sleep mode does on a GPU. On CPU it does nothing."""
        for layer in self.model_runner.kv_caches:
            layer.fill_(7)
