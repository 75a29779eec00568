"""Every `eexit` command that README and guides show is run, in their order, on small models and a Hub on localhost."""

import json
import re
import shlex
from pathlib import Path

import pytest
from dssd_files import dssd_folder
from eagle3_files import Head, random_weights, settings_of, write_checkpoint
from hub_server import HubServer
from hub_terminal import Terminal
from live_server import LiveServer

from early_exit_cli.files.environment import user_cache_dir

ROOT = Path(__file__).parent.parent.parent
PAGES = ["README.md", "docs/train-your-own.md", "docs/how-it-stays-exact.md", "docs/hub.md"]
SMALLER = {
    "train": "--max-steps 2 --batch-size 2 --max-length 64 --answer-tokens 8 --draft-vocab 64",
    "cache": "--max-length 64 --answer-tokens 8",
    "infer": "--max-tokens 6 --repeats 1",
    "chat": "--max-tokens 6",
}
"""What is added to a command, so that it takes seconds; a flag given twice counts the last time."""


def shown(page: str) -> list[str]:
    """The `eexit` commands of a page's shell blocks, without comments; `eexit serve`, which does not end, has tests of its own."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.startswith("eexit ") and not line.startswith("eexit serve")]


def test_every_page_shows_commands():
    assert all(shown(page) for page in PAGES)


@pytest.fixture(scope="module")
def terminal(tmp_path_factory, tiny_folder, linear_bundle):
    folder = tmp_path_factory.mktemp("documented")
    (folder / "Qwen").mkdir()
    (folder / "Qwen" / "Qwen2.5-0.5B-Instruct").symlink_to(tiny_folder("qwen2"))  # a local folder comes before the Hub
    rows = [{"prompt": f"What is {number} times {number + 1}?"} for number in range(60)]
    for name in ("prompts.jsonl", "wide.jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "handbook.txt").write_text("To reset the device, hold the button for ten seconds.")
    dssd_folder(linear_bundle, folder / "DSSD_FOLDER")
    (folder / "eexit").mkdir()
    (folder / "eexit" / "gguf").symlink_to(user_cache_dir() / "gguf")  # converting the embedded model takes long
    head = write_checkpoint(folder / "head", settings_of(Head()), random_weights(Head(), False))
    with HubServer() as server:
        server.make_repo("ORG/HEAD", {path.name: path.read_bytes() for path in head.iterdir()})
        found = Terminal(server, folder, folder)
        yield found
        found.close()


@pytest.fixture(scope="module")
def endpoint(tiny_model):
    """A server of the backbone that these commands train on; it is asked by more at once than may wait."""
    with LiveServer(tiny_model("qwen2")) as server:
        yield f"{server.address}/v1"


@pytest.mark.parametrize("command", [command for page in PAGES for command in shown(page)])
def test_a_documented_command_runs(terminal, endpoint, command):
    words = shlex.split(command.replace("http://localhost:8000/v1", endpoint), comments=True)[1:]
    extra = shlex.split(SMALLER.get(words[0], ""))
    if words[0] in ("train", "cache") or "--model-name" in words:
        extra += ["--model-name", "Qwen/Qwen2.5-0.5B-Instruct", "--quantization", "none"]
    code, out, err = terminal.run(*words, *extra, stdin="Hello\n")
    assert code == 0, err
    assert out or err
