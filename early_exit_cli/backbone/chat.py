"""Prompts and conversations as token ids, through the tokenizer's chat template where it has one."""

from __future__ import annotations

import json
import warnings
from typing import Any

from early_exit_cli.errors import BackboneError, EexitWarning, said

PROBE = "eexit"
"""A text that is in a rendered template if the template read it."""
Message = dict[str, Any]
"""A turn as chat templates read it: `role` (system, user, assistant, tool), `content`, which is a text, and where there
are any `tool_calls`, `name` and `tool_call_id`."""
Prompt = str | list[Message]
"""What is asked: a text, or the turns of a conversation up to the one to be answered."""


def encode_prompt(tokenizer: Any, prompt: Prompt, *, raw: bool = False) -> list[int]:
    """Token ids of a prompt, up to where the answer begins: in the chat template where the tokenizer has one, unless
    `raw`. Without it a text stays as it is, and the turns of a conversation are joined plainly.

    Raises:
        BackboneError: an image or another part that is no text; the template refuses the prompt, with its own words.
    """
    if not isinstance(prompt, str):
        prompt = [_told_in_text(message) for message in prompt]
    if raw or not tokenizer.chat_template:
        text = prompt if isinstance(prompt, str) else joined([*prompt, {"role": "assistant", "content": ""}])
        return encode_text(tokenizer, text)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return _through_template(tokenizer, messages, is_prompt=True)


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text that goes on: with the tokenizer's beginning token, but never twice, and without an end."""
    ids = _ids(tokenizer(text))
    begin, end = tokenizer.bos_token, tokenizer.eos_token
    if begin and text.startswith(begin) and ids[:2] == [tokenizer.bos_token_id] * 2:
        ids = ids[1:]
        warnings.warn(f"the prompt begins with {begin}: the tokenizer's own is left out", EexitWarning, stacklevel=2)
    if end and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not text.endswith(end):
        ids = ids[:-1]
        warnings.warn(f"the tokenizer ends a prompt with {end}: it is left out", EexitWarning, stacklevel=2)
    return ids


def encode_conversation(tokenizer: Any, messages: list[Message]) -> tuple[list[int], int]:
    """Token ids of a whole conversation, and where among them the first assistant turn begins; 0 without one.

    Raises:
        BackboneError: the template refuses the conversation, with its own words.
    """
    if tokenizer.chat_template:
        ids = _through_template(tokenizer, messages, is_prompt=False)
    else:
        ids = _ids(tokenizer(joined(messages)))
    first = next((place for place, message in enumerate(messages) if message["role"] == "assistant"), 0)
    if not first:
        return ids, 0
    try:
        before = encode_prompt(tokenizer, messages[:first])
    except BackboneError:  # a template may want an answer in what it renders
        return ids, 0
    start = next((place for place, (one, other) in enumerate(zip(ids, before, strict=False)) if one != other), None)
    return ids, min(len(ids) - 1, len(before)) if start is None else start


def joined(messages: list[Message]) -> str:
    """Roles and texts, a paragraph each."""
    return "\n\n".join(f"{message['role']}: {_in_words(message)}".rstrip(" ") for message in messages)


def turn_ends(tokenizer: Any, *, raw: bool = False) -> tuple[str, ...]:
    """Texts that end an answer in a conversation: what `joined` begins the next turn of the user with, where there is no
    chat template, since a model that was taught no turns goes on with both sides."""
    return ("\n\nuser:",) if raw or not tokenizer.chat_template else ()


def _told_in_text(message: Message) -> Message:
    """A turn whose content is a text, where it was parts that are texts."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise BackboneError(
                f"a prompt holds a part of type {kind!r}, and only text is read here",
                hint="leave it out, or describe it",
            )
        texts.append(text)
    return {**message, "content": "\n".join(texts)}


def _through_template(tokenizer: Any, messages: list[Message], is_prompt: bool) -> list[int]:
    """Ids as the template renders the turns; where it refuses them, those of the turns put in simpler roles.

    Some templates know no system turn, others neither tools nor two turns of one role in a row.
    """
    if "tool_calls" not in str(tokenizer.chat_template):
        messages = [_spoken(message) for message in messages]
    simpler = _alternating(messages)
    wants_parts = _wants_parts(tokenizer)
    refusals: list[Exception] = []
    for turns in [messages] if simpler == messages else [messages, simpler]:
        if wants_parts:
            turns = [{**turn, "content": _in_parts(turn["content"])} for turn in turns]
        try:
            return _ids(tokenizer.apply_chat_template(turns, add_generation_prompt=is_prompt, return_dict=True))
        except Exception as error:  # a template raises what it likes, and may be no Jinja at all
            refusals.append(error)
    raise BackboneError(
        f"the chat template refuses this: {said(refusals[0])}", hint="--raw uses the prompt without the template"
    ) from refusals[0]


def _wants_parts(tokenizer: Any) -> bool:
    """Whether the template reads a turn's text only where it is a part beside images, and would leave out a plain one."""
    if "type" not in str(tokenizer.chat_template):
        return False

    def is_read(content: Any) -> bool:
        turns = [{"role": "user", "content": content}]
        try:
            return PROBE in tokenizer.apply_chat_template(turns, tokenize=False)
        except Exception:  # a template raises what it likes
            return False

    return not is_read(PROBE) and is_read(_in_parts(PROBE))


def _in_parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _alternating(messages: list[Message]) -> list[Message]:
    """Only turns of user and assistant, in alternation: what the system and tools say is said by the user."""
    found: list[Message] = []
    for message in messages:
        role = "assistant" if message["role"] == "assistant" else "user"
        text = _in_words(message)
        if found and found[-1]["role"] == role:
            found[-1]["content"] = "\n\n".join(part for part in (found[-1]["content"], text) if part)
        else:
            found.append({"role": role, "content": text})
    return found


def _spoken(message: Message) -> Message:
    """A turn whose tool calls stand in its text, for a template that would leave them out."""
    if "tool_calls" not in message:
        return message
    return {key: value for key, value in message.items() if key != "tool_calls"} | {"content": _in_words(message)}


def _in_words(message: Message) -> str:
    """The text of a turn and, as JSON, its tool calls."""
    calls = [json.dumps(call.get("function", call), ensure_ascii=False) for call in message.get("tool_calls", [])]
    return "\n".join(part for part in (message["content"], *calls) if part)


def _ids(encoded: Any) -> list[int]:
    return [int(token) for token in encoded["input_ids"]]
