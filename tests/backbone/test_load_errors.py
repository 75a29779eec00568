"""Why a backbone does not load: told from types, status codes and files, whatever words stand in names and messages."""

import json
import os
import shutil
from pathlib import Path

import httpx2
import pytest
import transformers
from commands import eexit
from huggingface_hub import constants, errors
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import early_exit_cli
from early_exit_cli.backbone.load import load_backbone, load_tokenizer
from early_exit_cli.backbone.load_errors import load_error
from early_exit_cli.config import BackboneConfig
from early_exit_cli.errors import BackboneError, UnsupportedBackboneError

MISLEADING = ("aggregated", "checkpoint-4010", "run-403", "no-such-revision-404", "custom code")


@pytest.fixture
def model(tiny_folder, tmp_path):
    """Folder of a tiny Llama that a test may change."""
    return Path(shutil.copytree(tiny_folder("llama"), tmp_path / "model"))


def refused(folder, **settings):
    """Message and hint of the refusal to load a folder."""
    with pytest.raises((BackboneError, UnsupportedBackboneError)) as error:
        load_backbone(BackboneConfig(model_name=str(folder), quantization="none", device="cpu", **settings))
    return f"{error.value.message} | {error.value.hint}"


def shard(folder):
    """The folder with its weights in several files."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="200KB")
    return sorted(folder.glob("model-*.safetensors"))


@pytest.mark.parametrize("name", MISLEADING)
def test_a_missing_shard_is_named_whatever_the_folder_is_called(model, tmp_path, name):
    folder = model.rename(tmp_path / name)
    lost = shard(folder)[1]
    lost.unlink()
    said = refused(folder)
    assert f"{folder} lacks 1 of the 6 files that model.safetensors.index.json names: {lost.name}" in said
    assert "auth login" not in said
    assert "find" not in said


@pytest.mark.parametrize("name", MISLEADING)
def test_a_damaged_shard_is_named_whatever_the_folder_is_called(model, tmp_path, name):
    folder = model.rename(tmp_path / name)
    damaged = shard(folder)[2]
    os.truncate(damaged, damaged.stat().st_size - 8)
    said = refused(folder)
    assert f"{damaged} is damaged" in said
    assert "auth login" not in said


def test_a_missing_shard_is_one_line_of_a_command(model):
    lost = shard(model)[0]
    lost.unlink()
    code, out, err = eexit("infer", "--mode", "full", "--model-name", model, "--quantization", "none", "--prompt", "a")
    assert (code, out) == (1, "")
    assert lost.name in err
    assert "Traceback" not in err


@pytest.mark.parametrize("size", [0, 1000, -1000])
def test_a_damaged_pickle_is_named(model, size):
    import torch

    path = model / "pytorch_model.bin"
    torch.save(load_file(model / "model.safetensors"), path)
    (model / "model.safetensors").unlink()
    os.truncate(path, size % (path.stat().st_size + 1))
    assert f"{path} is damaged" in refused(model)


def test_a_folder_without_weights_says_so(model):
    (model / "model.safetensors").unlink()
    assert "holds no weights, neither model.safetensors nor" in refused(model)


def test_a_damaged_index_says_so(model):
    shard(model)
    (model / "model.safetensors.index.json").write_text("{half")
    assert "model.safetensors.index.json is not readable JSON" in refused(model)


def test_a_folder_without_a_configuration_says_so_and_names_what_is_there(model):
    (model / "config.json").unlink()
    assert "holds no config.json" in refused(model)
    (model / "one.gguf").write_bytes(b"")
    assert f"--model-name {model / 'one.gguf'}" in refused(model)


def test_what_writes_no_text_says_what_it_is(model):
    """A bundle of heads, a classifier, an encoder with a decoder, a pipeline for images, and MLX's 4-bit files."""
    shipped = Path(early_exit_cli.__file__).parent / "bundles" / "smollm2-135m"
    assert f"{shipped} is a bundle of heads, not a model | --bundle {shipped}" in refused(shipped)
    settings = json.loads((model / "config.json").read_text())
    for changes, said in (
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            "no causal language model: its config.json names Llama",
        ),
        (
            {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
            "reads with an encoder and writes with a",
        ),
        ({"quantization": {"group_size": 64, "bits": 4}}, "is quantized for MLX, which is not read here"),
        (
            {"model_type": "lamma9"},
            f"is of model type 'lamma9', which transformers {transformers.__version__} does not know",
        ),
    ):
        (model / "config.json").write_text(json.dumps(settings | changes))
        assert said in refused(model)
    (model / "config.json").unlink()
    (model / "model_index.json").write_text("{}")
    assert "is a pipeline of diffusers, which makes no text" in refused(model)


