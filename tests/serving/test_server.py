"""The server as its clients see it: OpenAI's own, curl, and some that are hostile."""

import asyncio
import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time

import pytest
from drafters import make_drafter
from fuzzing import damaged_body
from huggingface_hub import InferenceClient, constants
from live_server import SECONDS, Held, LiveServer, alone

from early_exit_cli.config import SamplingConfig
from early_exit_cli.decoding.answer import generate
from early_exit_cli.decoding.text import Request
from early_exit_cli.sampling import make_chooser

openai = pytest.importorskip("openai")
pytest.importorskip("starlette")
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "abc abc abc"}]
KEY = "a-key"


@pytest.fixture(scope="module")
def engine(tiny_model):
    return tiny_model("llama")


@pytest.fixture(scope="module")
def drafter(engine):
    return make_drafter("exit", engine)


@pytest.fixture(scope="module")
def server(engine, drafter):
    with LiveServer(
        engine, drafter, key=KEY, batch=3, timeout=SECONDS, cors_origin=["https://friend.example"]
    ) as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key=KEY, max_retries=0) as found:
        yield found


@pytest.fixture
def ask(server):
    return lambda path, body=None, **headers: server.ask(path, body, **{"Authorization": f"Bearer {KEY}", **headers})


def expected(engine, messages=MESSAGES, tokens=16, stop=(), **sampling):
    chooser = make_chooser(SamplingConfig(**sampling))
    return alone(engine, engine.backbone.encode_prompt(messages), tokens, chooser=chooser, stop=stop)


def until(condition):
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.9, "seed": 4}, {"temperature": 1.2, "top_p": 0.8, "seed": 5}]
)
def test_openais_client_gets_the_answer_that_infer_gives(engine, client, sampling):
    found = client.chat.completions.create(
        model=client.models.list().data[0].id, messages=MESSAGES, max_tokens=16, **sampling
    )
    plain = expected(engine, **sampling)
    assert found.choices[0].message.content == plain.text
    assert found.choices[0].finish_reason == plain.finish_reason
    assert found.usage.prompt_tokens == plain.stats.prompt_tokens
    assert found.usage.completion_tokens == len(plain.token_ids)
    assert found.system_fingerprint.startswith("fp_")
    timings = found.model_extra["timings"]
    assert timings["predicted_n"] == len(plain.token_ids)
    assert timings["prompt_n"] + timings["cache_n"] == plain.stats.prompt_tokens
    assert timings["predicted_ms"] > 0
    assert timings["predicted_per_second"] > 0
    assert 0 <= timings["draft_n_accepted"] <= timings["draft_n"]


@pytest.mark.parametrize("usage", [True, False])
def test_a_stream_is_the_answer_in_pieces(engine, client, usage):
    options = {"stream_options": {"include_usage": True}} if usage else {}
    chunks = list(client.chat.completions.create(model="", messages=MESSAGES, max_tokens=16, stream=True, **options))
    plain = expected(engine)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == plain.text
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["length"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].model_extra["timings"]["predicted_n"] == 16
    assert (chunks[-1].usage is not None) == usage
    assert not any(chunk.usage for chunk in chunks[:-1])
    if usage:
        assert chunks[-1].choices == []
        assert chunks[-1].usage.completion_tokens == 16


