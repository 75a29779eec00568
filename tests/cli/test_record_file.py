"""Where `--output` puts answers."""

import errno
import io

import pytest

from early_exit_cli.cli.job import RecordFile


class FullDisk(io.StringIO):
    def flush(self):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_file_is_kept_until_the_first_record(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text("of yesterday")
    file = RecordFile(path)
    assert path.read_text() == "of yesterday"
    file.write({"text": "é"})
    assert path.read_text() == '{"text": "é"}\n'


def test_a_full_disk_is_told_with_the_file(tmp_path):
    file = RecordFile(tmp_path / "answers.jsonl")
    file.file = FullDisk()
    with pytest.raises(OSError, match="No space left") as told:
        file.write({"row": 1})
    assert told.value.filename == str(tmp_path / "answers.jsonl")
