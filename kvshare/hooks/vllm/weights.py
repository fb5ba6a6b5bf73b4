"""Know the weights in a worker process: how often they were loaded, and a checksum of them.

Every store and load is recorded with both (``lmcache.events``). They come from the tensors that compute KV. So the
report sees KV of other weights even if its key names the right policy. Replicas with equal weights have equal
checksums.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Iterator
from typing import Any

import torch

from kvshare.core.policy import touches_weights
from kvshare.hooks.patch import optional, wrap

logger = logging.getLogger(__name__)

LOSS = "The report cannot compare the weights that computed KV with those that use it"

SAMPLE = 4096
"""Elements of each parameter that the checksum covers. An update changes some of them in nearly every parameter."""

ALSO = ("load_model", "wake_up")
"""Methods of vLLM's worker that set the weights, beside those that have "weight" in their name."""


class Weights:
    """The weights of this worker.

    ``epoch`` counts the updates that a store or load has seen. A read of the checksum after an update copies the sample
    from the device once: see docs/freshness.md for its duration.
    """

    def __init__(self) -> None:
        self.epoch = 0
        self.checksum = ""
        self._changed = False
        self._worker: Any = None

    def watch(self, worker: Any) -> None:
        """Note each call of the worker's methods that change its weights, verl's extension included."""
        self._worker = worker
        for name in dir(type(worker)):
            if (touches_weights(name) or name in ALSO) and callable(getattr(type(worker), name)):
                setattr(worker, name, self._noting(getattr(worker, name)))

    def now(self) -> dict[str, Any]:
        """Fields of an event: the epoch and the checksum of the weights. Without a watched worker, 0 and ""."""
        if self._changed:
            self._changed = False
            self.epoch += 1
            try:
                self.checksum = checksum(self._worker.model_runner.get_model())
            except Exception:
                self.checksum = ""
                logger.exception(LOSS)
        return {"epoch": self.epoch, "weights": self.checksum}

    def _noting(self, method: Any) -> Any:
        @functools.wraps(method)
        def noting(*args: Any, **kwargs: Any) -> Any:
            try:
                return method(*args, **kwargs)
            finally:
                self._changed = True

        return noting


weights = Weights()


@optional(LOSS)
def patch_worker(module: Any) -> None:
    """Wrap the first call after ``init_worker``, which loads this plugin. It comes before the first weights."""
    wrap(module, "WorkerWrapperBase.init_device", _init_device, "self")


def _init_device(wrapped: Any, wrapper: Any, args: tuple, kwargs: dict) -> None:
    wrapped(*args, **kwargs)
    weights.watch(wrapper.worker)


@torch.no_grad()
def checksum(model: torch.nn.Module) -> str:
    """16 hex digits, of ``SAMPLE`` evenly spaced elements of each parameter.

    vLLM on CPU packs the weights of most linear layers and drops the parameters: there the others count.
    """
    samples = [sample.contiguous().view(torch.uint8) for sample in _samples(model)]
    data = torch.cat(samples).cpu() if samples else torch.empty(0, dtype=torch.uint8)
    return hashlib.blake2b(data.numpy().tobytes(), digest_size=8).hexdigest()


def _samples(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    for parameter in model.parameters():
        if parameter.numel():
            flat = parameter.detach().flatten()
            yield flat[:: -(-flat.numel() // SAMPLE)]
