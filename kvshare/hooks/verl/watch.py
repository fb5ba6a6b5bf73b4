"""End a run that cannot go on because an actor or an engine has died, and say which, why and what to do.

verl 0.9.1 may wait for ever for such a process, e.g. on a socket in its weight update. A thread in the driver asks
Ray's control store (GCS) for dead actors, and for engines that rollout servers have reported there.
"""

from __future__ import annotations

import atexit
import functools
import json
import logging
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from kvshare.hooks.patch import optional, wrap
from kvshare.record.event_log import RUN_DIR

logger = logging.getLogger(__name__)

LOOK_SECONDS = 2
LOOKS = 5
"""The run ends when a death has been seen so often. Until then verl may end by itself, with a traceback."""

NAMESPACE = b"kvshare"
"""Of Ray's key-value store, where rollout servers report dead engines."""

MEMORY = "use less memory on that host (kvshare preflight shows what takes it), or a larger one"
UNKNOWN = "read its log; if the kernel killed it, dmesg says so"


class Death(NamedTuple):
    """The end of a process that a run cannot do without.

    Args:
        when: Unix milliseconds.
        process: its name.
        pid: its process id; of an engine, that of its rollout server, whose log it shares.
        address: IP address of its host.
        why: cause and cure.
    """

    when: int
    process: str
    pid: int
    address: str
    why: str


@optional("a run does not end when an actor or engine has died")
def watch_driver(module: Any) -> None:
    # The driver calls it right before ray.init. No other process does.
    wrap(module, "get_ppo_ray_runtime_env", _start, "config")


def _start(wrapped: Any, instance: Any, args: tuple, kwargs: dict) -> Any:
    threading.Thread(target=_watch, name="kvshare-watch", daemon=True).start()
    atexit.register(_say)  # runs before Ray's own
    return wrapped(*args, **kwargs)


def _watch() -> None:
    seen = 0
    while seen < LOOKS:
        time.sleep(LOOK_SECONDS)
        seen = seen + 1 if deaths() else 0
        if not threading.main_thread().is_alive():
            return  # the driver ends by itself
    _say()
    sys.stdout.flush()
    os._exit(1)  # the main thread may wait for ever


def _say() -> None:
    """Print the first death, if there is one. The others may be its consequences."""
    if found := deaths():
        first = found[0]
        print(
            f"kvshare: training cannot go on: {first.process} (pid {first.pid} on {first.address}) has ended: "
            f"{first.why}; log: {_keep_log(first)}",
            file=sys.stderr,
            flush=True,
        )


def deaths() -> list[Death]:
    """Unexpected deaths in this job, the earliest first. Empty before Ray is up, and if its control store is away."""
    import ray
    from ray._private import state  # the public API, ray.util.state, needs the dashboard, which may be off
    from ray.experimental import internal_kv

    try:
        if not ray.is_initialized():
            return []
        job = ray.get_runtime_context().get_job_id()
        actors = list(state.state.actor_table(None, ray.JobID(bytes.fromhex(job))).values())
        keys = internal_kv._internal_kv_list(f"{job}/", namespace=NAMESPACE)
        engines = [Death(*json.loads(internal_kv._internal_kv_get(key, namespace=NAMESPACE))) for key in keys]
    except Exception as error:
        _cannot_ask(f"{type(error).__name__}: {error}")
        return []
    return sorted([*engines, *filter(None, map(_death, _of_verl(actors)))])


@functools.cache  # once
def _cannot_ask(error: str) -> None:
    logger.warning("kvshare could not ask Ray for dead actors: %s", error)


def report_engine(engine: str, ended: Mapping[str, int]) -> None:
    """Report, from the rollout server of an engine, that the engine has died.

    Args:
        engine: its name.
        ended: exit codes of its processes by name; -N after signal N.
    """
    import ray
    from ray.experimental import internal_kv

    codes = [f"{name} with {f'exit code {code}' if code >= 0 else f'signal {-code}'}" for name, code in ended.items()]
    why = "; ".join([*codes, UNKNOWN])
    death = Death(int(time.time() * 1000), engine, os.getpid(), ray.util.get_node_ip_address(), why)
    key = f"{ray.get_runtime_context().get_job_id()}/{engine}"
    internal_kv._internal_kv_put(key, json.dumps(death), namespace=NAMESPACE)


OWNERS = ("FullyAsyncTrainer", "FullyAsyncRollouter")
"""Actors of verl's fully async trainer that own the workers and rollout servers; of other trainers TaskRunner does."""


def _of_verl(actors: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The actors that verl's driver, TaskRunner and OWNERS own. Others are a user's, who may expect that they die."""
    places = [actor["Address"] for actor in actors]
    runners = [actor for actor in actors if actor["OwnerAddress"] not in places]  # owned by the driver
    owners = [actor["Address"] for actor in actors if actor in runners or _kind(actor) in OWNERS]
    return runners + [actor for actor in actors if actor["OwnerAddress"] in owners]


def _kind(actor: dict[str, Any]) -> str:
    return actor["ActorClassName"].rpartition(".")[2]  # without "function.<locals>."


def _death(actor: dict[str, Any]) -> Death | None:
    if actor["State"] != "DEAD" or (why := _why(actor["DeathCause"])) is None:
        return None
    name = " ".join(filter(None, [_kind(actor), actor["Name"]]))
    return Death(actor["EndTime"], name, actor["Pid"], actor["Address"]["IPAddress"], why)


def _why(cause: Any) -> str | None:
    """Cause and cure, from Ray's ActorDeathCause; None if the actor ended on purpose, or because its owner did."""
    context = cause.WhichOneof("context")
    if context == "oom_context":
        used = re.search(r"was (\S+) used / (\S+) limit", cause.oom_context.error_message)
        memory = f" at {used[1]} of {used[2]}" if used else ""
        return f"Ray's memory monitor killed it{memory}: {MEMORY}"
    if context == "creation_task_failure_context":
        raised = cause.creation_task_failure_context.formatted_exception_string.strip()
        return f"it raised {raised.splitlines()[-1]}"
    if context != "actor_died_error_context":
        return None
    died = cause.actor_died_error_context
    if type(died).Reason.Name(died.reason) not in ("WORKER_DIED", "NODE_DIED") or "INTENDED" in died.error_message:
        return None
    detail = died.error_message.partition("Worker exit detail: ")[2] or died.error_message
    return f"{detail.partition(' Some common causes')[0].splitlines()[0].rstrip('.')}: {UNKNOWN}"


def _keep_log(death: Death) -> str:
    """Copy a process's output from Ray's folder, which the end of the run removes, to that of the run."""
    import ray

    name, folder = f"worker-*-{death.pid}.*", os.environ.get(RUN_DIR)
    try:
        node: Any = ray._private.worker._global_node
        logs = sorted(Path(node.get_logs_dir_path()).glob(name))
        kept = [shutil.copy(log, f"{folder}/worker-{death.pid}{log.suffix}") for log in logs] if folder else logs
    except Exception:  # the line matters more
        kept = []
    return ", ".join(map(str, kept)) or f"{name} in Ray's folder for logs on {death.address}"
