"""Versions that fit together: the one table that requirements/, preflight, the hooks and the docs go by.

Run whole, with training: cpu.txt on CPU, and gpu-verl.txt with LMCache 0.5.6 built for it on an H100. Of gpu.txt all is
checked that needs no GPU (``make test-gpu-install``), of npu.txt all that needs no NPU (``make test-npu``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

Packages = dict[str, str]
"""Version specifier by package."""

MAIN = ("verl", "vllm", "lmcache", "torch", "ray")
"""Whose versions are named in tables and reports."""


@dataclass(frozen=True)
class Fit:
    """A set of versions that fit together.

    Args:
        file: in requirements/, the one that installs them.
        packages: what every run needs.
        backends: what a backend needs beside them; one that is not listed does not run with these.
        build: package that must be built for them, and how to say so; the file has its command.
    """

    file: str
    packages: Packages
    backends: dict[str, Packages]
    build: str | None = None


TRAINER = {
    **{"verl": "==0.9.1", "ray": ">=2.49", "numpy": "<=2.2.6"},
    **{
        "TransferQueue": "==0.1.11",
        "tensordict": "==0.10.0",
    },  # verl's V1 trainers import them
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
        # verl's own pins. LMCache's wheels from 0.5.4 on do not load their CUDA code with torch 2.11; before 0.5.6 what
        # its multi-process server could not give was reported to vLLM as loaded (LMCacheMPWorkerAdapter.get_finished).
        Fit(
            "gpu-verl.txt",
            {
                **{"torch": "==2.11.*", "vllm": "==0.24.*", "lmcache": ">=0.5.3,<=0.5.6,!=0.5.4,!=0.5.5"},
                **{"transformers": "==5.9.*", **TRAINER},
            },
            {"remote": {}, "p2p": NIXL, "mp": {"lmcache": "==0.5.6"}},
            build="lmcache",
        ),
    ],
    "npu": [
        # vLLM 0.18 is not one: with transformers < 5, and vllm-ascend's numpy < 2, it excludes verl 0.9.
        Fit(
            "npu.txt",
            {
                **{"torch": "==2.10.*", "torch-npu": "==2.10.*", "vllm": "==0.23.*", "vllm-ascend": "==0.23.*"},
                **{
                    "transformers": ">=5.5.4,!=5.6.0,<5.11",
                    "lmcache": "==0.4.4",
                    "lmcache-ascend": "==0.4.4",
                    **TRAINER,
                },
            },
            {"remote": {}, "p2p": {}},
            build="lmcache-ascend",
        ),
    ],
}


def installed(package: str) -> str:
    """Its version, or "unknown" where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def known(package: str) -> str:
    """All versions of a package that the table has, e.g. "==0.23.*, ==0.24.*"."""
    fits = [fit for of_device in FITS.values() for fit in of_device]
    rows = [row for fit in fits for row in (fit.packages, *fit.backends.values())]
    return ", ".join(sorted({row[package] for row in rows if package in row}))


def problems(device: str, backend: str) -> list[str]:
    """One line for each package that is missing or does not fit, by the set that is nearest; empty if all do."""
    fits = [fit for fit in FITS[device] if backend in fit.backends]
    return min((list(_misfits(fit, backend)) for fit in fits), key=len, default=[])


def missing(device: str, backend: str) -> list[str]:
    """The same for packages that are not there, whatever the versions of the others."""
    return [line for line in problems(device, backend) if " is missing: " in line]


def _misfits(fit: Fit, backend: str) -> Iterator[str]:
    for package, wanted in {**fit.packages, **fit.backends[backend]}.items():
        found = installed(package)
        if found == "unknown":
            yield f"package {package} is missing: {_cure(fit, package)}"
        elif not SpecifierSet(wanted).contains(found, prereleases=True):
            yield f"package {package} {found} does not fit the others, {package}{wanted} does: {_cure(fit, package)}"


def _cure(fit: Fit, package: str) -> str:
    if package == fit.build:
        return f"build it, the command is in requirements/{fit.file}"
    return f"pip install -r requirements/{fit.file}"