def test_text_completions_go_on_with_a_prompt(engine, client):
    prompt = "one two one two one "
    ids = engine.backbone.encode_prompt(prompt, raw=True)
    plain = alone(engine, ids, 16)
    for asked in (prompt, [prompt], ids):
        found = client.completions.create(model="", prompt=asked)
        assert found.choices[0].text == plain.text
        assert found.usage.completion_tokens == 16
    pieces = list(client.completions.create(model="", prompt=prompt, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == plain.text


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_token_ids_are_told_where_they_are_asked_for(engine, ask, path):
    body = {"messages": MESSAGES, "prompt": "abc abc", "max_tokens": 8, "return_token_ids": True}
    whole = ask(path, body)[2]
    ids = whole["choices"][0]["token_ids"]
    assert len(ids) == whole["usage"]["completion_tokens"] == 8
    if path == CHAT:
        assert ids == expected(engine, tokens=8).token_ids
    chunks = [json.loads(line[6:]) for line in ask(path, body | {"stream": True})[2].splitlines() if line[6:7] == "{"]
    assert chunks[-1]["choices"][0]["token_ids"] == ids
    assert "token_ids" not in ask(path, body | {"return_token_ids": None})[2]["choices"][0]


def test_answers_end_before_a_stop_text(engine, client):
    stop = re.search("[A-Za-z]{2}", expected(engine).text)[0]
    found = client.chat.completions.create(model="", messages=MESSAGES, max_tokens=16, stop=[stop, "never this"])
    plain = expected(engine, stop=(stop, "never this"))
    assert found.choices[0].message.content == plain.text == expected(engine).text.partition(stop)[0]
    assert found.choices[0].finish_reason == "stop"


def test_several_clients_at_once_each_get_their_own_answer(engine, server):
    questions = [[{"role": "user", "content": f"question {number} " * (number + 1)}] for number in range(8)]

    async def ask_all():
        async with openai.AsyncOpenAI(base_url=f"{server.address}/v1", api_key=KEY, max_retries=0) as client:

            async def ask(number, messages):
                sampling = {"temperature": 0.8, "seed": number} if number % 2 else {}
                stream = await client.chat.completions.create(
                    model="", messages=messages, max_tokens=20, stream=True, **sampling
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*(ask(number, each) for number, each in enumerate(questions)))

    found = asyncio.run(ask_all())
    for number, (text, messages) in enumerate(zip(found, questions, strict=True)):
        sampling = {"temperature": 0.8, "seed": number} if number % 2 else {}
        assert text == expected(engine, messages, 20, **sampling).text


def test_a_bias_changes_what_is_said(engine, client):
    def tokens(bias):
        own = {"eexit": {"trace": True}}
        found = client.chat.completions.create(
            model="", messages=MESSAGES, max_tokens=4, logit_bias=bias, extra_body=own
        )
        return [token["token_id"] for step in found.model_extra["eexit"]["rounds"] for token in step["tokens"]]

    plain = expected(engine, tokens=4).token_ids
    assert tokens({}) == plain
    assert not {*plain} & {*tokens({str(token): -100 for token in plain})}
    assert tokens({"65": 100}) == [65] * 4


@pytest.mark.parametrize("stream", [False, True])
def test_who_decided_each_token_is_told_where_it_is_asked_for(engine, client, drafter, stream):
    options = {"stream": stream, "extra_body": {"eexit": {"trace": True}}}
    found = client.chat.completions.create(model="", messages=MESSAGES, max_tokens=16, **options)
    answers = list(found) if stream else [found]
    rounds = [step for each in answers for step in each.model_extra.get("eexit", {"rounds": []})["rounds"]]
    tokens = [token for step in rounds for token in step["tokens"]]
    ids = engine.backbone.encode_prompt(MESSAGES)
    run = generate(engine, Request(ids, 16), drafter.fork(), mode="exit", width=4)
    assert [token["token_id"] for token in tokens] == run.token_ids
    assert {token["decided_by"] for token in tokens} <= {"backbone", "head"}
    assert sum(step["accepted"] + len(step["rejected"]) for step in rounds) > 0
    text = "".join(token["text"] for token in tokens)
    assert expected(engine).text.startswith(text)
    assert stream or text == expected(engine).text


def test_the_next_turn_takes_over_what_the_last_one_computed(engine, drafter):
    messages = [{"role": "user", "content": "the same beginning " * 8}]
    with LiveServer(engine, drafter) as server:
        first = server.ask(CHAT, {"messages": messages, "max_tokens": 10})[2]
        said = first["choices"][0]["message"]["content"]
        longer = [*messages, {"role": "assistant", "content": said}, {"role": "user", "content": "and then?"}]
        second = server.ask(CHAT, {"messages": longer, "max_tokens": 10})[2]
        assert second["choices"][0]["message"]["content"] == expected(engine, longer, 10).text
        known = second["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert known == second["timings"]["cache_n"] == 128
        assert second["timings"]["prompt_n"] == second["usage"]["prompt_tokens"] - known
        assert server.metric("eexit_prefix_hits_total") == 1
        assert server.metric("eexit_prefix_saved_tokens_total") == known
        assert server.metric("eexit_prefix_bytes") > 0
    with LiveServer(engine, drafter, prefix_gb=0) as without:
        for _ in range(2):
            assert without.ask(CHAT, {"messages": messages, "max_tokens": 10})[2]["timings"]["cache_n"] == 0
        assert without.metric("eexit_prefix_bytes") == 0


def test_the_hubs_client_gets_the_answer(engine, server, monkeypatch):
    """What `transformers chat` asks with; offline, it would not even ask this machine."""
    monkeypatch.setattr(constants, "is_offline_mode", lambda: False)
    client = InferenceClient(base_url=f"{server.address}/v1", api_key=KEY)
    chunks = client.chat_completion(
        MESSAGES,
        model=server.ask("/v1/models", Authorization=f"Bearer {KEY}")[2]["data"][0]["id"],
        max_tokens=16,
        stream=True,
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected(engine).text


@pytest.mark.slow
def test_transformers_chat_gets_the_answer(engine, server, tmp_path):
    with LiveServer(engine) as server:
        model = server.ask("/v1/models")[2]["data"][0]["id"]
        script = "from transformers.cli.transformers import main; main()"
        words = [
            sys.executable,
            "-c",
            script,
            "chat",
            model,
            f"{server.address}/v1",
            "do_sample=False",
            "max_new_tokens=6",
        ]
        said = subprocess.run(
            words,
            input="abc abc abc\nn\n!exit\n",
            capture_output=True,
            text=True,
            timeout=120,
            cwd=tmp_path,
            env={**os.environ, "HF_HUB_OFFLINE": "0"},
        )
    assert said.returncode == 0, said.stderr
    assert any("/v1/chat/completions 200 streamed" in line for line in server.lines)
    assert expected(engine, MESSAGES[1:], tokens=6).text.strip() in said.stdout


def test_curl_gets_an_answer(engine, server):
    if shutil.which("curl") is None:
        pytest.skip("there is no curl")
    body = json.dumps({"messages": MESSAGES, "max_tokens": 16})
    key = ["-H", f"Authorization: Bearer {KEY}"]
    run = ["curl", "-sS", "--max-time", str(SECONDS), *key, "-d", body, server.address + CHAT]
    found = json.loads(subprocess.run(run, capture_output=True, check=True).stdout)
    assert found["choices"][0]["message"]["content"] == expected(engine).text
    stream = json.dumps({"messages": MESSAGES, "max_tokens": 16, "stream": True})
    run[run.index(body)] = stream
    lines = subprocess.run([*run, "-N"], capture_output=True, check=True, text=True).stdout.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == expected(engine).text


def test_model_health_and_metrics(server, ask, client):
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id).id == model.id
    assert "/" not in model.id  # of a local folder, without where it lies
    assert server.ask("/health")[::2] == (200, {"status": "ok"})
    client.completions.create(model=model.id, prompt="one two one two", max_tokens=12)
    page = ask("/metrics")[2]
    for name in (
        "requests_total{route=\"/v1/completions\",status=\"200\"}", "requests_total{route=\"/v1/models\",status=\"200\"}", "generated_tokens_total", "prompt_tokens_total",
        "drafted_tokens_total", "accepted_tokens_total", "prefix_hits_total", "prefix_saved_tokens_total", "prefix_bytes",
        "request_seconds_count", "first_token_seconds_sum", "queue_seconds_count",
    ):  # fmt: skip
        (value,) = [float(line.split()[-1]) for line in page.splitlines() if line.startswith(f"eexit_{name} ")]
        assert value > 0 or name.startswith(("accepted", "prefix_hits", "prefix_saved"))
    assert "eexit_queue_length 0.0" in page
    assert "eexit_live_texts 0.0" in page


def test_a_line_a_request_with_statistics_and_without_its_text(engine):
    secret = "zebra crossing"
    with LiveServer(engine, key=KEY) as server:
        key = {"Authorization": f"Bearer {KEY}"}
        server.ask(CHAT, {"messages": [{"role": "user", "content": secret}], "max_tokens": 5}, **key)
        server.ask(CHAT, {"messages": [{"role": secret, "content": secret}], secret: secret}, **key)
        server.ask(f"/v1/{secret.replace(' ', '%0a')}", **key)
        server.ask("/health")
        until(lambda: len(server.lines) == 3)
        whole = "\n".join(server.lines)
    for words in (
        "POST /v1/chat/completions 200 queued",
        "5 written",
        "POST /v1/chat/completions 400",
        "GET other 404",
    ):
        assert whole.count(words) == 1
    for word in ("zebra", "crossing", KEY):
        assert word not in whole


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        (CHAT, {"messages": MESSAGES, "model": "gpt-9"}, 404, "model_not_found"),
        ("/v1/models/gpt-9", None, 404, "model_not_found"),
        ("/v1/nothing", None, 404, None),
        (CHAT, None, 405, None),
        (CHAT, {"messages": MESSAGES, "tools": [{}]}, 400, "unsupported_parameter"),
        (CHAT, {"messages": MESSAGES, "max_tokens": 600}, 400, "context_length_exceeded"),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 600}]}, 400, "context_length_exceeded"),
        (TEXT, {"prompt": ""}, 400, None),
        (TEXT, {"prompt": [320]}, 400, None),
        (TEXT, {"prompt": [-1]}, 400, None),
        (CHAT, {"messages": MESSAGES, "logit_bias": {"320": 1}}, 400, None),
        (CHAT, b"x" * 4_000_001, 413, "body_too_large"),
    ],
)
def test_what_is_refused_is_told_in_openais_form(ask, path, body, status, code):
    found, _, answer = ask(path, body)
    assert (found, answer["error"]["code"]) == (status, code)
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert "\n" not in answer["error"]["message"]


