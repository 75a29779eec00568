"""Quantized copies: the bits of quantizing again, found by content alone, and never in the way of an answer."""

import errno
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import get_args
from unittest import mock

import pytest
import torch
from hub_caches import hub_cache
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from early_exit_cli.backbone import contents, weight_cache
from early_exit_cli.backbone.contents import weights_folder
from early_exit_cli.backbone.load import load_backbone
from early_exit_cli.backbone.quantization import settings_for
from early_exit_cli.backbone.weight_cache import load_copy, save_copy
from early_exit_cli.cli.app import app
from early_exit_cli.config import BackboneConfig
from early_exit_cli.config_files import KeptKind
from early_exit_cli.errors import BackboneError
from early_exit_cli.files import environment
from early_exit_cli.files.kept import KINDS

COMMIT = "a" * 40


pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture
def quantized(monkeypatch):
    """One entry for every matrix that bitsandbytes quantized since."""
    import bitsandbytes

    calls = []
    quantize = bitsandbytes.functional.quantize_4bit

    def counting(*args, **kwargs):
        calls.append(None)
        return quantize(*args, **kwargs)

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", counting)
    return calls


def load(folder, **settings):
    return load_backbone(BackboneConfig(model_name=str(folder), device="cpu", **settings))


def logits_of(backbone):
    ids = torch.arange(1, 25)[None]
    with torch.no_grad():
        return backbone.model(input_ids=ids, use_cache=False).logits


def copies():
    folder = weights_folder()
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.exists() else []


@pytest.mark.parametrize("family", ["llama", "smollm", "gpt2", "mixtral"])
def test_a_copy_gives_the_same_bits_and_the_same_identity(tiny_folder, quantized, family):
    plain = load(tiny_folder(family), weight_cache=False)
    first = load(tiny_folder(family))
    assert quantized
    quantized.clear()
    second = load(tiny_folder(family))
    assert not quantized, "the second start quantized"
    assert len(copies()) == 1
    for other in (first, second):
        assert torch.equal(logits_of(plain), logits_of(other))
        assert (other.name, other.revision, other.quantization) == (plain.name, plain.revision, plain.quantization)
        assert other.fingerprint == plain.fingerprint
        assert other.config.to_dict() == plain.config.to_dict()
        assert other.model.name_or_path == plain.model.name_or_path
        assert other.model.generation_config.to_dict() == plain.model.generation_config.to_dict()
        is_tied = other.embedding.weight is other.lm_head.weight
        assert is_tied == plain.config.tie_word_embeddings
        assert not other.model.training
        assert not any(p.requires_grad for p in other.model.parameters())


def test_every_tensor_of_a_copy_is_what_it_was(tiny_folder, tmp_path):
    source, device = tiny_folder("smollm"), torch.device("cpu")
    quantization = settings_for("4bit", torch.bfloat16)
    made = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.bfloat16, quantization_config=quantization, device_map={"": "cpu"}
    )
    before = made.config.to_dict()
    tmp_path.joinpath("copy").mkdir()
    save_copy(made, source, tmp_path / "copy")
    assert made.config.to_dict() == before  # saving leaves no trace in the model
    settings = type(made.config).from_pretrained(source)
    again = load_copy(tmp_path / "copy", "name", settings, quantization.to_dict(), torch.bfloat16, device)
    expected, found = made.state_dict(), again.state_dict()
    assert expected.keys() == found.keys()
    assert all(tensor.dtype == found[name].dtype for name, tensor in expected.items())
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert sum(name.endswith("nested_absmax") for name in found) == 6 * 7


def test_generation_defaults_are_those_of_the_original(model, quantized):
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8], "max_new_tokens": 33}))
    load(model)
    quantized.clear()
    again = load(model)
    assert not quantized
    assert (again.model.generation_config.eos_token_id, again.model.generation_config.max_new_tokens) == ([7, 8], 33)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9], "max_new_tokens": 33}))
    assert load(model).model.generation_config.eos_token_id == [7, 9]


def test_weights_of_the_same_size_and_time_are_other_weights(model, quantized):
    load(model)
    path = model / "model.safetensors"
    stat = path.stat()
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"].mul_(-1)
    save_file(tensors, path, metadata={"format": "pt"})
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    quantized.clear()
    changed = load(model)
    assert quantized
    assert len(copies()) == 2
    assert torch.equal(logits_of(changed), logits_of(load(model, weight_cache=False)))


