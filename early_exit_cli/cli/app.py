"""The command tree, and the one place where errors become a line and an exit code.

Nothing heavy is imported here: each command's file imports torch when it runs.
"""

from __future__ import annotations

import atexit
import gc
import logging
import os
import sys
from typing import Any

import typer

from early_exit_cli import __version__
from early_exit_cli.cli import bench, cache, calibrate, chat, env, evaluate, export, hub, infer, serve, train
from early_exit_cli.cli.options import Command
from early_exit_cli.errors import EexitError, EexitWarning, said
from early_exit_cli.files.environment import unsaved
from early_exit_cli.report import console

SPELLING: dict[str, Any] = {
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": lambda name: name.replace("_", "-"),  # --max_steps is --max-steps
}
app = typer.Typer(
    name="eexit",
    help="Faster answers from a 4-bit language model, with exactly the same output.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings=SPELLING,
)


def add(tree: typer.Typer, name: str, function: Command, help: str, *, hidden: bool = False) -> None:
    """Give a tree a command, with its examples below its help."""
    examples: tuple[str, ...] = getattr(function, "examples", ())
    shown = "\n\n".join(("Examples", *examples)).replace("[", "\\[") if examples else None
    tree.command(name, help=help, epilog=shown, hidden=hidden)(function)


add(app, "infer", infer.command, "Answer prompts: with drafts, plainly, or several ways side by side.")
add(
    app,
    "chat",
    chat.command,
    "Talk with a model that stays loaded: each turn takes over what the earlier ones computed.",
)
add(
    app,
    "serve",
    serve.command,
    "Serve OpenAI's API: requests share passes, and take over what earlier ones computed.",
)
add(app, "train", train.command, "Train exit heads or an EAGLE head, beside the running backbone or from a cache.")
add(app, "calibrate", calibrate.command, "Fit thresholds for each head and target accuracy, and what drafts are worth.")
add(app, "evaluate", evaluate.command, "Measure the heads on text, and why drafts are not accepted.")
add(app, "export", export.command, "Write the EAGLE head for vLLM and SGLang.")
add(app, "bench", bench.command, "Measure methods side by side on a set of prompts.")
add(app, "push", hub.push, "Upload a bundle to the Hub, in one commit, with a model card.")
add(app, "pull", hub.pull, "Download a bundle from the Hub.")
add(app, "import", hub.import_, "Make a bundle of heads trained elsewhere: published EAGLE-3 heads, or DSSD's.")
add(app, "env", env.command, "Show what a run would run on and with, as text to paste into a report.")

states = typer.Typer(
    help="Hidden states on disk: extract once, train many times. And what else is kept: ls, rm.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
add(states, "extract", cache.extract, "Run the backbone over text once and keep its hidden states.")
add(states, "info", cache.info, "What a cache of hidden states holds and what it costs.")
add(states, "verify", cache.verify, "Check every file of a cache.")
add(states, "repair", cache.repair, "Compute damaged files of a cache again.")
add(states, "ls", cache.ls, "List what is kept in the user's cache folder (EEXIT_HOME): what of, how large, when used.")
add(
    states,
    "rm",
    cache.rm,
    "Remove what is kept in the user's cache folder, by name, by kind, or all that is soon made again.",
)
add(states, "clear", cache.clear, "The same as rm --kind, or rm --all.", hidden=True)
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
    atexit.register(gc.freeze)  # or Python ends with a search for garbage among torch's objects, which takes a second
    console.accept_any_text()
    console.show_warnings(EexitWarning)
    if not os.environ.get("EEXIT_DEBUG"):
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # advice for people who use it themselves
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
