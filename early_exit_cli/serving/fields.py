"""OpenAI's request bodies: what is honoured, what is refused by name, and what is ignored (docs/serving.md)."""

from __future__ import annotations

import json
import secrets
from abc import ABC, abstractmethod
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, FailFast, Field, ValidationError

from early_exit_cli.backbone.chat import Message, encode_prompt, turn_ends
from early_exit_cli.config import SamplingConfig
from early_exit_cli.config_fields import is_unicode
from early_exit_cli.errors import shown
from early_exit_cli.serving.refusal import Refusal

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
}
"""Fields of OpenAI's that are not honoured, with the values that ask for nothing (as null does)."""
MOST_STOPS = 4
MOST_TOKENS = 2**31 - 1
COLDEST = 1e-5
"""Below this temperature the best token is taken: scores would leave the range of floats."""
SMALLEST_NUCLEUS = 1e-9
"""Of `top_p` 0: the best token."""
SEEDS = 2**63


def _stops(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _usable_stops(stops: list[str] | None) -> list[str] | None:
    if stops and (len(stops) > MOST_STOPS or "" in stops):
        raise ValueError(f"at most {MOST_STOPS} texts, none of them empty")
    return stops


def _text_of_parts(content: Any) -> Any:
    """A turn's content as one text: parts of text, a line each."""
    if not isinstance(content, list):
        return content
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"part {number} is {shown(kind or part)}: only text can be read")
        texts.append(part["text"])
    return "\n".join(texts)


def _one_prompt(value: Any) -> Any:
    """A list that holds one prompt, without the list."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if not isinstance(value, str | list) or (isinstance(value, list) and any(type(each) is not int for each in value)):
        raise ValueError("it must be one text, or the ids of its tokens")
    return value


class Part(BaseModel):
    """Numbers are numbers and texts are texts; a field that is not known is ignored."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


class StreamOptions(Part):
    include_usage: bool | None = None


class Own(Part):
    """What OpenAI does not have. trace: who decided each token."""

    model_config = ConfigDict(extra="forbid")

    trace: bool = False


class Options(Part, ABC):
    """What both routes take. Defaults are OpenAI's, but for the temperature, which is 0."""

    param: ClassVar[str]
    """The field of the prompt."""

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    seed: int | None = Field(None, ge=-SEEDS, lt=SEEDS)
    stop: Annotated[list[str] | None, BeforeValidator(_stops), AfterValidator(_usable_stops)] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    return_token_ids: bool | None = None
    """vLLM's: the answer's token ids beside its text."""
    eexit: Own | None = None

    @property
    def limit(self) -> int | None:
        """New tokens at most, where the request says so."""
        return self.max_tokens

    @abstractmethod
    def encoded(self, tokenizer: Any) -> list[int]:
        """Token ids of the prompt.

        Raises:
            BackboneError: the chat template refuses it.
        """

    def ends(self, tokenizer: Any) -> tuple[str, ...]:
        """Texts that the answer is to end before."""
        return tuple(self.stop or ())

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with a chunk of the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def traces(self) -> bool:
        return bool(self.eexit and self.eexit.trace)

    def sampling(self) -> SamplingConfig:
        """How tokens are chosen; with a new seed where none is named."""
        temperature = self.temperature or 0.0
        settings: dict[str, Any] = {"repetition_penalty": self.repetition_penalty or 1.0}
        if temperature >= COLDEST:
            settings |= {
                "temperature": temperature,
                "top_p": 1.0 if self.top_p is None else max(self.top_p, SMALLEST_NUCLEUS),
                "top_k": max(self.top_k or 0, 0),
                "min_p": self.min_p or 0.0,
                "seed": secrets.randbelow(SEEDS) if self.seed is None else self.seed % SEEDS,
            }
        return SamplingConfig(**settings)

    def bias(self, vocab_size: int) -> dict[int, float]:
        """Token -> what is added to its score.

        Raises:
            Refusal: no token of the vocabulary.
        """
        found = {}
        for name, value in (self.logit_bias or {}).items():
            is_number = name.isascii() and name.isdigit() and len(name) < 10
            if not is_number or int(name) >= vocab_size:
                raise Refusal(
                    400, f"logit_bias: {shown(name)} is no token; they are 0 to {vocab_size - 1}", param="logit_bias"
                )
            found[int(name)] = value
        return found


