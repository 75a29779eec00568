"""One thread for all: answers are those of each request alone, errors end their own request, and places become free."""

import threading
import time

import pytest
from drafters import make_drafter
from live_server import SECONDS, Held, alone

from early_exit_cli.config import SamplingConfig
from early_exit_cli.decoding.batch import Batch
from early_exit_cli.decoding.text import Request
from early_exit_cli.drafting.drafter import NoDrafter
from early_exit_cli.errors import ConfigError
from early_exit_cli.runtime.blocks import KEY_STEP, PREFILL_WIDTH
from early_exit_cli.sampling import Sampler, make_chooser
from early_exit_cli.serving.handle import Ended, Handle, HungUp, Piece, QueueFull, Stopping
from early_exit_cli.serving.scheduler import Scheduler

PROMPTS = [
    list(b"Hello Hello "),
    list(b"A"),
    list(b"one two one two one "),
    list(b"xyz xyz"),
    list(b"The end."),
    [7] * 90,
]
TOKENS = 20
LOST = 40
"""New tokens of the request that fails; with its prompt, a larger buffer than any other's."""


class Asked:
    """A request, and what comes of it."""

    def __init__(self, scheduler, request, trace=False):
        self.events, self.over = [], threading.Event()
        self.handle = Handle(request, self.hear, trace)
        scheduler.submit(self.handle)

    def hear(self, event):
        self.events.append(event)
        if isinstance(event, Ended):
            self.over.set()

    @property
    def ended(self):
        assert self.over.wait(SECONDS)
        return self.events[-1]

    @property
    def text(self):
        return "".join(event.text for event in self.events)


@pytest.fixture
def scheduler(tiny_model):
    made = []

    def make(drafter=None, engine=None, batch=3, queue=20, prefix_bytes=0, width=4, plain_pass=None):
        engine = engine or tiny_model("llama")
        sizes = {"batch": batch, "queue": queue, "prefix_bytes": prefix_bytes}
        made.append(Scheduler(engine, drafter or NoDrafter(), width, **sizes, plain_pass=plain_pass))
        made[-1].start()
        return made[-1]

    yield make
    for each in made:
        for drafter in [each.drafter]:
            if isinstance(drafter, Held):
                drafter.free.set()
        each.close()


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("who", ["exit", "lookup", "eagle", "auto"])
def test_every_answer_is_what_it_is_alone(tiny_model, scheduler, who, temperature):
    engine = tiny_model("llama")
    drafter = make_drafter(who, engine)
    choosers = [lambda n=n: make_chooser(SamplingConfig(temperature=temperature, seed=n)) for n in range(len(PROMPTS))]
    expected = [
        alone(engine, prompt, TOKENS, chooser=make(), stop_ids=())
        for prompt, make in zip(PROMPTS, choosers, strict=True)
    ]
    running = scheduler(drafter, engine)
    requests = [Request(prompt, TOKENS, make(), ()) for prompt, make in zip(PROMPTS, choosers, strict=True)]
    asked = [Asked(running, request, trace=bool(number % 2)) for number, request in enumerate(requests)]
    for ours, theirs in zip(asked, expected, strict=True):
        answer = ours.ended.answer
        assert ours.ended.error is None
        assert answer.token_ids == theirs.token_ids
        assert answer.text == ours.text == theirs.text
        assert len(answer.token_ids) == TOKENS
    assert running.idle
    assert running.live == running.waiting == 0
    traced = [event.record for event in asked[1].events if isinstance(event, Piece)]
    assert [token["token_id"] for record in traced for token in record["tokens"]] == expected[1].token_ids
    positions = [token["position"] for record in traced for token in record["tokens"]]
    assert positions == [*range(len(PROMPTS[1]), len(PROMPTS[1]) + TOKENS)]


