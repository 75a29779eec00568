"""The first command of the README: the shipped heads on the embedded backbone in NF4."""

import json
from pathlib import Path

import pytest
from test_commands import eexit

import early_exit_cli

BUNDLE = Path(early_exit_cli.__file__).parent / "bundles" / "smollm2-135m"


def test_the_bundle_is_complete_and_under_20_mb():
    names = {path.name for path in BUNDLE.iterdir()}
    assert {"config.json", "calibration.json", "heads.safetensors", "eexit.json"} <= names
    assert sum(path.stat().st_size for path in BUNDLE.iterdir()) < 20_000_000


@pytest.mark.parametrize("level", ["0.60", "0.75", "0.99"])
def test_adaptive_answers_are_the_plain_ones_bit_for_bit(level):
    code, out, err = eexit(
        "infer", "--mode", "compare", "--repeats", "1", "--max-tokens", "64", "--accuracy-level", level, "--json",
        "--prompt", "A shop sells 3 apples for 2 dollars. How much do 12 apples cost? Think step by step.",
    )  # fmt: skip
    assert code == 0, err
    record = json.loads(out)
    assert record["identical"] is True
    assert record["bit_exact"] is True
    assert record["adaptive_early_exit"]["stats"]["tokens_drafted"] > 0 or level == "0.99"
    assert len(record["full"]["token_ids"]) > 20


def test_the_shipped_heads_agree_with_the_backbone_as_recorded():
    """Agreement on text this test brings along is near what the record says of held-out answers."""
    record = json.loads((BUNDLE / "eexit.json").read_text())
    shares = [head["agreement"] for head in record["calibration"]["heads"]]
    assert shares == sorted(shares)  # deeper heads agree more
    assert shares[-1] > 0.6
