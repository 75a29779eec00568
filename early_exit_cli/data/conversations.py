"""What a row of a data set says: a plain text, a prompt, or a conversation, in any of the field's usual forms.

Recognised by the columns that hold something: `text`; `messages` or `conversations` (turns with `role` and `content`, or
ShareGPT's `from` and `value`); `prompt`, `instruction` (with `input` or `context`), `question`, `query` or `input`, alone
or with an answer in `completion`, `response`, `answer` or `output`; `turns`, of which the first counts (Spec-Bench).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from early_exit_cli.backbone.chat import Message, Prompt, joined
from early_exit_cli.files.atomic import parse_json

CONVERSATIONS = ("messages", "conversations", "conversation")
PROMPTS = ("prompt", "turns", "instruction", "question", "query", "input")
ANSWERS = ("completion", "response", "answer", "output")
SYSTEMS = ("system", "system_prompt")
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "chatgpt", "model", "bot", "ai", "bing", "bard", "function_call"), "assistant"
    ),
    **dict.fromkeys(("tool", "function", "observation", "tool_response", "function_response", "ipython"), "tool"),
}
"""Names of who speaks, and the role that chat templates know."""
KEPT_KEYS = ("name", "tool_call_id", "reasoning_content")


class UnreadableRow(ValueError):
    """Why a row of a known form says nothing."""


class UnknownRow(UnreadableRow):
    """No column of a row is of a known form."""


@dataclass(frozen=True)
class Sample:
    """What a row says. form: the columns it was read from.

    text: a plain text or a prompt, as it is. messages: the turns of a conversation; none where the row is a plain text.
    """

    form: str
    text: str
    messages: list[Message]

    def prompts(self, every_turn: bool = False) -> list[Prompt]:
        """What is to be answered: the text; or a conversation up to its first user turn, or up to each of them."""
        if not self.messages:
            return [self.text]
        turns = [place for place, message in enumerate(self.messages) if message["role"] == "user"]
        return [_as_prompt(self.messages[: place + 1]) for place in (turns if every_turn else turns[:1])]

    def last_prompt(self) -> Prompt:
        """What a person who hands in this row asks: the text, or the conversation up to its last turn that is no answer.

        Raises:
            UnreadableRow: nobody asks anything.
        """
        if not self.messages:
            return self.text
        asked = [place for place, message in enumerate(self.messages) if message["role"] in ("user", "tool")]
        if not asked:
            raise UnreadableRow("no user turn")
        return _as_prompt(self.messages[: asked[-1] + 1])


def read_row(row: Mapping[str, Any], column: str | None = None) -> Sample:
    """What a row says, by its columns, or in the one named.

    Raises:
        UnknownRow: no column of a known form, or not the named one.
        UnreadableRow: nothing in it, or no text and no turns of known roles.
    """
    if column is not None:
        if column not in row:
            raise UnknownRow(f"no column {column!r}")
        return _read_value(column, row[column])
    held = {key: value for key, value in row.items() if value not in (None, "", [], {}) and not _is_blank(value)}
    if "text" in held:
        return _read_value("text", held["text"])
    for key in CONVERSATIONS:
        if key in held:
            sample = _read_value(key, _unpacked(held[key]))
            return _conversation(sample.form, [*_system_of(held), *sample.messages]) if sample.messages else sample
    asked = next((key for key in PROMPTS if key in held), None)
    if asked is not None:
        return _read_pair(held, asked)
    if any(key in row for key in ("text", *CONVERSATIONS, *PROMPTS)):
        raise UnreadableRow("empty")
    raise UnknownRow("no column that holds a text or a conversation")


def _unpacked(value: Any) -> Any:
    """Turns that were written into their column as JSON."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with contextlib.suppress(ValueError):
            return parse_json(value)
    return value


def _read_value(column: str, value: Any) -> Sample:
    """A column by itself: a text, turns of a conversation, or Spec-Bench's turns."""
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        return _conversation(column, [message_of(turn) for turn in value])
    text = value[0] if isinstance(value, list) and value else value
    if not isinstance(text, str):
        raise UnreadableRow("empty" if text in (None, []) else f"{column} is no text")
    if _is_blank(text):
        raise UnreadableRow("empty")
    return Sample(column, text, [])


