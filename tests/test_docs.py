"""Docs that are made from the code are those of this code."""

import subprocess
import sys

from conftest import ROOT
from waiting import STUCK

CHECK = """
import runpy
made = runpy.run_path("docs/configuration.py")
assert made["PAGE"].read_text() == made["page"](), "run python docs/configuration.py"
"""


def test_configuration_is_up_to_date():
    """In a process of its own: after many other tests, Python 3.11's ast has failed here (SystemError)."""
    command = [sys.executable, "-c", CHECK]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=STUCK)
    assert done.returncode == 0, done.stderr
