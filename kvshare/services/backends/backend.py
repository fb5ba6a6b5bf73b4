"""What a backend is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from kvshare.core.job import Job

Ports = dict[str, int]
Exports = dict[str, str]


@dataclass(frozen=True)
class Backend:
    """A way to share KV, the service it needs, and what preflight checks of both.

    Args:
        service: what its service is called.
        ports: of the service, by name; those in config/.
        command: what starts it, from the address to listen on, the ports and a folder for what it writes.
        exports: environment variables that tell others of it, from the host they reach it at, the ports and the folder.
        check: returns where it is, from the exports; raises UserError when it is not healthy.
        addresses: the LMCache settings with addresses that every replica must reach.
        settings: lines about what the LMCache settings of a file lack.
        running: lines about the service of a job; what is there goes into ``job.facts["service"]``.
    """

    service: str
    ports: Ports
    command: Callable[[str, Ports, Path], list[str]]
    exports: Callable[[str, Ports, Path], Exports]
    check: Callable[[Mapping[str, str]], str]
    addresses: tuple[str, ...]
    settings: Callable[[Job, str | None], Iterator[str]]
    running: Callable[[Job], Iterator[str]]
