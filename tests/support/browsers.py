"""A real browser for pages, where there is one."""

import contextlib
import shutil

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]


@contextlib.contextmanager
def launched(profile):
    """A playwright context of a browser that lives for a module: while it runs, this thread has an event loop."""
    if BROWSER is None:
        pytest.skip("no chromium here: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with playwright.sync_playwright() as running:
        context = running.chromium.launch_persistent_context(
            profile, executable_path=BROWSER, headless=True, args=FLAGS
        )
        yield context
        context.close()
