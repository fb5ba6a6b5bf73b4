"""The policy of the weights in one replica's engine, as verl's calls tell it. No I/O."""

from __future__ import annotations

from typing import Any

from kvshare.core import policy
from kvshare.hooks.verl.trajectory import Stamp, Trajectories
from kvshare.record import worker_events


class ReplicaPolicy:
    """Follows a rollout server through weight updates.

    verl's update is one or more calls that change the weights, then a reset of the caches, then ``global_steps``.
    Some updates end without ``global_steps`` (verl 0.9.1: a validation with a colocated reward model). The weights stay
    until the next update, so the replica then has a policy of its own.

    Args:
        run: id of the run.
        versions: as in ``Trajectories``.
    """

    def __init__(self, run: str, versions: int = 1) -> None:
        self._run, self._trajectories = run, Trajectories(run, versions)
        self.store = policy.IF_ABORTED  # policy.ALWAYS if conversations have several turns
        self._name: str | None = policy.private_policy()  # until the first update, only this replica has it
        self._steps: int | None = None  # of the policy; None if only this replica has it, or if it is unknown
        self._calls = 0
        self._failed = False

    @property
    def known(self) -> str | None:
        """The policy; None during an update, and after one that failed: the weights are unknown."""
        return self._name

    @property
    def name(self) -> str:
        """The policy for a request that is sent now. Each request gets a private one while the weights are unknown."""
        return self._name or policy.private_policy()

    def call_began(self) -> bool:
        """A call that changes the weights begins. Returns whether it begins an update."""
        began, self._name, self._steps = self._name is not None, None, None
        self._calls += 1
        return began

    def call_ended(self, failed: bool) -> None:
        self._calls -= 1
        self._failed |= failed

    def caches_reset(self) -> bool:
        """verl has reset the caches. Returns whether that ends an update."""
        if self._name is not None or self._calls or self._failed:
            return False
        self._name = policy.private_policy()
        return True

    def steps_set(self, global_steps: int) -> None:
        """The update has ended on every replica, with the weights of this step."""
        self._name, self._failed, self._steps = policy.policy_id(self._run, global_steps), False, global_steps

    def stamp(self, request: Any, caller: str) -> Stamp:
        """Put the policy into a request that is sent now: LMCache's tag, and vLLM's ``cache_salt``.

        Args:
            request: vLLM's EngineCoreRequest.
            caller: the caller's request id.
        """
        given = self._stamp_of(request, caller)
        salt = f"{given.policy}.{request.cache_salt}" if request.cache_salt else given.policy
        request.cache_salt = f"{salt}~{given.kept_by}" if given.kept_by else salt
        if (sampling := request.sampling_params) is not None:
            configs = {policy.TAG: given.policy, policy.STORE: self.store, worker_events.REQUEST: caller}
            configs |= {policy.KEPT: salt} if given.kept_by else {}
            extra = dict(sampling.extra_args or {})
            params = {**(extra.get("kv_transfer_params") or {}), **configs}
            sampling.extra_args = {**extra, "kv_transfer_params": params}
        return given

    def _stamp_of(self, request: Any, caller: str) -> Stamp:
        if adapter := request.lora_request:
            return Stamp(f"{self.name}+{adapter.lora_name}")
        if self._steps is None or request.mm_features:  # KV of an image also depends on the encoder's weights
            return Stamp(self.name)
        return self._trajectories.stamp(caller, self._steps)
