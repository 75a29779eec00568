"""Files that outlive a run: atomic writes, hashes, fingerprints, the run record, and the user's cache folder."""

from __future__ import annotations

import codecs
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from early_exit_cli.errors import BundleError, ConfigError, DataError


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary sibling, sync it, then rename it to `path`. A failure leaves `path` as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except Exception as error:
        number = write_errno(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_errno(error: Exception) -> int | None:
    """Why the system refused a write, as Python, safetensors or torch (which does not know why) say it."""
    if isinstance(error, OSError):
        return error.errno
    said = re.search(r"os error (\d+)", str(error))
    if said:
        return int(said[1])
    return errno.ENOSPC if re.search("file write failed|unexpected pos", str(error)) else None


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` in UTF-8, atomically."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomic(path, write)


def keep_json(path: Path, value: Any) -> bool:
    """`write_json` of what can be made again: whether it could be written, for a full disk stops nobody's answer."""
    try:
        write_json(path, value)
    except OSError:
        return False
    return True


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """Write one JSON object a line, atomically."""
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_text(path, text)


def parse_json(text: str) -> Any:
    """A JSON value that can be shown and written again.

    Raises:
        ValueError: not JSON, nested too deeply, or with half a surrogate pair, which is no text.
    """
    try:
        value = json.loads(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("half a surrogate pair in a string") from None
    return value


def decoded(data: bytes) -> str:
    """Text in UTF-8, or in UTF-16 behind its byte order mark; without the mark, and every line end as `\\n`.

    Raises:
        UnicodeDecodeError: it is neither.
    """
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    return data.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")


def read_text(path: Path) -> str:
    """A text file, as `decoded` reads it.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return decoded(path.read_bytes())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        BundleError: missing, unreadable, or not an object.
    """
    try:
        value = parse_json(decoded(path.read_bytes()))
    except FileNotFoundError:
        raise BundleError(f"no file {path}") from None
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} is not readable JSON: {error}", hint="restore the file, or make it again") from error
    if not isinstance(value, dict):
        raise BundleError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


@contextmanager
def atomic_folder(path: Path, *, keep: bool = False) -> Iterator[Path]:
    """A temporary sibling folder that becomes `path` when the block ends well, and vanishes when it does not.

    Args:
        keep: what is at `path` by then stays, since another process made the same and may be reading it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    try:
        yield temporary
        os.chmod(temporary, 0o755)
        if path.exists() and not keep:
            shutil.rmtree(path)
        try:
            os.replace(temporary, path)
        except OSError:
            if not (keep and path.is_dir()):
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def atomic_files(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """A temporary folder whose files take the places of `names` in `folder` when the block ends well, the last one last.

    Of `names`, those that were not written go. A failure leaves everything as it was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder, prefix=".", suffix=".tmp"))
    try:
        yield temporary
        for name in (names[-1], *(name for name in names if not (temporary / name).exists())):
            (folder / name).unlink(missing_ok=True)
        for name in names:
            if (temporary / name).exists():
                os.replace(temporary / name, folder / name)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_new_folder(path: Path) -> None:
    """Refuse to write over what is there.

    Raises:
        ConfigError: a file, or a folder that holds something.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{path} exists and is not empty", hint="name a new folder")


def sha256_of(*parts: bytes | str) -> str:
    """Hex SHA-256 over the parts, each preceded by its length so that boundaries count."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "big"))
        digest.update(data)
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def fingerprint_differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(field, expected, found) for every field of `expected` on which the two disagree."""
    return [(key, value, found.get(key)) for key, value in expected.items() if found.get(key) != value]
