"""Writes docs/configuration.md from the code: `python docs/configuration.py`."""

from __future__ import annotations

import ast
import itertools
import os
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "configuration.md"
VARIABLE = re.compile(r"^# ([A-Za-z_, =1]+?)  +(.+?)(?: +\(([^()]+)\))?$")

HEAD = """# Configuration

Made by `python docs/configuration.py` from the launchers, the router's YAML and the command line: change those.

## Launchers

Environment variables, from the head of each launcher. What follows its name are Hydra overrides of verl's config.

| variable | what | default | launchers |
|---|---|---|---|
"""
KVSHARE = """
## kvshare's own environment variables

| variable | what |
|---|---|
"""
ROUTER = """
## Router

`config/router.yaml`; another one: `ROUTER=mine.yaml bash run_…`.

```yaml
{}```

## LMCache

Settings are LMCache's own, in the YAML of a backend (`config/`) or as `LMCACHE_<KEY>` in the environment, which wins;
lists are comma-separated there. `lmcache.<key>` in `kv_connector_extra_config` wins over both. `kvshare preflight`
checks what LMCache makes of all three.
"""


def page() -> str:
    router = (ROOT / "config" / "router.yaml").read_text()
    return HEAD + launchers() + KVSHARE + variables() + ROUTER.format(router) + "\n" + commands()


def launchers() -> str:
    """Rows of the table, with the launchers that have each line."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    paths = sorted(ROOT.glob("run_qwen_*.sh"))
    for path in paths:
        for line in path.read_text().split("\nset ")[0].splitlines():
            if found := VARIABLE.match(line):
                name, what, default = found.groups(default="")
                rows.setdefault((name, what, default), []).append(path.stem.removeprefix("run_qwen_"))
    return "".join(
        f"| `{name}` | {what} | {default} | {'all' if len(where) == len(paths) else ', '.join(where)} |\n"
        for (name, what, default), where in sorted(rows.items())
    )


def variables() -> str:
    """Constants of kvshare that name an environment variable, with the docstring below them."""
    rows = []
    for path in sorted((ROOT / "kvshare").rglob("*.py")):
        body = ast.parse(path.read_text()).body
        for node, below in itertools.pairwise(body):
            match node, below:
                case (
                    ast.Assign(value=ast.Constant(value=str(name))),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ) if name.startswith("KVSHARE_"):
                    rows.append(f"| `{name}` | {' '.join(text.split()).replace('``', '`')} |\n")
    return "".join(rows)


def commands() -> str:
    """Typer's own reference of the command line."""
    import typer
    from typer.cli import get_docs_for_click

    from kvshare.cli.main import app

    os.environ["COLUMNS"] = "100"
    command = typer.main.get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="kvshare", title="Command line")
    return re.sub(r"^#", "##", text, flags=re.M).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
