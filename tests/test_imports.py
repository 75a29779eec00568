"""A folder is a stage, and data flows one way: a folder imports only from those above it."""

import ast
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "early_exit_cli"
ORDER = (
    *(
        "errors",
        "steps",
        "config_fields",
        "config_files",
        "config_serving",
        "config_training",
        "config",
        "resolve",
        "files",
        "report",
        "sampling",
        "numerics",
    ),
    *("backbone", "runtime", "data", "hidden_states", "heads", "engine", "bundle"),
    *("drafting", "decoding", "training", "calibration", "evaluation", "library", "serving", "cli"),
)
"""From what imports nothing to what imports everything: the folders, and the files that stand beside them."""
LONGEST_CHAIN = 16
LONGEST_FILE = 500
HEAVY = {"torch", "transformers", "accelerate", "datasets", "bitsandbytes"}
NEVER_TORCH = (
    *("errors", "steps", "config_fields", "config_files", "config_serving", "config_training", "config"),
    *("resolve", "files", "report"),
    *("backbone.families", "runtime.native_code", "bundle.files", "bundle.hub_client", "bundle.model_card"),
)


def modules() -> dict[str, Path]:
    """Dotted name under the package -> file."""
    found = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    return {name: path for name, path in found.items() if not name.rpartition(".")[2].startswith("__")}


MODULES = modules()


@cache
def imported(module: str) -> tuple[frozenset[str], frozenset[str]]:
    """Modules of ours that a module imports, and the roots of all others."""
    ours, others = set(), set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            root, _, rest = name.partition(".")
            if root != PACKAGE.name:
                others.add(root)
            elif rest in MODULES:
                ours.add(rest)
            elif rest.rpartition(".")[0] in MODULES:
                ours.add(rest.rpartition(".")[0])
    return frozenset(ours), frozenset(others)


@cache
def reached(module: str) -> frozenset[str]:
    """All that a module imports, at any depth."""
    ours, _ = imported(module)
    return ours.union(*(reached(other) for other in ours))


@cache
def chain(module: str) -> tuple[str, ...]:
    """The longest chain of imports from a module down."""
    return (module, *max((chain(other) for other in imported(module)[0]), key=len, default=()))


def test_the_order_names_every_folder_and_file():
    assert {module.partition(".")[0] for module in MODULES} == set(ORDER)


@pytest.mark.parametrize("module", MODULES)
def test_a_folder_imports_only_from_those_above_it(module):
    own = ORDER.index(module.partition(".")[0])
    assert [name for name in imported(module)[0] if ORDER.index(name.partition(".")[0]) > own] == []


def test_no_chain_of_imports_is_long():
    longest = max((chain(module) for module in MODULES), key=len)
    assert len(longest) <= LONGEST_CHAIN, " > ".join(longest)


def test_no_file_is_long():
    root = PACKAGE.parent
    code = [path for folder in (PACKAGE, root / "tests", root / "benchmarks") for path in folder.rglob("*.py")]
    lines = {str(path.relative_to(root)): len(path.read_text().splitlines()) for path in code}
    assert {name: count for name, count in lines.items() if count > LONGEST_FILE} == {}


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith(NEVER_TORCH)])
def test_light_modules_never_import_torch(module):
    assert not imported(module)[1] & HEAVY


@pytest.mark.parametrize("head", ["heads.exit_heads", "heads.eagle", "heads.attention", "heads.uncertainty"])
def test_heads_reach_neither_the_answer_generator_nor_a_compiler(head):
    assert not reached(head) & {"data.answers", "data.recorded_answers", "runtime.native_code", "runtime.cuda_code"}


def test_only_what_people_see_uses_rich():
    assert {module.partition(".")[0] for module in MODULES if "rich" in imported(module)[1]} == {"report"}
