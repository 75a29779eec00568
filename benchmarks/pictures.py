"""The pictures of the README: a coloured answer as a terminal shows it, and the page of `--html`.

    python benchmarks/pictures.py docs/pictures

Writes terminal.svg and page.png (with a Chromium and `pip install playwright`) from real runs on this machine.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

PROMPT = "Explain step by step how to solve 2x + 6 = 14, then check the answer."
COMMAND = ["infer", "--mode", "compare", "--max-tokens", "160"]
COLUMNS = 100
FONT_FACE = re.compile(r"@font-face\s*\{[^}]*\}")


def run(*options: str) -> tuple[str, str]:
    """The command's two streams, in colour."""
    environment = {**os.environ, "COLORTERM": "truecolor", "TERM": "xterm-256color"}
    result = subprocess.run(
        [sys.executable, "-m", "early_exit_cli", *COMMAND, PROMPT, *options],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    return result.stdout, result.stderr


def terminal(out: str, err: str, path: Path) -> None:
    """Draw what a terminal of COLUMNS columns would show; without the web font that rich refers to."""
    console = Console(record=True, width=COLUMNS, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
    console.print(Text(f'$ eexit {" ".join(COMMAND)} \\\n    "{PROMPT}"\n', style="bold"))
    shown = [line for line in err.splitlines() if not line.startswith("page: ")]
    console.print(Text.from_ansi(out.rstrip() + "\n"))
    console.print(Text.from_ansi("\n".join(shown)))
    drawn = FONT_FACE.sub("", console.export_svg(title="eexit"))
    path.write_text(drawn.replace("Fira Code", "ui-monospace, Menlo, Consolas"), encoding="utf-8")


def page(source: Path, path: Path) -> None:
    """A screenshot of the upper part of the page."""
    from playwright.sync_api import sync_playwright

    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    flags = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as profile:
        context = playwright.chromium.launch_persistent_context(
            profile, executable_path=browser, args=flags, viewport={"width": 1100, "height": 1180}
        )
        shown = context.new_page()
        shown.goto(source.resolve().as_uri())
        shown.locator("#answer .t.d").nth(3).hover()
        shown.screenshot(path=path)
        context.close()


def main() -> None:
    """Both pictures into the folder that is named."""
    folder = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as temporary:
        html = Path(temporary) / "page.html"
        out, err = run("--color", "always", "--html", str(html))
        terminal(out, err, folder / "terminal.svg")
        page(html, folder / "page.png")


if __name__ == "__main__":
    main()