def test_plain_decoding_is_compared_with_where_an_answer_had_the_passes_to_itself(tiny_model, scheduler):
    running = scheduler(make_drafter("exit", tiny_model("llama")), plain_pass=100.0)
    found = Asked(running, Request(PROMPTS[0], TOKENS, stop_ids=()), trace=True)
    alone, first = found.ended.answer, len(found.events[0].record["tokens"])
    assert (TOKENS - first) * 100 < alone.plain_seconds < (TOKENS - first) * 100 + SECONDS
    held = Held()
    shared = scheduler(held, plain_pass=100.0)
    asked = [Asked(shared, Request(prompt, TOKENS, stop_ids=())) for prompt in PROMPTS[:2]]
    held.free.set()
    assert [each.ended.answer.plain_seconds for each in asked] == [None, None]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("who", ["none", "exit", "auto"])
def test_a_bias_is_added_to_scores_before_all_else(tiny_model, scheduler, who, temperature):
    engine = tiny_model("llama")
    free = alone(engine, PROMPTS[0], TOKENS, stop_ids=()).token_ids
    bias = dict.fromkeys(free, -100.0) | {65: 3.0, 66: 2.5}
    settings = SamplingConfig(temperature=temperature, seed=3)

    def biased(ids, scores):
        for token, value in bias.items():
            scores[:, token] += value
        return scores / (temperature or 1.0)

    expected = alone(engine, PROMPTS[0], TOKENS, chooser=Sampler(settings, biased), stop_ids=())
    running = scheduler(NoDrafter() if who == "none" else make_drafter(who, engine), engine)
    asked = [Asked(running, Request(PROMPTS[0], TOKENS, make_chooser(settings, bias), ())) for _ in range(2)]
    for each in asked:
        assert each.ended.answer.token_ids == expected.token_ids
    assert not {*free} & {*expected.token_ids}
    assert who == "none" or asked[0].ended.answer.drafted


def test_those_that_wait_join_between_rounds_in_their_order_and_share_passes(tiny_model, scheduler, monkeypatch):
    engine, held = tiny_model("llama"), Held()
    shared = []
    run = engine.run_batch
    monkeypatch.setattr(
        engine, "run_batch", lambda texts, *rest: shared.append(len(texts)) or run(texts, *rest), raising=False
    )
    running = scheduler(held, engine, batch=2)
    asked = [Asked(running, Request(prompt, 4, stop_ids=())) for prompt in PROMPTS[:4]]
    held.wait()
    assert running.live <= 2
    assert running.waiting >= 2
    held.free.set()
    ended = [each.ended for each in asked]
    assert set(shared) == {2}
    over = [each.times.whole + one.handle.asked for each, one in zip(ended, asked, strict=True)]
    assert over == sorted(over)
    assert [each.answer.token_ids for each in ended] == [
        alone(engine, prompt, 4, stop_ids=()).token_ids for prompt in PROMPTS[:4]
    ]
    assert 0 < ended[3].times.queue < ended[3].times.whole


@pytest.mark.parametrize("runner", ["fused", "hf"])
def test_a_later_request_takes_over_what_earlier_ones_computed(tiny_model, scheduler, runner):
    engine = tiny_model("llama", runner)
    prompt = [(7 * place) % 250 for place in range(200)]
    running = scheduler(make_drafter("lookup", engine), engine, prefix_bytes=10**9)
    first = Asked(running, Request(prompt, 8, stop_ids=())).ended
    longer = [*prompt, *first.answer.token_ids, *PROMPTS[0]]
    together = [Asked(running, Request(longer, 8, stop_ids=())) for _ in range(2)]
    fresh = alone(engine, longer, 8, stop_ids=())
    for each in together:
        assert each.ended.answer.token_ids == fresh.token_ids
        assert each.ended.answer.reused == 192
    assert first.answer.reused == 0
    assert 0 < running.kept_bytes < 10**9


