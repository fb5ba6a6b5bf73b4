"""Everything that would make a run fail or share nothing, found before it starts.

A check is a function of the Job that yields one line for each thing to mend: what is wrong, where, and what to
do. Its name is its row in the table; ``job.facts[name]`` is what the row says when all is well. A new check goes
into the module of its subject and into STAGES (it stops the run) or WARNINGS (so does a UserError it raises); what only
one backend needs goes into the module of that backend, and a new backend is a module in BACKENDS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from kvshare.core import versions
from kvshare.core.errors import UserError
from kvshare.core.job import Job as Job
from kvshare.core.job import one_line
from kvshare.launch.forecast import Forecast
from kvshare.launch.preflight import environment, lmcache, memory, packages, recipe, service
from kvshare.launch.preflight.record import describe as describe
from kvshare.launch.preflight.record import record as record

Check = Callable[[Job], Iterator[str]]

# What depends on a stage is not checked when something in it is wrong.
STAGES: tuple[tuple[Check, ...], ...] = (
    (packages.packages,),
    (recipe.config,),
    (lmcache.settings,),
    (
        *(packages.compiled, packages.attention, packages.plugins, environment.environment, environment.cluster),
        *(recipe.devices, recipe.model, recipe.bucket, recipe.data, recipe.estimator),
        *(recipe.connector, recipe.router, service.service),
    ),
)
WARNINGS: tuple[Check, ...] = (memory.forecast, memory.memory, recipe.graphs, service.exposure)


class Finding(NamedTuple):
    level: str  # error, warning or ok
    check: str
    text: str


def run(job: Job) -> list[Finding]:
    """What there is to say: errors first, then warnings, then what is well."""
    found: list[Finding] = []
    for stage in STAGES:
        found += [finding for check in stage for finding in _run(check, job, "error")]
        if errors(found):
            break
    else:
        found += [finding for check in WARNINGS for finding in _run(check, job, "warning")]
    return sorted(found, key=lambda finding: ("error", "warning", "ok").index(finding.level))


def forecast(job: Job) -> Forecast:
    """The forecast alone; needs no service, device or environment, and fits a run on another machine.

    Raises:
        UserError: what it needs is wrong.
    """
    if wrong := versions.missing(job.device, job.backend):
        raise UserError("; ".join(wrong))
    for stage in ((recipe.config,), (lmcache.settings,), (recipe.model, recipe.data)):
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
    except Exception as error:  # a value nobody thought of: one line all the same
        lines.append(f"check of {name} failed: {type(error).__name__}: {one_line(error)}")
    return [Finding(level, name, line) for line in lines] or [Finding("ok", name, job.facts.get(name, ""))]
