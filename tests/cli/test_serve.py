"""`eexit serve`: what it refuses to begin with, and one server in a process of its own, to its end by a signal."""

import http.client
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest
from commands import eexit, one_line, output_of, started

pytest.importorskip("starlette")


def refusal(*arguments, **environment):
    code, out, err = eexit("serve", *arguments, **environment)
    assert (code, out) == (2, "")
    return one_line(err), err


def test_an_address_that_others_reach_needs_a_key():
    line, err = refusal("--host", "0.0.0.0")
    assert "0.0.0.0 is reached from other machines" in line
    assert "EEXIT_API_KEY" in err
    line, err = refusal("--api-key", "two words")
    assert "words" not in err


def test_a_port_that_is_taken_is_told_before_anything_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1, port {port}" in refusal("--port", port, "--model-name", "no/model")[0]


def test_the_extra_that_is_not_installed_is_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "uvicorn" else find(name, *rest)
    )
    line, err = refusal()
    assert "needs uvicorn" in line
    assert "pip install 'eexit[serve]'" in err


def test_the_key_is_not_shown():
    out = output_of("serve", "--api-key", "zebra", "--show-config")
    assert "serve.api_key" in out
    assert "zebra" not in out


def test_a_log_that_nobody_reads_is_no_reason_to_stop():
    code = "import sys; from early_exit_cli.cli.serve import log; log('one'); log('two'); sys.exit(7)"
    read, write = os.pipe()
    os.close(read)
    assert subprocess.run([sys.executable, "-c", code], stderr=write, timeout=60).returncode == 7
    os.close(write)


def test_a_server_answers_as_infer_does_and_a_signal_lets_it_finish(tiny_folder, tmp_path):
    model = ["--model-name", tiny_folder("llama"), "--quantization", "none", "--drafter", "lookup"]
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "abc abc abc"}]
    process = started("serve", *model, "--port", 0, "--json", "--api-key", "zebra")
    try:
        about = json.loads(process.stdout.readline())
        base = about["address"]

        def ask(**fields):
            body = {"model": about["model"], "messages": messages, "max_tokens": 24, **fields}
            headers = {"Content-Type": "application/json", "Authorization": "Bearer zebra"}
            return urllib.request.Request(f"{base}/chat/completions", json.dumps(body).encode(), headers)

        found = [json.load(urllib.request.urlopen(ask(**more), timeout=60)) for more in ({}, SAMPLED)]
        with urllib.request.urlopen(ask(stream=True, max_tokens=300), timeout=60) as stream:
            lines = [stream.readline() for _ in range(4)]
            process.send_signal(signal.SIGTERM)
            lines += stream.readlines()
        assert b"data: [DONE]\n" in lines
        assert process.wait(timeout=60) == 0
        err = process.stderr.read()
    finally:
        process.kill()
    assert err.count("POST /v1/chat/completions 200") == 3
    assert "zebra" not in err
    assert "Traceback" not in err
    with pytest.raises(ConnectionRefusedError):
        http.client.HTTPConnection(base.split("/")[2]).connect()
    asked = tmp_path / "asked.jsonl"
    asked.write_text(json.dumps({"messages": messages}) + "\n")
    for answer, more in zip(found, ({}, SAMPLED), strict=True):
        flags = [word for name, value in more.items() for word in (f"--{name.replace('_', '-')}", value)]
        alone = json.loads(output_of("infer", *model, "--max-tokens", 24, "--prompts", asked, *flags, "--json"))
        record = alone["records"][0]["lookup"]
        assert answer["choices"][0]["message"]["content"] == record["text"]
        assert answer["choices"][0]["finish_reason"] == record["finish_reason"]
        assert answer["usage"]["completion_tokens"] == len(record["token_ids"])


SAMPLED = {"temperature": 0.9, "seed": 4, "top_p": 0.9}