def test_a_key_is_asked_for(server):
    for wrong in (None, "Bearer", "Bearer other", f"Basic {KEY}", f"Bearer {KEY}x", "Bearer \xe9"):
        headers = {} if wrong is None else {"Authorization": wrong}
        for path, body in ((CHAT, {"messages": MESSAGES}), ("/v1/models", None), ("/metrics", None)):
            status, found, answer = server.ask(path, body, **headers)
            assert (status, found["WWW-Authenticate"]) == (401, "Bearer")
            assert answer["error"]["type"] == "authentication_error"
    assert server.ask("/health")[0] == 200


def test_pages_of_other_origins_may_not_ask(server, ask, engine):
    body = {"messages": MESSAGES, "max_tokens": 2}
    assert ask(CHAT, body, Origin="https://evil.example")[0] == 403
    status, headers, _ = ask(CHAT, body, Origin="https://friend.example")
    assert (status, headers["Access-Control-Allow-Origin"]) == (200, "https://friend.example")
    assert ask(CHAT, body, Origin=server.address)[0] == 200
    with LiveServer(engine) as keyless:
        assert keyless.ask(CHAT, body)[0] == 200
        assert keyless.ask(CHAT, body, Host="evil.example:8000")[0] == 403
        assert keyless.ask(CHAT, body, Host="localhost:8000")[0] == 200
        status, headers, _ = keyless.ask(CHAT, body, Origin=keyless.address)
        assert (status, headers["Access-Control-Allow-Origin"]) == (200, None)


