"""One answer as a page that stands alone: the drafter of each token, every round, the methods. From records to text.

Here is what the page says and where its marks stand; `page.html`, a Jinja template, has the elements, the style, and the
script of the tooltips. No request leaves the page (its policy forbids them), everything that is filled in is escaped, and
all pictures are SVG drawn here.
"""

from __future__ import annotations

from typing import Any

from early_exit_cli.report.numbers import ENDS, rate
from early_exit_cli.report.palette import decider_of
from early_exit_cli.report.templates import class_of, colour_of, line_classes, render

Record = dict[str, Any]
"""As `decoding.token_record`, `decoding.round_records` and `Generation.record` make them."""
Mark = dict[str, Any]
"""An SVG element: its `tag`, its `text` if it has any, and its `attributes`, of which None stands for none."""
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
    drafted = _drafted(record)
    known = dict(
        colours=_colours(record),
        headline=_headline(record),
        badges=_badges(record),
        figures=_figures(record),
        counts=_deciders(record),
        pieces=_pieces(record),
        columns=_columns(record) if any(step["accepted"] or step["rejected"] for step in record["rounds"]) else [],
        depths=_depths(record) if any(token["head"] is not None for token in _tokens(record)) else [],
        entropies=_entropies(record),
        rows=_rows(record) if len(record["methods"]) > 1 else [],
        has_rejected=any(step["rejected"] for step in record["rounds"]),
        has_thresholds=any(token["threshold"] is not None for token in drafted),
        chart=CHART,
    )
    return render("page.html", record | known)


def _visible(text: str) -> str:
    """A token's text on one line."""
    return text.replace("\n", "↵").replace("\t", "⇥")


def _quoted(text: str) -> str:
    return f"“{_visible(text)}”"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _tokens(record: Record) -> list[Record]:
    return [token for step in record["rounds"] for token in step["tokens"]]


def _counts_of(method: Record) -> dict[str, int]:
    """Tokens by decider."""
    return {
        "backbone" if key == "full" else f"head {key}" if key.isdigit() else key: count
        for key, count in method["stats"]["exit_distribution"].items()
    }


def _deciders(record: Record) -> dict[str, int]:
    """Tokens by decider, of the shown method, without those that decided none; heads first, the backbone last."""
    named = _counts_of(record["methods"][record["shown"]])
    ordered = sorted(named, key=lambda name: (name == "backbone", not name[-1:].isdigit()))
    return {name: named[name] for name in ordered if named[name]}


def _colours(record: Record) -> dict[str, str]:
    """The colour of every decider on the page."""
    counted = {decider for method in record["methods"].values() for decider in _counts_of(method)}
    deciders = counted | {decider_of(token) for token in _drafted(record)} | {"backbone"}
    return {decider: colour_of(decider) for decider in sorted(deciders)}


def _drafted(record: Record) -> list[Record]:
    return _tokens(record) + [token for step in record["rounds"] for token in step["rejected"]]


def _headline(record: Record) -> str:
    shown = record["methods"][record["shown"]]
    if "speedup" in shown:
        return f"{shown['speedup']:.2f}× as fast as plain decoding"
    return f"{shown['stats']['tokens_per_second']:.0f} tokens a second"


def _badges(record: Record) -> list[tuple[str, str]]:
    """(class, words) of each badge below the headline."""
    shown = record["methods"][record["shown"]]
    badges = [_same_badge(shown)] if "speedup" in shown else []
    badges.append(("good", "every token verified by the model"))
    badges.append(("", f"{shown['stats']['total_tokens_generated']} tokens, ended {ENDS[shown['finish_reason']]}"))
    badges.append(("", f"method {record['shown']}"))
    if record["accuracy_level"] is not None and any(token["threshold"] is not None for token in _drafted(record)):
        badges.append(("", f"accuracy level {record['accuracy_level']:.2f}"))
    return badges


def _same_badge(method: Record) -> tuple[str, str]:
    if method["bit_exact"]:
        return "good", "same tokens as plain decoding, bit for bit"
    return (
        ("good", "same tokens as plain decoding")
        if method["identical"]
        else ("bad", "other tokens than plain decoding")
    )


def _figures(record: Record) -> list[tuple[str, str]]:
    """(value, what it is) of each large number."""
    stats = record["methods"][record["shown"]]["stats"]
    figures = [
        (rate(stats["tokens_per_second"]), "tokens/s, whole answer"),
        (rate(stats["prefill_tokens_per_second"]), "prefill tokens/s"),
        (rate(stats["decode_tokens_per_second"]), "decode tokens/s"),
        (f"{stats['time_to_first_token_seconds'] * 1000:.0f} ms", "to the first token"),
    ]
    if stats["tokens_drafted"]:
        figures += [
            (f"{stats['accept_length']:.2f}", "tokens a verify step"),
            (f"{stats['tokens_accepted']} of {stats['tokens_drafted']}", "drafted tokens accepted"),
        ]
    if _exits_drafted(stats):
        figures.append((f"{stats['average_exit_layer']:.1f} of {record['num_blocks']}", "average exit layer"))
    return figures


