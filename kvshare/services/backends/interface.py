"""Defines the fields of a backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from kvshare.core.job import Job

Ports = dict[str, int]
Exports = dict[str, str]


@dataclass(frozen=True)
class Backend:
    """A way to share KV, the service it needs, and the preflight checks for both.

    Args:
        service: name of the service.
        ports: default ports of the service by name, the same as in config/.
        command: makes the command that starts the service, from listen address, ports and folder for its files.
        exports: makes the environment variables that point replicas to it, from host, ports and folder.
        check: returns the address of the service, given its exports; raises UserError if it is not healthy.
        addresses: LMCache settings with addresses that every replica must reach.
        settings: yields one line for each mistake in the LMCache settings, given the job and the path of the file.
        running: yields one line for each problem with the service, and describes it in ``job.facts["service"]``.
    """

    service: str
    ports: Ports
    command: Callable[[str, Ports, Path], list[str]]
    exports: Callable[[str, Ports, Path], Exports]
    check: Callable[[Mapping[str, str]], str]
    addresses: tuple[str, ...]
    settings: Callable[[Job, str | None], Iterator[str]]
    running: Callable[[Job], Iterator[str]]
