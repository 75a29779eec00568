"""What serving gives: clients at once against one after another, and the second turn of a long conversation.

    python benchmarks/serving.py [--tokens 128] [--rounds 3] [eexit serve's flags ...]

Starts `eexit serve` on a free port, asks over HTTP as clients do, and prints a JSON record. Clients have different
questions; each count of clients answers the same eight, so `1` is one after another. The conversation's first turn has
about 1,500 tokens; its second turn is asked of a server that keeps prefixes and of one that keeps none.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

QUESTIONS = [
    "Explain why the sky is blue.",
    "Write a short story about a lighthouse keeper.",
    "List ten uses of a paper clip, and say why each works.",
    "How does a bicycle stay upright?",
    "Describe the water cycle for a child.",
    "What are the causes of the First World War?",
    "Write a Python function that reverses a list, and explain it.",
    "Compare tea and coffee in five points.",
]
CLIENTS = (1, 2, 4, 8)
SENTENCES = "The ship left the harbour at dawn, and the crew of twelve looked back at the town until it was gone. "


class Running:
    """A server in a process of its own."""

    def __init__(self, *flags: str) -> None:
        command = [sys.executable, "-m", "early_exit_cli", "serve", "--port", "0", "--json", *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout is not None
        self.base = json.loads(self.process.stdout.readline())["address"]

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        self.process.wait()

    def ask(self, messages: list[dict[str, str]], tokens: int) -> tuple[float, dict, str]:
        """Seconds to the first text, the last chunk, and the text."""
        body = {"messages": messages, "max_tokens": tokens, "stream": True, "stream_options": {"include_usage": True}}
        request = urllib.request.Request(
            f"{self.base}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        started = time.perf_counter()
        first, last, text = 0.0, {}, ""
        with urllib.request.urlopen(request) as stream:
            for line in stream:
                if line.startswith(b"data: {"):
                    last = json.loads(line[6:])
                    piece = last["choices"][0]["delta"].get("content") if last["choices"] else None
                    if piece:
                        first = first or time.perf_counter() - started
                        text += piece
        return first, last, text


def at_once(server: Running, clients: int, tokens: int) -> tuple[float, int, list[str]]:
    """Seconds in which so many clients get all questions answered, the tokens, and the answers."""
    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        found = list(pool.map(lambda text: server.ask([{"role": "user", "content": text}], tokens), QUESTIONS))
    seconds = time.perf_counter() - started
    return seconds, sum(last["usage"]["completion_tokens"] for _, last, _ in found), [text for *_, text in found]


def clients_at_once(tokens: int, rounds: int, flags: list[str]) -> dict[str, object]:
    """Medians over rounds in turns; answers must be the same for every count."""
    seconds: dict[int, list[float]] = {count: [] for count in CLIENTS}
    total, answers = 0, []
    with Running(*flags, "--prefix-gb", "0") as server:
        at_once(server, 2, 16)
        for _ in range(rounds):
            for count in CLIENTS:
                taken, total, texts = at_once(server, count, tokens)
                seconds[count].append(taken)
                answers.append(texts)
    middle = {count: statistics.median(found) for count, found in seconds.items()}
    return {
        "tokens": total,
        "seconds": middle,
        "tokens_per_second": {count: total / taken for count, taken in middle.items()},
        "ratio": {count: middle[1] / taken for count, taken in middle.items()},
        "identical": all(texts == answers[0] for texts in answers),
    }


def second_turn(rounds: int, flags: list[str]) -> dict[str, object]:
    """Time to the first token of a second turn, with prefixes and without."""
    found: dict[str, object] = {}
    said = []
    for name, kept in (("with_reuse", "1"), ("without_reuse", "0")):
        times = []
        with Running(*flags, "--prefix-gb", kept) as server:
            server.ask([{"role": "user", "content": "Hello."}], 8)
            for number in range(rounds):
                talk = [{"role": "user", "content": f"Text {number}. {SENTENCES * 65}\nWhat is this about?"}]
                answer = server.ask(talk, 32)[2]
                talk += [{"role": "assistant", "content": answer}, {"role": "user", "content": "How many were they?"}]
                first, last, text = server.ask(talk, 16)
                times.append(first)
                said.append((number, text))
                found["prompt_tokens"] = last["usage"]["prompt_tokens"]
                found[f"{name}_known"] = last["timings"]["cache_n"]
        found[f"{name}_ms"] = round(statistics.median(times) * 1000, 1)
    return {**found, "identical": len({*said}) == rounds}


def main() -> None:
    """Both measurements, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    asked, flags = parser.parse_known_args()
    record = {"clients": clients_at_once(asked.tokens, asked.rounds, flags), "turn": second_turn(asked.rounds, flags)}
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
