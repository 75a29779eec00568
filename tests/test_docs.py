"""What the documents say exists: every page is in the index, every link and every path that they name leads somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)|\b(?:src|href)=\"([^\"]+)\"")
SOURCE = re.compile(r"(?<![\w./])[\w./-]+\.(?:py|c|h|cu|cuh|yaml)\b")
HOMES = ("", "early_exit_cli", "early_exit_cli/runtime/cuda", "tests", "benchmarks", "configs")
"""Where a path in a document may begin."""
LONGEST_PAGE = 500


def links(page: Path) -> list[str]:
    """The relative links of a page, without anchors."""
    found = [first or second for first, second in LINK.findall(page.read_text(encoding="utf-8"))]
    return [link.partition("#")[0] for link in found if not re.match(r"[a-z]+:|#", link)]


def test_the_index_links_every_page():
    index = DOCS / "README.md"
    linked = {index, *((DOCS / link).resolve() for link in links(index))}
    assert [str(page.relative_to(DOCS)) for page in PAGES if DOCS in page.parents and page not in linked] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_paths_lead_to_files(page):
    assert [link for link in links(page) if not (page.parent / link).exists()] == []
    named = set(SOURCE.findall(page.read_text(encoding="utf-8")))
    assert [path for path in sorted(named) if not any((ROOT / home / path).exists() for home in HOMES)] == []


def test_no_page_is_long():
    lines = {str(page.relative_to(ROOT)): len(page.read_text(encoding="utf-8").splitlines()) for page in PAGES}
    assert {name: count for name, count in lines.items() if count > LONGEST_PAGE} == {}
