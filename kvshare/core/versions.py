"""The table of package versions that work together, used by requirements/, preflight, the hooks and the docs.

Tested with training: cpu.txt on CPU, and gpu-verl.txt with LMCache 0.5.6 built for it on an H100. Tested as far as
possible without the device: gpu.txt (``make test-gpu-install``) and npu.txt (``make test-npu``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

Packages = dict[str, str]
"""Version specifier by package."""

MAIN = ("verl", "vllm", "lmcache", "torch", "ray")
"""Packages whose versions tables and reports show."""


@dataclass(frozen=True)
class Fit:
    """A set of versions that work together.

    Args:
        file: file in requirements/ that installs them.
        packages: packages that every run needs.
        backends: further packages by backend. A backend that is not listed does not run with this set.
        build: package that must be built from source; the file has the command.
    """

    file: str
    packages: Packages
    backends: dict[str, Packages]
    build: str | None = None


TRAINER = {
    "verl": "==0.9.1",
    "ray": ">=2.49",
    "numpy": "<=2.2.6",
    "TransferQueue": "==0.1.11",  # verl's V1 trainers import it and tensordict; only an extra of verl asks for them
    "tensordict": "==0.10.0",
}
NIXL = {"nixl": "==1.5.*"}

FITS: dict[str, list[Fit]] = {
    "cpu": [
        Fit(
            "cpu.txt",
            {"torch": "==2.13.*", "vllm": "==0.31.*", "lmcache": "==0.5.6", "transformers": "==5.10.*", **TRAINER},
            {"remote": {}, "p2p": NIXL, "mp": {}},
        ),
    ],
    "cuda": [
        Fit(
            "gpu.txt",
            {"torch": "==2.13.*", "vllm": "==0.31.*", "lmcache": "==0.5.6", "transformers": "==5.10.*", **TRAINER},
            {"remote": {}, "p2p": NIXL, "mp": {}},
        ),
        # verl's own pins. The CUDA code in LMCache's wheels from 0.5.4 on does not load with torch 2.11. Before 0.5.6
        # the mp connector reports failed loads to vLLM as loaded (LMCacheMPWorkerAdapter.get_finished).
        Fit(
            "gpu-verl.txt",
            {
                "torch": "==2.11.*",
                "vllm": "==0.24.*",
                "lmcache": ">=0.5.3,<=0.5.6,!=0.5.4,!=0.5.5",
                "transformers": "==5.9.*",
                **TRAINER,
            },
            {"remote": {}, "p2p": NIXL, "mp": {"lmcache": "==0.5.6"}},
            build="lmcache",
        ),
    ],
    "npu": [
        # vLLM 0.18 cannot be used: it needs transformers < 5, its vllm-ascend numpy < 2, and verl 0.9 allows neither.
        Fit(
            "npu.txt",
            {
                "torch": "==2.10.*",
                "torch-npu": "==2.10.*",
                "vllm": "==0.23.*",
                "vllm-ascend": "==0.23.*",
                "transformers": ">=5.5.4,!=5.6.0,<5.11",
                "lmcache": "==0.4.4",
                "lmcache-ascend": "==0.4.4",
                **TRAINER,
            },
            {"remote": {}, "p2p": {}},
            build="lmcache-ascend",
        ),
    ],
}


def installed(package: str) -> str:
    """Version of a package, or "unknown" if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def known(package: str) -> str:
    """All versions of a package in the table, e.g. "==0.23.*, ==0.24.*"."""
    fits = [fit for of_device in FITS.values() for fit in of_device]
    rows = [row for fit in fits for row in (fit.packages, *fit.backends.values())]
    return ", ".join(sorted({row[package] for row in rows if package in row}))


def problems(device: str, backend: str) -> list[str]:
    """One line for each package that is missing or of a wrong version, compared with the set that is closest."""
    fits = [fit for fit in FITS[device] if backend in fit.backends]
    return min((list(_misfits(fit, backend)) for fit in fits), key=len, default=[])


def missing(device: str, backend: str) -> list[str]:
    """The lines of ``problems`` about missing packages only."""
    return [line for line in problems(device, backend) if " is missing: " in line]


def _misfits(fit: Fit, backend: str) -> Iterator[str]:
    for package, wanted in {**fit.packages, **fit.backends[backend]}.items():
        found = installed(package)
        if found == "unknown":
            yield f"package {package} is missing: {_fix(fit, package)}"
        elif not SpecifierSet(wanted).contains(found, prereleases=True):
            yield f"package {package} {found} does not fit the others, {package}{wanted} does: {_fix(fit, package)}"


def _fix(fit: Fit, package: str) -> str:
    if package == fit.build:
        return f"build it, the command is in requirements/{fit.file}"
    return f"pip install --no-deps -r requirements/{fit.file}"
