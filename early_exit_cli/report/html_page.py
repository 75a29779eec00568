"""One answer as a page that stands alone: the drafter of each token, every round, the methods. From records to text.

No request leaves the page (its policy forbids them), everything that comes from a model or a person is escaped, and all
pictures are SVG drawn here. `page.html` is the frame: style, and the script of the tooltips.
"""

from __future__ import annotations

import html
from collections.abc import Iterable
from pathlib import Path
from string import Template
from typing import Any

from early_exit_cli.report.palette import decider_of, look

Record = dict[str, Any]
"""As `decoding.token_record`, `decoding.round_records` and `Generation.record` make them."""
CELL, GAP = 12, 3
"""Pixels of a token in the timeline, and between two."""
CHART = (760, 230)
MARGIN = (40, 26, 92, 28)
"""Pixels around the plot: left, top, right, bottom."""


def render_page(record: Record) -> str:
    """The page.

    Args:
        record: model, quantization, num_blocks, exit_layers, accuracy_level (None where the method's name says it), prompt,
            prompt_tokens, processor, version;
            `methods`, name -> record of an answer, with speedup, identical and bit_exact where it was compared; `shown`,
            the method whose `rounds` are drawn.
    """
    parts = [
        _header(record),
        _figures(record),
        _answer(record),
        _timeline(record) if any(step["accepted"] or step["rejected"] for step in record["rounds"]) else "",
        _depths(record) if any(token["head"] is not None for token in _tokens(record)) else "",
        _entropies(record),
        _methods(record) if len(record["methods"]) > 1 else "",
        _footer(record),
    ]
    frame = Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
    title = f"{record['model']}: the drafter of each token"
    return frame.substitute(title=_text(title), colours=_colours(record), body="\n".join(filter(None, parts)))


def _text(value: Any) -> str:
    """Escaped for elements and attributes; a carriage return would otherwise become a newline, a NUL is no text."""
    return html.escape(str(value)).replace("\r", "&#13;").replace("\0", "&#65533;")


def _tip(lines: Iterable[str]) -> str:
    return f'data-tip="{_text(chr(10).join(lines))}"'


def _visible(text: str) -> str:
    """A token's text on one line."""
    return text.replace("\n", "↵").replace("\t", "⇥")


def _quoted(text: str) -> str:
    return f"“{_visible(text)}”"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _class(decider: str) -> str:
    return "by-" + "".join(character if character.isalnum() else "-" for character in decider)


def _tokens(record: Record) -> list[Record]:
    return [token for step in record["rounds"] for token in step["tokens"]]


def _deciders(record: Record) -> dict[str, int]:
    """Tokens by decider, of the shown method; heads first, the backbone last."""
    counts = record["methods"][record["shown"]]["stats"]["exit_distribution"]
    named = {_decider(key): count for key, count in counts.items()}
    return {name: named[name] for name in sorted(named, key=lambda name: (name == "backbone", not name[-1:].isdigit()))}


def _decider(counted: str) -> str:
    return "backbone" if counted == "full" else f"head {counted}" if counted.isdigit() else counted


def _colours(record: Record) -> str:
    """A class that sets --c for every decider on the page."""
    counted = [key for method in record["methods"].values() for key in method["stats"]["exit_distribution"]]
    deciders = {_decider(key) for key in counted} | {decider_of(token) for token in _drafted(record)} | {"backbone"}
    looks = {decider: look(decider) for decider in sorted(deciders)}
    return "\n".join(
        f".{_class(decider)} {{ --c: {seen.colour if seen else 'var(--backbone)'}; }}"
        for decider, seen in looks.items()
    )


def _drafted(record: Record) -> list[Record]:
    return _tokens(record) + [token for step in record["rounds"] for token in step["rejected"]]


