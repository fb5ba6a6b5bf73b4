"""Versions that fit together, by device. Only the CPU row has been run; the others are by metadata."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

from kvshare.upstream import installed

Row = dict[str, str]
VERL = {"verl": "==0.9.1", "ray": ">=2.49", "numpy": "<=2.2.6"}

MAIN = ("verl", "vllm", "lmcache", "torch", "ray")
"""Whose versions are named in tables and reports."""

FITS: dict[str, list[Row]] = {
    "cpu": [
        {"torch": "==2.13.*", "vllm": "==0.31.*", "lmcache": "==0.5.6", "transformers": ">=5.10.4,<5.11", **VERL},
    ],
    "cuda": [
        # verl 0.9.1's own pins. LMCache's wheels from 0.5.4 do not load their CUDA code with torch 2.11, as preflight
        # says; built with it they do.
        {"torch": "==2.11.*", "vllm": "==0.24.*", "lmcache": ">=0.5.2,<=0.5.6", "transformers": "<5.11", **VERL},
        {"torch": "==2.13.*", "vllm": ">=0.27,<0.29", "lmcache": ">=0.5.4,<=0.5.6", "transformers": "<5.11", **VERL},
    ],
    "npu": [
        # vLLM 0.18 is not one: with transformers < 5, and vllm-ascend's numpy < 2, it excludes verl 0.9.
        {
            **{"torch": "==2.10.*", "torch-npu": "==2.10.*", "vllm": "==0.23.*", "vllm-ascend": "==0.23.*"},
            **{"transformers": ">=5.5.4,!=5.6.0,<5.11", "lmcache": "==0.4.4", "lmcache-ascend": "==0.4.4", **VERL},
        },
    ],
}


def problems(device: str) -> list[str]:
    """One line for each package that is missing or does not fit; empty if all do."""
    return min((_misfits(row, device) for row in FITS[device]), key=len)


def missing(device: str) -> list[str]:
    """The same for packages that are not there, whatever the versions of the others."""
    row = FITS[device][-1]
    return _misfits({package: wanted for package, wanted in row.items() if installed(package) == "unknown"}, device)


def _misfits(row: Row, device: str) -> list[str]:
    out = []
    for package, wanted in row.items():
        try:
            found = version(package)
        except PackageNotFoundError:
            out.append(
                f"package {package} is missing: install {_requirement(package, wanted)} ({requirements(device)})"
            )
            continue
        if not SpecifierSet(wanted).contains(found, prereleases=True):
            fix = f"install {_requirement(package, wanted)} ({requirements(device)})"
            out.append(f"package {package} {found} does not fit the others, {package}{wanted} does: {fix}")
    return out


def _requirement(package: str, wanted: str) -> str:
    if package == "lmcache-ascend":
        return f"its tag v{wanted.removeprefix('==')} from source, it is not on PyPI"
    return f"'{package}{wanted}'"


def requirements(device: str) -> str:
    return f"requirements/{'gpu' if device == 'cuda' else device}.txt"
