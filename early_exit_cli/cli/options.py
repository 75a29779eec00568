"""Settings as flags: a command names its configuration sections and gets one option per field.

`--max-steps` and `--max_steps` are the same option: names are read with dashes (`app.SPELLING`). An option that is not given
stays out of the overrides, so that YAML and defaults below it count.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import types
import typing
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from early_exit_cli.config_fields import is_text_list
from early_exit_cli.errors import ConfigError
from early_exit_cli.report import console
from early_exit_cli.report.status import status_line
from early_exit_cli.resolve import Resolved, parse_yaml, resolve, sections

Command = Callable[..., None]

SWEEPABLE = {
    *("heads.kind", "heads.rank", "heads.draft_vocab"),
    *("training.lr", "training.weight_decay", "training.warmup_steps", "training.max_grad_norm", "training.max_steps"),
}
"""Settings of which one run may train several values: none of them changes the states that heads see."""

ARGUMENT = "argument_"
ALIAS = "alias_"
CONFIG = typer.Option(
    "--config", help="YAML file with any part of the settings.", metavar="FILE", rich_help_panel="Settings"
)
SET = typer.Option(
    "--set",
    help="Any setting by its dotted name: --set training.lr=2e-4. Repeatable. Training takes lists, a set of heads for "
    "each value: --set heads.rank=\\[64,256].",
    metavar="SECTION.NAME=VALUE",
    rich_help_panel="Settings",
)
SHOW = typer.Option(
    "--show-config", help="Print every setting with its origin, and stop.", metavar="", rich_help_panel="Settings"
)
JSON = typer.Option("--json", help="The result as JSON on stdout.", metavar="", rich_help_panel="Output")


def flag_names(name: str, field: FieldInfo) -> list[str]:
    """A field's flag with dashes, then its other names."""
    extra = field.json_schema_extra
    aliases = extra.get("aliases", []) if isinstance(extra, dict) else []
    return [f"--{name.replace('_', '-')}", *map(str, aliases)]  # type: ignore[arg-type]


def option_type(field: FieldInfo) -> Any:
    """The type Typer should parse; choices and lists of numbers and names arrive as text, which the configuration reads."""
    annotation = _bare(field.annotation)
    if is_text_list(field):
        return list[str]
    return annotation if annotation in (str, int, float, bool, Path) else str


def default_text(field: FieldInfo) -> str:
    """The default as a person writes it; nothing where the help says what happens without the flag."""
    default = field.get_default(call_default_factory=True)
    if default is None or isinstance(default, bool):
        return ""
    return ",".join(map(str, default)) if isinstance(default, list) else str(default)


def kind_text(field: FieldInfo) -> str:
    """What a flag takes: its choices, or the kind of value; nothing for a switch."""
    annotation = _bare(field.annotation)
    if get_origin(annotation) is Literal:
        return "|".join(map(str, get_args(annotation)))
    if is_text_list(field):
        return "text"
    if get_origin(annotation) is list:
        return "list"
    return {bool: "", int: "number", float: "number", Path: "path"}.get(annotation, "text")


def _bare(annotation: Any) -> Any:
    """A type without validators and without None."""
    while True:
        if get_origin(annotation) is Annotated:
            annotation = get_args(annotation)[0]
        elif get_origin(annotation) in (typing.Union, types.UnionType):
            annotation = next(part for part in get_args(annotation) if part is not type(None))
        else:
            return annotation


def _help(field: FieldInfo) -> str:
    """What a flag is for, its choices, and its default, as Typer's markup."""
    parts = [field.description or ""]
    if get_origin(_bare(field.annotation)) is Literal:
        parts.append(f"[{kind_text(field).replace('|', ' | ')}]")
    if default_text(field):
        parts.append(f"(default: {default_text(field)})")
    return " ".join(parts).replace("[", "\\[")


def _metavar(field: FieldInfo) -> str:
    """What a flag takes, in a word; an empty one for a switch."""
    return "choice" if get_origin(_bare(field.annotation)) is Literal else kind_text(field)


