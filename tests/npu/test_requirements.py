"""requirements/npu.txt satisfies what its packages ask of each other."""

import sys
from email.parser import Parser
from importlib.metadata import requires
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement

from kvshare.core import versions
from npu.conftest import VLLM_ASCEND

LINES = [line.split("#")[0].strip() for line in (ROOT / "requirements" / "npu.txt").read_text().splitlines()]
PINS = {r.name: r.specifier for r in map(Requirement, filter(None, LINES))}
VERSIONS = {name: str(s).removeprefix("==") for name, s in PINS.items() if str(s).startswith("==")}


def _asked(package: str) -> list[str]:
    if package == "vllm":  # built without a device it asks for these only
        return (Path(sys.prefix) / "vllm-common.txt").read_text().splitlines()
    if package == "vllm-ascend":
        (metadata,) = VLLM_ASCEND.glob("*.dist-info/METADATA")
        return Parser().parsestr(metadata.read_text()).get_all("Requires-Dist")
    return requires(package)


@pytest.mark.parametrize("package", ["verl", "vllm", "vllm-ascend", "lmcache"])
def test_packages_agree(package):
    asked = [Requirement(text) for line in _asked(package) if (text := line.split("#")[0].strip())]
    for one in asked:
        if one.name in VERSIONS and (one.marker is None or one.marker.evaluate({"extra": ""})):
            assert one.specifier.contains(VERSIONS[one.name]), f"{package} asks for {one}"


def test_numpy_has_a_version_for_all():
    asked = [
        Requirement(t.split("#")[0])
        for p in ("verl", "vllm", "vllm-ascend", "lmcache")
        for t in _asked(p)
        if t[:1] != "#" and t.strip()
    ]
    specifier = PINS["numpy"]
    for one in asked:
        if one.name == "numpy" and (one.marker is None or one.marker.evaluate({"extra": ""})):
            specifier &= one.specifier
    assert list(specifier.filter(["1.26.4", "2.0.2", "2.2.6", "2.3.0"])) == ["2.0.2", "2.2.6"]


def test_preflight_takes_them():
    (fit,) = versions.FITS["npu"]
    row = fit.packages
    for name in row.keys() & VERSIONS.keys():
        assert Requirement(f"{name}{row[name]}").specifier.contains(VERSIONS[name]), name
