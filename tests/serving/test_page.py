"""The page of the server in a real browser: it says what the API says, who decided what, and what went wrong."""

import contextlib
import copy
import dataclasses
import json
import re
import time

import pytest
from browsers import launched
from drafters import make_drafter
from live_server import SECONDS, Held, LiveServer

from early_exit_cli.drafting.auto import AutoDrafter
from early_exit_cli.engine import Engine
from early_exit_cli.report import html_page
from early_exit_cli.report.palette import decider_of, look

pytest.importorskip("starlette")
CHAT = "/v1/chat/completions"
NASTY = "<img src=x onerror=\"document.title='taken'\">"
KEY = "a-key"
WIDER = (
    "[...document.querySelectorAll('html, main, header, footer, dialog')].filter(e => e.scrollWidth > e.clientWidth)"
)
"""What has to be scrolled sideways."""
CONTRAST = """() => {
  const pen = Object.assign(document.createElement("canvas"), {width: 1, height: 1}).getContext("2d", {willReadFrequently: true});
  const light = colours => {
    pen.clearRect(0, 0, 1, 1);
    for (const colour of colours) { pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1); }
    const [r, g, b] = [...pen.getImageData(0, 0, 1, 1).data].map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const weak = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; node = walker.nextNode();) {
    const element = node.parentElement;
    if (!node.data.trim() || !element.getClientRects().length || element.closest("script")) continue;
    const grounds = [];
    for (let e = element; e; e = e.parentElement) grounds.unshift(getComputedStyle(e).backgroundColor);
    const [a, b] = [light(grounds), light([...grounds, getComputedStyle(element).color])].sort((x, y) => y - x);
    if ((a + .05) / (b + .05) < 4.5) weak.push(`${element.outerHTML.slice(0, 99)}: ${(a + .05) / (b + .05)}`);
  }
  return weak;
}"""
"""Texts whose colour is too near the one behind them."""


@pytest.fixture(scope="module")
def engine(tiny_model):
    """Its token 257 is an element, were it not text."""
    found = tiny_model("llama")
    tokenizer = copy.deepcopy(found.backbone.tokenizer)
    tokenizer.add_tokens([NASTY])
    return Engine(dataclasses.replace(found.backbone, tokenizer=tokenizer), found.blocks, found.heads)


@pytest.fixture(scope="module")
def server(engine):
    drafter = AutoDrafter([(make_drafter("lookup", engine), 15), (make_drafter("exit", engine), 3)])
    with LiveServer(engine, drafter, plain_pass=0.001) as found:
        yield found


@contextlib.contextmanager
def held_up(engine, **settings):
    """A server whose rounds wait until they may go on, and what lets them; at the end they all may."""
    held = Held()
    with LiveServer(engine, held, batch=1, **settings) as server:
        try:
            yield held, server
        finally:
            held.free.set()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with launched(tmp_path_factory.mktemp("profile")) as context:
        yield context


