"""What is kept under a backbone's name is found by its whole content: other weights in its place are another backbone."""

import json
import os

import pytest
import torch
from commands import eexit
from hub_caches import hub_cache
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from small_training import trainer
from tiny_models import byte_tokenizer
from transformers import AutoModelForCausalLM

from early_exit_cli.backbone import contents
from early_exit_cli.backbone import load as load_module
from early_exit_cli.backbone.contents import content_of, content_of_tensors, hashes_of
from early_exit_cli.backbone.load import adopt_backbone, load_backbone, local_content
from early_exit_cli.backbone.quantization import settings_for
from early_exit_cli.bundle.load import load_engine
from early_exit_cli.config import BackboneConfig, BundleConfig, CacheConfig, DataConfig, HeadsConfig
from early_exit_cli.data.documents import Document
from early_exit_cli.data.on_policy import answer_prompts
from early_exit_cli.errors import BackboneError, CacheError, CheckpointError
from early_exit_cli.hidden_states.cache import Cache, cache_request, default_folder
from early_exit_cli.hidden_states.extract import check_backbone
from early_exit_cli.runtime.measurements import device_identity, measurement_path
from early_exit_cli.runtime.select import make_blocks
from early_exit_cli.training.checkpoints import MARKER, complete_checkpoints

INNER = "model.layers.2.mlp.down_proj.weight"
"""Neither in the embedding nor in the final norm, which the fingerprint that travels is made of."""


pytestmark = pytest.mark.usefixtures("home")


def config(folder):
    return BackboneConfig(model_name=str(folder), quantization="none", device="cpu")


def retrain(folder):
    """Other weights of the same size in the same file, as a fine-tune of some matrices leaves them."""
    tensors = load_file(folder / "model.safetensors")
    tensors[INNER] = -tensors[INNER]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_other_weights_in_a_folder_are_another_backbone_of_the_same_fingerprint(model):
    before = load_backbone(config(model))
    assert before.content == local_content(config(model))
    assert load_backbone(config(model)).identity == before.identity
    retrain(model)
    after = load_backbone(config(model))
    assert after.fingerprint == before.fingerprint  # bundles travel, and their heads still draft
    assert after.content != before.content
    assert after.identity != before.identity
    assert after.content == local_content(config(model))


def test_measurements_are_of_one_content(model, home):
    paths = set()
    for times in range(3):
        blocks = make_blocks(load_backbone(config(model)))
        paths |= {measurement_path(kind, device_identity(blocks)) for kind in ("widths", "costs")}
        assert len(list((home / "widths").iterdir())) == min(times + 1, 2)
        if times == 0:
            retrain(model)
    assert len(paths) == 4


def test_answers_are_of_one_content(model, home):
    prompts = [Document([72, 101, 10 + number], f"line {number}") for number in range(4)]

    def answers():
        data = DataConfig(on_policy=True, answer_tokens=12, max_length=64, sampled_share=0.0)
        return [document.ids for document in answer_prompts(prompts, data, load_backbone(config(model)))]

    first = answers()
    assert answers() == first
    assert len(list((home / "answers").iterdir())) == 1
    retrain(model)
    assert answers() != first
    assert len(list((home / "answers").iterdir())) == 2


def test_hidden_states_are_of_one_content(model, tmp_path):
    text, states = tmp_path / "text.jsonl", tmp_path / "states"
    text.write_text("".join(json.dumps({"text": f"line {i} of the text, and {i * i}. " * 4}) + "\n" for i in range(12)))
    command = [
        "cache", "extract", "--model-name", model, "--quantization", "none", "--dataset-name", text,
        "--max-length", 64, "--num-heads", 2, "--cache-dir", states,
    ]  # fmt: skip
    for _ in range(2):
        code, _, err = eexit(*command)
        assert code == 0, err
    assert "using the cache" in err
    retrain(model)
    code, _, err = eexit(*command)
    assert code == 1
    assert "was made otherwise (backbone.content: " in err
    with pytest.raises(CacheError, match=r"made by another backbone .*content: "):
        check_backbone(Cache(states), load_backbone(config(model)))  # before anything of it is computed again
    manifest = json.loads((states / "manifest.json").read_text())
    del manifest["request"]["backbone.content"]  # as caches were written before
    (states / "manifest.json").write_text(json.dumps(manifest))
    code, _, err = eexit(*command)
    assert code == 0, err