def _section(title: str, words: str, content: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n<p>{words}</p>\n{content}\n</section>"


def _header(record: Record) -> str:
    shown = record["methods"][record["shown"]]
    stats = shown["stats"]
    headline = f"{stats['tokens_per_second']:.0f} tokens a second"
    badges = []
    if "speedup" in shown:
        headline = f"{shown['speedup']:.2f}× as fast as plain decoding"
        badges.append(_same_badge(shown))
    badges.append(("good", "every token verified by the model"))
    badges.append(("", f"{stats['total_tokens_generated']} tokens"))
    badges.append(("", f"method {record['shown']}"))
    if record["accuracy_level"] is not None and any(token["threshold"] is not None for token in _drafted(record)):
        badges.append(("", f"accuracy level {record['accuracy_level']:.2f}"))
    drawn = "".join(f'<span class="badge {kind}">{_text(words)}</span>' for kind, words in badges)
    return (
        f'<header>\n<p class="brand">eexit</p>\n<h1>{headline}</h1>\n'
        f"<p>{_text(record['model'])} in {_text(record['quantization'])}, {record['num_blocks']} blocks, "
        f'on {_text(record["processor"])}</p>\n<div class="badges">{drawn}</div>\n</header>'
    )


def _same_badge(method: Record) -> tuple[str, str]:
    if method["bit_exact"]:
        return "good", "same tokens as plain decoding, bit for bit"
    return (
        ("good", "same tokens as plain decoding")
        if method["identical"]
        else ("bad", "other tokens than plain decoding")
    )


def _figures(record: Record) -> str:
    stats = record["methods"][record["shown"]]["stats"]
    figures = [
        (f"{stats['tokens_per_second']:.1f}", "tokens/s"),
        (f"{stats['time_to_first_token_seconds'] * 1000:.0f} ms", "to the first token"),
    ]
    if stats["tokens_drafted"]:
        figures += [
            (f"{stats['accept_length']:.2f}", "tokens a verify step"),
            (f"{stats['tokens_accepted']} of {stats['tokens_drafted']}", "drafted tokens accepted"),
        ]
    figures.append((f"{stats['average_exit_layer']:.1f} of {record['num_blocks']}", "average exit layer"))
    return (
        '<section class="figures">'
        + "".join(f"<div><b>{v}</b><span>{k}</span></div>" for v, k in figures)
        + "</section>"
    )


def _answer(record: Record) -> str:
    counts = _deciders(record)
    total = sum(counts.values())
    names = "".join(
        f'<li class="{_class(name)}"><i></i>{_text(name)} <b>{count}</b> ({count / total:.0%})</li>'
        for name, count in counts.items()
    )
    spans = []
    for number, step in enumerate(record["rounds"], 1):
        committed = [_span(record, step, number, place) for place in range(len(step["tokens"]))]
        struck = [
            f"<del {_tip(_rejected_lines(step, number, place))}>{_text(_visible(token['token_text']))}</del>"
            for place, token in enumerate(step["rejected"])
        ]
        spans += [*committed[: step["accepted"]], *struck, *committed[step["accepted"] :]]
    toggle = ""
    if any(step["rejected"] for step in record["rounds"]):
        toggle = '<li><label><input type="checkbox" id="rejected"> show rejected drafts</label></li>'
    return (
        f'<section>\n<p class="prompt">{_text(record["prompt"])}</p>\n<div class="answer" id="answer">{"".join(spans)}</div>\n'
        f'{_share_bar(counts)}\n<ul class="legend">{names}{toggle}</ul>\n</section>'
    )


def _span(record: Record, step: Record, number: int, place: int) -> str:
    """A committed token. One without text is an end token, or waits for the rest of a character."""
    token = step["tokens"][place]
    decider = decider_of(token)
    seen = look(decider)
    classes = ["t", _class(decider)]
    if seen:
        classes += ["d"] if seen.line == "none" else ["d", seen.line]
    if not token["text"]:
        classes.append("end" if token is _tokens(record)[-1] else "void")
    tip = _tip(_token_lines(record, step, number, place))
    return f'<span class="{" ".join(classes)}" data-p="{token["position"]}" {tip}>{_text(token["text"])}</span>'


def _token_lines(record: Record, step: Record, number: int, place: int) -> list[str]:
    """What a tooltip says of a committed token."""
    token = step["tokens"][place]
    partial = not token["text"] and "\ufffd" in token["token_text"]
    name = "a part of a character" if partial else _quoted(token["token_text"])
    lines = [f"{name} by {decider_of(token)}", *_why(token, record["num_blocks"])]
    if place < step["accepted"]:
        lines.append("drafted, and accepted by the backbone")
    elif step["accepted"] or step["rejected"]:
        after = f"after {step['accepted']} accepted" if step["accepted"] else "nothing of the draft was accepted"
        lines.append(f"the backbone's own token, {after}")
    elif token["head"] is not None:
        lines.append("not verified")
    lines.append(f"round {number}, position {token['position']}, id {token['token_id']}")
    for view in token["heads"]:
        lines.append(f"head {view['head']} says {_quoted(view['token_text'])}, entropy {view['entropy']:.2f}")
    return lines


def _rejected_lines(step: Record, number: int, place: int) -> list[str]:
    """What a tooltip says of a drafted token that was not taken."""
    token = step["rejected"][place]
    lines = [f"{_quoted(token['token_text'])} drafted by {decider_of(token)}", *_why(token, None)]
    if place:
        lines.append("dropped: a drafted token before it was rejected")
    else:
        lines.append(f"rejected: the backbone chose {_quoted(step['tokens'][-1]['token_text'])}")
    return [*lines, f"round {number}, id {token['token_id']}"]


def _why(token: Record, num_blocks: int | None) -> list[str]:
    """The reason of a decision: depth, entropy and threshold, or the match in the text."""
    lines = []
    if token["decided_by"] == "head":
        depth = f"after {token['exit_layer']} blocks" + (f" of {num_blocks}" if num_blocks else "")
        lines.append(depth)
    if token["entropy"] is not None:
        gate = "no threshold" if token["threshold"] is None else f"below the threshold {token['threshold']:.3f}"
        lines.append(f"entropy {token['entropy']:.3f} nats, {gate}")
    if token.get("length") is not None:
        lines.append(f"continues a suffix of {token['length']} tokens that occurred before")
    return lines


def _share_bar(counts: dict[str, int]) -> str:
    parts = "".join(
        f'<i class="{_class(name)}" style="flex:{count}" {_tip([f"{name}: {count} tokens"])}></i>'
        for name, count in counts.items()
        if count
    )
    return f'<div class="share">{parts}</div>'


def _timeline(record: Record) -> str:
    """A column per round: accepted drafts, the backbone's token on top of them, hollow what was rejected."""
    columns = []
    for number, step in enumerate(record["rounds"], 1):
        drawn = [
            (decider_of(token), "", f'data-p="{token["position"]}"', _token_lines(record, step, number, place))
            for place, token in enumerate(step["tokens"])
        ] + [
            (decider_of(token), " no", "", _rejected_lines(step, number, place))
            for place, token in enumerate(step["rejected"])
        ]
        height = len(drawn) * (CELL + GAP)
        cells = ""
        for place, (decider, rejected, position, lines) in enumerate(drawn):
            top = height - (place + 1) * (CELL + GAP) + GAP
            inset = 0.6 if rejected else 0
            size = CELL - 2 * inset
            cells += (
                f'<rect class="cell{rejected} {_class(decider)}" {position} x="{inset}" y="{top + inset}" width="{size}" '
                f'height="{size}" rx="2" {_tip(lines)}/>'
            )
            if rejected:
                cells += f'<path class="cross {_class(decider)}" d="M{CELL * 0.3} {top + CELL * 0.7}l{CELL * 0.4} -{CELL * 0.4}"/>'
        columns.append(f'<svg width="{CELL}" height="{height}" viewBox="0 0 {CELL} {height}">{cells}</svg>')
    rounds = len(record["rounds"])
    words = (
        f"{rounds} verify steps, left to right. Bottom up: drafted tokens that the backbone accepted, its own next token, and "
        "hollow what it rejected."
    )
    return _section("Draft and verify", words, f'<div class="rounds">{"".join(columns)}</div>')


def _depths(record: Record) -> str:
    """A bar per committed token, as high as the blocks that ran for it."""
    tokens = _tokens(record)
    depth = record["num_blocks"]
    width, height, plot = _plot()
    step = plot[2] / len(tokens)
    marks = _horizontal_grid(plot, [(layer / depth, str(layer)) for layer in (0, *record["exit_layers"], depth)])
    for place, token in enumerate(tokens):
        tall = max(token["exit_layer"] / depth * plot[3], 2)
        marks += (
            f'<rect class="cell {_class(decider_of(token))}" data-p="{token["position"]}" x="{plot[0] + place * step:.2f}" '
            f'y="{plot[1] + plot[3] - tall:.2f}" width="{max(step - 1, 0.8):.2f}" height="{tall:.2f}" '
            f"{_tip([_quoted(token['token_text']) + ' by ' + decider_of(token), *_why(token, depth)])}/>"
        )
    labels = {f"head {head}": layer for head, layer in enumerate(record["exit_layers"])} | {"backbone": depth}
    for name, layer in labels.items():
        marks += _right_label(plot, plot[1] + plot[3] * (1 - layer / depth), name)
    marks += _axis_words(plot, len(tokens), "blocks")
    words = "Blocks that ran for each token. The backbone runs all of them, an exit head those up to its exit layer."
    return _section("How deep each token went", words, _chart(width, height, marks))


def _entropies(record: Record) -> str:
    """A dot per drafted token: its head's entropy, and whether the backbone agreed; dashed, the thresholds."""
    dots: list[tuple[int, Record, str]] = []
    place = 0
    for step in record["rounds"]:
        dots += [(place + i, token, "") for i, token in enumerate(step["tokens"]) if token["entropy"] is not None]
        if step["rejected"] and step["rejected"][0]["entropy"] is not None:
            dots.append((place + step["accepted"], step["rejected"][0], " no"))
        place += len(step["tokens"])
    if len(dots) < 2:
        return ""
    limits = {decider_of(token): token["threshold"] for _, token, _ in dots if token["threshold"] is not None}
    top = max([token["entropy"] for _, token, _ in dots] + list(limits.values())) * 1.08 or 1.0
    width, height, plot = _plot()
    marks = _horizontal_grid(plot, [(share, f"{share * top:.1f}") for share in (0, 0.25, 0.5, 0.75, 1)])
    taken: list[float] = []
    for decider, limit in sorted(limits.items(), key=lambda item: item[1]):
        y = plot[1] + plot[3] * (1 - limit / top)
        label = min([y, *(other - 13 for other in taken)])
        taken.append(label)
        marks += f'<path class="limit {_class(decider)}" d="M{plot[0]} {y:.1f}h{plot[2]}"/>' + _right_label(
            plot, label, f"{decider}: {limit:.2f}"
        )
    for at, token, rejected in dots:
        x, y = plot[0] + (at + 0.5) / place * plot[2], plot[1] + plot[3] * (1 - token["entropy"] / top)
        verdict = "rejected" if rejected else "accepted"
        position = "" if rejected else f'data-p="{token["position"]}"'
        lines = [
            f"{_quoted(token['token_text'])} by {decider_of(token)}, {verdict}",
            *_why(token, record["num_blocks"]),
        ]
        marks += f'<circle class="dot{rejected} {_class(decider_of(token))}" {position} cx="{x:.1f}" cy="{y:.1f}" r="3.6" {_tip(lines)}/>'
    marks += _axis_words(plot, place, "nats")
    words = "Entropy of the head at each token it drafted. Dashed: its threshold. Hollow: rejected by the backbone."
    return _section("How sure the heads were", words, _chart(width, height, marks))


Plot = tuple[float, float, float, float]
"""x, y, width and height of the plotted area."""


def _plot() -> tuple[int, int, Plot]:
    (width, height), (left, top, right, bottom) = CHART, MARGIN
    return width, height, (left, top, width - left - right, height - top - bottom)


def _horizontal_grid(plot: Plot, lines: list[tuple[float, str]]) -> str:
    """Lines at shares of the height, with their labels on the left."""
    drawn = ""
    for share, label in lines:
        y = plot[1] + plot[3] * (1 - share)
        drawn += f'<path class="grid" d="M{plot[0]} {y:.1f}h{plot[2]}"/>'
        drawn += f'<text x="{plot[0] - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
    return drawn


def _right_label(plot: Plot, y: float, words: str) -> str:
    return f'<text x="{plot[0] + plot[2] + 8}" y="{y + 4:.1f}">{_text(words)}</text>'


def _axis_words(plot: Plot, tokens: int, unit: str) -> str:
    base = plot[1] + plot[3] + 20
    return (
        f'<text x="{plot[0]}" y="{base}">token 1</text>'
        f'<text x="{plot[0] + plot[2]}" y="{base}" text-anchor="end">{tokens}</text>'
        f'<text x="0" y="{plot[1] - 14}">{unit}</text>'
    )


def _chart(width: int, height: int, marks: str) -> str:
    return f'<div class="scroll"><svg viewBox="0 0 {width} {height}" role="img">{marks}</svg></div>'


def _methods(record: Record) -> str:
    """Every method, one a row."""
    methods = record["methods"]
    fastest = max(method["stats"]["tokens_per_second"] for method in methods.values())
    rows = ""
    for name, method in methods.items():
        stats = method["stats"]
        counts = {_decider(key): count for key, count in stats["exit_distribution"].items()}
        speed = stats["tokens_per_second"]
        cells = [
            ("", _text(name)),
            ("", f'<span class="speed" style="width:{speed / fastest * 80:.0f}px"></span>{speed:.1f}'),
            ("n", f"{method['speedup']:.2f}×" if "speedup" in method else "1.00×"),
            ("n", str(stats["tokens_drafted"] or "–")),
            ("n", str(stats["tokens_accepted"]) if stats["tokens_drafted"] else "–"),
            ("n", _share(stats["acceptance_rate"])),
            ("n", f"{stats['accept_length']:.2f}"),
            ("n", f"{stats['average_exit_layer']:.1f}"),
            ("", _same_tokens(method)),
            ("", _share_bar(counts)),
        ]
        row = "".join(f'<td class="{kind}">{cell}</td>' if kind else f"<td>{cell}</td>" for kind, cell in cells)
        rows += f'<tr class="shown">{row}</tr>' if name == record["shown"] else f"<tr>{row}</tr>"
    heads = [
        *(
            ("", "method"),
            ("", "tokens/s"),
            ("n", "speed-up"),
            ("n", "drafted"),
            ("n", "accepted"),
            ("n", "acceptance"),
        ),
        *(("n", "accept length"), ("n", "exit layer"), ("", "text"), ("", "tokens by drafter")),
    ]
    head = "".join(f'<th class="{kind}">{name}</th>' if kind else f"<th>{name}</th>" for kind, name in heads)
    words = "The same prompt, every method in turns on the same machine; medians. Bold: the answer above."
    return _section("Methods", words, f'<div class="scroll"><table><tr>{head}</tr>{rows}</table></div>')


def _same_tokens(method: Record) -> str:
    if "identical" not in method:
        return "baseline"
    if not method["identical"]:
        return '<span class="different">different</span>'
    return f'<span class="same">{"same bits" if method["bit_exact"] else "same"}</span>'


def _footer(record: Record) -> str:
    how = (
        "Drafted tokens are proposals; the model itself checks all of them in one pass and keeps those it would have chosen. "
        "So the tokens are its own."
    )
    if any(token["threshold"] is not None for token in _drafted(record)):
        how += (
            " A head is sure when the entropy of its prediction is below a threshold that was calibrated on other text."
        )
    return (
        f"<footer>\n<p>{how}</p>\n<p>Greedy, one text at a time, {record['prompt_tokens']} tokens of prompt. Made by "
        f"<code>eexit {_text(record['version'])}</code>.</p>\n</footer>"
    )