def test_a_file_that_is_no_model_names_its_folder(model):
    assert f"name the folder of the model: {model}" in refused(model / "model.safetensors")


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gemma2", "gpt_neox", "opt", "phi3"])
def test_a_folder_without_a_tokenizer_says_so(tiny_folder, tmp_path, family):
    """Some of the library's tokenizers are made of nothing, without a word."""
    folder = Path(shutil.copytree(tiny_folder(family), tmp_path / "model"))
    for path in folder.glob("tokenizer*"):
        path.unlink()
    said = refused(folder)
    assert "it holds no tokenizer" in said
    assert "sentencepiece" not in said
    with pytest.raises(BackboneError, match="it holds no tokenizer"):
        load_tokenizer(BackboneConfig(model_name=str(folder)))


def test_half_a_tokenizer_is_none_and_a_damaged_one_is_named(model):
    (model / "tokenizer.json").write_text('{"version": "1.0"}')
    assert f"cannot load the tokenizer of the backbone '{model}'" in refused(model)
    (model / "tokenizer.json").unlink()
    assert "it holds no tokenizer" in refused(model)


@pytest.mark.parametrize("has_weights", [False, True])
def test_an_adapter_is_named_as_one_with_its_base_model(model, has_weights):
    """Also beside whole weights: without peft they would answer alone, with it another model than our passes read."""
    settings = {"peft_type": "LORA", "base_model_name_or_path": "org/the-base", "task_type": "CAUSAL_LM"}
    (model / "adapter_config.json").write_text(json.dumps(settings))
    if not has_weights:
        (model / "config.json").unlink()
        (model / "model.safetensors").rename(model / "adapter_model.safetensors")
    said = refused(model)
    assert "an adapter (LORA) of the base model org/the-base" in said
    assert "merge_and_unload()" in said


def test_an_adapter_that_names_no_base_is_one_all_the_same(model):
    (model / "adapter_config.json").write_text("no json")
    assert "an adapter of the base model that it was trained on" in refused(model)


# The Hub


def answered(kind, status):
    """What transformers raises over an answer of the Hub."""
    request = httpx2.Request("HEAD", "https://hub/org/model/resolve/main/config.json")
    inner = kind("words that decide nothing", response=httpx2.Response(status, request=request))
    try:
        raise OSError("other words: 401, 403, gated") from inner
    except OSError as error:
        return error


@pytest.mark.parametrize(
    ("kind", "status", "message", "hint"),
    [
        (errors.GatedRepoError, 403, "org/model is gated or private", "hf auth login"),
        (errors.HfHubHTTPError, 401, "org/model is gated or private", "hf auth login"),
        (errors.HfHubHTTPError, 403, "org/model is gated or private", "hf auth login"),
        (errors.RepositoryNotFoundError, 404, "cannot find the backbone", "where it is private: hf auth login"),
        (errors.RepositoryNotFoundError, 401, "cannot find the backbone", "where it is private: hf auth login"),
        (errors.RevisionNotFoundError, 404, "org/model has no revision 'v9'", "check --revision"),
        (errors.HfHubHTTPError, 429, "answers 429", "try again later"),
        (errors.HfHubHTTPError, 503, "answers 503", "try again later"),
    ],
)
def test_an_answer_of_the_hub_is_told_by_its_kind_and_code(kind, status, message, hint):
    told = load_error("org/model", "org/model", "v9", "configuration", answered(kind, status))
    assert message in told.message
    assert hint in (told.hint or "")


def test_without_the_hub_only_the_local_cache_was_looked_at():
    told = load_error("org/model", "org/model", None, "configuration", chained(errors.LocalEntryNotFoundError("x")))
    assert told.message == "cannot find the backbone 'org/model'"
    assert constants.ENDPOINT in (told.hint or "")


def test_words_of_other_faults_decide_nothing():
    fault = OSError("gated 401 403 custom code is not a valid model identifier")
    told = load_error("org/model", "org/model", None, "weights", fault)
    assert told.message == f"cannot load the weights of the backbone 'org/model': {fault}"
    assert told.hint is None


def chained(cause):
    try:
        raise OSError("words") from cause
    except OSError as error:
        return error


def test_a_shard_that_is_missing_from_the_local_cache_of_the_hub_is_named(model, tmp_path, monkeypatch):
    """Offline, with the rest of the model there."""
    hub = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    commit = "b" * 40
    snapshot = hub / "models--org--model" / "snapshots" / commit
    shard(model)
    shutil.copytree(model, snapshot)
    refs = hub / "models--org--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text(commit)
    lost = sorted(snapshot.glob("model-*"))[3]
    lost.unlink()
    assert f"org/model lacks 1 of the 6 files that model.safetensors.index.json names: {lost.name}" in refused(
        "org/model"
    )
