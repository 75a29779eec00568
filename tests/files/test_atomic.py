import json

import pytest

from early_exit_cli.errors import BundleError
from early_exit_cli.files.atomic import (
    atomic_folder,
    fingerprint_differences,
    read_json,
    sha256_of,
    write_atomic,
    write_json,
)
from early_exit_cli.files.environment import run_record


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, fail)
    assert read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_failed_folder_leaves_the_old_one(tmp_path):
    target = tmp_path / "folder"
    with atomic_folder(target) as folder:
        (folder / "a").write_text("1")
    with pytest.raises(ValueError, match="stop"), atomic_folder(target) as folder:
        (folder / "b").write_text("2")
        raise ValueError("stop")
    assert [p.name for p in target.iterdir()] == ["a"]
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("text", ["{", "[1]", "\xff", "", "[" * 100_000])
def test_json_that_is_no_object_is_a_bundle_error(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(BundleError, match=r"config\.json"):
        read_json(path)


def test_hashes_see_where_parts_end():
    assert sha256_of("ab", "c") != sha256_of("a", "bc")


def test_differences_name_field_and_both_values():
    assert fingerprint_differences({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4}) == [("b", 2, 3)]


def test_the_run_record_says_how_to_repeat_a_run():
    record = run_record([("training.lr", 0.1, "--lr")], device="cpu")
    assert record["settings"]["training.lr"] == {"value": 0.1, "origin": "--lr"}
    assert {"torch", "transformers", "bitsandbytes", "eexit", "python"} <= set(record["versions"])
    json.dumps(record)
