"""The page from records: everything is escaped, every token is there, what was rejected too."""

from html.parser import HTMLParser

from early_exit_cli.report.html_page import render_page

NASTY = "</script><script>alert(\"1\")</script> & 'quotes' <b>$body</b>\r\n\0"


def token(text, position, decided_by="backbone", **known):
    record = {
        "position": position, "token_id": position, "token_text": text, "text": text, "decided_by": decided_by,
        "exit_layer": 30, "head": None, "entropy": None, "threshold": None, "heads": [],
    }  # fmt: skip
    return record | known


def by_head(text, position, head=0, entropy=0.5, threshold=1.0):
    return token(text, position, "head", head=head, exit_layer=8, entropy=entropy, threshold=threshold)


def answer(name, **known):
    stats = {
        "mode": name, "total_tokens_generated": 4, "tokens_per_second": 80.0, "time_to_first_token_seconds": 0.1,
        "prefill_tokens_per_second": 1234.5, "decode_tokens_per_second": 90.0,
        "tokens_drafted": 3, "tokens_accepted": 1, "acceptance_rate": 1 / 3, "accept_length": 2.0,
        "exit_distribution": {"0": 1, "full": 2, "lookup": 1}, "average_exit_layer": 17.0,
    }  # fmt: skip
    return {"text": "", "token_ids": [], "finish_reason": "stop", "stats": stats} | known


def record(**known):
    rounds = [
        {
            "accepted": 1,
            "tokens": [by_head("Hi" + NASTY, 5), token("", 6)],
            "rejected": [by_head(NASTY, None, head=1), token("x", None, "lookup", length=3, exit_layer=0)],
        },
        {"accepted": 1, "tokens": [token(" there", 7, "lookup", length=3, exit_layer=0), token("", 8)], "rejected": []},
    ]
    return {
        "model": NASTY, "quantization": "4bit", "num_blocks": 30, "exit_layers": [8], "accuracy_level": 0.9,
        "prompt": NASTY, "prompt_tokens": 5, "shown": "auto", "rounds": rounds, "processor": NASTY, "version": "1",
        "methods": {"full": answer("full"), "auto": answer("auto", speedup=1.5, identical=True, bit_exact=True)},
    } | known  # fmt: skip


class Page(HTMLParser):
    """Elements with their attributes, and the text of the answer."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.answer = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "link", "input"):
            self.open.append((tag, dict(attributes).get("id")))

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        inside = [name for _, name in self.open]
        if "answer" in inside and "del" not in [tag for tag, _ in self.open]:
            self.answer += data


def test_everything_is_escaped_and_well_formed():
    text = render_page(record())
    page = Page(text)
    assert not page.open
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert "b" not in {tag for tag, attributes in page.elements if attributes.get("title")}
    assert "<b>$body" not in text
    assert page.answer == ("Hi" + NASTY + " there").replace("\0", "\ufffd")
    assert not {"src", "href", "action", "onload"} & {
        name for tag, attributes in page.elements for name in attributes if tag != "link"
    }
    assert [attributes["href"] for tag, attributes in page.elements if tag == "link"] == ["data:,"]


def test_every_token_says_its_drafter_and_why():
    page = Page(render_page(record()))
    tips = [a["data-tip"] for tag, a in page.elements if tag == "span" and a.get("class", "").startswith("t ")]
    assert len(tips) == 4
    for words in ("by head 0", "after 8 blocks of 30", "entropy 0.500 nats, below the threshold 1.000", "position 5"):
        assert words in tips[0]
    assert "drafted, and accepted" in tips[0]
    assert "the backbone's own token, after 1 accepted" in tips[1]
    assert "continues a suffix of 3 tokens" in tips[2]


def test_rejected_drafts_are_struck_in_the_text_and_hollow_in_the_timeline():
    page = Page(render_page(record()))
    struck = [attributes["data-tip"] for tag, attributes in page.elements if tag == "del"]
    assert "by head 1" in struck[0]
    assert "rejected: the backbone chose" in struck[0]
    assert "a drafted token before it was rejected" in struck[1]
    cells = [a["class"] for tag, a in page.elements if tag == "rect" and "cell" in a["class"] and "by-" in a["class"]]
    assert sum(" no " in name for name in cells) == 2


def test_a_plain_answer_is_a_page_without_drafts():
    rounds = [{"accepted": 0, "tokens": [token("a", 5)], "rejected": []}]
    text = render_page(record(rounds=rounds, exit_layers=[], shown="full", methods={"full": answer("full")}))
    assert Page(text).answer == "a"
    assert "Draft and verify" not in text
    assert "Methods" not in text
    assert "accuracy level" not in text


def test_a_token_that_is_half_a_character_is_called_so():
    rounds = [
        {
            "accepted": 0,
            "tokens": [token("", 5, token_text="\ufffd"), token("🍎", 6, token_text="\ufffd")],
            "rejected": [],
        }
    ]
    page = Page(render_page(record(rounds=rounds)))
    assert page.answer == "🍎"
    tips = [a["data-tip"] for tag, a in page.elements if a.get("class", "").startswith("t ")]
    assert tips[0].startswith("a part of a character by backbone")


def test_a_traced_answer_shows_what_every_head_said():
    views = [{"head": 0, "token_id": 3, "token_text": "\n", "entropy": 2.5}]
    rounds = [{"accepted": 0, "tokens": [token("a", 5, heads=views)], "rejected": []}]
    assert "head 0 says “↵”, entropy 2.50" in render_page(record(rounds=rounds))


def test_other_tokens_are_called_so():
    other = answer("auto", speedup=1.5, identical=False, bit_exact=False)
    text = render_page(record(methods={"full": answer("full"), "auto": other}))
    assert "other tokens than plain decoding" in text
    assert ">different<" in text
