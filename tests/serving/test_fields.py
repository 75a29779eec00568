"""Bodies of requests: what is honoured, what is refused by name, and how faults are told."""

import json
from types import SimpleNamespace

import pytest
from transformers import GenerationConfig

from early_exit_cli.serving.fields import ChatBody, TextBody, read_body
from early_exit_cli.serving.refusal import Refusal

MESSAGES = [{"role": "user", "content": "hello"}]


def chat(**fields):
    return read_body(json.dumps({"messages": MESSAGES, **fields}).encode(), ChatBody)


def refused(body, kind=ChatBody):
    with pytest.raises(Refusal) as found:
        read_body(body if isinstance(body, bytes) else json.dumps(body).encode(), kind)
    assert found.value.status == 400
    assert "\n" not in found.value.message
    return found.value


def test_defaults_are_openais_but_for_the_temperature():
    body = chat()
    assert body.sampling().is_greedy
    assert body.limit is None
    assert not body.traces
    assert not body.includes_usage
    assert read_body(b'{"prompt": "x"}', TextBody).limit == 16


def test_a_chat_without_a_template_ends_before_the_users_next_turn_and_a_text_does_not():
    bare = SimpleNamespace(chat_template=None)
    assert chat(stop="x").ends(bare) == ("x", "\n\nuser:")
    assert chat(stop="x").ends(SimpleNamespace(chat_template="{{ messages }}")) == ("x",)
    assert read_body(b'{"prompt": "x"}', TextBody).ends(bare) == ()


def test_null_asks_for_nothing():
    names = [*ChatBody.model_fields, "tools", "logprobs", "n", "response_format", "presence_penalty"]
    assert chat(**{name: None for name in names if name != "messages"}).sampling().is_greedy


def test_what_is_neutral_or_unknown_is_taken():
    neutral = dict(n=1, logprobs=False, presence_penalty=0, frequency_penalty=0.0, tools=[], tool_choice="auto")
    chat(**neutral, response_format={"type": "text"}, modalities=["text"], user="x", metadata={"a": "b"}, new_field=3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 2),
        ("logprobs", True),
        ("top_logprobs", 3),
        ("presence_penalty", 0.5),
        ("frequency_penalty", -1),
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("functions", [{}]),
        ("response_format", {"type": "json_object"}),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "x"}),
        ("max_tokens", 0),
        ("max_tokens", True),
        ("max_tokens", "12"),
        ("max_tokens", 10**400),
        ("max_completion_tokens", 1.5),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", "hot"),
        ("top_p", 1.1),
        ("seed", "x"),
        ("seed", 2**63),
        ("stop", ["a"] * 5),
        ("stop", ""),
        ("stop", [1]),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),
        ("logit_bias", {"5": 101}),
        ("logit_bias", [1]),
        ("model", 3),
        ("messages", []),
        ("messages", "hello"),
        ("eexit", {"trace": 1}),
        ("eexit", {"trac": True}),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(name, value):
    found = refused({"messages": MESSAGES, name: value})
    assert found.param.split(".")[0] == name
    assert name in found.message


def test_both_limits_are_one_too_many():
    assert refused({"messages": MESSAGES, "max_tokens": 3, "max_completion_tokens": 3}).param == "max_tokens"
    assert chat(max_completion_tokens=3).limit == 3


@pytest.mark.parametrize(
    ("message", "param", "says"),
    [
        ({"role": "user"}, "messages.0.content", "required"),
        ({"content": "x"}, "messages.0.role", "required"),
        ({"role": "tool", "content": "x"}, "messages.0.role", "system"),
        ({"role": "user", "content": None}, "messages.0.content", "string"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages.0.content", "image_url"),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, "b"]}, "messages.0.content", "part 1"),
        ("hello", "messages.0", "Turn"),
    ],
)
def test_a_turn_that_cannot_be_read_is_named(message, param, says):
    found = refused({"messages": [message]})
    assert found.param == param
    assert says in found.message


class Words:
    """A tokenizer whose template shows what it is given."""

    chat_template = "x"

    def apply_chat_template(self, turns, **options):
        self.turns = turns
        return {"input_ids": [1]}


def test_parts_of_text_are_lines_and_developers_are_the_system():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    words = Words()
    body = read_body(
        json.dumps(
            {"messages": [{"role": "developer", "content": "be kind"}, {"role": "user", "content": parts}]}
        ).encode(),
        ChatBody,
    )
    assert body.encoded(words) == [1]
    assert words.turns == [{"role": "system", "content": "be kind"}, {"role": "user", "content": "a\nb"}]


def test_prompts_are_texts_or_token_ids():
    for prompt in ("x", ["x"], [5, 6], [[5, 6]]):
        read_body(json.dumps({"prompt": prompt}).encode(), TextBody)
    for prompt in (["x", "y"], [[1], [2]], [1.5], [True], {}, None, 3):
        assert refused({"prompt": prompt}, TextBody).param.startswith("prompt")
    for name, value in (("echo", True), ("suffix", "x"), ("best_of", 2), ("logprobs", 0)):
        assert refused({"prompt": "x", name: value}, TextBody).param == name


def test_sampling_follows_the_fields():
    found = chat(temperature=0.7, top_p=0, top_k=-1, min_p=0.1, seed=-1, repetition_penalty=1.2).sampling()
    assert (found.temperature, found.top_k, found.min_p, found.repetition_penalty) == (0.7, 0, 0.1, 1.2)
    assert 0 < found.top_p < 1e-6
    assert found.seed == 2**63 - 1
    assert chat(temperature=1).sampling().seed != chat(temperature=1).sampling().seed
    assert chat(temperature=1e-30, top_p=0.5).sampling().is_greedy


def test_a_bias_is_of_tokens():
    assert chat(logit_bias={"5": 3, "0": -100}).bias(10) == {5: 3.0, 0: -100.0}
    for name in ("10", "-1", "x", "", "٣", "9" * 5000):
        with pytest.raises(Refusal):
            chat(logit_bias={name: 1}).bias(10)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"3", b"null", b"\xff\xfe\xff", b"[" * 100_000, b'{"messages": [' + b"1" * 10_000 + b"]}",
     b'{"messages": [{"role": "user", "content": "\\ud800"}]}', b'{"messages": NaN}', b'{"a\\ud800": 1}'],
)  # fmt: skip
def test_what_is_no_body_is_refused_in_one_line(body):
    assert len(refused(body).message) < 500


def test_a_generation_config_is_what_transformers_chat_sends():
    def read(config, **more):
        found = chat(generation_config=config, **more)
        return found.limit, found.temperature, found.top_p

    sampled = GenerationConfig(max_new_tokens=7, do_sample=True, top_p=0.5).to_json_string()
    assert read(GenerationConfig(max_new_tokens=7, temperature=0.5).to_json_string()) == (7, None, None)
    assert read(sampled) == (7, 1.0, 0.5)
    assert read(sampled, max_tokens=9, temperature=0.3) == (9, 0.3, 0.5)
    assert read(sampled, max_completion_tokens=9) == (9, 1.0, 0.5)


@pytest.mark.parametrize("wrong", ["a", "[1]", {"do_sample": True}, 3])
def test_what_is_no_generation_config_is_refused(wrong):
    body = {"messages": MESSAGES, "generation_config": wrong}
    assert refused(body).param == "generation_config"