def raw(server, body):
    """A request whose answer was not read yet."""
    connection = http.client.HTTPConnection(*server.socket.getsockname(), timeout=SECONDS)
    connection.request("POST", CHAT, json.dumps(body), {"Content-Type": "application/json"})
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_makes_room_and_a_full_queue_says_when_to_come_again(engine, stream):
    held = Held()
    body = {"messages": MESSAGES, "max_tokens": 100, "stream": stream}
    with LiveServer(engine, held, batch=1, queue=1) as server:
        live = raw(server, body)
        held.wait()
        if stream:
            assert live.getresponse().read1(10).startswith(b"data: ")
        waiting = raw(server, body)
        until(lambda: server.scheduler.waiting == 1)
        status, headers, answer = server.ask(CHAT, body)
        assert (status, answer["error"]["code"]) == (429, "queue_full")
        assert int(headers["Retry-After"]) >= 1
        assert server.metric("eexit_queue_length") == 1
        for each in (live, waiting):
            each.sock.shutdown(socket.SHUT_RDWR)
            each.close()
        until(lambda: held.allowed.release() or server.scheduler.idle)
        held.free.set()
        until(lambda: server.metric("eexit_cancelled_total") == 2)
        assert server.ask(CHAT, {**body, "max_tokens": 3, "stream": False})[0] == 200
        assert server.metric("eexit_generated_tokens_total") < 100
        assert sum("hung up" in line for line in server.lines) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_has_its_time(engine, stream):
    held = Held()
    threading.Timer(0.4, held.free.set).start()
    with LiveServer(engine, held, timeout=0.2) as server:
        status, _, answer = server.ask(CHAT, {"messages": MESSAGES, "max_tokens": 100, "stream": stream})
        found = json.loads(answer.split("\n\n")[-2].removeprefix("data: ")) if stream else answer
        assert status == (200 if stream else 504)
        assert found["error"]["code"] == "timeout"
        with socket.create_connection(server.socket.getsockname(), timeout=SECONDS) as slow:
            slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
            assert b"408" in slow.recv(1000)
        assert server.scheduler.idle


