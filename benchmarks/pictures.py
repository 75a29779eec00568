"""The pictures of the README: a coloured answer as a terminal shows it, the page of `--html`, and that of `eexit serve`.

    python benchmarks/pictures.py docs/pictures

Writes terminal.svg, page.png and serve.png (with a Chromium and `pip install playwright pillow`) from real runs on this machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image
from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from playwright.sync_api import Page

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


@contextlib.contextmanager
def tab(width: int, height: int, scale: float = 1) -> Iterator[Page]:
    """A browser's empty tab."""
    from playwright.sync_api import sync_playwright

    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    flags = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as profile:
        context = playwright.chromium.launch_persistent_context(
            profile,
            executable_path=browser,
            args=flags,
            viewport={"width": width, "height": height},
            device_scale_factor=scale,
        )
        yield context.new_page()
        context.close()


def page(source: Path, path: Path) -> None:
    """A screenshot of the upper part of the page."""
    with tab(1100, 1180) as shown:
        shown.goto(source.resolve().as_uri())
        shown.locator("#answer .t.d").nth(3).hover()
        shown.screenshot(path=path)


def conversation(path: Path) -> None:
    """A screenshot of the server's page, with an answer."""
    command = [sys.executable, "-m", "early_exit_cli", "serve", "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        address = json.loads(server.stdout.readline())["address"]
        with tab(640, 580, scale=2) as shown:
            shown.goto(address.removesuffix("/v1"))
            shown.fill("#message", PROMPT)
            shown.press("#message", "Enter")
            shown.wait_for_selector(".copy")
            print(shown.inner_text(".about"))
            shown.screenshot(path=path)
        server.terminate()
    Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)


def main() -> None:
    """All pictures into the folder that is named."""
    folder = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as temporary:
        html = Path(temporary) / "page.html"
        out, err = run("--color", "always", "--html", str(html))
        terminal(out, err, folder / "terminal.svg")
        page(html, folder / "page.png")
    conversation(folder / "serve.png")


if __name__ == "__main__":
    main()
