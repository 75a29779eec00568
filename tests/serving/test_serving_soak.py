"""`eexit serve` on the real backbone under 2,000 requests, a part of them hung up or malformed, and stopped under load."""

import http.client
import json
import random
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from commands import output_of, started
from fuzzing import VALUES

pytestmark = pytest.mark.slow
CLIENTS, REQUESTS, TOKENS = 16, 2000, 24
CHAT = "/v1/chat/completions"
SYSTEM = (
    "You are a careful assistant who answers in one or two sentences, and never invents what was not asked for. " * 4
)
THINGS = ["a bridge", "the sea", "a wheel", "bread", "a violin", "snow", "a map", "an engine", "salt", "a library"]
QUESTIONS = [f"{ask} {thing}?" for thing in THINGS for ask in ("What is", "Who uses", "Why do people like")]


class Soaked:
    """A process of `eexit serve`, and what its clients saw."""

    def __init__(self, process, about):
        self.process, self.model = process, about["model"]
        self.host = about["address"].split("/")[2]
        self.statuses, self.wrong = [], []

    def connection(self):
        return http.client.HTTPConnection(self.host, timeout=300)

    def get(self, path):
        connection = self.connection()
        connection.request("GET", path)
        return connection.getresponse().read().decode()

    def metric(self, name):
        return next(
            float(line.split()[-1]) for line in self.get("/metrics").splitlines() if line.startswith(f"{name} ")
        )

    def memory(self):
        """Resident bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])

    def post(self, body):
        connection = self.connection()
        connection.request("POST", CHAT, body, {"Content-Type": "application/json"})
        return connection

    def asked(self, number, expected):
        """One request: right, streamed, hung up or malformed."""
        chance = random.Random(number)
        question = chance.choice(QUESTIONS)
        body = {"messages": messages(question), "max_tokens": TOKENS, "stream": bool(chance.getrandbits(1))}
        kind = number % 10
        if kind == 0:
            return self.hung_up(body, chance)
        if kind == 1:
            body[chance.choice(["messages", "max_tokens", "temperature", "stop"])] = chance.choice(VALUES)
            response = self.post(
                json.dumps(body)[: -chance.randint(1, 9)] if chance.getrandbits(1) else json.dumps(body)
            )
            return self.statuses.append(response.getresponse().status)
        while True:
            response = self.post(json.dumps(body)).getresponse()
            text = response.read().decode()
            if response.status != 429:
                break
            time.sleep(min(2, int(response.headers["Retry-After"])))
        self.statuses.append(response.status)
        said = streamed(text) if body["stream"] else json.loads(text)["choices"][0]["message"]["content"]
        if said != expected[question]:
            self.wrong.append((question, said))

    def hung_up(self, body, chance):
        connection = self.post(json.dumps(body | {"stream": True, "max_tokens": 200}))
        if chance.getrandbits(1):
            response = connection.getresponse()
            for _ in range(chance.randint(1, 8)):
                response.readline()
        connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()


def messages(question):
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]


def streamed(text):
    """The text of a stream that came to its end."""
    *lines, last = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    assert last == "[DONE]"
    return "".join(choice["delta"].get("content", "") for line in lines for choice in json.loads(line)["choices"])


def test_two_thousand_requests_from_sixteen_clients(tmp_path):
    asked = tmp_path / "asked.jsonl"
    asked.write_text("".join(json.dumps({"messages": messages(question)}) + "\n" for question in QUESTIONS))
    found = json.loads(output_of("infer", "--prompts", asked, "--max-tokens", TOKENS, "--mode", "full", "--json"))
    expected = {question: record["full"]["text"] for question, record in zip(QUESTIONS, found["records"], strict=True)}
    process = started("serve", "--port", 0, "--json", "--batch", 8, "--queue", 12, "--prefix-gb", 0.05)
    threading.Thread(target=process.stderr.read, daemon=True).start()
    try:
        server = Soaked(process, json.loads(process.stdout.readline()))
        memory = []
        with ThreadPoolExecutor(CLIENTS) as clients:
            for start in range(0, REQUESTS, 250):
                list(clients.map(lambda number: server.asked(number, expected), range(start, start + 250)))
                memory.append(server.memory())
        assert server.wrong == []
        assert {*server.statuses} <= {200, 400, 413}
        assert server.statuses.count(200) >= 0.8 * REQUESTS
        assert server.statuses.count(400) > 0.05 * REQUESTS
        until(lambda: server.metric("eexit_live_texts") == server.metric("eexit_queue_length") == 0)
        assert server.metric("eexit_cancelled_total") > 0.05 * REQUESTS
        assert server.metric("eexit_prefix_bytes") <= 0.05e9
        assert memory[-1] < 1.05 * memory[3], [f"{size / 1e6:.0f} MB" for size in memory]  # buffers have grown by then
        print("resident:", [f"{size / 1e6:.0f} MB" for size in memory])

        bodies = [json.dumps({"messages": messages(q), "max_tokens": TOKENS}) for q in QUESTIONS[:CLIENTS]]
        with ThreadPoolExecutor(CLIENTS) as clients:  # stopped under load: whatever was taken is answered
            asked = list(clients.map(server.post, bodies))
        time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        responses = [connection.getresponse() for connection in asked]
        assert {response.status for response in responses} <= {200, 429, 503}
        for question, response in zip(QUESTIONS, responses, strict=False):
            if response.status == 200:
                assert json.loads(response.read())["choices"][0]["message"]["content"] == expected[question]
        assert [response.status for response in responses].count(200) > 0
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()


def until(happens, seconds=60):
    deadline = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.02)
