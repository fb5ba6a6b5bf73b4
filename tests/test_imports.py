"""Imports go one way: from the command line down to core, and never in a circle."""

import ast
from graphlib import TopologicalSorter

from conftest import ROOT

ORDER = ("core", "record", "routing", "hooks", "services", "launch", "tools", "cli")
"""Packages from the bottom up: each imports itself and those before it. hooks and services do not know each other."""

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "kvshare").rglob("*.py")
}


def imported(module: str) -> set[str]:
    """Modules of kvshare that a module names in an import, also within functions."""
    names = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kvshare"):
            names |= {
                full if (full := f"{node.module}.{alias.name}") in MODULES else node.module for alias in node.names
            }
    return names - {module, "kvshare"}


def package(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_no_circle():
    graph = {module: imported(module) for module in MODULES}
    list(TopologicalSorter(graph).static_order())


def test_no_module_imports_upwards():
    for module in MODULES:
        if package(module) in ORDER:
            allowed = ORDER[: ORDER.index(package(module)) + 1]
            wrong = {name for name in imported(module) if package(name) not in allowed}
            assert not wrong, f"{module} imports {wrong}"


def test_hooks_and_services_do_not_know_each_other():
    """What runs in an engine's processes brings no service, report or command line with it."""
    for module in MODULES:
        if package(module) in ("hooks", "services"):
            other = {"hooks": "services", "services": "hooks"}[package(module)]
            assert not {name for name in imported(module) if package(name) == other}, module