def _exits_drafted(stats: Record) -> bool:
    """Whether exit heads drafted any token: lookup runs no block, and its tokens would count as exits after none."""
    return any(count for name, count in stats["exit_distribution"].items() if name.isdigit())


def _pieces(record: Record) -> list[Record]:
    """The answer's tokens, and struck between them those that were rejected."""
    pieces = []
    for number, step in enumerate(record["rounds"], 1):
        committed = [_piece(record, step, number, place) for place in range(len(step["tokens"]))]
        struck = [
            {"classes": None, "tip": _rejected_lines(step, number, place), "text": _visible(token["token_text"])}
            for place, token in enumerate(step["rejected"])
        ]
        pieces += [*committed[: step["accepted"]], *struck, *committed[step["accepted"] :]]
    return pieces


def _piece(record: Record, step: Record, number: int, place: int) -> Record:
    """A committed token. One without text is an end token, or waits for the rest of a character."""
    token = step["tokens"][place]
    decider = decider_of(token)
    classes = ["t", class_of(decider), *line_classes(decider)]
    if not token["text"]:
        classes.append("end" if token is _tokens(record)[-1] else "void")
    tip = _token_lines(record, step, number, place)
    return {"classes": " ".join(classes), "position": token["position"], "tip": tip, "text": token["text"]}


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


def _mark(tag: str, text: str | None = None, **attributes: Any) -> Mark:
    """An SVG element; `class_` is written `class`, `data_p` is `data-p`, and `data_tip` takes lines."""
    named = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
    if "data-tip" in named:
        named["data-tip"] = "\n".join(named["data-tip"])
    return {"tag": tag, "text": text, "attributes": named}


def _columns(record: Record) -> list[Record]:
    """A picture per round: accepted drafts, the backbone's token on top of them, hollow what was rejected."""
    columns = []
    for number, step in enumerate(record["rounds"], 1):
        drawn = [
            (token, "", _token_lines(record, step, number, place)) for place, token in enumerate(step["tokens"])
        ] + [(token, " no", _rejected_lines(step, number, place)) for place, token in enumerate(step["rejected"])]
        height = len(drawn) * (CELL + GAP)
        marks = []
        for place, (token, rejected, lines) in enumerate(drawn):
            top = height - (place + 1) * (CELL + GAP) + GAP
            inset = 0.6 if rejected else 0
            size = CELL - 2 * inset
            drafter = class_of(decider_of(token))
            marks.append(
                _mark(
                    "rect", class_=f"cell{rejected} {drafter}", data_p=None if rejected else token["position"],
                    x=inset, y=top + inset, width=size, height=size, rx=2, data_tip=lines,
                )
            )  # fmt: skip
            if rejected:
                path = f"M{CELL * 0.3} {top + CELL * 0.7}l{CELL * 0.4} -{CELL * 0.4}"
                marks.append(_mark("path", class_=f"cross {drafter}", d=path))
        columns.append({"width": CELL, "height": height, "marks": marks})
    return columns


def _depths(record: Record) -> list[Mark]:
    """A bar per committed token, as high as the blocks that ran for it."""
    tokens = _tokens(record)
    depth = record["num_blocks"]
    plot = _plot()
    step = plot[2] / len(tokens)
    marks = _horizontal_grid(plot, [(layer / depth, str(layer)) for layer in (0, *record["exit_layers"], depth)])
    for place, token in enumerate(tokens):
        tall = max(token["exit_layer"] / depth * plot[3], 2)
        marks.append(
            _mark(
                "rect", class_=f"cell {class_of(decider_of(token))}", data_p=token["position"],
                x=f"{plot[0] + place * step:.2f}", y=f"{plot[1] + plot[3] - tall:.2f}",
                width=f"{max(step - 1, 0.8):.2f}", height=f"{tall:.2f}",
                data_tip=[f"{_quoted(token['token_text'])} by {decider_of(token)}", *_why(token, depth)],
            )
        )  # fmt: skip
    labels = {f"head {head}": layer for head, layer in enumerate(record["exit_layers"])} | {"backbone": depth}
    marks += [_right_label(plot, plot[1] + plot[3] * (1 - layer / depth), name) for name, layer in labels.items()]
    return marks + _axis_words(plot, len(tokens), "blocks")