def configured(
    *names: str,
    without: tuple[str, ...] = (),
    sweeps: bool = False,
    argument: str | None = None,
    examples: tuple[str, ...] = (),
) -> Callable[[Callable[..., None]], Command]:
    """Give a command the flags of the sections `names`; it is called with the `Resolved` settings.

    `without` are settings of these (dotted) that do nothing there; in a shared file they count as another command's. With `sweeps`, it is called with a list of them: `--set heads.rank=[64,256]` makes two. `argument` is a setting
    (dotted) that may also be given without its flag. `examples` are shown below the command's help.
    """

    def decorate(function: Callable[..., None]) -> Command:
        parameters: list[inspect.Parameter] = []
        keys: dict[str, tuple[str, str]] = {}
        settings = {
            section: {
                name: field
                for name, field in sections()[section].model_fields.items()
                if f"{section}.{name}" not in without
            }
            for section in names
        }
        for section, fields in settings.items():
            for name, field in fields.items():
                kind = option_type(field)
                flag, *others = flag_names(name, field)
                spellings = {name: [flag if kind is not bool else f"{flag}/--no-{flag[2:]}"], f"{ALIAS}{name}": others}
                for parameter, spelled in spellings.items():
                    if spelled:
                        option = typer.Option(
                            *spelled,
                            help=_help(field),
                            hidden=spelled is others,
                            show_default=False,
                            metavar=_metavar(field),
                            rich_help_panel=section.capitalize(),
                        )
                        keys[parameter] = (f"{section}.{name}", flag)
                        parameters.append(_keyword(parameter, kind, option))
        if argument is not None:
            section, name = argument.split(".")
            given: Any = list[str] if is_text_list(settings[section][name]) else str
            shown = typer.Argument(metavar=name.upper(), help=f"The same as --{name}.".replace("_", "-"))
            parameters.insert(0, _keyword(ARGUMENT, given, shown))
        fixed: list[tuple[str, Any, Any]] = [
            ("config", Annotated[Path | None, CONFIG], None),
            ("set_", Annotated[list[str] | None, SET], None),
            ("show_config", Annotated[bool, SHOW], False),
            ("json_", Annotated[bool, JSON], False),
        ]
        parameters += [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for name, annotation, default in fixed
        ]

        @functools.wraps(function)
        def command(**values: Any) -> None:
            path, assignments, show = values.pop("config"), values.pop("set_"), values.pop("show_config")
            as_json = values.pop("json_")
            given = values.pop(ARGUMENT, None)
            flags = {key: (values[name], flag) for name, (key, flag) in keys.items() if values[name] not in (None, [])}
            if argument is not None and given not in (None, []):
                if argument in flags:
                    raise ConfigError(f"{given!r} is given beside {flags[argument][1]} {flags[argument][0]!r}")
                flags[argument] = (given, argument.split(".")[1].upper())
            flags |= parse_assignments(assignments or [])
            variants = sweep(flags, path) if sweeps else [resolve(flags, path)]
            if show:
                for resolved in variants:
                    show_settings(resolved, settings, as_json)
                return
            with status_line():
                function(variants if sweeps else variants[0], as_json)

        command.settings, command.argument, command.examples = settings, argument, examples  # type: ignore[attr-defined]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return decorate


def _keyword(name: str, kind: Any, shown: Any) -> inspect.Parameter:
    """A parameter that is None where nobody gives it."""
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, shown]
    )


def sweep(flags: dict[str, tuple[Any, str]], path: Path | None) -> list[Resolved]:
    """One set of settings for every combination of the values that sweepable settings were given as lists.

    Raises:
        ConfigError: as `resolve`.
    """
    lists = {key: value for key, (value, _) in flags.items() if key in SWEEPABLE and isinstance(value, list)}
    variants = []
    for values in itertools.product(*lists.values()):
        swept = dict(zip(lists, values, strict=True))
        chosen = {key: (value, flags[key][1]) for key, value in swept.items()}
        variants.append(replace(resolve({**flags, **chosen}, path), swept=swept))
    return variants


def parse_assignments(assignments: list[str]) -> dict[str, tuple[Any, str]]:
    """`a.b=value` pairs; the value is read as YAML."""
    found = {}
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator:
            raise ConfigError(f"--set {assignment}: write it as section.name=value")
        try:
            found[key.strip()] = (parse_yaml(text), f"--set {key.strip()}")
        except ValueError:
            raise ConfigError(f"--set {assignment}: the value is not readable") from None
    return found


def show_settings(resolved: Resolved, settings: dict[str, dict[str, FieldInfo]], as_json: bool) -> None:
    """The settings a command would run with, and where each comes from."""
    shown = {f"{section}.{name}" for section, fields in settings.items() for name in fields}
    rows = [row for row in resolved.rows() if row[0] in shown]
    if as_json:
        console.emit_json({key: {"value": value, "origin": origin} for key, value, origin in rows})
    else:
        console.table(
            "",
            ["setting", "value", "origin"],
            [(k, "-" if v is None else str(v), o) for k, v, o in rows],
            result=True,
        )