def test_a_request_for_hidden_states_names_what_lies_here(model, tmp_path):
    def folder_of(data=None):
        return default_folder(cache_request(config(model), HeadsConfig(), data or DataConfig(), CacheConfig()))

    first = folder_of()
    assert folder_of() == first
    retrain(model)
    assert folder_of() != first
    on_hub = cache_request(BackboneConfig(model_name="org/model"), HeadsConfig(), DataConfig(), CacheConfig())
    assert "backbone.content" not in on_hub
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "data-00000.arrow").write_bytes(b"one")
    data = DataConfig(dataset_name=str(rows))
    before = folder_of(data)
    (rows / "cache-1234.arrow").write_bytes(b"of the library's own")
    assert folder_of(data) == before
    (rows / "data-00000.arrow").write_bytes(b"two")
    assert folder_of(data) != before


def test_a_model_of_the_hub_is_named_by_what_lies_here(model, tmp_path, monkeypatch):
    """Without a revision its name says nothing of its weights; and a folder of the same files is the same."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def request():
        on_hub = BackboneConfig(model_name="org/tiny", quantization="none", device="cpu")
        return cache_request(on_hub, HeadsConfig(), DataConfig(), CacheConfig()), on_hub

    named, on_hub = request()
    assert "backbone.content" not in named
    first = hub_cache(model, tmp_path / "hub", "a" * 40)
    named, _ = request()
    assert named["backbone.content"] == load_backbone(on_hub).content == local_content(config(model))
    retrain(model)
    assert hub_cache(model, tmp_path / "hub", "b" * 40) != first  # what somebody pushed to it meanwhile
    other, _ = request()
    assert other["backbone.content"] == load_backbone(on_hub).content == local_content(config(model))
    assert default_folder(other) != default_folder(named)
    at_first = on_hub.model_copy(update={"revision": "a" * 40})
    assert local_content(at_first) == load_backbone(at_first).content == named["backbone.content"]


def test_hidden_states_of_a_model_that_is_downloaded_meanwhile_are_found_again(model, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"line {i} of the text. " * 4}) + "\n" for i in range(12)))
    load = load_module.load_backbone

    def downloading(settings):
        if not (tmp_path / "hub").exists():
            hub_cache(model, tmp_path / "hub", "a" * 40)
        return load(settings)

    monkeypatch.setattr(load_module, "load_backbone", downloading)
    command = ["cache", "extract", "--model-name", "org/tiny", "--quantization", "none", "--dataset-name", text]
    for _ in range(2):
        code, _, err = eexit(*command, "--max-length", 64, "--num-heads", 2)
        assert code == 0, err
    assert "using the cache" in err


def test_an_older_cache_does_not_claim_a_content_by_growing(model, tmp_path):
    text, states = tmp_path / "text.jsonl", tmp_path / "states"
    text.write_text("".join(json.dumps({"text": f"line {i} of the text, and {i * i}. " * 4}) + "\n" for i in range(40)))
    command = [
        "cache", "extract", "--model-name", model, "--quantization", "none", "--dataset-name", text,
        "--max-length", 64, "--num-heads", 2, "--cache-dir", states, "--shard-tokens", 256,
    ]  # fmt: skip
    assert eexit(*command, "--cache-tokens", 512)[0] == 0
    manifest = json.loads((states / "manifest.json").read_text())
    assert manifest["request"].pop("backbone.content")
    (states / "manifest.json").write_text(json.dumps(manifest))
    code, _, err = eexit(*command, "--cache-tokens", 1024)
    assert code == 0, err
    grown = json.loads((states / "manifest.json").read_text())
    assert len(grown["shards"]) > len(manifest["shards"])
    assert "backbone.content" not in grown["request"]


def test_training_is_not_resumed_on_other_weights(model, tmp_path):
    assert trainer(load_backbone(config(model)), tmp_path / "run", max_steps=2).run().steps == 2
    assert trainer(load_backbone(config(model)), tmp_path / "run", max_steps=2, resume=True).step == 2
    retrain(model)
    other = load_backbone(config(model))
    with pytest.raises(
        CheckpointError, match=r"belongs to another run \(content: '[0-9a-f]{32}' then, '[0-9a-f]{32}' now\)"
    ):
        trainer(other, tmp_path / "run", max_steps=2, resume=True)
    marker = complete_checkpoints(tmp_path / "run")[-1] / MARKER
    state = json.loads(marker.read_text())
    del state["identity"]["content"]  # as checkpoints were written before
    marker.write_text(json.dumps(state))
    assert trainer(other, tmp_path / "run", max_steps=2, resume=True).step == 2


def test_heads_go_with_any_weights_of_their_fingerprint(model, tmp_path, capfd):
    """They draft, and the backbone decides: of a fine-tune they are taken, without a word."""
    trainer(load_backbone(config(model)), tmp_path / "heads", max_steps=2).run()
    retrain(model)
    capfd.readouterr()
    engine = load_engine(
        config(model).model_copy(update={"runner": "hf"}), BundleConfig(bundle=str(tmp_path / "heads"))
    )
    assert len(engine.heads.exit_layers) == 2
    assert capfd.readouterr().err == ""


def test_a_file_whose_times_settle_late_is_looked_at_again(model, monkeypatch):
    path, sha256, read = model / "model.safetensors", contents.file_sha256, []

    def settling(path):
        if len(read) < contents.LOOKS - 1:
            os.utime(path, ns=(len(read), len(read)))
        read.append(path)
        return sha256(path)

    monkeypatch.setattr(contents, "file_sha256", settling)
    assert hashes_of([path]) == [sha256(path)]
    assert len(read) == contents.LOOKS


def test_a_file_is_hashed_once_until_it_changes(model, monkeypatch):
    hashed = []
    sha256 = contents.file_sha256
    monkeypatch.setattr(contents, "file_sha256", lambda path: (hashed.append(path.name), sha256(path))[1])
    path = model / "model.safetensors"
    first = hashes_of([path])
    assert hashes_of([path]) == first
    assert hashed == [path.name]
    stat = path.stat()
    retrain(model)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the same size and time, as a careless copy leaves it
    assert path.stat().st_size == stat.st_size
    assert hashes_of([path]) != first
    assert hashed == [path.name] * 2


def test_a_file_that_changes_while_it_is_read_has_no_content(model, monkeypatch):
    sha256 = contents.file_sha256
    monkeypatch.setattr(contents, "file_sha256", lambda path: (sha256(path), retrain(model))[0])
    assert content_of([model / "model.safetensors"]) is None
    with pytest.raises(BackboneError, match="changed while they were read"):
        cache_request(config(model), HeadsConfig(), DataConfig(), CacheConfig())  # and not: one without a content


def test_what_is_no_plain_checkpoint_has_the_content_of_all_its_files(model):
    settings = json.loads((model / "config.json").read_text())
    (model / "model.safetensors").rename(model / "weights.safetensors")
    (model / "config.json").write_text(json.dumps(settings | {"transformers_weights": "weights.safetensors"}))
    before = local_content(config(model))
    assert load_backbone(config(model)).content == before
    (model / "model.safetensors").symlink_to(model / "weights.safetensors")
    retrain(model)
    assert local_content(config(model)) not in (before, None)


@pytest.mark.parametrize("quantization", ["none", "4bit", "8bit"])
def test_a_model_that_somebody_else_loaded_is_known_by_its_tensors(tiny_folder, quantization):
    settings = settings_for(quantization, torch.bfloat16)
    made = {} if settings is None else {"quantization_config": settings, "dtype": torch.bfloat16}

    def adopted(change=lambda model: None):
        model = AutoModelForCausalLM.from_pretrained(tiny_folder("llama"), device_map={"": "cpu"}, **made)
        change(model)
        return adopt_backbone(model, byte_tokenizer())

    def trained(model):
        with torch.no_grad():
            model.model.layers[1].input_layernorm.weight[3] += 0.5

    def scaled(model):
        weight = model.model.layers[1].mlp.up_proj.weight
        state = getattr(weight, "quant_state", None)
        with torch.no_grad():
            (weight if quantization == "none" else weight.SCB if state is None else state.offset).mul_(2)

    first = adopted()
    assert first.content == adopted().content
    assert first.content not in {adopted(trained).content, adopted(scaled).content}
    assert adopted(trained).fingerprint == first.fingerprint


def test_the_content_of_tensors_is_of_their_values_shapes_and_names():
    def holding(**tensors):
        module = torch.nn.Module()
        for name, tensor in tensors.items():
            module.register_buffer(name, tensor)
        return content_of_tensors(module)

    first = holding(a=torch.arange(6.0), b=torch.tensor(1))
    assert first == holding(a=torch.arange(6.0), b=torch.tensor(1))
    others = [
        holding(a=torch.arange(6.0), b=torch.tensor(2)),
        holding(a=torch.arange(6.0).flip(0), b=torch.tensor(1)),
        holding(a=torch.arange(6.0).view(2, 3), b=torch.tensor(1)),
        holding(c=torch.arange(6.0), b=torch.tensor(1)),
        holding(a=torch.arange(6.0).view(torch.int32), b=torch.tensor(1)),
    ]
    assert len({first, *others}) == 6
