"""Rows of text and prompts, from local files and data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from early_exit_cli.config import DataConfig
from early_exit_cli.errors import DataError
from early_exit_cli.files.atomic import parse_json

TEXT_COLUMNS = ("text", "prompt", "turns", "messages", "instruction", "question")


def read_records(config: DataConfig) -> list[dict[str, Any]]:
    """Rows of the data set as `{"text": str, "source": str}`.

    Raises:
        DataError: no name given, file or column missing, nothing in it.
    """
    name = config.dataset_name
    if not name:
        raise DataError("no text to work on", hint="name it with --dataset-name: a Hub id or a local file")
    rows = _load_rows(config, name)
    column = config.text_column or next((key for key in TEXT_COLUMNS if rows and key in rows[0]), "text")
    missing = next((number for number, row in enumerate(rows, start=1) if column not in row), None)
    if missing is not None:
        raise DataError(
            f"{name}: row {missing} has no column {column!r}; its columns: {', '.join(rows[missing - 1]) or 'none'}",
            hint="--text-column NAME",
        )
    records = [
        {"text": text, "source": str(row.get("source") or row.get("category") or Path(name).stem)}
        for row in rows
        if (text := _as_text(row[column])).strip()
    ]
    if not records:
        raise DataError(f"{name} holds no text")
    return records


def _load_rows(config: DataConfig, name: str) -> list[dict[str, Any]]:
    from datasets import Dataset, load_dataset, load_from_disk

    path = Path(name).expanduser()
    kinds = {".jsonl": "json", ".json": "json", ".txt": "text", ".parquet": "parquet"}
    try:
        if path.is_file() and path.suffix in (".jsonl", ".json"):
            return _read_json_lines(path)
        if path.is_file():
            if path.suffix not in kinds:
                raise DataError(f"{path}: unknown kind of file; supported: {', '.join(kinds)}")
            options = {"sample_by": "paragraph"} if path.suffix == ".txt" else {}
            loaded: Any = load_dataset(kinds[path.suffix], data_files=str(path), split="train", **options)
        elif path.is_dir():
            loaded = load_from_disk(str(path))
        elif path.suffix in kinds:
            raise DataError(f"no file {path}")
        else:
            loaded = load_dataset(name, config.dataset_config_name, split=config.split)
    except DataError:
        raise
    except Exception as error:  # datasets raises builder-specific classes; all mean: this cannot be read
        raise DataError(f"cannot read the data set {name!r}: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(loaded, Dataset):
        loaded = loaded[config.split]
    return list(loaded)


def _read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Rows of a .jsonl file; or of a .json file that holds a list, or a list under `data`."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from error
    places = [(str(path), text)]
    if path.suffix != ".json":
        places = [(f"{path}:{number}", line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    values: Any = []
    for place, document in places:
        try:
            values.append(parse_json(document))
        except ValueError as error:
            raise DataError(f"{place} is not JSON: {error}") from error
    if path.suffix == ".json":
        (whole,) = values
        values = whole.get("data") if isinstance(whole, dict) else whole
        if not isinstance(values, list):
            raise DataError(f"{path} must hold a list, or a list under 'data'")
        places = [(f"{path}, row {number}", "") for number in range(1, len(values) + 1)]
    for (place, _), value in zip(places, values, strict=True):
        if not isinstance(value, dict):
            raise DataError(f"{place} must hold a JSON object")
    return values


def _as_text(value: Any) -> str:
    """A text column's value: a string, the first of Spec-Bench's turns, or the first user message."""
    if isinstance(value, list) and value:
        value = value[0]
        if isinstance(value, dict):
            value = value.get("content")
    return value if isinstance(value, str) else ""


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """Prompts of a .jsonl file: rows with `prompt`, or Spec-Bench's `turns` (the first one counts).

    Raises:
        DataError: unreadable, or a row without a prompt.
    """
    rows = _read_json_lines(path)
    for number, row in enumerate(rows, start=1):
        row["prompt"] = _as_text(row.get("prompt") or row.get("turns"))
        if not row["prompt"].strip():
            raise DataError(f"{path}: row {number} has neither `prompt` nor `turns`")
    if not rows:
        raise DataError(f"{path} holds no prompts")
    return rows
