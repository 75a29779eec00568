"""What a setting is made of: a field with its default, bounds and help, the kinds of lists and names, and a section."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator
from pydantic.fields import FieldInfo

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def is_unicode(text: str) -> bool:
    """Whether a text can be written: bytes of a terminal that are no UTF-8 come as halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def setting(default: Any, help: str, *, aliases: tuple[str, ...] = (), **bounds: Any) -> Any:
    """A configuration field: default, help text, extra flag spellings, and pydantic bounds (ge, le, gt, lt)."""
    extra: Any = {"aliases": list(aliases)}
    if isinstance(default, list):
        return Field(default_factory=lambda: list(default), description=help, json_schema_extra=extra, **bounds)
    return Field(default, description=help, json_schema_extra=extra, **bounds)


FORMER_WORDS = {"lookahead": "eagle"}
"""What settings and files said before, and say now: read, written nowhere."""


def todays_word(value: Any) -> Any:
    """A word of settings or files as it is written now."""
    return FORMER_WORDS.get(value, value) if isinstance(value, str) else value


DrafterName = Annotated[Literal["exit", "eagle", "mtp", "lookup", "auto", "none"] | None, BeforeValidator(todays_word)]


def split_numbers(value: Any) -> Any:
    """A list given on the command line: numbers separated by commas or spaces."""
    return value.replace(",", " ").split() if isinstance(value, str) else value


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


TextList = Annotated[list[str], BeforeValidator(_listed)]
"""Whole texts, which may hold commas and spaces; one alone is a list, too."""


def is_text_list(field: FieldInfo) -> bool:
    """Whether a setting is a `TextList`: its flag may be given several times."""
    return any(isinstance(each, BeforeValidator) and each.func is _listed for each in field.metadata)


FloatList = Annotated[list[float], BeforeValidator(split_numbers)]
IntList = Annotated[list[int], BeforeValidator(split_numbers)]


class Section(BaseModel):
    """Base of all sections: unknown keys are refused, defaults are validated too, numbers are finite, and no text holds
    what no file name and no terminal takes."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _plain_text(cls, value: Any) -> Any:
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and ("\0" in text or not is_unicode(text)):
                raise ValueError("a null byte, or bytes that are no text")
        return value


def _endpoint(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("write it as http://HOST:PORT/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError("an address alone; a key comes from EEXIT_ANSWERS_KEY or OPENAI_API_KEY")
    return value.rstrip("/")


Endpoint = Annotated[str, AfterValidator(_endpoint)]
"""The address of a server."""


def _names(value: Any) -> Any:
    return [name for name in value.replace(",", " ").split() if name] if isinstance(value, str) else value


NameList = Annotated[list[str], BeforeValidator(_names)]


def _in_todays_words(names: list[str]) -> list[str]:
    return [todays_word(name) for name in names]


MethodList = Annotated[NameList, AfterValidator(_in_todays_words)]


def _repo_id(value: str) -> str:
    if HUB_ID.fullmatch(value) is None:
        raise ValueError("write it as ORG/NAME; a revision goes into --revision")
    return value


RepoId = Annotated[str, AfterValidator(_repo_id)]