def _entropies(record: Record) -> list[Mark]:
    """A dot per drafted token: its head's entropy, and whether the backbone agreed; dashed, the thresholds."""
    dots: list[tuple[int, Record, str]] = []
    place = 0
    for step in record["rounds"]:
        dots += [(place + i, token, "") for i, token in enumerate(step["tokens"]) if token["entropy"] is not None]
        if step["rejected"] and step["rejected"][0]["entropy"] is not None:
            dots.append((place + step["accepted"], step["rejected"][0], " no"))
        place += len(step["tokens"])
    if len(dots) < 2:
        return []
    limits = {decider_of(token): token["threshold"] for _, token, _ in dots if token["threshold"] is not None}
    top = max([token["entropy"] for _, token, _ in dots] + list(limits.values())) * 1.08 or 1.0
    plot = _plot()
    marks = _horizontal_grid(plot, [(share, f"{share * top:.1f}") for share in (0, 0.25, 0.5, 0.75, 1)])
    taken: list[float] = []
    for decider, limit in sorted(limits.items(), key=lambda item: item[1]):
        y = plot[1] + plot[3] * (1 - limit / top)
        label = min([y, *(other - 13 for other in taken)])
        taken.append(label)
        marks.append(_mark("path", class_=f"limit {class_of(decider)}", d=f"M{plot[0]} {y:.1f}h{plot[2]}"))
        marks.append(_right_label(plot, label, f"{decider}: {limit:.2f}"))
    for at, token, rejected in dots:
        x, y = plot[0] + (at + 0.5) / place * plot[2], plot[1] + plot[3] * (1 - token["entropy"] / top)
        verdict = "rejected" if rejected else "accepted"
        marks.append(
            _mark(
                "circle", class_=f"dot{rejected} {class_of(decider_of(token))}",
                data_p=None if rejected else token["position"], cx=f"{x:.1f}", cy=f"{y:.1f}", r=3.6,
                data_tip=[
                    f"{_quoted(token['token_text'])} by {decider_of(token)}, {verdict}",
                    *_why(token, record["num_blocks"]),
                ],
            )
        )  # fmt: skip
    return marks + _axis_words(plot, place, "nats")


Plot = tuple[float, float, float, float]
"""x, y, width and height of the plotted area."""


def _plot() -> Plot:
    (width, height), (left, top, right, bottom) = CHART, MARGIN
    return left, top, width - left - right, height - top - bottom


def _horizontal_grid(plot: Plot, lines: list[tuple[float, str]]) -> list[Mark]:
    """Lines at shares of the height, with their labels on the left."""
    marks = []
    for share, label in lines:
        y = plot[1] + plot[3] * (1 - share)
        marks.append(_mark("path", class_="grid", d=f"M{plot[0]} {y:.1f}h{plot[2]}"))
        marks.append(_mark("text", label, x=plot[0] - 8, y=f"{y + 4:.1f}", text_anchor="end"))
    return marks


def _right_label(plot: Plot, y: float, words: str) -> Mark:
    return _mark("text", words, x=plot[0] + plot[2] + 8, y=f"{y + 4:.1f}")


def _axis_words(plot: Plot, tokens: int, unit: str) -> list[Mark]:
    base = plot[1] + plot[3] + 20
    return [
        _mark("text", "token 1", x=plot[0], y=base),
        _mark("text", str(tokens), x=plot[0] + plot[2], y=base, text_anchor="end"),
        _mark("text", unit, x=0, y=plot[1] - 14),
    ]


def _rows(record: Record) -> list[Record]:
    """Every method, one a row."""
    methods = record["methods"]
    fastest = max(method["stats"]["tokens_per_second"] for method in methods.values())
    rows = []
    for name, method in methods.items():
        stats = method["stats"]
        numbers = [
            f"{method['speedup']:.2f}×" if "speedup" in method else "1.00×",
            stats["tokens_drafted"] or "–",
            stats["tokens_accepted"] if stats["tokens_drafted"] else "–",
            _share(stats["acceptance_rate"]),
            f"{stats['accept_length']:.2f}",
            f"{stats['average_exit_layer']:.1f}" if _exits_drafted(stats) else "–",
        ]
        speed = stats["tokens_per_second"]
        rows.append(
            {"name": name, "bar": f"{speed / fastest * 80:.0f}", "speed": f"{speed:.1f}", "numbers": numbers,
             "same": _same_tokens(method), "counts": _counts_of(method)}
        )  # fmt: skip
    return rows


def _same_tokens(method: Record) -> tuple[str, str]:
    """(class, words)."""
    if "identical" not in method:
        return "", "baseline"
    if not method["identical"]:
        return "different", "different"
    return "same", "same bits" if method["bit_exact"] else "same"
