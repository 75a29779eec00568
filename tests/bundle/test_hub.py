"""What a push checks without a backbone, and what the model card says."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from commands import output_of
from safetensors.torch import load_file, save_file

import early_exit_cli
from early_exit_cli.bundle.push import check_bundle, push, staged, write_card
from early_exit_cli.cli.app import app
from early_exit_cli.config_files import HubConfig, PushConfig
from early_exit_cli.errors import BundleError, ConfigError
from early_exit_cli.files.atomic import file_sha256

SHIPPED = Path(early_exit_cli.__file__).parent / "bundles" / "smollm2-135m"


@pytest.fixture
def bundle(linear_bundle, tmp_path):
    return shutil.copytree(linear_bundle, tmp_path / "heads")


def card_of(folder, **settings):
    """(metadata, body) of the model card."""
    text = write_card(check_bundle(folder), "org/heads", PushConfig(**settings))
    _, metadata, body = text.split("---\n", 2)
    return yaml.safe_load(metadata), body


def change(name, **values):
    def damage(folder):
        record = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(record | values))

    return damage


def change_heads(alter):
    def damage(folder):
        tensors = load_file(folder / "heads.safetensors")
        alter(tensors)
        save_file(tensors, folder / "heads.safetensors")

    return damage


def change_thresholds(alter):
    def damage(folder):
        record = json.loads((folder / "calibration.json").read_text())
        alter(record)
        (folder / "calibration.json").write_text(json.dumps(record))

    return damage


def remove(*names):
    def damage(folder):
        for name in names:
            (folder / name).unlink()

    return damage


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (remove("heads.safetensors", "eexit.json"), "no heads.safetensors, no eexit.json"),
        (remove("calibration.json"), "is not calibrated"),
        (
            change("config.json", quantization="4bit"),
            "quantization is '4bit' in config.json, 'none' in the fingerprint",
        ),
        (change("config.json", vocab_size=8), "vocab_size is 8 in config.json, 320 in the fingerprint"),
        (change("eexit.json", fingerprint=None), "fingerprint: it must hold a JSON object, found None"),
        (change("eexit.json", heads={"kind": "lookbehind", "rank": 3}), "'lookbehind' are unknown"),
        (change("eexit.json", heads=[]), r"heads: it must hold a JSON object, found \[\]"),
        (change("eexit.json", heads={"kind": "adapter", "rank": 8}), "0.down.weight should be"),
        (change_heads(lambda t: t.pop("0.norm.weight")), r"0.norm.weight should be \[64\]"),
        (change_heads(lambda t: t["1.linear.weight"].fill_(torch.inf)), "1.linear.weight holds NaN"),
        (change_heads(lambda t: t.update({"2.norm.weight": torch.ones(64)})), "2.norm.weight is none of them"),
        (change_thresholds(lambda r: r["thresholds"].pop("0.30")), "level 0.3 has no thresholds"),
        (change_thresholds(lambda r: r["thresholds"]["0.90"].pop("1")), "level 0.90, head 1: no threshold"),
        (change_thresholds(lambda r: r["thresholds"]["0.90"].update({"2": 1.0})), "level 0.90 has other heads"),
        (change_thresholds(lambda r: r.update(version=2)), "version missing or unknown"),
        (change_thresholds(lambda r: r.pop("statistics")), "statistics missing or unknown"),
        (
            change_thresholds(lambda r: r["statistics"]["0"].update(overall_accuracy=0.999)),
            "of different calibrations",
        ),
        (change("eexit.json", calibration={}), "of different calibrations"),
        (change("eexit.json", format_version=2), "format_version: 2 is of a newer eexit"),
        (change_thresholds(lambda r: r.update(statistics={})), "statistics must be of heads 0, 1"),
        (change_thresholds(lambda r: r["thresholds"].update({"0.50": {}})), "level 0.50 has other heads"),
    ],
)
def test_an_incomplete_bundle_is_refused_before_anything_is_sent(bundle, damage, words):
    damage(bundle)
    with pytest.raises(BundleError, match=words):
        card_of(bundle)


def test_the_card_of_the_shipped_bundle_says_what_its_records_say():
    metadata, body = card_of(SHIPPED, license="apache-2.0")
    record = json.loads((SHIPPED / "eexit.json").read_text())
    assert metadata == {
        "library_name": "eexit",
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "license": "apache-2.0",
        "tags": metadata["tags"],
    }
    assert {"speculative-decoding", "early-exit", "dynamic-inference"} <= set(metadata["tags"])
    assert "3 adapter heads after 8, 16 and 23 of 30 blocks, rank 576" in body
    assert "400 steps on 816,788 tokens of the backbone's own answers to `train_prompts.jsonl`" in body
    assert "aux_heads.pt" not in body
    assert "eexit infer --bundle org/heads" in body
    for head in record["calibration"]["heads"]:
        assert f"{head['agreement']:.1%}" in body
    coverage, agreement = (record["calibration"]["heads"][2][name]["0.90"] for name in ("coverage", "agreement_at"))
    threshold = json.loads((SHIPPED / "calibration.json").read_text())["thresholds"]["0.90"]["2"]
    assert f"| 0.90 | 2 | {threshold:.4f} | {coverage:.1%} | {agreement:.1%} |" in body


def test_what_nobody_measured_is_not_in_the_card(bundle):
    metadata, body = card_of(bundle)
    assert not {"license", "base_model", "datasets", "model-index"} & set(metadata)
    assert "## Speed" not in body
    assert "## Evaluation" not in body
    assert "| `aux_heads.pt` |" in body
    assert str(bundle.parent.parent) not in body
    record = json.loads((bundle / "eexit.json").read_text())
    del record["calibration"], record["training"]
    (bundle / "eexit.json").write_text(json.dumps(record))
    _, body = card_of(bundle)
    assert "| target accuracy | head | threshold (nats) |\n" in body
    assert "steps" not in body


def test_measured_numbers_come_from_the_commands_records(bundle, tmp_path):
    evaluation, prompts, bench = tmp_path / "evaluation.json", tmp_path / "prompts.jsonl", tmp_path / "bench"
    prompts.write_text('{"prompt": "count to ten"}\n')
    where, small = ["--bundle", bundle], ["--max-tokens", 8, "--repeats", 1]
    commands = (
        ["evaluate", *where, "--num-samples", 4, "--output-path", evaluation],
        ["bench", *where, *small, "--prompts", prompts, "--methods", "full,lookup", "--output-dir", bench],
    )
    for command in commands:
        output_of(*command)
    metadata, body = card_of(bundle, evaluation=evaluation, bench=bench / "report.json")
    measured = json.loads(evaluation.read_text())["auxiliary_heads"]
    (model,) = metadata["model-index"]
    (result,) = model["results"]
    assert model["name"] == "heads"
    assert result["dataset"]["name"] == "text.jsonl"
    assert [metric["value"] for metric in result["metrics"]] == [
        value for head in measured for value in (head["accuracy_vs_lm_head"], head["accuracy"])
    ]
    report = json.loads((bench / "report.json").read_text())
    assert f"| lookup | {report['methods']['lookup']['tokens_per_second']:.1f} |" in body
    assert report["environment"]["processor"] in body
    source = {"folder": "heads", "heads": file_sha256(bundle / "heads.safetensors")}
    assert json.loads((bench / "run.json").read_text())["bundle"] == source
    assert json.loads(evaluation.read_text())["bundle"] == source

    change_heads(lambda t: t["0.norm.weight"].mul_(2))(bundle)
    for settings in ({"evaluation": evaluation}, {"bench": bench / "report.json"}):
        with pytest.raises(ConfigError, match="was measured on heads with SHA-256"):
            card_of(bundle, **settings)
    evaluation.write_text(json.dumps(json.loads(evaluation.read_text()) | {"bundle": {}}))
    with pytest.raises(ConfigError, match="heads it does not name"):
        card_of(bundle, evaluation=evaluation)


def test_the_same_heads_are_the_same_bytes(bundle):
    """Else a second push would be a second commit."""
    sent = []
    for _ in range(2):
        with staged(check_bundle(bundle), "card") as files:
            sent.append({name: path.read_bytes() for name, path in files.items()})
    assert sent[0] == sent[1]
    assert set(sent[0]) >= {"aux_heads.pt", "README.md"}
    assert not files["README.md"].exists()


def test_places_of_this_machine_are_named(bundle, tiny_folder):
    places = check_bundle(bundle).local_paths()
    assert f"config.json: model_name = {tiny_folder('llama')}" in places
    assert any(place.startswith("eexit.json: training.data.dataset_name = /") for place in places)
    assert check_bundle(SHIPPED).local_paths() == []


def test_a_pull_request_goes_to_main_only():
    with pytest.raises(ConfigError, match="not to --revision trial"):
        push({}, HubConfig(repo_id="org/x", revision="trial"), PushConfig(create_pr=True))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["push", "a", "--bundle", "b", "--repo-id", "org/x"], "'a' is given beside --bundle 'b'"),
        (["push"], "which repository"),
        (["push", "--repo-id", "just-a-name"], "write it as ORG/NAME"),
        (["push", "--repo-id", "org/x", "--calibration-path", "c.json"], "leave --calibration-path out"),
        (["pull"], "which repository"),
        (["import"], "from where to where"),
    ],
)
def test_a_command_that_cannot_work_is_refused_at_once(arguments, words):
    with pytest.raises(ConfigError, match=words):
        app(arguments, standalone_mode=False)
