"""Where things are kept, and what happens where they cannot be."""

import importlib

import pytest

from early_exit_cli.files import environment
from early_exit_cli.files.environment import cache_place, from_home, is_writable, kept_path, unsaved, user_cache_dir


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

    def unknown(*_, **__):
        raise RuntimeError("could not determine the home directory")

    monkeypatch.setattr(environment.platformdirs, "user_cache_path", unknown)
    assert unsaved() is None
    place = kept_path("widths", "a.json")
    assert place == kept_path("widths", "a.json")
    assert place.is_relative_to(user_cache_dir())
    assert "EEXIT_HOME" in unsaved()
    assert cache_place() == (user_cache_dir(), "of this process alone: there is no home folder")


def test_it_is_known_who_says_where(monkeypatch, tmp_path):
    surroundings(monkeypatch, HOME=tmp_path)
    assert cache_place() == (tmp_path / ".cache" / "eexit", "default")
    surroundings(monkeypatch, HOME=tmp_path, XDG_CACHE_HOME="relative")
    assert cache_place() == (tmp_path / ".cache" / "eexit", "default")
    surroundings(monkeypatch, HOME=tmp_path, XDG_CACHE_HOME=tmp_path / "caches")
    assert cache_place() == (tmp_path / "caches" / "eexit", "XDG_CACHE_HOME")
    surroundings(monkeypatch, HOME=tmp_path, EEXIT_HOME="~/own")
    assert cache_place() == (tmp_path / "own", "EEXIT_HOME")


@pytest.mark.parametrize(
    ("system", "expected"),
    [("macos.MacOS", "Library/Caches/eexit"), ("unix.Unix", ".cache/eexit")],
)
def test_other_systems_have_their_own_place(monkeypatch, tmp_path, system, expected):
    surroundings(monkeypatch, HOME=tmp_path)
    module, _, name = system.partition(".")
    place = getattr(importlib.import_module(f"platformdirs.{module}"), name)
    monkeypatch.setattr(environment.platformdirs, "PlatformDirs", place)
    assert user_cache_dir() == tmp_path / expected


def test_the_home_folder_is_written_as_a_person_does(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert from_home(tmp_path / "a") == "~/a"
    assert from_home(tmp_path) == "~"
    assert from_home(f"{tmp_path}-other/a") == f"{tmp_path}-other/a"
    assert from_home("org/name") == "org/name"


def test_whether_a_folder_may_be_written_is_told_without_making_it(tmp_path):
    assert is_writable(tmp_path / "new" / "folder")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    assert not is_writable(tmp_path / "file" / "folder")


def test_a_folder_that_may_not_be_written_is_still_read(monkeypatch, tmp_path):
    surroundings(monkeypatch, EEXIT_HOME=tmp_path)
    kept_path("widths").mkdir(parents=True)
    kept_path("widths", "known.json").write_text("{}")
    assert unsaved() is None
    monkeypatch.setattr(environment, "_can_write", lambda folder: False)
    assert kept_path("widths", "known.json") == tmp_path / "widths" / "known.json"
    assert not kept_path("widths", "new.json").is_relative_to(tmp_path)
    assert "EEXIT_HOME" in unsaved()


def test_a_full_disk_is_one_that_cannot_be_written(monkeypatch, tmp_path):
    surroundings(monkeypatch, EEXIT_HOME=tmp_path)
    usage = environment.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda folder: usage._replace(free=4096))
    assert not kept_path("native", "new.so").is_relative_to(tmp_path)
    assert "full" in unsaved()
