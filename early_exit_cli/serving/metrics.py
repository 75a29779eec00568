"""What `/metrics` shows, in Prometheus' form."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from early_exit_cli.serving.handle import Answering, Ended

CONTENT_TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Of one server."""

    def __init__(self, answering: Answering) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, help: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"eexit_{name}", help, labels, registry=self.registry)

        def seconds(name: str, help: str) -> Histogram:
            return Histogram(f"eexit_{name}_seconds", help, buckets=SECONDS, registry=self.registry)

        self.requests = counter("requests", "Requests, by route and HTTP status.", ("route", "status"))
        self.cancelled = counter("cancelled", "Answers that nobody waited for to the end.")
        self.prompt = counter("prompt_tokens", "Tokens of prompts.")
        self.generated = counter("generated_tokens", "Tokens of answers.")
        self.drafted = counter("drafted_tokens", "Tokens that were drafted.")
        self.accepted = counter("accepted_tokens", "Drafted tokens that were accepted.")
        self.hits = counter("prefix_hits", "Requests whose prompt began like an earlier one's.")
        self.saved = counter("prefix_saved_tokens", "Tokens of prompts that were not computed again.")
        self.queued = seconds("queue", "From the request to its prefill.")
        self.first = seconds("first_token", "From the request to its first token.")
        self.whole = seconds("request", "From the request to the end of its answer.")
        for name, help, read in (
            ("queue_length", "Requests that wait.", lambda: answering.waiting),
            ("live_texts", "Answers that are being decoded.", lambda: answering.live),
            ("prefix_bytes", "What is kept of earlier requests.", lambda: answering.kept_bytes),
        ):
            Gauge(f"eexit_{name}", help, registry=self.registry).set_function(read)

    def count(self, ended: Ended, hung_up: bool) -> None:
        """An answer is over."""
        self.cancelled.inc(hung_up)
        answer, times = ended.answer, ended.times
        if answer is None:
            return
        for metric, value in (
            (self.prompt, answer.prompt_tokens),
            (self.generated, len(answer.token_ids)),
            (self.drafted, answer.drafted),
            (self.accepted, answer.accepted),
            (self.hits, answer.reused > 0),
            (self.saved, answer.reused),
        ):
            metric.inc(value)
        self.queued.observe(times.queue)
        self.first.observe(answer.first_seconds)
        self.whole.observe(times.whole)

    def page(self) -> bytes:
        """All of it."""
        return generate_latest(self.registry)
