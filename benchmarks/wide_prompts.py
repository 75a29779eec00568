"""Writes many wide prompts to train a draft head on: translation, summaries, retrieval, facts, chat, mathematics.

Sentences and passages come from folders of installed documentation and gettext catalogues (`--texts`), the rest from the
templates in `prompt_templates.py`. The same seed and folders give the same file; any prefix of it is a fair mix.

    python benchmarks/wide_prompts.py --output wide.jsonl --texts texts /usr/share --without spec_bench.jsonl

Any installed documentation will do. The widest mix came from a folder `texts` of unpacked Debian 12 packages (`apt-get download`,
`dpkg-deb -x`): manpages-{de,fr,es,it}, debian-reference-*, debian-faq-*, developers-reference-de, debian-edu-doc-{de,fr,en},
debian-history, aptitude-doc-*, gnome-user-docs, anarchism, fortunes-{de,es,it}, dict-{foldoc,jargon,devil}, r-cran-janeaustenr;
catalogues of wesnoth, freeciv, widelands, freedroidrpg, kstars, lordsawar; and of the wheel gensim, whose test data hold news
and encyclopaedia articles.
"""

import argparse
import bz2
import gettext
import gzip
import html
import itertools
import json
import os
import random
import re
import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import prompt_templates as templates

SHARES = {"translation": 25, "summary": 20, "retrieval": 15, "facts": 15, "chat": 22, "mathematics": 3}  # per cent
LANGUAGES = {"de": "German", "fr": "French", "es": "Spanish", "it": "Italian", "pt": "Portuguese", "nl": "Dutch"}
LANGUAGE_SHARES = {"de": 60, "fr": 12, "es": 9, "it": 7, "pt": 3, "nl": 2, "en": 7}  # en: English to German
MAX_WORDS, MAX_CHARACTERS = 240, 1400  # about 330 tokens
FAMILIES = {  # how many passages of such a family come for each one of a manual; the first match counts
    r"\.cor$|enwiki": 200,
    r"\.rdb$|games$|stellarium": 60,
    r"fortunes|foldoc|jargon|devil": 30,
    r"history|help/C": 15,
    r"anarchism": 6,
}
RUN = 8  # words in a row that no prompt may share with `--without`
STATEMENT = re.compile(
    r"([A-Z][a-z]+ (?:[A-Za-z][a-z]* ){0,3}?)(is|was|are|were|can|will|must|should) ([^,;:.]{12,80})[,.;:]"
)
PRONOUNS = set(
    re.findall(r"\w+", "It This There He She They These Those That We You What Who As If When While In On At For But")
)
PROSE = re.compile(
    r"\.(html|txt|txt\.gz|[1-8]\.gz|cor|dict\.dz|xml\.bz2|page|bz2|rdb|utf8)$|/fortunes/(?!.*\.(dat|u8)$)"
)
SKIPPED = re.compile(r"copyright|/gcloud|/fortunes/.*off|/[Cc]hangelog|/NEWS")
SENTENCE_END = re.compile(r"(?<=[.!?])[\"”»“]?\s+(?=[A-ZÄÖÜÀÉÈÊ„“\"«¿¡])")
COMMON = re.compile(r"\b(the|of|and|to|that|for|it|as|on|with|by|from|this|be|are|or|which|his|not|you|your)\b")
ODD = re.compile(r"[%{}<>\\|=_$@#~^*•→\[\]]|--|://|/\w+/|\(\)|\.\.\.|\bNOTE\b|\w\.\w\w|[A-Z]{7,}|\d{6,}|[а-яぁ-龥]")


@dataclass(frozen=True)
class Passage:
    """A stretch of English prose."""

    family: str  # where it comes from, such as a package's folder
    title: str
    text: str


def natural(text: str, fewest: int, most: int) -> bool:
    """Whether `text` is running prose of `fewest` to `most` words: capital first, full stop last, hardly any code."""
    if not fewest <= len(text.split()) <= most or ODD.search(text):
        return False
    if not re.match(r"[\"“„«¿¡(]?[A-ZÄÖÜÀÉÈÊÍÓÚ]", text) or not re.search(r"[.!?][\"”“»)]?$", text):
        return False
    return sum(c.isalpha() or c in " ,.'" for c in text) >= 0.93 * len(text)