def test_answers_go_on_while_a_long_prompt_is_read(tiny_model, scheduler):
    engine, held = tiny_model("llama"), Held()
    prompt = [(7 * place) % 250 for place in range(5 * PREFILL_WIDTH)]
    running = scheduler(held, engine)
    first = Asked(running, Request(PROMPTS[0], TOKENS, stop_ids=()))
    held.wait()
    second = Asked(running, Request(prompt, 4, stop_ids=()))
    seen = []
    hear = second.handle.on_event
    second.handle.on_event = lambda event: seen.append(len(first.events)) or hear(event)
    held.free.set()
    assert second.ended.answer.token_ids == alone(engine, prompt, 4, stop_ids=()).token_ids
    assert first.ended.answer.token_ids == alone(engine, PROMPTS[0], TOKENS, stop_ids=()).token_ids
    assert 5 <= seen[0] < TOKENS


def test_who_hangs_up_while_its_prompt_is_read_leaves_nothing(tiny_model, scheduler):
    engine, held = tiny_model("llama"), Held()
    prompt = [(7 * place) % 250 for place in range(5 * PREFILL_WIDTH)]
    running = scheduler(held, engine, prefix_bytes=10**8)
    first = Asked(running, Request(PROMPTS[0], TOKENS, stop_ids=()))
    held.wait()
    second = Asked(running, Request(prompt, 4, stop_ids=()))
    for _ in range(3):
        held.allowed.release()
        held.wait()
    second.handle.cancel(HungUp("gone"))
    held.free.set()
    assert isinstance(second.ended.error, HungUp)
    assert second.ended.answer is None
    assert first.ended.error is None
    assert [kept.tokens[: len(PROMPTS[0])] for kept in running.prefixes.kept] == [PROMPTS[0]]


def test_who_hangs_up_makes_room(scheduler):
    held = Held()
    running = scheduler(held, batch=1, queue=2)
    live = Asked(running, Request(PROMPTS[0], 50, stop_ids=()))
    held.wait()
    waiting = [Asked(running, Request(prompt, 3, stop_ids=())) for prompt in PROMPTS[1:3]]
    with pytest.raises(QueueFull) as full:
        Asked(running, Request(PROMPTS[3], 3))
    assert full.value.retry_after >= 1
    waiting[0].handle.cancel(HungUp("gone"))
    live.handle.cancel(HungUp("gone"))
    held.free.set()
    assert isinstance(live.ended.error, HungUp)
    assert 0 < len(live.ended.answer.token_ids) < 50
    assert live.ended.answer.finish_reason is None
    assert isinstance(waiting[0].ended.error, HungUp)
    assert waiting[0].ended.answer is None
    assert waiting[1].ended.error is None


class Failing(NoDrafter):
    """Fails in one place, for the text whose prompt is `prompt`."""

    def __init__(self, prompt, place):
        self.prompt, self.place = prompt, place
        self.is_guilty, self.rounds = False, 0

    def begin(self, prompt_ids, chooser):
        super().begin(prompt_ids, chooser)
        self.is_guilty = prompt_ids == self.prompt
        self.rounds = 0
        self.fail("begin")

    def draft(self, *arguments):
        self.rounds += 1
        self.fail("draft")
        return super().draft(*arguments)

    def accept(self, *arguments):
        self.fail("accept")

    def fail(self, place):
        if self.is_guilty and place == self.place and (place == "begin" or self.rounds > 3):
            raise RuntimeError(f"a fault in {place}")


