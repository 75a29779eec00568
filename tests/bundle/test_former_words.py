"""A bundle of the time when the EAGLE head was called lookahead: read as any other, and never written again in that word."""

import json
import shutil
from pathlib import Path

import pytest
from drafters import some_head

import early_exit_cli
from early_exit_cli.bundle.files import eagle_exit_layers, eagle_file, read_bundle_record
from early_exit_cli.bundle.load import load_engine
from early_exit_cli.bundle.pull import copy_bundle
from early_exit_cli.bundle.push import check_bundle, staged, write_card
from early_exit_cli.bundle.save import save_eagle
from early_exit_cli.config import BackboneConfig, BundleConfig
from early_exit_cli.config_files import PushConfig
from early_exit_cli.decoding.answer import generate
from early_exit_cli.decoding.text import Request
from early_exit_cli.drafting.chances import draft_chances_of, save_draft_chances
from early_exit_cli.drafting.choose import eagle_drafter
from early_exit_cli.drafting.drafter import NoDrafter
from early_exit_cli.engine import Engine
from early_exit_cli.errors import ConfigError
from early_exit_cli.files.schemas import MarkerForm
from early_exit_cli.heads.eagle import load_eagle
from early_exit_cli.resolve import resolve
from early_exit_cli.training.checkpoints import MARKER, resumable

SHIPPED = Path(early_exit_cli.__file__).parent / "bundles" / "smollm2-135m"
BACKBONE = BackboneConfig(device="cpu")


def turned_back(value):
    """A JSON value with the keys of that time."""
    if not isinstance(value, dict):
        return value
    return {key.replace("eagle", "lookahead"): turned_back(item) for key, item in value.items()}


def make_old(folder):
    """Turn a bundle's words and the name of its file back."""
    (folder / "eagle.safetensors").rename(folder / "lookahead.safetensors")
    record = json.loads((folder / "eexit.json").read_text())
    (folder / "eexit.json").write_text(json.dumps(turned_back(record)))
    assert {"lookahead", "drafting"} <= turned_back(record).keys()
    assert {"lookahead", "lookahead_temperature"} <= turned_back(record)["drafting"].keys()
    return folder


@pytest.fixture
def old(tmp_path):
    return make_old(shutil.copytree(SHIPPED, tmp_path / "old"))


def says_lookahead(folder):
    """Names and texts of a folder's files that hold the word."""
    named = [path.name for path in folder.iterdir() if "lookahead" in path.name]
    return named + [path.name for path in folder.glob("*.json") if "lookahead" in path.read_text()]


def test_its_record_is_that_of_today(old):
    assert read_bundle_record(old) == read_bundle_record(SHIPPED)
    chances = draft_chances_of(read_bundle_record(old))
    assert chances == draft_chances_of(read_bundle_record(SHIPPED))
    assert len(chances.eagle) == len(chances.checked) == 7
    assert chances.eagle_temperature != 1.0 or chances.exit_temperature != 1.0


def test_its_head_is_loaded(old, smollm2):
    record = read_bundle_record(old)
    assert eagle_file(old) == old / "lookahead.safetensors"
    head = load_eagle(eagle_file(old), smollm2, eagle_exit_layers(record.eagle, old, smollm2.num_blocks))
    assert head.exit_layers == record.eagle.exit_layers == [8, 16]
    assert head.logits(head.norm.weight[None]).shape == (1, 8192)


def test_it_drafts(tmp_path, tiny_folder, tiny_backbone, tiny_bundle):
    folder = shutil.copytree(tiny_bundle, tmp_path / "heads")
    backbone = tiny_backbone("llama")
    save_eagle(folder, backbone, some_head(backbone), {}, {})
    shipped = draft_chances_of(read_bundle_record(SHIPPED))
    certain = shipped.eagle[0].model_copy(update={"intercept": 30.0, "slope": 0.0, "mean": 1.0, "entropies": ()})
    save_draft_chances(shipped.model_copy(update={"eagle": [certain], "checked": [(1.0, 1.0)]}), folder)
    make_old(folder)
    config = BACKBONE.model_copy(update={"model_name": str(tiny_folder("llama")), "quantization": "none"})
    engine: Engine = load_engine(config, BundleConfig(bundle=str(folder)), backbone=backbone)
    request = Request([72, 101, 108, 108, 111], 20)
    drafter = eagle_drafter(engine)
    drafter.passes = type(drafter.passes)(lambda rows: 1.0)  # any draft is worth its time
    drafter.read_cost = drafter.step_cost = 0.01
    run = generate(engine, request, drafter, mode="eagle", width=8)
    assert run.token_ids == generate(engine, request, NoDrafter(), mode="full").token_ids
    assert run.stats.tokens_drafted > 0


def test_it_is_pushed_in_todays_words(old, tmp_path):
    bundle = check_bundle(old)
    card = write_card(bundle, "org/heads", PushConfig())
    assert "lookahead" not in card
    assert "| `eagle.safetensors` |" in card
    sent = tmp_path / "sent"
    sent.mkdir()
    with staged(bundle, card) as files:
        for name, path in files.items():
            shutil.copy(path, sent / name)
    assert not says_lookahead(sent)
    assert json.loads((sent / "eexit.json").read_text()) == json.loads((SHIPPED / "eexit.json").read_text())
    assert (sent / "eagle.safetensors").read_bytes() == (SHIPPED / "eagle.safetensors").read_bytes()
    assert says_lookahead(old) == ["lookahead.safetensors", "eexit.json"]  # the folder itself is left alone
    assert not any("lookahead" in place for place in bundle.local_paths())


def test_a_copy_of_it_is_one_too(old, tmp_path):
    copy_bundle(old, tmp_path / "copy")
    assert check_bundle(tmp_path / "copy").record == check_bundle(SHIPPED).record


def test_what_changes_it_writes_todays_words(old, smollm2):
    record = read_bundle_record(old)
    head = load_eagle(eagle_file(old), smollm2, eagle_exit_layers(record.eagle, old, smollm2.num_blocks))
    save_draft_chances(draft_chances_of(record), old)
    assert says_lookahead(old) == ["lookahead.safetensors"]
    assert json.loads((old / "eexit.json").read_text()) == json.loads((SHIPPED / "eexit.json").read_text())
    save_eagle(old, smollm2, head, {}, {})
    assert not says_lookahead(old)
    assert eagle_file(old).name == "eagle.safetensors"


def test_the_word_is_taken_in_settings_and_means_eagle():
    config = resolve(
        {
            "heads.kind": ("lookahead", "--head"),
            "inference.drafter": ("lookahead", "--drafter"),
            "bench.methods": ("full,lookahead,lookup", "--methods"),
        }
    ).config
    assert config.heads.kind == config.inference.drafter == "eagle"
    assert config.bench.methods == ["full", "eagle", "lookup"]
    with pytest.raises(ConfigError) as caught:
        resolve({"inference.drafter": ("lookbehind", "--drafter")})
    assert "lookahead" not in caught.value.message


def test_a_run_of_that_time_is_resumed(tmp_path):
    folder = tmp_path / "checkpoints" / "step-0000007"
    folder.mkdir(parents=True)
    state = MarkerForm(step=7, tokens_seen=9, best_step=7, best_agreement=[0.5], identity={"kind": "lookahead"})
    (folder / MARKER).write_text(state.model_dump_json())
    found = resumable(tmp_path, {"kind": "eagle"})
    assert found is not None
    assert found[1].step == 7
