"""The command line. Exit codes: 0 done, 1 it did not work, 2 something the user must mend."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from kvshare import __version__
from kvshare.cli import reporting, services, tools, training
from kvshare.core.errors import UserError
from kvshare.core.secrets import redacted

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for part in (training, reporting, tools, services):
    app.add_typer(part.app)


def main() -> None:
    try:
        app(prog_name="kvshare")
    except UserError as error:
        print(f"kvshare: {redacted(str(error))}", file=sys.stderr)
        sys.exit(2)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """KV cache sharing between vLLM rollout replicas in verl RL training, through LMCache."""
    if version:
        print(__version__)
        raise typer.Exit


if __name__ == "__main__":
    main()
