"""Answers of an endpoint: the same as those made here, many at once, kept as they come, and another model's are noticed."""

import json
import time

import pytest
import torch
from commands import eexit
from openai_server import OPENAIS, OpenAIServer

from early_exit_cli.config import DataConfig
from early_exit_cli.data import endpoint
from early_exit_cli.data.answers import answer_together
from early_exit_cli.data.endpoint import Said
from early_exit_cli.data.load import load_documents
from early_exit_cli.data.remote_answers import LIKE_OWN, score, tokens_of
from early_exit_cli.errors import DataError
from early_exit_cli.resolve import resolve
from early_exit_cli.runtime.fused_blocks import FusedBlocks

PROMPTS = 40


@pytest.fixture(autouse=True)
def _own_home_and_no_patience(tmp_path, monkeypatch):
    monkeypatch.setenv("EEXIT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.01)
    for name in endpoint.KEYS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server(tiny_backbone):
    with OpenAIServer(tiny_backbone("llama")) as server:
        yield server


@pytest.fixture
def data(tmp_path, server):
    """A configuration with an endpoint, or with what is said."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"question {i} of many"}) + "\n" for i in range(PROMPTS)))
    common = {"dataset_name": str(path), "on_policy": True, "answer_tokens": 6, "holdout": 0.5, "answer_batch": 8}
    return lambda **more: DataConfig(**{**common, "answers_from": server.url, **more})


def texts(config, backbone):
    return [d for split in ("train", "eval", "calibrate") for d in load_documents(config, backbone, split)]


def test_answers_are_those_made_here_and_nobody_is_asked_twice(data, server, tiny_backbone, monkeypatch):
    backbone = tiny_backbone("llama")
    monkeypatch.setenv("EEXIT_ANSWERS_KEY", "sesame")
    here = texts(data(answers_from=None, sampled_share=0.0), backbone)
    server.faults = [503, (429, 0), "reset", 500]
    there = texts(data(sampled_share=0.0), backbone)
    assert there == here
    assert len(server.asked) == PROMPTS + 4
    assert 2 <= server.most_at_once <= 8
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer sesame"}
    assert all(body["repetition_penalty"] == 1.0 and body["temperature"] == 0.0 for body in server.asked)
    server.shutdown()
    assert texts(data(sampled_share=0.0), backbone) == here


def test_a_run_that_was_refused_goes_on_where_it_was(data, server, tiny_backbone, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    server.faults = [None] * 20 + [403]
    with pytest.raises(DataError, match=r"/completions answers 403: injected for Bearer \*\*\*") as caught:
        texts(data(), tiny_backbone("llama"))
    assert "EEXIT_ANSWERS_KEY" in caught.value.hint
    while server.now:  # what was under way
        time.sleep(0.01)
    had = len(server.asked)
    assert len(texts(data(), tiny_backbone("llama"))) == PROMPTS
    asked = {tuple(body["prompt"]) for body in server.asked}
    assert len(asked) == PROMPTS
    assert len(server.asked) - had <= PROMPTS - 16  # the sample, at least, is kept
    assert {body["temperature"] for body in server.asked} == {0.0, 0.8}
    monkeypatch.setattr(endpoint, "RETRIES", 1)
    server.faults = [503] * 99
    server.names = ["org/other"]
    with pytest.raises(DataError, match="503") as caught:
        texts(data(answer_tokens=5), tiny_backbone("llama"))
    assert "sesame" not in caught.value.message + caught.value.hint


def test_a_model_that_changed_meanwhile_is_refused(data, server, tiny_backbone):
    server.faults = [None] * 20 + [400, 400]
    with pytest.raises(DataError, match="answers 400"):
        texts(data(answer_batch=1), tiny_backbone("llama"))
    server.names = ["org/other"]
    with pytest.raises(DataError, match=r"so far are those of 'org/tiny', and .* has 'org/other'"):
        texts(data(answer_batch=1), tiny_backbone("llama"))
    server.names = ["org/one", "org/two"]
    with pytest.raises(DataError, match="it has 'org/one', 'org/two'"):
        texts(data(answer_batch=1), tiny_backbone("llama"))


def test_another_model_is_noticed_before_it_has_answered_everything(data, server, tiny_backbone, monkeypatch):
    server.backbone = tiny_backbone("qwen2")
    for _ in range(2):  # the second time without asking anybody
        with pytest.raises(DataError, match=r"nats a token more than its own would .* they are another model's"):
            texts(data(), tiny_backbone("llama"))
        assert len(server.asked) == 16


def test_a_strict_server_is_asked_for_what_openai_has_and_its_text_is_tokenised(
    data, server, tiny_backbone, monkeypatch
):
    monkeypatch.setattr("early_exit_cli.data.remote_answers.ANOTHERS", 1e9)
    server.is_strict, server.texts = True, ["yes", "", "\n no"]
    with pytest.warns(match="is it the same model, in the same precision"):
        found = texts(data(), tiny_backbone("llama"))
    decoded = {tiny_backbone("llama").tokenizer.decode(d.ids[d.answer_start : -1]) for d in found}
    assert decoded == set(server.texts)
    assert all(d.ids[-1] == 256 for d in found)
    assert sum(set(body) == OPENAIS for body in server.asked) == PROMPTS


def test_answers_made_here_score_as_ones_own(tiny_backbone):
    backbone = tiny_backbone("llama")
    prompts = [list(f"question {i}".encode()) for i in range(60)]
    blocks = FusedBlocks(backbone)
    greedy = answer_together(blocks, prompts, 8)
    sampled = answer_together(blocks, prompts, 8, 0.8, torch.Generator().manual_seed(0))
    own = score(backbone, [(prompt, answer, 0.0) for prompt, answer in zip(prompts, greedy, strict=True)])
    assert own.excess == pytest.approx(0.0, abs=1e-5)
    assert own.agreement == 1.0
    drawn = score(backbone, [(prompt, answer, 0.8) for prompt, answer in zip(prompts, sampled, strict=True)])
    assert abs(drawn.excess) < LIKE_OWN
    assert drawn.agreement is None


@pytest.mark.parametrize(
    ("said", "ids"),
    [
        (Said("ab", None, True, None), [64, 65, 256]),
        (Said("ab", None, False, None), [64, 65]),
        (Said("", None, True, 999), [256]),
        (Said("ab", [5, 6], True, 256), [5, 6, 256]),
        (Said("ab", [5, 256, 7], True, None), [5, 256]),
        (Said("abcdef", None, True, None), [64, 65, 66, 67]),
    ],
)
def test_an_answer_ends_as_one_made_here(tiny_backbone, said, ids):
    assert tokens_of(said, tiny_backbone("llama"), 4) == ids


def test_settings_that_make_no_sense_and_a_server_that_is_not_there(tmp_path, tiny_folder):
    for settings, words in [
        ({"data.answers_from": "http://h/v1"}, "on_policy is not set"),
        ({"data.answers_from": "ftp://h", "data.on_policy": True}, "write it as http://HOST:PORT/v1"),
        ({"data.answers_from": "http://u:key@h/v1", "data.on_policy": True}, "an address alone"),
        ({"data.answers_model": "m", "data.on_policy": True}, "answers_from says which"),
    ]:
        with pytest.raises(Exception, match=words):
            resolve({key: (value, f"--{key}") for key, value in settings.items()})
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "Hello"}\n' * 9)
    with OpenAIServer(None) as gone:
        url = gone.url
    code, out, err = eexit(
        *("train", "--model-name", tiny_folder("llama"), "--quantization", "none", "--dataset-name", prompts),
        *("--on-policy", "--answers-from", url, "--max-steps", 1, "--output-dir", tmp_path / "heads"),
    )
    assert (code, out) == (2, "")
    assert f"{url} cannot be reached (ConnectError" in err
