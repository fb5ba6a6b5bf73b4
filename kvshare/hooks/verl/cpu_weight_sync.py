"""vLLM worker extension that loads verl's weight updates into vLLM's packed CPU weights."""

from __future__ import annotations

from typing import Any

from verl.workers.rollout.vllm_rollout import utils

from kvshare.hooks import check

# CPUWorkerExtension replaces it.
check.source(utils, "vLLMColocateWorkerExtension.update_weights_from_ipc", {"bfeb6433d0b4": "0.9.1"})


class CPUWorkerExtension(utils.vLLMColocateWorkerExtension):
    """Loads weights with vLLM's layerwise reload, which packs them again.

    vLLM's CPU linear layers pack their weight and drop the original, so verl's in-place copy has no target.
    """

    model_runner: Any  # vLLM mixes this class into its worker

    def update_weights_from_ipc(
        self, peft_config: dict | None = None, base_sync_done: bool = False, use_shm: bool = False
    ) -> None:
        from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightReceiver

        if peft_config and base_sync_done:
            raise NotImplementedError("LoRA adapters cannot be synced on CPU")
        weights: dict[str, Any] = {}

        def keep(bucket: list[tuple[str, Any]], is_last: bool) -> None:
            # The next bucket overwrites the buffer behind these tensors.
            weights.update((name, tensor.clone()) for name, tensor in bucket)

        receiver = BucketedWeightReceiver(zmq_handle=self._get_zmq_handle(), device=self.device, use_shm=use_shm)
        receiver.receive_weights(on_bucket_received=keep)
        self.model_runner.reload_weights(weights_iterator=iter(weights.items()), is_checkpoint_format=True)
        self._repack_tied_lm_head()

    def _repack_tied_lm_head(self) -> None:
        """Pack a tied lm_head again: it receives no weights itself, so the reload leaves its old packed copy."""
        from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

        for module in self.model_runner.get_model().modules():
            method = getattr(module, "quant_method", None)
            if isinstance(method, UnquantizedEmbeddingMethod):
                method.process_weights_after_loading(module)
