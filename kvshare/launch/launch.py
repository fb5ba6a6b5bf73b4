"""Runs a training for ``kvshare launch``: service, preflight, training, cleanup, report."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from uuid import uuid4

from kvshare.core.errors import UserError
from kvshare.launch import environment, hydra_overrides
from kvshare.record import report
from kvshare.record.event_log import RUN_DIR
from kvshare.services.backends import BACKENDS, place
from kvshare.services.health import wait_healthy
from kvshare.services.processes import Processes

MAIN = "verl.trainer.main_ppo"
RECIPE_MAINS = {
    "fully": "verl.experimental.fully_async_policy.fully_async_main",
    "one_step": "verl.experimental.one_step_off_policy.main_ppo",
}
"""verl's other mains, by the recipe in config/async that needs them."""
MARK = "KVSHARE_LAUNCH"
LOOPBACK = "127.0.0.1"


class Launch:
    """A training to run.

    Args:
        backend: key of BACKENDS.
        device: cuda, npu or cpu.
        command: ``python3 -m verl.trainer.main_ppo`` and its arguments.
        caller: environment of the launcher.

    Raises:
        UserError: the command does not run verl's trainer.
    """

    def __init__(self, backend: str, device: str, command: list[str], caller: Mapping[str, str]) -> None:
        if MAIN not in command or "--config-dir" not in command[:-1]:
            raise UserError(
                f"give after --: python3 -m {MAIN} --config-dir … --config-name … and overrides "
                "(+async=fully and +async=one_step run verl's other mains: docs/async.md)"
            )
        self.backend, self.device = backend, device
        at = command.index(MAIN) + 1
        self._verl, self._arguments = command[:at], command[at:]
        if main := _own_main(self._arguments):
            self._verl[-1:] = [main, "--config-path", "pkg://verl.trainer.config"]  # its own configs are elsewhere
        root = Path(command[command.index("--config-dir") + 1]).absolute().parent
        named = caller.get(RUN_DIR) or root / "outputs" / f"{backend}-{time.strftime('%Y%m%d-%H%M%S')}"
        self.run_dir = Path(named).absolute()
        self._caller = caller

    def prepare(self, exports: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
        """Environment and command of the training.

        Args:
            exports: variables of the service, if it was started here.
        """
        variables = environment.of_run(self.device, self.run_dir, {**self._caller, **exports})
        return variables, [*self._verl, *hydra_overrides.complete(self._arguments, self.device, variables)]

    def dry_run(self) -> str:
        """The training as lines of bash."""
        variables, command = self.prepare({})
        return "\n".join([*environment.as_bash(variables), shlex.join(command)])

    def run(self, services: bool) -> int:
        """Run preflight, then the training. Return the first exit code that is not 0, else 0.

        Everything that was started has ended when this returns or raises.

        Args:
            services: whether to start the backend's service first.

        Raises:
            NotStarted: the service did not start.
            UserError: the folder of the run cannot be written to.
            KeyboardInterrupt: on SIGINT, SIGTERM or SIGHUP.
        """
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot write to {self.run_dir} ({error.strerror}): set {RUN_DIR} to another folder"
            ) from None
        with Processes((MARK, uuid4().hex)) as processes:
            exports = self._start_service(processes) if services else {}
            variables, command = self.prepare(exports)
            check = [sys.executable, "-m", "kvshare", "preflight", "--backend", self.backend, "--device", self.device]
            check += ["--record", str(self.run_dir), "--", *command[len(self._verl) :]]
            # Preflight imports gigabytes. In its own process they are freed before training.
            code = processes.start(check, None, variables).wait()
            if not code:
                self.check_main()
                code = processes.start(command, None, variables).wait()
        return code if code >= 0 else 128 - code

    def check_main(self) -> None:
        """Compare the main with the trainer that preflight has found in the config.

        Raises:
            UserError: the trainer has another main.
        """
        found = self.run_dir / "run.json"  # written by preflight, if it could
        kind = json.loads(found.read_text())["trainer"] if found.is_file() else None
        named = next((name for name, main in RECIPE_MAINS.items() if f".{kind}." in main), None)
        if named and RECIPE_MAINS[named] not in self._verl:
            raise UserError(f"the config is of verl's {kind} trainer: give +async={named}, which runs its main")

    def _start_service(self, processes: Processes) -> dict[str, str]:
        backend, log = BACKENDS[self.backend], self.run_dir / f"{self.backend}.log"
        command, exports = place(backend, LOOPBACK, self.run_dir)
        where = wait_healthy(backend.service, processes.start(command, log), lambda: backend.check(exports), log)
        print(f"kvshare launch: {backend.service} is up at {where}; log: {log}", flush=True)
        return exports


def _own_main(arguments: list[str]) -> str | None:
    recipes = [argument.partition("=")[2] for argument in arguments if argument.startswith("+async=")]
    return RECIPE_MAINS.get(recipes[-1].removesuffix("_cpu")) if recipes else None


def write_report(folder: Path) -> dict | None:
    """Write the report of a finished run. If that fails, print why and return None."""
    try:
        return report.write(folder)
    except Exception as error:  # a failed report must not fail the training
        print(
            f"kvshare launch: no report ({type(error).__name__}: {error}): try kvshare report {folder}", file=sys.stderr
        )
        return None
