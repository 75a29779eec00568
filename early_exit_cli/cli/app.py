"""The command tree, and the one place where errors become a line and an exit code.

Nothing heavy is imported here: each command's file imports torch when it runs.
"""

from __future__ import annotations

import os
import sys

import typer

from early_exit_cli import __version__
from early_exit_cli.cli import bench, cache, calibrate, evaluate, export, hub, infer, train
from early_exit_cli.errors import EexitError, EexitWarning, said
from early_exit_cli.files.environment import unsaved
from early_exit_cli.report import console

app = typer.Typer(
    name="eexit",
    help="Faster answers from a 4-bit language model, with exactly the same output.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("infer", help="Answer prompts: with drafts, plainly, or several ways side by side.")(infer.command)
app.command("train", help="Train exit heads or an EAGLE head, beside the running backbone or from a cache.")(
    train.command
)
app.command("calibrate", help="Fit thresholds for each head and target accuracy, and what drafts are worth.")(
    calibrate.command
)
app.command("evaluate", help="Measure the heads on text, and why drafts are not accepted.")(evaluate.command)
app.command("export", help="Write the EAGLE head for vLLM and SGLang.")(export.command)
app.command("bench", help="Measure methods side by side on a set of prompts.")(bench.command)
app.command("push", help="Upload a bundle to the Hub, in one commit, with a model card.")(hub.push)
app.command("pull", help="Download a bundle from the Hub.")(hub.pull)
app.command("import", help="Make a bundle of heads that DSSD's own program trained.")(hub.import_)

states = typer.Typer(
    help="Hidden states on disk: extract once, train many times. And what else is kept.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
states.command("extract", help="Run the backbone over text once and keep its hidden states.")(cache.extract)
states.command("info", help="What a cache holds and what it costs; without --cache-dir, what is kept by kind.")(
    cache.info
)
states.command("verify", help="Check every file of a cache.")(cache.verify)
states.command("repair", help="Compute damaged files of a cache again.")(cache.repair)
states.command(
    "clear", help="Remove what is kept in the user's cache folder: converted models, copies, measurements, code."
)(cache.clear)
app.add_typer(states, name="cache")


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"eexit {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),
) -> None:
    """Faster answers from a 4-bit language model, with exactly the same output."""


def main() -> None:
    """Entry point of `eexit` and `python -m early_exit_cli`. Typer ends an interrupted run with 130."""
    console.accept_any_text()
    console.show_warnings(EexitWarning)
    try:
        app()
    except Exception as error:
        if os.environ.get("EEXIT_DEBUG"):
            raise
        console.error(*described(error))
        sys.exit(error.exit_code if isinstance(error, EexitError) else 1)
    finally:
        if (reason := unsaved()) is not None:
            console.note(reason)


def described(error: Exception) -> tuple[str, str | None]:
    """An exception as a message and a hint."""
    if isinstance(error, EexitError):
        return error.message, error.hint
    if isinstance(error, OSError) and error.strerror:  # a full disk, a folder that may not be written, a long name
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror, None
    return said(error), "EEXIT_DEBUG=1 shows where this came from"
