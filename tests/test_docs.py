"""Docs that are made from the code are those of this code."""

import runpy

from conftest import ROOT


def test_configuration_is_up_to_date():
    """If this fails: python docs/configuration.py."""
    made = runpy.run_path(str(ROOT / "docs" / "configuration.py"))
    assert made["PAGE"].read_text() == made["page"]()