class Turn(Part):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_text_of_parts)]


class ChatBody(Options):
    """Of `/v1/chat/completions`."""

    param = "messages"

    messages: Annotated[list[Turn], FailFast()] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS)

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def encoded(self, tokenizer: Any) -> list[int]:
        roles = {"developer": "system"}  # what OpenAI's newer models call it; templates know the other
        turns: list[Message] = [
            {"role": roles.get(turn.role, turn.role), "content": turn.content} for turn in self.messages
        ]
        return encode_prompt(tokenizer, turns)

    def ends(self, tokenizer: Any) -> tuple[str, ...]:
        return (*super().ends(tokenizer), *turn_ends(tokenizer))


class TextBody(Options):
    """Of `/v1/completions`. prompt: a text, or token ids."""

    param = "prompt"

    prompt: Annotated[str | list[int], BeforeValidator(_one_prompt)]

    @property
    def limit(self) -> int | None:
        return self.max_tokens or 16

    def encoded(self, tokenizer: Any) -> list[int]:
        return self.prompt if isinstance(self.prompt, list) else encode_prompt(tokenizer, self.prompt, raw=True)


BodyT = TypeVar("BodyT", bound=Options)


def read_body(body: bytes, form: type[BodyT]) -> BodyT:
    """A request's body.

    Raises:
        Refusal: 400, with the first thing that is wrong and the field it is in.
    """
    try:
        value = json.loads(body)
        whole = is_unicode(json.dumps(value, ensure_ascii=False))
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise Refusal(400, "the body must be a JSON object")
    if not whole:
        raise Refusal(400, "the body holds half a surrogate pair, which is no text")
    if value.get("generation_config") is not None:
        defaults = of_generation_config(value["generation_config"])
        if value.get("max_completion_tokens") is not None:
            defaults.pop("max_tokens", None)
        value = {**defaults, **value}
    for name, neutral in NEUTRAL.items():
        asked = value.get(name)
        if asked is not None and not any(type(asked) is type(each) and asked == each for each in neutral):
            raise Refusal(400, f"{name}: {shown(asked)} is not supported", param=name, code="unsupported_parameter")
    if value.get("max_tokens") is not None and value.get("max_completion_tokens") is not None:
        raise Refusal(400, "max_tokens and max_completion_tokens: give one of them", param="max_tokens")
    if value.get("stream_options") is not None and not value.get("stream"):
        raise Refusal(400, "stream_options: only where stream is true", param="stream_options")
    try:
        return form.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        param = ".".join(shown(part)[1:-1] if isinstance(part, str) else str(part) for part in first["loc"])
        raise Refusal(400, f"{param}: {first['msg'].removeprefix('Value error, ')}", param=param) from None


def of_generation_config(given: Any) -> dict[str, Any]:
    """The fields that `transformers chat` sends as its library's GenerationConfig, in JSON.

    Raises:
        Refusal: it is none.
    """
    try:
        config = json.loads(given)
        assert isinstance(config, dict)
    except (TypeError, ValueError, AssertionError, RecursionError):
        raise Refusal(
            400, "generation_config: it must be a GenerationConfig in JSON", param="generation_config"
        ) from None
    names = {"max_new_tokens": "max_tokens", "repetition_penalty": "repetition_penalty"}
    if config.get("do_sample"):
        names |= {name: name for name in ("temperature", "top_p", "top_k", "min_p")}
        config = {"temperature": 1.0} | {name: value for name, value in config.items() if value is not None}
    return {ours: config[theirs] for theirs, ours in names.items() if config.get(theirs) is not None}
