"""Damaged and hostile files, made from whole ones, and what loading them must never do.

A mutant is decided by its format and its number alone, so a failure is repeated by that number. Whoever loads one must
take it or raise an `EexitError` that says something a terminal can print: no other exception, no hang, no memory beyond a
bound, and nothing run that stands in the file.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import pickle
import random
import resource
import signal
import struct
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from early_exit_cli.errors import EexitError
from early_exit_cli.report import console

SECONDS = 10.0
"""A load may take so long; damaged files are as small as the whole ones."""
BYTES = 2 << 30
"""A load may reserve so much more memory than the process has."""

HUGE = (10**400, -(10**400), 2**63, 2**31, 10**12, 1e308, -1, 0, 1, 0.5, float("nan"), float("inf"), float("-inf"))
TEXTS = ("", "x", "\0", "\ud800", "../../etc/passwd", "/", ".", "a" * 5000, "[red]", "１", "\u202e", "1e5", "nan")
VALUES: tuple[Any, ...] = (
    *HUGE,
    *TEXTS,
    None,
    True,
    False,
    [],
    {},
    [[]],
    [None],
    [0, 0],
    {"a": 1},
    {"0": None},
    [1e400],
)


@dataclass
class Outcome:
    """What became of the mutants of one kind of file."""

    loaded: int = 0
    refused: int = 0
    messages: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    @property
    def cases(self) -> int:
        return self.loaded + self.refused + len(self.failures)


class Hang(BaseException):
    """Raised by the clock; no `except Exception` catches it."""


@contextlib.contextmanager
def limits(seconds: float) -> Iterator[None]:
    """Raise `Hang` when the time is over."""

    def stop(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def bounded_memory(more: int) -> Iterator[None]:
    """Let the address space grow by so many bytes: beyond it, an allocation fails instead of taking the machine along."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def fuzz(path: Path, seeds: list[bytes], mutate: Mutate, load: Callable[[], Any], cases: range) -> Outcome:
    """Write each mutant of the seeds to `path` and load it."""
    outcome = Outcome()
    with bounded_memory(BYTES):
        for number in cases:
            dice = random.Random(number)
            data = mutate(seeds[number % len(seeds)], dice)
            path.unlink(missing_ok=True)  # a mapped file that is written over would change under its reader
            path.write_bytes(data)
            try:
                with limits(SECONDS):
                    load()
                outcome.loaded += 1
            except EexitError as error:
                wrong = unreadable(error)
                if wrong:
                    outcome.failures.append(f"case {number}: {wrong}: {error.message[:300]!r}")
                else:
                    outcome.refused += 1
                    outcome.messages[error.message.replace(str(path), path.name)[:80]] += 1
            except (Exception, Hang) as error:
                outcome.failures.append(f"case {number}: {where(error)}")
    return outcome


def unreadable(error: EexitError) -> str | None:
    """What is wrong with a message as a terminal gets it, if anything."""
    if not error.message.strip():
        return "an empty message"
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")
    with contextlib.redirect_stderr(terminal):
        try:
            console.error(error.message, error.hint)
            terminal.flush()
        except UnicodeEncodeError:
            return "a message that cannot be printed"
    printed = terminal.buffer.getvalue().decode()  # type: ignore[attr-defined]
    if len(printed) > 32_000 or max(map(len, printed.splitlines())) > 1500:
        return f"{len(printed)} characters are no message"
    return None if printed.replace("\n", "").isprintable() else "a control character in a message"


def where(error: BaseException) -> str:
    """The exception, and the last line of ours that it passed."""
    trace, place = error.__traceback__, ""
    while trace:
        name = trace.tb_frame.f_code.co_filename
        if "early_exit_cli" in name:
            place = f"{Path(name).name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return f"{type(error).__name__} at {place}: {str(error)[:200]}"


Mutate = Callable[[bytes, random.Random], bytes]


