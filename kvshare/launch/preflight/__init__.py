"""Finds, before a run starts, everything that would make it fail or share nothing.

A check judges the objects that verl, vLLM and LMCache themselves build of the job. It is a function that takes the Job
and yields one line per problem: what is wrong, where, and what to do. Its name is its row in the table. If it finds
nothing, the row shows ``job.facts[name]``. To add a check, put it into the module of its subject and into STAGES, which
stop the run, or into WARNINGS, which stop it only by raising a UserError. A check for one backend goes into the module
of that backend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from omegaconf.errors import MissingMandatoryValue

from kvshare.core import versions
from kvshare.core.errors import UserError
from kvshare.core.job import Job as Job
from kvshare.core.job import one_line
from kvshare.core.secrets import redacted
from kvshare.launch.forecast import Forecast
from kvshare.launch.preflight import (
    engine,
    environment,
    host_memory,
    lmcache,
    memory,
    packages,
    recipe,
    rollout,
    service,
    tools,
    trainer,
)
from kvshare.launch.preflight.record import describe as describe
from kvshare.launch.preflight.record import record as record

Check = Callable[[Job], Iterator[str]]


def untried(job: Job) -> Iterator[str]:
    """Say which combinations are not known to work."""
    for part in (trainer, rollout, engine, lmcache, service):
        yield from part.untried(job)


# Later stages depend on earlier ones, so an error ends the checks after its stage.
STAGES: dict[str, tuple[Check, ...]] = {
    "packages": (packages.packages,),
    "verl's config and LMCache's settings": (recipe.config, lmcache.written),
    "trainer and numbers of the rollout": (trainer.mode, rollout.numbers),
    "verl's objects": (rollout.verl, trainer.trainer, rollout.replicas, recipe.model),
    "vLLM's arguments": (engine.engine,),
    "vLLM's connector": (engine.connector,),
    "LMCache's config": (lmcache.settings,),
    "devices, data and services": (
        *(packages.compiled, packages.attention, packages.plugins, environment.environment, environment.cluster),
        *(rollout.devices, trainer.weights, recipe.bucket, recipe.data, tools.tools, recipe.estimator, recipe.router),
        service.service,
    ),
}
WARNINGS: tuple[Check, ...] = (
    memory.forecast,
    memory.memory,
    host_memory.host_memory,
    engine.graphs,
    service.exposure,
    trainer.staleness,
    untried,
)


class Finding(NamedTuple):
    level: str  # error, warning or ok
    check: str
    text: str


def run(job: Job, doing: Callable[[str], None] = lambda what: None) -> list[Finding]:
    """Run all checks. Return errors first, then warnings, then passed checks.

    Args:
        doing: called with what is looked at next.
    """
    found: list[Finding] = []
    for what, stage in STAGES.items():
        doing(what)
        found += [finding for check in stage for finding in _run(check, job, "error")]
        if errors(found):
            break
    else:
        doing("prompts and memory")
        found += [finding for check in WARNINGS for finding in _run(check, job, "warning")]
    return sorted(found, key=lambda finding: ("error", "warning", "ok").index(finding.level))


def forecast(job: Job) -> Forecast:
    """Make only the forecast. It needs no service, device or environment, so it works for a run on another machine.

    Raises:
        UserError: a check that the forecast depends on has failed.
    """
    if wrong := versions.missing(job.device, job.backend):
        raise UserError("; ".join(wrong))
    for stage in (*list(STAGES.values())[1:-1], (recipe.data,)):
        if wrong := errors([finding for check in stage for finding in _run(check, job, "error")]):
            raise UserError("; ".join(wrong))
    (found,) = _run(memory.forecast, job, "warning")
    if job.forecast is None:
        raise UserError(found.text)
    return job.forecast


def errors(findings: list[Finding]) -> list[str]:
    return [finding.text for finding in findings if finding.level == "error"]


def _run(check: Check, job: Job, level: str) -> list[Finding]:
    name, lines = check.__name__, []
    try:
        lines += list(check(job))
    except UserError as error:
        level = "error"
        lines.append(str(error))
    except MissingMandatoryValue as error:  # "???" in verl's config
        level = "error"
        lines.append(f"{one_line(error)}: set it")
    except Exception as error:  # a value that the check does not expect
        lines.append(f"check of {name} failed: {type(error).__name__}: {one_line(error)}")
    found = [Finding(level, name, line) for line in lines] or [Finding("ok", name, job.facts.get(name, ""))]
    return [Finding(level, name, redacted(text)) for level, name, text in found]
