"""The table of commands and the one place where errors become a line and an exit code."""

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Make generative models forget concepts.")


@app.callback()
def root() -> None:
    """Make generative models forget concepts."""


def main() -> None:
    """Console entry point."""
    app()