def test_a_copied_folder_finds_the_copy_and_keeps_its_own_name(model, tmp_path, quantized):
    load(model)
    moved = shutil.copytree(model, tmp_path / "elsewhere")
    quantized.clear()
    backbone = load(moved)
    assert not quantized
    assert len(copies()) == 1
    assert (backbone.name, backbone.model.name_or_path) == (str(moved), str(moved))


def test_files_are_hashed_once_and_those_of_the_hub_never(model, tmp_path, monkeypatch):
    hashed = []
    sha256 = contents.file_sha256
    monkeypatch.setattr(contents, "file_sha256", lambda path: (hashed.append(path.name), sha256(path))[1])
    found = contents.contents_of(model)
    assert set(hashed) == {"config.json", "generation_config.json", "model.safetensors"} == set(found)
    assert contents.contents_of(model) == found
    assert len(hashed) == 3

    snapshot = hub_cache(model, tmp_path / "hub")
    assert contents.contents_of(snapshot) == found
    assert len(hashed) == 3
    (snapshot / "model.safetensors").resolve().unlink()  # a download that is not complete
    assert contents.contents_of(snapshot) is None


def test_a_model_of_the_hub_is_kept_after_its_download(model, tmp_path, quantized, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    hub_cache(model, tmp_path / "hub")
    place, asked = weight_cache.WeightCopy._place, []

    def not_yet(copy):
        asked.append(None)
        return None if len(asked) == 1 else place(copy)

    monkeypatch.setattr(weight_cache.WeightCopy, "_place", not_yet)
    expected = logits_of(load("org/tiny"))
    assert len(copies()) == 1
    quantized.clear()
    for revision in (None, "main", COMMIT):
        backbone = load("org/tiny", revision=revision)
        assert (backbone.name, backbone.model.name_or_path, backbone.revision) == ("org/tiny", "org/tiny", revision)
        assert torch.equal(logits_of(backbone), expected)
    assert not quantized


def test_a_model_of_several_files_is_known_by_all_of_them(model, quantized):
    made = AutoModelForCausalLM.from_pretrained(model)
    (model / "model.safetensors").unlink()
    made.save_pretrained(model, max_shard_size="200KB")
    shards = sorted(path.name for path in model.glob("*.safetensors"))
    assert len(shards) > 1
    assert set(shards) | {"model.safetensors.index.json"} < set(contents.contents_of(model))
    load(model)
    quantized.clear()
    load(model)
    assert not quantized


def test_other_settings_are_another_copy(model, monkeypatch):
    load(model)
    monkeypatch.setattr(weight_cache, "versions", lambda: {"bitsandbytes": "0.0", "transformers": "5", "torch": "2"})
    load(model)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)  # the mean that double quantization subtracts has another order of sums
        load(model)
    finally:
        torch.set_num_threads(threads)
    assert len(copies()) == 3


def test_only_plain_weights_in_4bit_have_copies(model, tmp_path):
    load(model, quantization="8bit")
    load(model, quantization="none")
    load(model, weight_cache=False)
    assert not weights_folder().exists()
    load(model, weight_cache=False).model.save_pretrained(tmp_path / "saved")
    for path in model.glob("tokenizer*"):
        shutil.copyfile(path, tmp_path / "saved" / path.name)
    assert load(tmp_path / "saved").quantization == "4bit"
    assert not weights_folder().exists()


def cut(path):
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 1000)