def running(paragraph: str) -> str:
    """The paragraph's natural sentences where they are most of it, else nothing."""
    sentences = SENTENCE_END.split(without_markup(paragraph))
    good = [sentence for sentence in sentences if natural(sentence, 4, 80)]
    return " ".join(good) if len(good) >= 0.7 * len(sentences) else ""


def english(text: str) -> bool:
    """Whether enough of the words are the commonest English ones."""
    return len(COMMON.findall(text.lower())) >= 0.15 * len(text.split())


def squeeze(text: str) -> str:
    """`text` with white space runs as single spaces."""
    return " ".join(text.split())


def without_markup(text: str) -> str:
    """`text` without tags, entities and accelerator marks."""
    text = html.unescape(re.sub(r"<[^<>]*>", "", text))
    return squeeze(re.sub(r"&(?=\w)|(?<!\w)_(?=\w)", "", text))


# Files of prose -------------------------------------------------------------------------------------------------------


def language_of(path: Path) -> str:
    """The language that a file's path names; English when it names none."""
    for part in reversed(path.parts):
        for code in LANGUAGES:
            if part == code or re.search(rf"[.\-_]{code}(\.|-|_|$)", part):
                return code
        if re.fullmatch(r"[a-z]{2}(_[A-Z]{2})?", part) and part not in ("C", "en", "js"):
            return part[:2]
    foreign = re.search(r"[.-](ja|ru|zh|ko|pl|cs|fi|sv|da|nb|uk|id|hu|tr|ro|sk)\b", path.name)
    return foreign[1] if foreign else "en"


def read_text(path: Path) -> str:
    """The text of a plain, gzip (dictzip too) or bzip2 file; at most eight million characters."""
    opener = {".gz": gzip.open, ".dz": gzip.open, ".bz2": bz2.open}.get(path.suffix, open)
    with opener(path, "rt", encoding="utf-8", errors="replace") as file:  # type: ignore[operator]
        return str(file.read(8_000_000))


def r_strings(path: Path) -> str:
    """The strings of an R package's data, one a line: zlib blocks of records made of a type, a length, the bytes."""
    data, lines = path.read_bytes(), []
    while len(data) > 4:
        block = zlib.decompressobj()
        text = block.decompress(data[4:])  # after the length of the unpacked block
        data, at = block.unused_data, 0
        while (at := text.find(b"\x00\x04\x00\x09", at)) >= 0:
            length = int.from_bytes(text[at + 4 : at + 8], "big", signed=True)
            at += 8
            lines.append(text[at : at + max(length, 0)].decode("utf-8", "replace"))
            at += max(length, 0)
    return "\n".join(lines)


def wiki_articles(text: str) -> Iterator[tuple[str, list[str]]]:
    """Titles and paragraphs of a MediaWiki export."""
    for title, body in re.findall(r"<title>([^<]+)</title>.*?<text[^>]*>(.*?)</text>", text, re.S):
        body = html.unescape(body)
        body = re.sub(r"<ref[^>]*/>|<ref.*?</ref>|<!--.*?-->|<(math|gallery|table).*?</\1>", "", body, flags=re.S)
        for _ in range(4):  # templates nest
            body = re.sub(r"\{\{[^{}]*\}\}|\{\|.*?\|\}", "", body, flags=re.S)
        body = re.sub(r"\[\[(?:[^|\[\]]*\|)?([^|\[\]]*)\]\]", r"\1", body)
        body = re.sub(r"\[\w+://\S+ ?([^\]]*)\]|'{2,}", r"\1", body)
        body = re.sub(r"\(\s*[;,]?\s*\)|&nbsp;", " ", body)
        yield title, [without_markup(line) for line in body.splitlines() if line[:1] not in "=*#|:;{!"]


def man_paragraphs(text: str) -> list[str]:
    """The running paragraphs of a manual page."""
    text = re.sub(r"\\f[BIRP]|\\f\[\w*\]|\\[&%/,|^]", "", text)
    text = re.sub(r"\\\(lq|\\\(rq|\\\(dq", '"', text)
    text = re.sub(r"\\\(aq|\\\(cq|\\\(oq", "'", text).replace(r"\-", "-").replace(r"\ ", " ")
    text = re.sub(r"^\.(B|I|BR|IR|RB|RI|BI|IB) (.*)$", lambda m: m[2].replace('"', ""), text, flags=re.M)
    return re.split(r"(?:\n\.[^\n]*|\n\s*\n)+", text)


