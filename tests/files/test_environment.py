"""Where things are kept, and what happens where they cannot be."""

from pathlib import Path

import pytest

from early_exit_cli.files import environment
from early_exit_cli.files.environment import kept_path, unsaved, user_cache_dir


@pytest.fixture(autouse=True)
def asked_anew():
    remembered = (environment._can_write, environment._folder_of_process)
    for answer in remembered:
        answer.cache_clear()
    yield
    for answer in remembered:
        answer.cache_clear()


def surroundings(monkeypatch, **variables):
    for name in ("EEXIT_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


def test_the_folder_is_the_one_that_is_named(monkeypatch, tmp_path):
    surroundings(monkeypatch, EEXIT_HOME=tmp_path / "own", XDG_CACHE_HOME=tmp_path / "caches")
    assert user_cache_dir() == tmp_path / "own"
    surroundings(monkeypatch, EEXIT_HOME="", XDG_CACHE_HOME=tmp_path / "caches")
    assert user_cache_dir() == tmp_path / "caches" / "eexit"


@pytest.mark.parametrize("caches", ["", "relative/caches"])
def test_what_is_no_absolute_folder_of_caches_does_not_count(monkeypatch, tmp_path, caches):
    surroundings(monkeypatch, EEXIT_HOME="", XDG_CACHE_HOME=caches, HOME=tmp_path)
    assert user_cache_dir() == tmp_path / ".cache" / "eexit"


def test_without_a_home_things_are_kept_for_this_process(monkeypatch):
    """As for a user whom the system does not know, in a container."""
    surroundings(monkeypatch)

    def unknown():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", unknown)
    assert unsaved() is None
    place = kept_path("widths", "a.json")
    assert place == kept_path("widths", "a.json")
    assert place.is_relative_to(user_cache_dir())
    assert "EEXIT_HOME" in unsaved()


def test_a_folder_that_may_not_be_written_is_still_read(monkeypatch, tmp_path):
    surroundings(monkeypatch, EEXIT_HOME=tmp_path)
    kept_path("widths").mkdir(parents=True)
    kept_path("widths", "known.json").write_text("{}")
    assert unsaved() is None
    monkeypatch.setattr(environment, "_can_write", lambda folder: False)
    assert kept_path("widths", "known.json") == tmp_path / "widths" / "known.json"
    assert not kept_path("widths", "new.json").is_relative_to(tmp_path)
    assert "EEXIT_HOME" in unsaved()
