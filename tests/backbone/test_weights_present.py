"""No weight is left random: what a checkpoint or a GGUF file lacks is named, and what is split is read whole."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf_files import write_gguf
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from early_exit_cli.backbone.load import load_backbone
from early_exit_cli.config import BackboneConfig
from early_exit_cli.errors import BackboneError

LAST = "model.layers.5.mlp.down_proj.weight"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("EEXIT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def copied(tiny_folder, tmp_path):
    """family -> folder of a tiny model that a test may change."""

    def copy(family="llama"):
        return Path(shutil.copytree(tiny_folder(family), tmp_path / family))

    return copy


def load(folder, quantization="none"):
    return load_backbone(BackboneConfig(model_name=str(folder), quantization=quantization, device="cpu"))


def rewrite(folder, change):
    """Let `change` alter the tensors of a folder."""
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def without(*names):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def in_shards(folder):
    """The folder with its weights in several files; their names, in order."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="200KB")
    return sorted(path.name for path in folder.glob("model-*.safetensors"))


@pytest.mark.parametrize("quantization", ["none", "4bit"])
@pytest.mark.parametrize("prefix", ["base_model.model.", "module.", "_orig_mod."])
def test_keys_under_a_foreign_prefix_are_no_weights(copied, home, prefix, quantization):
    folder = copied()
    rewrite(folder, lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()})
    with pytest.raises(BackboneError) as refused:
        load(folder, quantization)
    message = str(refused.value)
    assert "lacks 57 of the model's tensors: lm_head.weight, model.embed_tokens.weight, model.layers.0." in message
    assert f"it holds {prefix}lm_head.weight" in message
    assert not list((home / "weights").glob("*/model.safetensors"))  # and no copy of it is kept


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight", LAST])
def test_one_missing_tensor_is_named(copied, name):
    folder = copied()
    rewrite(folder, without(name))
    with pytest.raises(BackboneError, match=f"lacks 1 of the model's tensors: {name}"):
        load(folder)


def test_both_of_a_tied_pair_missing_are_missing(copied):
    folder = copied("smollm")
    rewrite(folder, without("model.embed_tokens.weight"))
    with pytest.raises(BackboneError, match=r"lacks 2 of .*: lm_head.weight, model.embed_tokens.weight"):
        load(folder)


def test_blocks_that_only_the_configuration_has_are_missing(copied):
    folder = copied()
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 8}))
    with pytest.raises(BackboneError, match=r"lacks 18 of the model's tensors: model\.layers\.6\."):
        load(folder)


def test_tensors_that_an_index_promises_and_a_shard_lacks_are_named(copied):
    folder = copied()
    second = in_shards(folder)[1]
    load(folder)
    held = load_file(folder / second)
    lost = sorted(held)[0]
    save_file(without(lost)(held), folder / second, metadata={"format": "pt"})
    with pytest.raises(BackboneError, match=f"lacks 1 of the model's tensors: {lost}"):
        load(folder)
    save_file({}, folder / second, metadata={"format": "pt"})
    with pytest.raises(BackboneError, match=rf"lacks {len(held)} of the model's tensors: {lost}.*, \.\.\."):
        load(folder)


def test_an_older_format_that_lacks_a_tensor_is_refused_too(copied):
    folder = copied()
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    load(folder)
    torch.save(without(LAST)(tensors), folder / "pytorch_model.bin")
    with pytest.raises(BackboneError, match=LAST):
        load(folder)


def test_a_tensor_of_another_shape_is_named_with_both(copied):
    folder = copied()
    name = "model.layers.2.mlp.up_proj.weight"
    rewrite(folder, lambda tensors: tensors | {name: tensors[name][:100].clone()})
    with pytest.raises(BackboneError) as refused:
        load(folder)
    assert f"1 tensors of another shape than the model's: {name} is [100, 64], in the model [128, 64]" in str(
        refused.value
    )


def test_an_expert_that_is_missing_is_noticed(copied):
    folder = copied("mixtral")
    lost = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    rewrite(folder, without(lost))
    with pytest.raises(BackboneError, match=r"model\.layers\.1\.mlp\.experts\.down_proj is \[3, 64, 128\]"):
        load(folder)