def test_the_engine_that_fails_is_a_500_and_the_next_request_is_answered(engine, monkeypatch):
    with LiveServer(engine) as server:
        monkeypatch.setattr(engine, "run_tokens", lambda *arguments: 1 / 0, raising=False)
        status, _, answer = server.ask(CHAT, {"messages": MESSAGES, "max_tokens": 4})
        assert (status, answer["error"]["type"]) == (500, "server_error")
        monkeypatch.undo()
        assert server.ask(CHAT, {"messages": MESSAGES, "max_tokens": 4})[0] == 200


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_health_tells_that_nobody_decodes_any_more(engine, monkeypatch):
    with LiveServer(engine) as server:
        monkeypatch.setattr(server.scheduler, "_read", lambda: 1 / 0)
        assert server.ask(CHAT, {"messages": MESSAGES, "max_tokens": 4})[0] == 503
        assert server.ask("/health")[0] == 503


def test_stopping_finishes_what_was_taken_and_refuses_what_is_new(engine):
    held = Held()
    with LiveServer(engine, held, batch=1) as server:
        asked = [raw(server, {"messages": MESSAGES, "max_tokens": 6}) for _ in range(2)]
        held.wait()
        until(lambda: server.scheduler.waiting == 1)
        server.server.handle_exit(15, None)
        status, _, answer = server.ask(CHAT, {"messages": MESSAGES})
        assert (status, answer["error"]["code"]) == (503, "stopping")
        assert server.ask("/health")[0] == 503
        held.free.set()
        for each in asked:
            answer = json.loads(each.getresponse().read())
            assert answer["choices"][0]["message"]["content"] == expected(engine, tokens=6).text
        server.thread.join(SECONDS)
        assert not server.thread.is_alive()


def test_a_second_signal_stops_at_once(engine):
    held = Held()
    with LiveServer(engine, held, batch=1) as server:
        asked = raw(server, {"messages": MESSAGES, "max_tokens": 6})
        held.wait()
        try:
            server.server.handle_exit(2, None)
            server.server.handle_exit(2, None)
            server.thread.join(SECONDS)
            assert not server.thread.is_alive()
            response = asked.getresponse()
            assert (response.status, json.loads(response.read())["error"]["code"]) == (503, "stopping")
        finally:
            held.free.set()


def test_a_connection_that_asks_nothing_is_closed(engine):
    with LiveServer(engine) as server:
        server.server.idle_seconds = 0.3
        where = server.socket.getsockname()
        with socket.create_connection(where) as silent, socket.create_connection(where) as slow:
            slow.sendall(b"GET /health HTTP/1.1\r\nHost: local")
            for each in (silent, slow):
                each.settimeout(SECONDS)
                assert each.recv(100) == b""
        assert server.ask("/health")[0] == 200


def test_pieces_of_a_stream_do_not_wait_for_the_client(engine):
    """Nagle's algorithm held the second piece of a connection's second answer back for 40 ms."""
    with LiveServer(engine) as server, socket.create_connection(server.socket.getsockname()) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert client.recv(100)
        (connection,) = server.server.server_state.connections
        on_servers_side = connection.transport.get_extra_info("socket")
        assert on_servers_side.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0


def test_headers_have_a_limit(ask):
    assert ask("/health", X_Long="x" * 30_000)[0] == 200
    status, _, answer = ask("/health", X_Long="x" * 40_000)  # in one piece, which h11's own limit does not see
    assert (status, answer["error"]["code"]) == (431, "headers_too_large")


@pytest.mark.parametrize("bodies", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_damaged_bodies_get_a_4xx_in_one_line_and_never_hang(server, ask, bodies):
    counts = {}
    for number in range(bodies):
        status, _, answer = ask((CHAT, TEXT)[number % 2], damaged_body(number))
        counts[status] = counts.get(status, 0) + 1
        assert status in (200, 400, 404), (number, status, answer)
        if status != 200:
            assert "\n" not in answer["error"]["message"]
    assert counts[400] > bodies / 3
    assert counts.get(200, 0) > bodies / 30
    assert server.scheduler.idle