def documents(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Titles and paragraphs of the documents in one file."""
    name = path.name
    text = r_strings(path) if name.endswith(".rdb") else read_text(path)
    if name.endswith(".xml.bz2") or name.startswith("enwiki"):
        yield from wiki_articles(text)
    elif name.endswith(".cor"):  # one article a line
        for line in text.splitlines():
            sentences = SENTENCE_END.split(line)
            yield "", [" ".join(sentences[i : i + 3]) for i in range(0, len(sentences), 3)]
    elif name.endswith(".dict.dz"):
        for entry in re.split(r"\n(?=\S)", text):
            headword, _, body = entry.partition("\n")
            yield headword.strip(), re.split(r"\n\s*\n", body)
    elif "fortunes" in path.parts:
        for cookie in re.split(r"\n%\n", text):
            yield "", [re.split(r"\n\s*--", cookie)[0]]
    elif re.search(r"\.[1-8]\.gz$", name):
        yield name.split(".")[0], man_paragraphs(text)
    elif name.endswith((".html", ".page", ".utf8")):
        found = re.search(r"<title[^>]*>(.*?)</title>", text, re.S)
        body = re.sub(r"<(pre|script|style|table|code)\b.*?</\1>", "CODE_HERE", text, flags=re.S)
        yield without_markup(found[1]) if found else "", re.findall(r"<p\b[^>]*>(.*?)</p>", body, re.S)
    else:
        yield "", re.split(r"\n\s*\n", text)


def prose(folders: list[Path]) -> Iterator[tuple[str, str, str, list[str]]]:
    """Language, family, title and clean paragraphs of every document under `folders`, in the order of the paths."""
    for folder in folders:
        for path in sorted(p for p in folder.rglob("*") if PROSE.search(str(p)) and not SKIPPED.search(str(p))):
            if path.is_symlink() or not path.is_file():
                continue
            language, inner = language_of(path.relative_to(folder)), path.relative_to(folder).parts[:-1]
            family = path.name if path.name.endswith((".dz", ".cor", ".bz2", ".rdb")) else "/".join(inner)
            for title, paragraphs in documents(path):
                yield language, family, title, [text for text in map(running, paragraphs) if text]


def passages_of(family: str, title: str, paragraphs: list[str], rng: random.Random, longer: int) -> Iterator[Passage]:
    """Cuts a document into passages of one length drawn for each, 35 to 200 words times `longer`, at the ends of sentences."""
    sentences = [s for p in paragraphs if len(p.split()) >= 20 and english(p) for s in SENTENCE_END.split(p)]
    taken: list[str] = []
    wanted = rng.randint(40, 190) * longer
    for sentence in sentences:
        taken.append(sentence)
        words = len(" ".join(taken).split())
        if words >= wanted:
            if words <= 205 * longer:
                yield Passage(family, title, " ".join(taken))
            taken, wanted = [], rng.randint(40, 190) * longer
    if len(" ".join(taken).split()) >= 35 * longer:
        yield Passage(family, title, " ".join(taken))


def turns(passages: list[Passage], rng: random.Random) -> list[Passage]:
    """`passages` with the families taking turns, so that a large manual does not drown a small news corpus."""
    families: dict[str, list[Passage]] = defaultdict(list)
    for passage in passages:
        families[passage.family].append(passage)
    for members in families.values():
        rng.shuffle(members)
    order = []
    for name, members in families.items():
        weight = next((weight for pattern, weight in FAMILIES.items() if re.search(pattern, name)), 1)
        order += [((i + rng.random()) / weight, name, passage) for i, passage in enumerate(members)]
    return [passage for _, _, passage in sorted(order, key=lambda item: item[:2])]


# The kinds of prompts -------------------------------------------------------------------------------------------------


def catalogue_sentences(folders: list[Path]) -> Iterator[tuple[str, str, str, str]]:
    """Kind of catalogue, language, sentence and its English original from every gettext catalogue under `folders`."""
    for path in sorted(path for folder in folders for path in folder.rglob("LC_MESSAGES/*.mo")):
        language = path.parts[-3].split("_")[0].split("@")[0]
        if language not in LANGUAGES:
            continue
        try:
            with path.open("rb") as file:
                catalogue: dict[object, str] = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
        except (OSError, UnicodeDecodeError, ValueError):
            continue
        for original, translated in catalogue.items():
            if isinstance(original, str) and original:
                yield (
                    "games" if "games" in path.parts else "programs",
                    language,
                    without_markup(translated),
                    without_markup(original),
                )


def translations(
    catalogues: list[Path], foreign: dict[str, list[tuple[str, str]]], count: int, rng: random.Random
) -> list[str]:
    """Instructions to translate; sentences from the catalogues and from foreign `prose`, in turn."""
    pools: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for kind, language, sentence, original in catalogue_sentences(catalogues):
        for code, text in ((language, sentence), ("en" if language == "de" else "", original)):
            if code and natural(text, 6, 60) and english(text) == (code == "en"):
                pools[code][kind].append(text)
    for language, paragraphs in foreign.items():
        for family, paragraph in paragraphs:
            kind = next((k for k in ("fortunes", "man/") if k in family), "manuals")
            pools[language][kind] += [s for s in SENTENCE_END.split(paragraph) if natural(s, 6, 60) and not english(s)]
    result = []
    for code, share in LANGUAGE_SHARES.items():
        columns = [sorted(set(pool)) for pool in pools[code].values()]
        for column in columns:
            rng.shuffle(column)
        mixed = [s for row in itertools.zip_longest(*columns) for s in row if s]
        for sentence in mixed[: count * share // 100 + 1]:
            source, target = ("English", "German") if code == "en" else (LANGUAGES[code], "English")
            result.append(rng.choice(templates.TRANSLATE).format(source=source, target=target, text=sentence))
    return result


def summaries(passages: Iterator[Passage], count: int, rng: random.Random, longer: int) -> list[str]:
    """Instructions to summarise one passage each."""
    long = (passage for passage in passages if len(passage.text.split()) >= 70 * longer)
    return [rng.choice(templates.SUMMARIZE).format(text=p.text) for p in itertools.islice(long, count)]


def question_about(passage: Passage, rng: random.Random) -> str:
    """A question about the passage's title, or about a name, a year or a long word in it."""
    names = re.findall(
        r"(?<=[a-z,] )[A-Z][a-z]{2,}(?: (?:of |the )?[A-Z][a-z]+){0,2}(?! ?[A-Za-z]*[A-Z])", passage.text
    )
    years = re.findall(r"\b1[0-9]\d\d\b|\b20[0-2]\d\b", passage.text)
    choices = [(templates.ASK_TERM, word) for word in re.findall(r"\b[a-z]{8,13}\b", passage.text)[:30:15]]
    choices += [(templates.ASK_NAME, name) for name in names[:6]] + [(templates.ASK_YEAR, year) for year in years[:2]]
    if passage.title and len(passage.title) < 40:
        choices += [(templates.ASK_TITLE, passage.title)] * 4
    for sentence in SENTENCE_END.split(passage.text):
        found = STATEMENT.match(sentence)
        if found and found[1].split()[0] not in PRONOUNS:
            subject = re.sub(r"^(The|An?|All|Most|Some|Many) ", lambda m: m[0].lower(), found[1].strip())
            choices += [([f.format(s=subject, v=found[2], r=found[3]) for f in templates.ASK_STATEMENT], "")] * 4
    questions, subject = rng.choice(choices or [(templates.ASK_TERM, "text")])
    question = rng.choice(questions).format(x=subject)
    return question.lower() if rng.random() < 0.3 else question[0].upper() + question[1:]


def retrieval(passages: Iterator[Passage], count: int, rng: random.Random, longer: int) -> list[str]:
    """One to four passages (times `longer`) and a question about one of them."""
    result = []
    for first in passages:
        chosen, words = [first], len(first.text.split())
        while len(chosen) < 4 * longer and words < 110 * longer:
            other = next(passages, None)
            if other is None:
                break
            if words + len(other.text.split()) <= 185 * longer:
                chosen.append(other)
            words += len(other.text.split())
        question = question_about(rng.choice(chosen), rng)
        rng.shuffle(chosen)
        titled = all(p.title for p in chosen)
        style = rng.choice([style for style in templates.PASSAGE_STYLES if titled or "{title}" not in style])
        text = "\n\n".join(style.format(i=i + 1, title=p.title, text=p.text) for i, p in enumerate(chosen))
        result.append(rng.choice(templates.RETRIEVE).format(passages=text, question=question))
        if len(result) == count:
            break
    return result


# Together -------------------------------------------------------------------------------------------------------------


def runs_of(text: str) -> set[tuple[str, ...]]:
    """Every run of `RUN` words in `text`, in lower case."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1)}


def strings_in(value: object) -> Iterator[str]:
    """Every string inside a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from strings_in(inner)


def kept(
    prompts: list[str], forbidden: set[tuple[str, ...]], short: set[str], seen: set[str], longer: int
) -> list[str]:
    """`prompts` that are new, short enough and share nothing with the forbidden texts."""
    result = []
    for prompt in prompts:
        key = squeeze(prompt).lower()
        fits = len(prompt.split()) <= MAX_WORDS * longer and len(prompt) <= MAX_CHARACTERS * longer
        if fits and key not in seen and key not in short and forbidden.isdisjoint(runs_of(prompt)):
            seen.add(key)
            result.append(prompt)
    return result


def main() -> None:
    """Reads the folders, makes every kind of prompt, writes the mix."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the JSONL file to write")
    parser.add_argument(
        "--texts", type=Path, nargs="+", default=[Path("/usr/share")], help="folders of prose, catalogues"
    )
    parser.add_argument("--without", type=Path, help="JSONL whose texts no prompt may share eight words in a row with")
    parser.add_argument("--count", type=int, default=25_000, help="prompts wanted in all")
    parser.add_argument(
        "--longer", type=int, default=1, help="so many times longer passages; only summaries and retrieval from 2 on"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    rng = random.Random(options.seed)
    forbidden: set[tuple[str, ...]] = set()
    short: set[str] = set()
    if options.without:
        for line in options.without.read_text(encoding="utf-8").splitlines():
            for text in strings_in(json.loads(line)):
                forbidden |= runs_of(text)
                short.add(squeeze(text).lower())

    wanted = {kind: options.count * share // 100 for kind, share in SHARES.items()}
    spare = {kind: number * 5 // 4 for kind, number in wanted.items()}  # some will be dropped
    foreign: dict[str, list[tuple[str, str]]] = defaultdict(list)
    passages: dict[str, Passage] = {}
    for language, family, title, paragraphs in prose(options.texts):
        if language == "en":
            passages.update((p.text, p) for p in passages_of(family, title, paragraphs, rng, options.longer))
        elif language in LANGUAGES:
            foreign[language] += [(family, paragraph) for paragraph in paragraphs]
    for kind, _, _, original in catalogue_sentences(options.texts):
        if kind == "games" and natural(original, 35, 200) and english(original):
            passages[original] = Passage("games", "", original)
    stream = turns(list(passages.values()), rng)
    print(f"prose: {len(stream)} English passages, foreign paragraphs: { {k: len(v) for k, v in foreign.items()} }")
    made = {
        "translation": translations(options.texts, foreign, spare["translation"], rng),
        "summary": summaries(iter(stream[0::5] + stream[1::5]), spare["summary"], rng, options.longer),
        "retrieval": retrieval(
            iter(stream[2::5] + stream[3::5] + stream[4::5]), spare["retrieval"], rng, options.longer
        ),
        "facts": templates.facts(rng),
        "chat": templates.chat(rng),
        "mathematics": templates.mathematics(spare["mathematics"], rng),
    }
    records, seen = [], set[str]()
    if options.longer > 1:
        made = {kind: made[kind] for kind in ("summary", "retrieval")}
    for kind, prompts in made.items():
        rng.shuffle(prompts)
        good = kept(prompts, forbidden, short, seen, options.longer)[: wanted[kind]]
        print(f"{kind}: {len(good)} prompts of {wanted[kind]} wanted")
        records += [{"source": f"wide-{kind}", "prompt": prompt} for prompt in good]
    rng.shuffle(records)
    with options.output.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + os.linesep for record in records)
    print(f"{options.output}: {len(records)} prompts")


if __name__ == "__main__":
    main()