@pytest.fixture
def opened(browser):
    """server -> its page; fails where that says something in the console, or asks anybody else."""
    faults, pages = [], []

    def open_page(server):
        page = browser.new_page()
        page.set_default_timeout(8000)
        refused = "Failed to load resource"
        page.on("request", lambda r: None if r.url.startswith((server.address, "data:")) else faults.append(r.url))
        page.on("console", lambda m: None if m.text.startswith(refused) else faults.append(m.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(server.address)
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert faults == []


def say(page, text, **settings):
    """Type a message and send it, with these settings."""
    if settings:
        if page.locator("#settings").is_hidden():
            page.click("#open")
        for name, value in settings.items():
            page.fill(f"#options [name={name}]", str(value))
        page.click("#done")
    page.fill("#message", text)
    page.press("#message", "Enter")


def ended(page, answers=1):
    """The last answer, once so many are over."""
    page.locator(f".answer:nth-child({2 * answers}) .copy").wait_for()
    return page.locator(".answer .text").last


def until(condition):
    for _ in range(SECONDS * 100):
        if condition():
            return
        time.sleep(0.01)
    raise TimeoutError


def fails(page, words):
    """Wait for an error that says so."""
    page.locator("#error", has_text=words).wait_for()


def rounds_of(response):
    """What a stream said of who decided."""
    chunks = [json.loads(line[6:]) for line in response.text().split("\n\n") if line.startswith("data: {")]
    return [step for chunk in chunks for step in chunk.get("eexit", {"rounds": []})["rounds"]]


def test_tokens_come_in_the_look_and_the_words_of_who_decided_them(server, opened):
    page = opened(server)
    page.locator("#model", has_text="llama").wait_for()
    with page.expect_response(f"**{CHAT}") as streamed:
        say(page, "one two one two ", max_tokens=60)
    body = {"messages": [{"role": "user", "content": "one two one two "}], "max_tokens": 60}
    answer = ended(page)
    text = server.ask(CHAT, body)[2]["choices"][0]["message"]["content"]
    rounds = rounds_of(streamed.value)
    assert answer.evaluate("e => [...e.querySelectorAll('.t')].map(t => t.textContent).join('')") == text
    shown = answer.locator(".t, del").evaluate_all("all => all.map(e => [e.className, e.dataset.tip])")
    tokens = [
        (step, number, place, "rejected" if kind else "tokens")
        for number, step in enumerate(rounds, 1)
        for kind, place in [
            *((0, place) for place in range(step["accepted"])),
            *((1, place) for place in range(len(step["rejected"]))),
            *((0, place) for place in range(step["accepted"], len(step["tokens"]))),
        ]
    ]
    known = {"num_blocks": None}
    looks = {}
    for (name, words), (step, number, place, kind) in zip(shown, tokens, strict=True):
        decider = decider_of(step[kind][place])
        if kind == "rejected":
            assert words.split("\n") == html_page._rejected_lines(step, number, place)
            continue
        assert words.split("\n") == html_page._token_lines(known, step, number, place)
        looks[decider] = look(decider)
        assert f"by-{decider.replace(' ', '-')}" in name
        assert {"single", "double"} & {*name.split()} == ({look(decider).line} - {"none"} if look(decider) else set())
    assert {"backbone", "head 1"} < {*looks}
    assert any(step["rejected"] for step in rounds)
    assert page.locator("#deciders .t").all_inner_texts() == sorted(looks, key=lambda name: (name == "backbone", name))
    assert re.search(r"[\d.]+ tokens/s · plain decoding [\d.,]+ undisturbed", page.inner_text(".about"))
    spoken = "".join(page.locator("#spoken p").all_text_contents())
    assert "Answer is whole" in spoken

    assert not page.locator("del").first.is_visible()
    page.check("#rejected")
    assert page.locator("del").first.is_visible()
    answer.focus()
    page.keyboard.press("ArrowRight")
    page.locator("#tip", has_text="round 1").wait_for()

    body["messages"] += [{"role": "assistant", "content": text}, {"role": "user", "content": "and?"}]
    say(page, "and?")
    ended(page, 2)
    second = server.ask(CHAT, body)[2]["choices"][0]["message"]["content"]
    assert ended(page, 2).locator(".t").evaluate_all("all => all.map(t => t.textContent).join('')") == second
    page.locator(".retry").last.click()
    assert ended(page, 2).locator(".t").evaluate_all("all => all.map(t => t.textContent).join('')") == second
    page.click("#begin")
    assert page.locator("article").count() == 0
    assert page.locator("#welcome").is_visible()


def test_what_the_model_and_its_user_write_is_text(server, opened):
    page = opened(server)
    page.locator("#model[title]").wait_for(state="attached")  # the model's name has come, which is in the page's title
    title = page.title()

    def favour(route):
        body = json.loads(route.request.post_data) | {"logit_bias": {"257": 100}}
        route.continue_(post_data=json.dumps(body))

    page.route(f"**{CHAT}", favour)
    say(page, NASTY, max_tokens=30, system=NASTY)
    assert ended(page).inner_text() == NASTY * 30
    assert page.locator(".answer .t.single.by-lookup").count() > 9
    assert page.inner_text(".question") == NASTY
    page.locator(".answer .t").first.hover()
    assert NASTY in page.inner_text("#tip")
    assert page.locator("img").count() == 0
    assert page.title() == title


def test_an_answer_is_stopped_and_a_question_without_one_comes_back(engine, opened):
    with held_up(engine) as (held, server):
        page = opened(server)
        say(page, "Hello", max_tokens=100)
        held.wait()
        page.press("#message", "Escape")
        page.wait_for_selector("body:not(.busy)")
        assert page.input_value("#message") == "Hello"
        assert page.locator("article").count() == 0
        held.allowed.release()  # the round of the one that was stopped
        page.press("#message", "Enter")
        for _ in range(3):
            held.wait()
            held.allowed.release()
        page.wait_for_selector(".answer .t", state="attached")
        page.click("#send")
        held.free.set()
        ended(page)
        assert "stopped" in page.inner_text(".about")
        say(page, "More")
        ended(page, 2)


def test_what_goes_wrong_is_a_line_and_nothing_typed_is_lost(engine, opened):
    with held_up(engine, queue=1, key=KEY) as (held, server):
        status, headers, _ = server.ask("/")
        assert status == 200
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert "unsafe" not in headers["Content-Security-Policy"]
        page = opened(server)
        page.wait_for_selector("#settings[open] #needs-key")
        page.fill("[name=key]", "another")
        page.click("#done")
        fails(page, "does not take this key")
        page.click("#error button")
        page.fill("[name=key]", KEY)
        page.keyboard.press("Enter")
        page.wait_for_selector("#model:not(:empty)")
        assert page.locator("#error").is_hidden()
        assert KEY not in str(page.context.storage_state())  # neither cookies nor local storage

        others = [opened(server) for _ in range(2)]
        for number, other in enumerate(others):
            say(other, f"another {number}", key=KEY, max_tokens=100)
            other.wait_for_selector(".waiting")
            if not number:
                held.wait()
        until(lambda: server.scheduler.waiting)
        say(page, "the third")
        fails(page, "Try again in 1 s.")
        assert page.input_value("#message") == "the third"
        held.allowed.release()
        others[0].wait_for_selector(".answer .t", state="attached")
        server.scheduler.closing = True
        held.free.set()
        fails(others[0], "The answer broke off")
        assert "broke off" in others[0].inner_text(".about")
        page.press("#message", "Enter")
        fails(page, "Nothing is answered now")
    page.press("#message", "Enter")
    fails(page, "The server cannot be reached")
    assert page.input_value("#message") == "the third"


def test_it_fits_a_phone_and_is_readable_in_light_and_dark(server, opened):
    page = opened(server)
    say(page, "one two one two " + "x" * 90, max_tokens=40)
    ended(page)
    page.check("#rejected")
    page.evaluate("showError(new Told('Something went wrong.', 'key'))")
    page.click("#open")
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for width in (360, 1200):
            page.set_viewport_size({"width": width, "height": 700})
            assert page.evaluate(WIDER) == []
        assert page.evaluate(CONTRAST) == []
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, ground[4:-1].split(","))) < 200) == (scheme == "dark")
