"""Rows of text, conversations and prompts, from local files and data sets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from early_exit_cli.backbone.chat import Prompt
from early_exit_cli.config import DataConfig
from early_exit_cli.data.conversations import Sample, UnknownRow, UnreadableRow, read_row
from early_exit_cli.errors import DataError, said
from early_exit_cli.files.atomic import decoded, parse_json

LOCAL_KINDS = (".jsonl", ".json", ".txt", ".parquet")
OTHER_KINDS = (".csv", ".tsv", ".arrow", ".md", ".gz", ".zip")
"""Of files that are not read; what is called so is no data set of the Hub."""
SHOWN_ROWS = 5
"""Of those left out for one reason, in the report."""


class Record(TypedDict):
    """A row that says something: `text` is its plain text, its prompt, or what its first user says."""

    text: str
    source: str
    sample: Sample
    number: int


@dataclass
class Reading:
    """What was read of a data set: its records, how many of each form, and the numbers of the rows left out, by reason."""

    config: DataConfig
    name: str
    records: list[Record] = field(default_factory=list)
    forms: Counter[str] = field(default_factory=Counter)
    left_out: dict[str, list[int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def leave_out(self, number: int, reason: str) -> None:
        """Count a row that is not used."""
        self.left_out.setdefault(reason, []).append(number)

    def reject(self, record: Record, reason: str) -> None:
        """Count a row that was read and cannot be used after all."""
        self.forms[record["sample"].form] -= 1
        self.leave_out(record["number"], reason)

    def summary(self) -> str:
        """One line: rows read by form, rows left out by reason."""
        forms = ", ".join(f"{count:,} {form}" for form, count in self.forms.most_common() if count)
        parts = [f"{self.forms.total():,} rows read{f' ({forms})' if forms else ''}"]
        if self.left_out:
            parts.append(f"{sum(map(len, self.left_out.values())):,} left out: {self.reasons()}")
        return f"{self.name}: {'; '.join([*parts, *self.notes])}"

    def reasons(self) -> str:
        """Why rows were left out, and which."""
        most_first = sorted(self.left_out.items(), key=lambda item: (-len(item[1]), item[0]))
        return "; ".join(f"{reason} [{_listed(rows)}]" for reason, rows in most_first)


def _listed(rows: list[int]) -> str:
    shown = ", ".join(map(str, sorted(rows)[:SHOWN_ROWS]))
    return f"{len(rows):,} row{'s' * (len(rows) > 1)}: {shown}{' ...' if len(rows) > SHOWN_ROWS else ''}"


def read_records(config: DataConfig) -> list[Record]:
    """Rows of the data set that say something, as `read_data`."""
    return read_data(config).records


def read_data(config: DataConfig) -> Reading:
    """Rows of the data set, with what was read and what was left out.

    Raises:
        DataError: no name given, file, split or column missing, a row that is broken, nothing in it.
    """
    name = config.dataset_name
    if not name:
        raise DataError("no text to work on", hint="name it with --dataset-name: a Hub id or a local file")
    found = Reading(config, Path(name).name if Path(name).expanduser().exists() else name)
    for number, row in _load_rows(config, name):
        try:
            sample = read_row(row, config.text_column)
        except UnknownRow as error:
            raise DataError(
                f"{name}: row {number} has {error}; its columns: {', '.join(map(str, row)) or 'none'}",
                hint="--text-column NAME",
            ) from None
        except UnreadableRow as error:
            found.leave_out(number, str(error))
            continue
        source = str(row.get("source") or row.get("category") or Path(name).stem)
        found.records.append({"text": sample.text, "source": source, "sample": sample, "number": number})
        found.forms[sample.form] += 1
    if not found.records:
        raise DataError(f"{name} holds no text" + (f"; {found.reasons()}" if found.left_out else ""))
    return found


def _load_rows(config: DataConfig, name: str) -> list[tuple[int, dict[str, Any]]]:
    """Numbered rows; of a .jsonl file by their lines."""
    path = Path(name).expanduser()
    try:
        if path.is_file():
            return _rows_of_file(path)
        if path.suffix in LOCAL_KINDS + OTHER_KINDS:
            raise DataError(f"no file {path}")
        return list(enumerate(_rows_of_data_set(config, path, name), start=1))
    except DataError:
        raise
    except Exception as error:  # datasets raises builder-specific classes; all mean: this cannot be read
        raise DataError(f"cannot read the data set {name!r}: {said(error)}") from error


def _rows_of_file(path: Path) -> list[tuple[int, dict[str, Any]]]:
    if path.suffix in (".jsonl", ".json"):
        return [(line.number, line.checked()) for line in _json_rows(path)]
    if path.suffix == ".txt":
        try:
            paragraphs = decoded(_content(path)).split("\n\n")
        except UnicodeDecodeError as error:
            raise DataError(f"{path} {_not_text(error)}") from error
        return [(number, {"text": text}) for number, text in enumerate(filter(None, paragraphs), start=1)]
    if path.suffix == ".parquet":
        from datasets import load_dataset

        return list(enumerate(load_dataset("parquet", data_files=str(path), split="train"), start=1))
    raise DataError(f"{path}: unknown kind of file; supported: {', '.join(LOCAL_KINDS)}")


def _rows_of_data_set(config: DataConfig, path: Path, name: str) -> list[dict[str, Any]]:
    """Of a folder from save_to_disk, or of the Hub."""
    from datasets import Dataset, get_dataset_split_names, load_dataset, load_from_disk

    if path.is_dir():
        loaded: Any = load_from_disk(str(path))
        if not isinstance(loaded, Dataset):
            if config.split not in loaded:
                raise _no_split(config, list(loaded))
            loaded = loaded[config.split]
        return list(loaded)
    try:
        return list(load_dataset(name, config.dataset_config_name, split=config.split))
    except ValueError:
        splits = get_dataset_split_names(name, config.dataset_config_name)
        if config.split.split("[")[0] not in splits:
            raise _no_split(config, splits) from None
        raise


def _no_split(config: DataConfig, splits: list[str]) -> DataError:
    return DataError(
        f"{config.dataset_name} has no split {config.split!r}; its splits: {', '.join(splits) or 'none'}",
        hint="--split NAME",
    )


@dataclass(frozen=True)
class _JsonRow:
    """A line of a .jsonl file, or an element of a .json file: an object, or what is wrong."""

    place: str
    number: int
    value: dict[str, Any]
    fault: str | None = None

    def checked(self) -> dict[str, Any]:
        """The object.

        Raises:
            DataError: it is none.
        """
        if self.fault is not None:
            raise DataError(f"{self.place} {self.fault}")
        return self.value


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _not_text(error: UnicodeDecodeError) -> str:
    return f"is not UTF-8: {error.reason} at byte {error.start}"


def _json_rows(path: Path) -> Iterator[_JsonRow]:
    """Rows of a .jsonl file, one by one: a broken line spoils no other; or of a .json file with a list.

    Raises:
        DataError: the file cannot be read, or a .json file holds no list, nor one under `data`.
    """
    data = _content(path)
    if path.suffix == ".json":
        try:
            whole = parse_json(decoded(data))
        except UnicodeDecodeError as error:
            raise DataError(f"{path} {_not_text(error)}") from error
        except ValueError as error:
            raise DataError(f"{path} is not JSON: {error}") from error
        values = whole.get("data") if isinstance(whole, dict) else whole
        if not isinstance(values, list):
            raise DataError(f"{path} must hold a list, or a list under 'data'")
        for number, value in enumerate(values, start=1):
            yield _json_row(f"{path}, row {number}", number, value)
        return
    for number, line in enumerate(_lines(data), start=1):
        place = f"{path}:{number}"
        try:
            text = decoded(line)
            if text.strip():
                yield _json_row(place, number, parse_json(text))
        except UnicodeDecodeError as error:
            yield _JsonRow(place, number, {}, _not_text(error))
        except ValueError as error:
            yield _JsonRow(place, number, {}, f"is not JSON: {error}")


def _lines(data: bytes) -> list[bytes]:
    """Lines of a file in any of the encodings that `decoded` knows, whatever ends them."""
    try:
        data = decoded(data).encode()
    except UnicodeDecodeError:  # some line is no text: those of the others are found all the same
        data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return data.split(b"\n")


def _json_row(place: str, number: int, value: Any) -> _JsonRow:
    if isinstance(value, dict):
        return _JsonRow(place, number, value)
    return _JsonRow(place, number, {}, "must hold a JSON object")


@dataclass(frozen=True)
class PromptRow:
    """A row of a file of prompts: what is asked, or why nothing can be.

    number: of the line; of the element in a .json file. columns: all that the row holds. error: None for a good row.
    """

    place: str
    number: int
    prompt: Prompt
    columns: dict[str, Any]
    error: str | None = None


def prompt_rows(path: Path) -> list[PromptRow]:
    """Rows of a .jsonl file in any of the forms that `read_row` knows, good and bad ones; a conversation asks with its last
    turn that is no answer, and of Spec-Bench's `turns` the first counts.

    Raises:
        DataError: the file cannot be read, holds no rows, or is of another kind: no row holds a prompt.
    """
    found = []
    for line in _json_rows(path):
        prompt: Prompt = ""
        error = line.fault
        try:
            if error is None:
                prompt = read_row(line.value).last_prompt()
        except UnreadableRow as reason:
            error = f"holds no prompt: {reason}"
        found.append(PromptRow(line.place, line.number, prompt, line.value, error))
    if not found:
        raise DataError(f"{path} holds no prompts")
    if all(row.error is not None for row in found):
        raise DataError(_bad_rows(found), hint='a .jsonl file holds {"prompt": "..."} on each line')
    return found


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """The rows of `prompt_rows`, each with what it asks as `prompt`.

    Raises:
        DataError: unreadable, or bad rows: the first, and how many.
    """
    rows = prompt_rows(path)
    bad = [row for row in rows if row.error is not None]
    if bad:
        raise DataError(_bad_rows(bad))
    return [{**row.columns, "prompt": row.prompt} for row in rows]


def _bad_rows(bad: list[PromptRow]) -> str:
    more = f" ({len(bad)} rows like it or otherwise bad)" if len(bad) > 1 else ""
    return f"{bad[0].place} {bad[0].error}{more}"
