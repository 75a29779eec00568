"""From flags, a YAML file and defaults to one validated `Config`, with the origin of every value.

Pure: it raises `ConfigError` with all faults at once and touches nothing but the YAML file it is given.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from early_exit_cli.config import Config
from early_exit_cli.errors import ConfigError, shown

DEFAULT = "default"


@dataclass(frozen=True)
class Resolved:
    """A validated configuration; `origins` maps a dotted key to `default`, `FILE` or `--flag`; `swept` holds the values
    that tell it from the other variants of a sweep."""

    config: Config
    origins: dict[str, str]
    swept: dict[str, Any] = field(default_factory=dict)

    def is_default(self, key: str) -> bool:
        """Whether nobody set `key` (dotted, as `backbone.model_name`)."""
        return self.origins[key] == DEFAULT

    def rows(self) -> list[tuple[str, Any, str]]:
        """(dotted key, value, origin) of every setting, in the tree's order."""
        dump = self.config.model_dump(mode="json")
        return [
            (f"{section}.{name}", value, self.origins[f"{section}.{name}"])
            for section, fields in dump.items()
            for name, value in fields.items()
        ]


def setting_keys() -> list[str]:
    """All dotted keys of the tree."""
    return [f"{section}.{name}" for section, cls in sections().items() for name in cls.model_fields]


def sections() -> dict[str, type[BaseModel]]:
    """Section name to its class."""
    return {name: field.annotation for name, field in Config.model_fields.items()}  # type: ignore[misc]


def resolve(flags: Mapping[str, tuple[Any, str]], yaml_path: Path | None = None) -> Resolved:
    """Layer flags over a YAML file over defaults.

    Args:
        flags: dotted key -> (value, the flag as the person would write it).
        yaml_path: optional file with any part of the tree.

    Raises:
        ConfigError: unreadable file, unknown keys, values out of bounds; all of them in one message.
    """
    values: dict[str, dict[str, Any]] = {}
    origins = dict.fromkeys(setting_keys(), DEFAULT)
    faults: list[str] = []
    if yaml_path is not None:
        for section, fields in _read_yaml(yaml_path, faults).items():
            for name, value in fields.items():
                key = f"{section}.{name if isinstance(name, str) else shown(name)}"
                if key in origins:
                    values.setdefault(section, {})[name] = value
                    origins[key] = str(yaml_path)
                else:
                    faults.append(f"{yaml_path}: unknown key {shown(key)}{nearest(key, origins)}")
    for key, (value, flag) in flags.items():
        if key not in origins:
            faults.append(f"{flag}: unknown key {key!r}{nearest(key, origins)}")
            continue
        section, name = key.split(".", 1)
        values.setdefault(section, {})[name] = value
        origins[key] = flag
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        faults.extend(_describe(item, origins) for item in error.errors())
    if faults:
        raise ConfigError("\n".join(faults), hint="eexit COMMAND --help lists every setting")
    return Resolved(config, origins)


def nearest(word: str, known: Mapping[str, Any] | list[str]) -> str:
    """`, did you mean 'x'?`, or nothing when no known name is near."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f", did you mean {close[0]!r}?" if close else ""


def parse_yaml(text: str | bytes) -> Any:
    """A YAML value, of plain types only; bytes in the encodings that YAML knows, by their byte order mark.

    Raises:
        ValueError: whatever is wrong with it: a damaged scalar fails in any way its constructor likes.
    """
    try:
        return yaml.safe_load(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except Exception as error:
        raise ValueError(str(error) or type(error).__name__) from error


def _read_yaml(path: Path, faults: list[str]) -> dict[str, dict[str, Any]]:
    try:
        tree = parse_yaml(path.read_bytes())
        tree = {} if tree is None else tree
    except FileNotFoundError:
        raise ConfigError(f"no configuration file at {path}", hint="configs/ holds examples") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not readable YAML: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold sections ({', '.join(sections())}), not {type(tree).__name__}")
    for section, fields in tree.items():
        if section not in sections():
            name = section if isinstance(section, str) else shown(section)
            owners = [f"'{owner}: {name}:'" for owner, form in sections().items() if name in form.model_fields]
            meant = f", a setting that stands in a section: {' or '.join(owners)}" if owners else None
            faults.append(f"{path}: unknown section {shown(section)}{meant or nearest(name, list(sections()))}")
        elif not isinstance(fields, dict):
            faults.append(f"{path}: section {section!r} must hold settings, not {type(fields).__name__}")
    return {name: fields for name, fields in tree.items() if name in sections() and isinstance(fields, dict)}


def _describe(item: Any, origins: Mapping[str, str]) -> str:
    key = ".".join(str(part) for part in item["loc"][:2])
    origin = origins.get(key, DEFAULT)
    if len(item["loc"]) < 2:  # a cross-field check speaks for its section
        return f"{key}: {item['msg'].removeprefix('Value error, ')}"
    return f"{origin}: {key} = {shown(item['input'])}: {item['msg'].removeprefix('Value error, ')}"