@pytest.mark.parametrize("place", ["begin", "draft", "accept", "pass"])
def test_what_goes_wrong_in_one_request_ends_that_one_alone(tiny_model, scheduler, place, monkeypatch):
    engine = tiny_model("llama")
    if place == "pass":  # in a shared pass, and again in that text's own
        run = engine.run_tokens

        def run_tokens(tokens, cache, *rest):
            if cache.limit == 2 * KEY_STEP and cache.length > len(PROMPTS[2]) + 3:
                raise RuntimeError("a fault in pass")
            return run(tokens, cache, *rest)

        def run_batch(*arguments):
            raise RuntimeError("a fault in pass")

        monkeypatch.setattr(engine, "run_tokens", run_tokens, raising=False)
        monkeypatch.setattr(engine, "run_batch", run_batch, raising=False)
    running = scheduler(Failing(PROMPTS[2], place), engine, batch=4, prefix_bytes=10**8)
    asked = [
        Asked(running, Request(prompt, LOST if prompt == PROMPTS[2] else TOKENS, stop_ids=())) for prompt in PROMPTS[:5]
    ]
    for number, each in enumerate(asked):
        is_lost = number == 2 and place != "draft"  # without a draft it goes on
        assert (each.ended.error is not None) == is_lost
        if is_lost:
            assert f"a fault in {place}" in str(each.ended.error)
        else:
            tokens = LOST if number == 2 else TOKENS
            assert each.ended.answer.token_ids == alone_without_faults(tiny_model, number, tokens)
    assert running.idle
    assert running.thread.is_alive()


def alone_without_faults(tiny_model, number, tokens):
    return alone(tiny_model("llama"), PROMPTS[number], tokens, stop_ids=()).token_ids


def test_a_prompt_that_cannot_be_read_is_its_own_error(scheduler):
    running = scheduler()
    wrong, right = Asked(running, Request([], 4)), Asked(running, Request(PROMPTS[0], 4))
    assert isinstance(wrong.ended.error, ConfigError)
    assert right.ended.error is None


def test_a_listener_that_fails_ends_its_own_answer(scheduler):
    running = scheduler()

    def hear(event):
        raise RuntimeError("nobody is here")

    running.submit(Handle(Request(PROMPTS[0], 400, stop_ids=()), hear))
    other = Asked(running, Request(PROMPTS[1], 6, stop_ids=()))
    assert other.ended.error is None
    deadline = time.monotonic() + SECONDS
    while not running.idle and time.monotonic() < deadline:
        time.sleep(0.01)
    assert running.idle


def test_draining_finishes_what_was_taken_and_takes_nothing_more(scheduler):
    held = Held()
    running = scheduler(held, batch=1)
    asked = [Asked(running, Request(prompt, 4, stop_ids=())) for prompt in PROMPTS[:3]]
    held.wait()
    running.drain()
    with pytest.raises(Stopping):
        Asked(running, Request(PROMPTS[3], 4))
    assert not running.idle
    held.free.set()
    assert [each.ended.error for each in asked] == [None] * 3
    assert running.idle


def test_closing_tells_everybody_who_waits(scheduler):
    held = Held()
    running = scheduler(held, batch=1)
    asked = [Asked(running, Request(prompt, 400, stop_ids=())) for prompt in PROMPTS[:3]]
    held.wait()
    threading.Timer(0.05, held.free.set).start()
    running.close()
    assert all(isinstance(each.ended.error, Stopping) for each in asked)
    assert not running.thread.is_alive()
    with pytest.raises(Stopping):
        Asked(running, Request(PROMPTS[3], 4))


def test_a_text_that_leaves_a_batch_changes_nothing_for_the_others(tiny_model):
    engine = tiny_model("llama")
    texts = Batch(engine, width=4)
    joined = [texts.join(Request(prompt, TOKENS, stop_ids=()), make_drafter("exit", engine)) for prompt in PROMPTS[:3]]
    tokens = {text: [] for text in joined}
    for number in range(TOKENS):
        if number == 3:
            texts.leave(joined[1])
        if texts.live:
            for text, step in texts.step():
                tokens[text] += step.tokens
                if text.ended:
                    texts.leave(text)
    for place in (0, 2):
        assert tokens[joined[place]] == alone(engine, PROMPTS[place], TOKENS, stop_ids=()).token_ids
    assert texts.live == []
