"""The pages of docs/commands, one a command, made from the same fields as its flags: `make docs`; a test compares them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from early_exit_cli.cli.app import app
from early_exit_cli.cli.options import default_text, flag_names, kind_text
from early_exit_cli.resolve import sections

ALWAYS = [
    ("--config FILE", "YAML file with any part of the settings, by section."),
    ("--set SECTION.NAME=VALUE", "Any setting by its dotted name. Repeatable."),
    ("--show-config", "Print every setting with its origin, and stop."),
    ("--json", "The result as JSON on stdout."),
]
"""Flags of every command."""


def commands(tree: typer.Typer = app, prefix: str = "") -> Iterator[tuple[str, str, Any]]:
    """(name, help, function) of every command that is shown, those of groups with the group's name in front."""
    for entry in tree.registered_commands:
        if entry.name and entry.callback and not entry.hidden:
            yield f"{prefix}{entry.name}", entry.help or "", entry.callback
    for group in tree.registered_groups:
        if group.typer_instance and group.name:
            yield from commands(group.typer_instance, f"{prefix}{group.name} ")


def page(name: str, help: str, function: Any) -> str:
    """One command's page, Markdown."""
    argument = f" [{function.argument.split('.')[1].upper()}]" if function.argument else ""
    parts = [
        f"# eexit {name}",
        help,
        "```bash\n" + "\n".join([f"eexit {name}{argument} [OPTIONS]", *function.examples]) + "\n```",
        "Made from the settings themselves (`make docs`). `--dashed-name` and `--underscored_name` are the same flag.",
    ]
    for section, fields in function.settings.items():
        rows = []
        for field_name, field in fields.items():
            rows.append(
                (
                    ", ".join(f"`{flag}`" for flag in flag_names(field_name, field)),
                    kind_text(field),
                    default_text(field),
                    field.description,
                )
            )
        parts.append(
            f"## {section}\n\n{(sections()[section].__doc__ or '').strip()}\n\n"
            + _table(["flag", "value", "default", ""], rows)
        )
    parts.append("## every command\n\n" + _table(["flag", ""], [(f"`{flag}`", meaning) for flag, meaning in ALWAYS]))
    return "\n\n".join(parts) + "\n"


def _table(columns: list[str], rows: list[tuple[Any, ...]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def file_name(name: str) -> str:
    """`cache extract` -> cache-extract.md."""
    return f"{name.replace(' ', '-')}.md"


def main() -> None:
    """Write all pages into the folder named on the command line; pages of commands that are gone are removed."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    pages = {file_name(name): page(name, help, function) for name, help, function in commands()}
    for old in folder.glob("*.md"):
        if old.name not in pages:
            old.unlink()
    for name, text in pages.items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
