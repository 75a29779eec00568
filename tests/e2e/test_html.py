"""The page of `--html` in a real browser: it renders, asks nobody for anything, and says what the answer says."""

import json

import pytest
from browsers import launched
from commands import eexit

PROMPT = "one </div><script>alert('\"two\"')</script> & three"


@pytest.fixture(scope="module")
def made(tiny_bundle, tmp_path_factory):
    """(page, answers of all methods) of a real decode: compare, at a level where drafts are accepted and rejected."""
    path = tmp_path_factory.mktemp("page") / "page.html"
    code, out, err = eexit(
        "infer", "--bundle", tiny_bundle, "--mode", "compare", "--drafter", "exit", "--accuracy-level", 0.6, "--read-heads", "all",
        "--repeats", 1, "--max-tokens", 40, "--prompt", PROMPT, "--html", path, "--json",
    )  # fmt: skip
    assert code == 0, err
    assert str(path) in err
    return path, json.loads(out)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with launched(tmp_path_factory.mktemp("profile")) as context:
        yield context


@pytest.fixture
def page(browser, made):
    """The opened page; fails on a message in the console, an error, or a request for anything but the file itself."""
    path, _ = made
    seen = []
    page = browser.new_page()
    page.route("**/*", lambda route: route.continue_() if route.request.url == path.as_uri() else route.abort())
    page.on("request", lambda request: seen.append(request.url) if request.url != path.as_uri() else None)
    page.on("console", lambda message: seen.append(message.text))
    page.on("pageerror", lambda error: seen.append(str(error)))
    page.goto(path.as_uri())
    yield page
    page.wait_for_load_state("networkidle")
    page.close()
    assert seen == []


def test_the_page_shows_the_answer_and_the_prompt_as_they_are(page, made):
    answer = made[1]["adaptive_early_exit"]["text"].replace("\0", "\ufffd")  # no page can hold a NUL
    assert page.inner_text("#answer", timeout=5000) == answer
    assert page.inner_text(".prompt") == PROMPT
    assert page.locator("#answer .t").count() == len(made[1]["full"]["token_ids"])


def test_every_token_has_a_tooltip_that_shows(page):
    tokens = page.locator("#answer .t")
    assert all(tokens.evaluate_all("all => all.map(e => e.dataset.tip.includes(' by '))"))
    exited = page.locator("#answer .t.d").first
    exited.hover()
    tip = page.locator("#tip")
    assert tip.is_visible()
    assert tip.inner_text() == exited.get_attribute("data-tip")
    assert "nats, below the threshold" in tip.inner_text()
    assert page.locator("svg .lit").count() > 0  # the same token in the timeline and the plots


def test_rejected_drafts_show_when_asked_for(page, made):
    stats = made[1]["adaptive_early_exit"]["stats"]
    rejected = stats["tokens_drafted"] - stats["tokens_accepted"]
    struck = page.locator("#answer del")
    assert struck.count() == page.locator(".rounds .cell.no").count() == rejected > 0
    assert not struck.first.is_visible()
    page.check("#rejected")
    assert struck.first.is_visible()


@pytest.mark.parametrize("width", [400, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_narrow_and_wide_in_light_and_dark(page, width, scheme):
    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background.removeprefix("rgb(").removesuffix(")").split(","))) < 200) == (scheme == "dark")
    for chart in page.locator("section svg").all():
        box = chart.bounding_box()
        assert box["width"] > 0
        assert box["height"] > 0
