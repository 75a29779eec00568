"""`eexit cache ls` and `rm`: everything that is kept has a name, a size and a key, and goes only when it is meant."""

import json
import os
import shlex
from pathlib import Path

import pytest
import torch
from commands import eexit, output_of

from early_exit_cli.backbone.load import load_backbone
from early_exit_cli.config import BackboneConfig, DataConfig
from early_exit_cli.data.documents import Document
from early_exit_cli.data.on_policy import answer_prompts
from early_exit_cli.runtime.select import make_blocks

HASHES = ["74b083f62123" + "0" * 12, *(letter * 24 for letter in "bcdef0123")]
FIRST = HASHES[0][:12]
QWEN = "Qwen/Qwen2.5-0.5B-Instruct"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A cache folder with something of every kind."""
    home = tmp_path / "home"
    monkeypatch.setenv("EEXIT_HOME", str(home))
    shape = {"model_type": "llama", "num_hidden_layers": 30, "hidden_size": 576}
    request = {"backbone.model_name": QWEN, "data.dataset_name": "prompts.jsonl"}
    files = {
        f"gguf/Tiny.Q4_1-{'9' * 12}/model.safetensors": "x" * 3000,
        f"weights/{HASHES[0]}/model.safetensors": "x" * 2_500_000,
        f"weights/{HASHES[0]}/made_from.json": {"made_from": QWEN},
        f"weights/{HASHES[1]}/model.safetensors": "x" * 100,
        f"weights/{HASHES[1]}/made_from.json": {"made_from": str(home / "gguf" / f"Tiny.Q4_1-{'9' * 12}")},
        f"weights/{HASHES[2]}/config.json": shape,
        "weights/hashes.json": {},
        f"weights/.{HASHES[3]}.tmp/model.safetensors": "x",
        "dssd/ORG--NAME/commit/heads.safetensors": "x" * 50,
        f"widths/{HASHES[4]}.json": {"made_from": QWEN},
        f"costs/{HASHES[5]}.json": {"made_from": QWEN},
        f"costs/{HASHES[6]}.json": '{"half',
        f"native/{HASHES[7]}.so": "x",
        f"cuda/product-{HASHES[8]}.cubin": "x",
        f"answers/{HASHES[9]}.jsonl": json.dumps({"made_from": f"{QWEN}, chats.jsonl"})
        + '\n{"index": 0, "answer": []}\n',
        f"states/{HASHES[0]}/manifest.json": {"request": request},
        f"states/{HASHES[0]}/shards/train-00000.safetensors": "x" * 1000,
    }
    for name, content in files.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return home


def listed(*words):
    return json.loads(output_of("cache", "ls", *words, "--json"))


def keys(*words):
    return [entry["key"] for entry in listed(*words)["entries"]]


def test_every_entry_says_what_it_was_made_from(home):
    names = {entry["key"]: entry["name"] for entry in listed()["entries"]}
    assert names == {
        "models/Tiny.Q4_1-999999999999": "Tiny.Q4_1",
        f"weights/{FIRST}": QWEN,
        "weights/bbbbbbbbbbbb": "Tiny.Q4_1",
        "weights/cccccccccccc": "unnamed llama, 30 blocks, 576 wide",
        "weights/hashes": "hashes of model files",
        f"weights/.{HASHES[3]}.tmp": "unfinished",
        "bundles/ORG--NAME": "ORG/NAME",
        f"measurements/{QWEN}": QWEN,
        "measurements/unknown": "unknown",
        "code/native": "passes on this processor",
        "code/cuda": "kernels for GPUs",
        "answers/333333333333": f"{QWEN}, chats.jsonl",
        f"states/{FIRST}": f"{QWEN}, prompts.jsonl",
    }


def test_sizes_and_ages_and_all_of_it_together(home):
    copy = home / "weights" / HASHES[0] / "model.safetensors"
    os.utime(copy, (copy.stat().st_mtime - 3600, copy.stat().st_mtime - 3 * 86400))
    os.utime(copy.with_name("made_from.json"), (0, copy.stat().st_mtime))
    found = listed()
    (entry,) = [entry for entry in found["entries"] if entry["key"] == f"weights/{FIRST}"]
    assert (entry["kind"], entry["files"], entry["paths"]) == ("weights", 2, [str(copy.parent)])
    assert entry["bytes"] == 2_500_000 + copy.with_name("made_from.json").stat().st_size
    assert entry["made"] < entry["used"]
    whole = sum(path.lstat().st_size for path in home.rglob("*") if path.is_file())
    assert found["bytes"] == whole == sum(kind["bytes"] for kind in found["kinds"].values())
    lines = output_of("cache", "ls").splitlines()
    (line,) = [line for line in lines if f"weights/{FIRST}" in line]
    assert line.split() == ["weights", QWEN, "2.5", "MB", "3", "d", "1", "h", f"weights/{FIRST}"]
    assert lines[-1].split()[:3] == ["total", "13", "entries"]


def test_one_kind_is_listed_alone(home):
    assert keys("--kind", "code") == ["code/native", "code/cuda"] or keys("--kind", "code") == [
        "code/cuda",
        "code/native",
    ]


def test_an_empty_cache_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setenv("EEXIT_HOME", str(tmp_path / "none"))
    assert listed()["entries"] == []
    assert "0 entries" in output_of("cache", "ls")
    assert not (tmp_path / "none").exists()


def test_a_key_removes_one_entry_and_a_name_all_that_has_it(home):
    before = keys()
    output_of("cache", "rm", "weights/bbbbbbbbbbbb", "code/cuda")
    assert set(before) - set(keys()) == {"weights/bbbbbbbbbbbb", "code/cuda"}
    output_of("cache", "rm", QWEN)
    assert not {f"weights/{FIRST}", f"measurements/{QWEN}"} & set(keys())
    assert {f"states/{FIRST}", "answers/333333333333"} <= set(keys())  # their names have the text, too
    output_of("cache", "rm", f"{QWEN}, prompts.jsonl")
    assert f"states/{FIRST}" not in keys()


def test_a_name_within_a_kind(home):
    output_of("cache", "rm", QWEN, "--kind", "measurements")
    assert f"measurements/{QWEN}" not in keys()
    assert f"weights/{FIRST}" in keys()


def test_all_leaves_what_took_hours(home):
    dry = json.loads(output_of("cache", "rm", "--all", "--dry-run", "--json"))
    assert len(dry["entries"]) == 11
    assert len(keys()) == 13
    output_of("cache", "rm", "--all")
    assert keys() == ["answers/333333333333", f"states/{FIRST}"]
    output_of("cache", "rm", "--kind", "answers")
    assert keys() == [f"states/{FIRST}"]


def test_clear_is_the_same(home):
    output_of("cache", "clear", "models")
    assert "models/Tiny.Q4_1-999999999999" not in keys()
    output_of("cache", "clear")
    assert keys() == ["answers/333333333333", f"states/{FIRST}"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "what shall go?"),
        (["--all", "--kind", "code"], "leave names and --kind out"),
        (["--all", QWEN], "leave names and --kind out"),
        (["code/native", "nobody/knows"], "nothing that is kept is called 'nobody/knows'"),
        ([QWEN, "--kind", "code"], f"nothing that is kept is called {QWEN!r}"),
        (["--kind", "thoughts"], "thoughts"),
    ],
)
def test_what_is_not_meant_clearly_removes_nothing(home, words, said):
    before = keys()
    code, _, err = eexit("cache", "rm", *words)
    assert code == 2
    assert said in err
    assert keys() == before


def test_what_lies_elsewhere_by_a_link_stays_there(home, tmp_path):
    (tmp_path / "shared").mkdir()
    (home / "gguf").rename(tmp_path / "shared" / "gguf")
    (home / "gguf").symlink_to(tmp_path / "shared" / "gguf")
    assert "models/Tiny.Q4_1-999999999999" in keys()
    output_of("cache", "rm", "--all")
    assert not (home / "gguf").exists()
    assert (tmp_path / "shared" / "gguf" / "Tiny.Q4_1-999999999999" / "model.safetensors").exists()


def test_the_commands_of_the_guide_run(home):
    guide = (Path(__file__).parents[2] / "docs" / "cache.md").read_text(encoding="utf-8")
    commands = [shlex.split(line, comments=True)[1:] for line in guide.splitlines() if line.startswith("eexit ")]
    assert len(commands) > 4
    for words in commands:
        output_of(*words)
    assert keys() == ["answers/333333333333", f"states/{FIRST}"]


def test_what_is_kept_of_a_model_has_its_name(tmp_path, tiny_folder, monkeypatch):
    monkeypatch.setenv("EEXIT_HOME", str(tmp_path))
    folder = str(tiny_folder("llama"))
    backbone = load_backbone(BackboneConfig(model_name=folder, device="cpu"))
    with torch.inference_mode():
        make_blocks(backbone)
    prompts = [Document([72, 101, 108], "a question")]
    data = DataConfig(dataset_name="chats.jsonl", on_policy=True, answer_tokens=2, max_length=32)
    first = answer_prompts(prompts, data, backbone)
    names = {entry["kind"]: entry["name"] for entry in listed()["entries"] if entry["key"] != "weights/hashes"}
    code = names.pop("code", None)
    assert code in (None, "passes on this processor")
    assert names == {"weights": folder, "measurements": folder, "answers": f"{folder}, chats.jsonl"}
    assert answer_prompts(prompts, data, backbone) == first