def flipped(data: bytes, dice: random.Random) -> bytes:
    """Some bytes changed, cut off, doubled, or put in between."""
    changed = bytearray(data)
    for _ in range(dice.choice((1, 1, 1, 2, 5))):
        place = dice.randrange(len(changed) + 1)
        kind = dice.randrange(6)
        if kind == 0:
            del changed[place:]
        elif kind == 1:
            changed[place:place] = dice.choice(
                (b"\xff", b"\0", b"\xed\xa0\x80", b'"', b"{", b"}", b"\n", b"&a *a", b"0" * 5000)
            )
        elif kind == 2:
            del changed[place : place + dice.randrange(1, 64)]
        elif kind == 3:
            changed[place:place] = changed[place : place + dice.randrange(1, 64)]
        elif place < len(changed):
            changed[place] ^= 1 << dice.randrange(8)
    return bytes(changed)


def altered(value: Any, dice: random.Random) -> Any:
    """A JSON value with one thing changed somewhere in it."""
    value = copy.deepcopy(value)
    holder, key = dice.choice(
        [(None, None), *_places(value)] if dice.random() < 0.05 else _places(value) or [(None, None)]
    )
    if holder is None:
        return dice.choice(VALUES)
    kind = dice.randrange(8)
    old = holder[key]
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[dice.choice((key + "x", key.upper(), *TEXTS))] = holder.pop(key)
    elif kind == 2 and isinstance(old, (int, float)) and not isinstance(old, bool):
        holder[key] = dice.choice(
            (-old, old + 1, old * 10**9, old / 2 if abs(old) < 1e300 else 0, str(old)[:99], [old])
        )
    elif kind == 3 and isinstance(old, (list, dict)):
        holder[key] = _resized(old, dice)
    elif kind == 4:
        other, name = dice.choice(_places(value))
        holder[key] = copy.deepcopy(other[name])
    else:
        holder[key] = dice.choice(VALUES)
    return value


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything in a JSON value; of a long list, the first and the last few."""
    found: list[tuple[Any, Any]] = []
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in (*keys[:6], *keys[-2:]) if isinstance(value, list) else keys:
        found.append((value, key))
        found.extend(_places(value[key]))
    return found


def _resized(value: Any, dice: random.Random) -> Any:
    if isinstance(value, dict):
        return dice.choice(({}, list(value.items()), value | {"more": 1}, dict.fromkeys(value), list(value)))
    return dice.choice(([], value * 2, value * 3000, value[:-1], value[::-1], dict.fromkeys(map(str, range(3)), 1)))


def mutated_json(data: bytes, dice: random.Random) -> bytes:
    """A JSON document with keys dropped, renamed, doubled, retyped, nested; or with broken bytes."""
    if dice.random() < 0.2:
        return flipped(data, dice)
    value = json.loads(data)
    for _ in range(dice.choice((1, 1, 1, 2, 4))):
        value = altered(value, dice)
    text = json.dumps(value)
    if dice.random() < 0.04:
        depth = dice.choice((50, 900, 5000, 100_000))
        text = _inside(text, "[" * depth + "]" * depth, dice)
    if dice.random() < 0.04:
        text = _inside(text, "9" * 6000, dice)
    if dice.random() < 0.04 and text.endswith("}") and isinstance(value, dict) and value:
        key = dice.choice(list(value))
        text = f"{text[:-1]}, {json.dumps(key)}: {json.dumps(dice.choice(VALUES))}}}"
    return text.encode(errors="surrogatepass")


def _inside(text: str, value: str, dice: random.Random) -> str:
    """Instead of one value after a colon."""
    places = [place for place, character in enumerate(text) if character == ":"]
    if not places:
        return value
    place = dice.choice(places)
    return f"{text[:place]}: {value}, {json.dumps('k')}{text[place:]}"


def mutated_lines(data: bytes, dice: random.Random) -> bytes:
    """JSON lines, one of them changed as a document."""
    lines = data.splitlines()
    place = dice.randrange(len(lines))
    lines[place] = mutated_json(lines[place], dice)
    return b"\n".join(lines) + (b"" if dice.random() < 0.1 else b"\n")


YAML_TRICKS = (
    "&a [*a]", "!!python/object/apply:os.mkdir [canary]", "!!bool x", "!!int x", "!!float x", "!!timestamp x", "2001-99-99",
    "!!binary '*'", "? [a]\n: b", "<<: *a", "<<: 1", "%YAML 9.9\n---\na: 1", "--- a\n--- b", "0b", "0x", "1_000", "1:99:99", "!!set {a}",
    "!!omap [a: 1]", "!!null x", "{{a}}", "- - - -", "\t", "@", "`", "*nowhere", "!!int ''", "[" * 3000, "{" * 3000,
    "&a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
    "d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d]\nf: &f [*e,*e,*e,*e,*e,*e,*e,*e,*e]\n"
    "g: &g [*f,*f,*f,*f,*f,*f,*f,*f,*f]\nh: &h [*g,*g,*g,*g,*g,*g,*g,*g,*g]\n"
    "calibration:\n  accuracy_levels: [*h,*h,*h,*h]\nbackbone: {model_name: *h, *h : 1}\n",
)  # fmt: skip


def mutated_yaml(data: bytes, dice: random.Random) -> bytes:
    """A YAML document changed like JSON, or with tags, anchors and dates that are none."""
    kind = dice.random()
    if kind < 0.2:
        return flipped(data, dice)
    if kind < 0.5:
        trick = dice.choice(YAML_TRICKS)
        lines = data.decode().splitlines()
        place = dice.randrange(len(lines))
        head, colon, _ = lines[place].partition(": ")
        lines[place] = f"{head}{colon}{trick}" if dice.random() < 0.7 else trick
        return "\n".join(lines).encode()
    value = yaml.safe_load(data)
    for _ in range(dice.choice((1, 1, 2, 4))):
        value = altered(value, dice)
    return yaml.safe_dump(value).encode(errors="surrogatepass") if dice.random() < 0.5 else json.dumps(value).encode()


DTYPES = (
    "F64",
    "F32",
    "F16",
    "BF16",
    "F8_E4M3",
    "F8_E5M2",
    "F8_E8M0",
    "F4",
    "I64",
    "I32",
    "U8",
    "U64",
    "BOOL",
    "C64",
    "X1",
    "",
)


def mutated_tensors(data: bytes, dice: random.Random) -> bytes:
    """A safetensors file with another header, other numbers, or broken bytes."""
    length = int.from_bytes(data[:8], "little")
    body = data[8 + length :]
    kind = dice.randrange(6)
    if kind == 0:
        return flipped(data, dice)
    if kind == 1:  # other numbers: common ones, or special ones
        numbers = bytearray(body)
        special = dice.choice((b"\0\0\xc0\x7f", b"\0\0\x80\xff", b"\xff\xff\xff\xff", b"\0\0\0\x80", None, None, None))
        for _ in range(dice.choice((1, 20, 2000))):
            place = 4 * dice.randrange(max(1, len(numbers) // 4))
            numbers[place : place + 4] = special or struct.pack("<f", dice.uniform(-9, 9))
        return data[: 8 + length] + bytes(numbers)
    if kind == 2:  # a header of another length than it says
        said = dice.choice((0, 1, length - 1, length + 1, len(data), len(data) * 2, 10**8, 2**31, 2**63, 2**64 - 1))
        return struct.pack("<Q", said) + data[8:]
    header = json.loads(data[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    entry = header[dice.choice(names)]
    shape, dtype = entry["shape"], entry["dtype"]
    if kind == 3:
        entry["dtype"] = dice.choice(DTYPES)
    elif kind == 4:
        entry["shape"] = dice.choice(
            ([2**31, 2**31], [2**40], [-1], [], [0], shape[::-1], [*shape, 1], [sum(shape)], shape[:-1], [2**64, 0])
        )
        if dice.random() < 0.5:
            entry["data_offsets"] = dice.choice(
                ([0, 0], [0, len(body)], [len(body), 2**62], [0, 2**62], [8, 4], [0, 2**64])
            )
    else:
        header = altered(header, dice)
    if dice.random() < 0.3:  # a name for the same bytes, with dtypes that hold as many
        same = {"F32": "I32", "BF16": "F16", "F16": "BF16", "I32": "F32"}.get(dtype)
        if same and isinstance(header, dict) and isinstance(entry, dict):
            entry["dtype"] = same
    text = json.dumps(header).encode(errors="surrogatepass")
    return struct.pack("<Q", len(text)) + text + body


class Touch:
    """Unpickled without care, it makes a folder."""

    def __init__(self, path: str, call: Callable[[str], Any] = os.mkdir) -> None:
        self.path, self.call = path, call

    def __reduce__(self):
        return self.call, (self.path,)


def mutated_pickle(canary: Path) -> Mutate:
    """state dicts of torch whose pickle holds calls, other globals, storages that are not there; or with broken bytes."""

    def mutate(data: bytes, dice: random.Random) -> bytes:
        kind = dice.randrange(6)
        if kind == 0:
            return flipped(data, dice)
        if kind == 1:  # a pickle of nothing but a call
            return pickle.dumps(
                {"0.norm.weight": Touch(str(canary), dice.choice((os.mkdir, os.listdir)))}, dice.choice((0, 2, 4))
            )
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = {info.filename: archive.read(info) for info in archive.infolist()}
        program = next(name for name in entries if name.endswith("data.pkl"))
        if kind == 2:
            entries[program] = flipped(entries[program], dice)
        elif kind == 3:  # another function in place of torch's own
            old = dice.choice(
                (b"torch._utils\n_rebuild_tensor_v2", b"collections\nOrderedDict", b"torch\nFloatStorage")
            )
            new = dice.choice(
                (
                    b"os\nmkdir",
                    b"posix\nsystem",
                    b"builtins\neval",
                    b"torch\nload",
                    b"torch\nzeros",
                    b"torch\nHalfStorage",
                )
            )
            entries[program] = entries[program].replace(old, new)
        elif kind == 4:
            entries[program] = pickle.dumps(Touch(str(canary)), 2)
        else:
            del entries[dice.choice(list(entries))]
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", dice.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
            for name, content in entries.items():
                archive.writestr(name, content)
        return packed.getvalue()

    return mutate


def damaged_body(number):
    """A request's body for `eexit serve`, some of it wrong."""
    chance = random.Random(number)
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": [{"type": "text", "text": "b"}]}]
    fields = {
        "max_tokens": 2, "temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": ["x"], "stream": False, "n": 1,
        "stream_options": None, "logit_bias": {"5": 1}, "logprobs": False, "model": "", "eexit": {"trace": True},
        "tools": [], "presence_penalty": 0, "top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1,
    }  # fmt: skip
    body = {"messages": messages, "prompt": "hello", **fields}
    for _ in range(chance.randint(1, 3)):
        place = body
        while True:
            keys = [*place] if isinstance(place, dict) else [*range(len(place))]
            key = chance.choice(keys)
            if isinstance(place[key], dict | list) and place[key] and chance.random() < 0.6:
                place = place[key]
                continue
            place[key] = copy.deepcopy(chance.choice(VALUES))
            break
        if not isinstance(body.get("messages"), list):
            break
    text = json.dumps(body).encode()
    if chance.random() < 0.2:
        cut = chance.randrange(len(text))
        text = text[:cut] + bytes(chance.randrange(256) for _ in range(chance.randrange(4))) + text[cut + 1 :]
    return text