def lose_a_tensor(path):
    tensors = load_file(path)
    del tensors["model.layers.3.input_layernorm.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


def break_a_number(path):
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("damage", [Path.unlink, cut, lose_a_tensor, break_a_number])
def test_a_damaged_copy_gives_way_to_the_original(model, quantized, damage):
    expected = logits_of(load(model))
    damage(copies()[0] / "model.safetensors")
    assert torch.equal(logits_of(load(model)), expected)
    quantized.clear()
    assert torch.equal(logits_of(load(model)), expected)
    assert not quantized, "the copy was not made again"
    assert len(copies()) == 1


def test_a_copy_stays_where_the_original_fails_too(model, monkeypatch):
    load(model)

    def refuse(*args, **kwargs):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
        with pytest.raises(BackboneError, match="out of memory"):
            load(model)
    assert len(copies()) == 1


def test_without_room_nothing_is_kept_or_hashed(model, monkeypatch, capfd):
    usage = shutil.disk_usage(model)
    full = usage._replace(free=weight_cache.SPARE_BYTES)
    monkeypatch.setattr(weight_cache.shutil, "disk_usage", lambda path: full)
    monkeypatch.setattr(contents, "file_sha256", lambda path: pytest.fail("hashed for nothing"))
    load(model)
    assert not weights_folder().exists()
    assert capfd.readouterr() == ("", "")


def test_a_disk_that_fills_up_meanwhile_leaves_nothing(model, monkeypatch):
    from transformers import PreTrainedModel

    def half(self, folder, **kwargs):
        (Path(folder) / "model.safetensors").write_bytes(bytes(1000))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", half)
    load(model)
    assert [path.name for path in weights_folder().iterdir()] == [contents.HASHES]


def test_a_cache_folder_that_cannot_be_written_costs_nothing(model, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EEXIT_HOME", str(tmp_path / "file" / "home"))
    expected = logits_of(load(model, weight_cache=False))
    assert torch.equal(logits_of(load(model)), expected)


def test_without_a_home_nothing_is_copied_for_this_process_alone(model, tmp_path, monkeypatch, quantized):
    monkeypatch.setenv("EEXIT_HOME", "")
    monkeypatch.setattr(environment.platformdirs, "user_cache_path", mock.Mock(side_effect=RuntimeError))
    environment._folder_of_process.cache_clear()
    try:
        for _ in range(2):
            quantized.clear()
            load(model)
            assert quantized
            assert not copies()
        assert weights_folder().is_relative_to(tempfile.gettempdir())
    finally:
        environment._folder_of_process.cache_clear()


def test_a_model_that_does_not_compute_leaves_no_copy(model):
    break_a_number(model / "model.safetensors")
    with pytest.raises(Exception, match="NaN"):
        load(model)
    assert not copies()


def test_one_process_writes_and_what_a_killed_one_left_goes(model):
    load(model)
    place = copies()[0]
    shutil.rmtree(place)
    writing = place.with_name(f".{place.name}.tmp")
    writing.mkdir()
    load(model)
    assert copies() == [writing]
    os.utime(writing, (0, 0))
    load(model)
    assert copies() == [place]


def test_a_damaged_table_of_hashes_is_made_again(model, quantized):
    load(model)
    (weights_folder() / contents.HASHES).write_text('{"half')
    quantized.clear()
    load(model)
    assert not quantized
    assert json.loads((weights_folder() / contents.HASHES).read_text())


def run(*words):
    app([str(word) for word in words], standalone_mode=False)


def test_a_flag_does_without(model, tmp_path):
    heads = ["--dataset-name", tmp_path / "text.jsonl", "--cache-dir", tmp_path / "states", "--cache-tokens", 64]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"line {i} " * 30}) + "\n" for i in range(20)))
    command = ["cache", "extract", "--model-name", model, "--device", "cpu", *heads, "--max-length", 32]
    run(*command, "--no-weight-cache")
    assert not copies()


def test_every_kind_has_its_line():
    assert set(KINDS) == set(get_args(KeptKind))


def test_info_and_clear_know_what_is_kept(model, home, tmp_path, capsys):
    load(model)
    (home / "states" / "a").mkdir(parents=True)
    (home / "states" / "a" / "shard").write_bytes(bytes(1000))
    (home / "costs").mkdir(exist_ok=True)
    (home / "costs" / "table.json").write_text("{}")
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "model").write_bytes(bytes(10))
    (home / "gguf").symlink_to(tmp_path / "shared")

    run("cache", "info", "--json")
    kinds = json.loads(capsys.readouterr().out)["kinds"]
    weights = kinds["weights"]
    assert weights["bytes"] == sum(p.stat().st_size for p in weights_folder().rglob("*") if p.is_file()) > 100_000
    assert kinds["states"] == {"files": 1, "bytes": 1000}
    assert kinds["models"]["bytes"] == 10

    run("cache", "clear", "weights", "--dry-run")
    out, err = capsys.readouterr()
    assert "weights" in out
    assert "states" not in out
    assert "nothing was removed" in err
    assert copies()

    run("cache", "clear", "weights")
    assert not weights_folder().exists()
    assert (home / "costs").exists()
    run("cache", "clear")
    assert "states" not in capsys.readouterr().out
    assert not (home / "costs").exists()
    assert not (home / "gguf").exists()
    assert (tmp_path / "shared" / "model").exists()
    assert (home / "states" / "a" / "shard").exists()
    run("cache", "clear", "--kind", "states")
    assert not (home / "states").exists()