def _read_pair(row: Mapping[str, Any], asked: str) -> Sample:
    """A prompt, and where there are any, what it goes with, the answer, and the system's and earlier turns."""
    columns = [asked]
    question = _read_value(asked, row[asked])
    text = question.text
    if asked == "instruction":
        added = next((key for key in ("input", "context") if isinstance(row.get(key), str)), None)
        if added is not None:
            columns.append(added)
            text = f"{text}\n\n{row[added]}"
    answer = next((key for key in ANSWERS if key in row), None)
    answered = [] if answer is None or asked == "turns" else _answer(answer, row[answer])
    if answered and answer is not None:
        columns.append(answer)
    before = [*_system_of(row), *_history_of(row)]
    if not (before or answered or question.messages):
        return Sample(" + ".join(columns), text, [])
    turns = question.messages or [{"role": "user", "content": text}]
    return _conversation(" + ".join(columns), [*before, *turns, *answered])


def _answer(column: str, value: Any) -> list[Message]:
    """The turns of an answer: a text, a number, the first of several texts, or turns."""
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        return [message_of(turn) for turn in value]
    if isinstance(value, list) and value:
        value = value[0]
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise UnreadableRow(f"{column} is no text")
    return [{"role": "assistant", "content": value}]


def _system_of(row: Mapping[str, Any]) -> list[Message]:
    """The turn of a column for the system's text, where there is one."""
    texts = [row[key] for key in SYSTEMS if isinstance(row.get(key), str)]
    return [{"role": "system", "content": text} for text in texts[:1]]


def _history_of(row: Mapping[str, Any]) -> list[Message]:
    """Earlier turns, in a column of pairs of question and answer."""
    pairs = row.get("history")
    if not isinstance(pairs, list):
        return []
    turns = []
    for pair in pairs:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise UnreadableRow("history is not made of pairs of texts")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return turns


def _conversation(form: str, messages: list[Message]) -> Sample:
    """A conversation, without system turns that say nothing."""
    turns = [message for message in messages if message["role"] != "system" or message["content"].strip()]
    if all(_is_blank(message["content"]) and "tool_calls" not in message for message in turns):
        raise UnreadableRow("empty")
    user = next((message["content"] for message in turns if message["role"] == "user"), None)
    return Sample(form, user or joined(turns), turns)


def message_of(turn: Any) -> Message:
    """A turn as chat templates read it, from `role` and `content` or from `from` and `value`.

    Raises:
        UnreadableRow: an unknown role, or content that is no text.
    """
    if not isinstance(turn, Mapping):
        raise UnreadableRow("a turn that is no object")
    name = turn.get("role") or turn.get("from")
    role = ROLES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        raise UnreadableRow(f"a turn of the unknown role {name!r}" if name else "a turn without a role")
    content = next((turn[key] for key in ("content", "value", "text") if turn.get(key) is not None), None)
    message: Message = {"role": role, "content": _text_of(content)}
    calls = turn.get("tool_calls")
    if isinstance(calls, list) and calls:
        message["tool_calls"] = [_call(call) for call in calls]
    elif content is None and role != "assistant":
        raise UnreadableRow(f"a {role} turn without content")
    return message | {key: turn[key] for key in KEPT_KEYS if isinstance(turn.get(key), str)}


def _text_of(content: Any) -> str:
    """The text of a turn's content: a string, or parts, a line each."""
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, list):
        raise UnreadableRow("a turn whose content is no text")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else None
            raise UnreadableRow(
                f"a part that is no text ({kind})" if isinstance(kind, str) else "a part that is no text"
            )
        texts.append(text)
    return "\n".join(texts)


def _call(call: Any) -> dict[str, Any]:
    """A tool call with its arguments as an object, which is how templates write them as JSON."""
    if not isinstance(call, Mapping):
        raise UnreadableRow("a tool call that is no object")
    function = call.get("function", call)
    if not isinstance(function, Mapping):
        raise UnreadableRow("a tool call that is no object")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError):
            arguments = parse_json(arguments)
    function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else {"type": "function", "function": function}


def _as_prompt(messages: list[Message]) -> Prompt:
    """Turns to be answered; a text where there is but one of the user's."""
    is_text = len(messages) == 1 and messages[0]["role"] == "user"
    return messages[0]["content"] if is_text else messages


def _is_blank(value: Any) -> bool:
    return isinstance(value, str) and not value.strip()
