"""The first command of the README: the shipped heads on the embedded backbone in NF4."""

import json
from pathlib import Path

import pytest
from commands import eexit

import early_exit_cli

BUNDLE = Path(early_exit_cli.__file__).parent / "bundles" / "smollm2-135m"


def test_the_bundle_is_complete_and_under_20_mb():
    names = {path.name for path in BUNDLE.iterdir()}
    assert {"config.json", "calibration.json", "heads.safetensors", "eexit.json"} <= names
    assert sum(path.stat().st_size for path in BUNDLE.iterdir()) < 20_000_000


@pytest.mark.parametrize("level", ["0.60", pytest.param("0.80", marks=pytest.mark.slow), "0.99"])
def test_adaptive_answers_are_the_plain_ones_bit_for_bit(level):
    code, out, err = eexit(
        "infer", "--mode", "compare", "--drafter", "exit", "--repeats", "1", "--max-tokens", "64", "--accuracy-level", level, "--json",
        "--read-heads", "all",
        "--prompt", "A shop sells 3 apples for 2 dollars. How much do 12 apples cost? Think step by step.",
    )  # fmt: skip
    assert code == 0, err
    record = json.loads(out)
    assert record["identical"] is True
    assert record["bit_exact"] is True
    assert record["adaptive_early_exit"]["stats"]["tokens_drafted"] > 0 or level == "0.99"
    assert len(record["full"]["token_ids"]) > 20


def test_sampled_answers_are_the_plain_ones_bit_for_bit():
    code, out, err = eexit(
        "infer", "--mode", "compare", "--drafter", "auto", "--repeats", "1", "--max-tokens", "48", "--json",
        "--temperature", "0.7", "--seed", "3", "--prompt", "Name five animals that live in the sea, then name them again.",
    )  # fmt: skip
    assert code == 0, err
    record = json.loads(out)
    assert record["identical"] is True
    assert record["bit_exact"] is True
    assert record["auto"]["stats"]["tokens_accepted"] > 0


def test_the_records_of_the_bundle_belong_together():
    """Deeper heads agree more; calibration.json and eexit.json are of the same calibration; no path of a machine."""
    record = json.loads((BUNDLE / "eexit.json").read_text())
    calibration = json.loads((BUNDLE / "calibration.json").read_text())
    shares = [head["agreement"] for head in record["calibration"]["heads"]]
    assert shares == sorted(shares)
    assert shares[-1] > 0.5
    assert [calibration["statistics"][str(head)]["overall_accuracy"] for head in range(3)] == shares
    assert set(record["calibration"]["head_sets"]) == set(calibration["thresholds"])
    assert not Path(record["training"]["data"]["dataset_name"]).is_absolute()