def test_what_is_rightly_absent_stays_silent(copied, capfd):
    tied = copied("smollm")
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    ids = torch.arange(20)[None]
    expected = load(tied).model(ids).logits
    rewrite(tied, lambda tensors: {name.removeprefix("model."): tensor for name, tensor in tensors.items()})
    assert torch.equal(load(tied).model(ids).logits, expected)  # as the model without its head would be saved
    rewrite(tied, lambda tensors: tensors | {"rotary_emb.inv_freq": torch.ones(8)})
    assert torch.equal(load(tied).model(ids).logits, expected)  # as old versions saved what is computed
    assert capfd.readouterr().err == ""


# GGUF files


@pytest.fixture
def gguf_of(tiny_folder, tmp_path):
    """(name, change of the tensors, tensors a part) -> the files of a GGUF model of the tiny Llama."""
    folder = tiny_folder("llama")
    tensors = load_file(folder / "model.safetensors")

    def make(name, change=lambda tensors: tensors, parts_of=None):
        return write_gguf(tmp_path / f"{name}.gguf", folder, change(dict(tensors)), parts_of)

    return make


def logits(path):
    return load(path).model(torch.arange(30)[None]).logits


def test_a_split_gguf_is_read_whole_whichever_part_is_named(gguf_of, tiny_backbone):
    whole, *rest = gguf_of("whole")
    parts = gguf_of("parts", parts_of=20)
    assert (len(rest), [part.name for part in parts]) == (0, [f"parts-0000{n}-of-00003.gguf" for n in (1, 2, 3)])
    expected = logits(whole)
    own = tiny_backbone("llama").model(torch.arange(30)[None]).logits
    assert torch.allclose(expected, own, atol=0.5)  # kept in bfloat16
    assert (expected.argmax(-1) == own.argmax(-1)).float().mean() > 0.9
    for part in parts:
        assert torch.equal(logits(part), expected)


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_part_that_is_missing_is_named(gguf_of, lost):
    parts = gguf_of("parts", parts_of=20)
    parts[lost].unlink()
    named = parts[0 if lost else 1]
    with pytest.raises(BackboneError, match=f"one of 3 parts of a model, and {parts[lost].name} is missing"):
        load(named)


def test_a_part_that_is_missing_is_noticed_when_the_model_was_converted_before(gguf_of):
    parts = gguf_of("parts", parts_of=20)
    load(parts[0])
    parts[2].unlink()
    with pytest.raises(BackboneError, match="is missing"):
        load(parts[0])


def test_parts_under_other_names_or_of_other_models_are_refused(gguf_of, tmp_path):
    parts = gguf_of("parts", parts_of=20)
    shutil.copy(parts[0], tmp_path / "first.gguf")
    with pytest.raises(BackboneError, match="its name does not say which"):
        load(tmp_path / "first.gguf")
    shutil.copy(parts[0], parts[1])
    with pytest.raises(BackboneError, match="do not belong together"):
        load(parts[0])


def test_a_gguf_that_lacks_a_tensor_is_refused(gguf_of, home):
    (path,) = gguf_of("lacking", without(LAST))
    with pytest.raises(BackboneError, match=f"lacks 1 of the model's tensors: {LAST}"):
        load(path)
    assert not list((home / "gguf").glob("*/model.safetensors"))


def test_a_gguf_that_is_cut_off_is_named(gguf_of):
    (path,) = gguf_of("cut")
    os.truncate(path, path.stat().st_size - 5000)
    with pytest.raises(BackboneError, match=f"{path.name} is not a whole GGUF file"):
        load(path)


def test_another_gguf_of_the_same_name_size_and_head_is_another_model(gguf_of, tmp_path):
    (path,) = gguf_of("same")
    first = logits(path)
    data = path.read_bytes()
    values = np.frombuffer(data[-64 * 320 * 4 :], np.float32)
    path.write_bytes(data[: -64 * 320 * 4] + (-values).astype(np.float32).tobytes())
    assert path.stat().st_size == len(data)
    assert path.read_bytes()[: 1 << 16] == data[: 1 << 16]
    second = logits(path)
    assert not torch.equal(first, second)
    path.write_bytes(data)
    assert torch.equal(logits(path), first)  # which was kept
    renamed = path.rename(tmp_path / "other.gguf")
    assert torch.equal(logits(renamed), first)
