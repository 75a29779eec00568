"""`eexit calibrate` and `eexit evaluate` as a person runs them, on a tiny bundle."""

import json
import shutil

import pytest
from commands import eexit

from early_exit_cli.data import rows


@pytest.fixture
def own(bundle, tmp_path):
    """A copy of the bundle that a test may write into."""
    folder = tmp_path / "own"
    shutil.copytree(bundle, folder, ignore=shutil.ignore_patterns("checkpoints", "last"))
    return folder


def test_calibrate_shows_both_rules_and_draws(own):
    code, out, err = eexit("calibrate", "--bundle", own, "--accuracy-levels", "0.2,0.5", "--verbose")
    assert code == 0, err
    assert "independent threshold" in out
    assert "promises on the second text" in out
    assert "too few exiting tokens" in err
    for name in ("coverage", "uncertainty", "reliability"):
        path = own / "calibration" / f"{name}.png"
        assert path.read_bytes().startswith(b"\x89PNG")
        assert str(path) in err
    record = json.loads((own / "eexit.json").read_text())["calibration"]
    written = json.loads((own / "calibration.json").read_text())
    assert written["accuracy_levels"] == [0.2, 0.5]
    for head, found in enumerate(record["heads"]):
        cells = found["rules"]["conditional"]
        assert {level: cell["threshold"] for level, cell in cells.items()} == {
            level: block[str(head)] for level, block in written["thresholds"].items()
        }
        assert found["coverage"] == {level: cell["coverage"] for level, cell in cells.items()}


def test_calibrate_json_is_complete_the_only_thing_on_stdout_and_of_a_text_read_once(own, monkeypatch):
    read = []
    monkeypatch.setattr(rows, "_content", lambda path: read.append(path.name) or path.read_bytes())
    code, out, err = eexit("calibrate", "--bundle", own, "--accuracy-levels", "0.5", "--json")
    assert code == 0, err
    assert read == ["prompts.jsonl"]
    found = json.loads(out)
    written = json.loads((own / "calibration.json").read_text())
    assert {key: found[key] for key in written} == written
    assert found["record"] == json.loads((own / "eexit.json").read_text())["calibration"]
    assert found["output_path"] == str(own / "calibration.json")
    assert len(found["pictures"]) == 3
    assert any("too few" in fault for fault in found["faults"])


def test_strict_names_the_cells_and_ends_with_3_after_writing(own):
    (own / "calibration.json").unlink()
    code, out, err = eexit("calibrate", "--bundle", own, "--accuracy-levels", "0.2,0.99", "--strict")
    assert code == 3
    assert "level 0.99, head 0:" in err
    assert "Traceback" not in err
    assert "entropy threshold" in out
    assert json.loads((own / "calibration.json").read_text())["accuracy_levels"] == [0.2, 0.99]


def test_the_programs_own_bundle_is_not_written_into():
    code, out, err = eexit("calibrate", "--dataset-name", "prompts.jsonl")
    assert (code, out) == (2, "")
    assert "smollm2-135m is the program's own" in err
    assert "eexit calibrate --bundle FOLDER" in err


def test_strict_ends_well_where_nothing_is_amiss(own):
    """A level and a margin so low that the little text of a test is enough."""
    code, _, err = eexit("calibrate", "--bundle", own, "--accuracy-levels", "0.31", "--margin", "0.3", "--strict")
    assert code == 0, err


def test_a_calibration_by_confidence_elsewhere_is_used_by_infer_and_evaluate(own, tmp_path):
    path = tmp_path / "elsewhere" / "mine.json"
    before = (own / "eexit.json").read_text()
    code, out, err = eexit(
        "calibrate", "--bundle", own, "--uncertainty_metric", "confidence", "--accuracy_levels", "0.2", "--output_path", path,
        "--threshold-rule", "independent", "--assurance", "0.8",
    )  # fmt: skip
    assert code == 0, err
    assert "confidence threshold" in out
    assert (own / "eexit.json").read_text() == before
    assert json.loads(path.with_suffix(".eexit.json").read_text())["calibration"]["assurance"] == 0.8
    assert (tmp_path / "elsewhere" / "mine" / "reliability.png").exists()
    assert all(value <= 0 for value in json.loads(path.read_text())["thresholds"]["0.20"].values())
    chosen = ["--bundle", own, "--calibration-path", path, "--accuracy-level", 0.2]
    code, out, err = eexit(
        "infer", *chosen, "--mode", "compare", "--drafter", "exit", "--read-heads", "all", "--repeats", 1, "--prompt", "abc", "--max-tokens", 24,
        "--json",
    )  # fmt: skip
    assert code == 0, err
    record = json.loads(out)
    assert record["bit_exact"] is True
    assert record["adaptive_early_exit"]["stats"]["tokens_drafted"] > 0
    code, out, err = eexit("evaluate", *chosen, "--json")
    assert code == 0, err
    assert json.loads(out)["acceptance"]["drafted"] > 0


def test_evaluate_says_where_heads_agree_and_why_drafts_fail(bundle, tmp_path):
    path = tmp_path / "evaluation.json"
    code, out, err = eexit("evaluate", "--bundle", bundle, "--accuracy-level", "0.6", "--output-path", path)
    assert code == 0, err
    record = json.loads(path.read_text())
    total = record["total_tokens"]
    for groups in record["agreement_by"].values():
        assert sum(group["tokens"] for group in groups) == total
        for head in range(2):
            right = sum(group["tokens"] * group["agreement"][head] for group in groups)
            assert right / total == pytest.approx(record["auxiliary_heads"][head]["accuracy_vs_lm_head"])
    assert [group["name"] for group in record["agreement_by"]["source"]] == ["prompts"]
    assert record["agreement_by"]["position"][0]["name"] == "1"
    shares = record["acceptance"]["shares"]
    assert set(shares) == {"accepted", "vocabulary", "head", "threshold", "position"}
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["vocabulary"] > 0  # 128 of 320 tokens can be drafted
    for words in ("agreement by position", "agreement by frequency", "agreement by source", "accept length"):
        assert words in out


def test_evaluate_without_thresholds_leaves_acceptance_out(own):
    (own / "calibration.json").unlink()
    code, out, err = eexit("evaluate", "--bundle", own, "--output-path", own / "evaluation.json")
    assert code == 0, err
    assert "not calibrated" in err
    assert "accept length" not in out
    assert json.loads((own / "evaluation.json").read_text())["acceptance"] is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["evaluate", "--accuracy-level", "0.77"], "0.77 was not calibrated; calibrated: 0.60"),
        (["calibrate", "--uncertainty-metric", "margin"], "calibration.uncertainty_metric = 'margin'"),
        (["calibrate", "--assurance", "0.3"], "calibration.assurance = 0.3"),
        (["calibrate", "--assurance", "0.8", "--threshold-strategy", "platt_scaling"], "platt_scaling does not"),
        (["calibrate", "--accuracy-levels", "0.005"], "margin 0.01 is not below the lowest accuracy level"),
        (["calibrate", "--accuracy-levels", "0.601,0.604"], "two accuracy levels are both 0.60"),
    ],
)
def test_bad_settings_are_one_clear_line_and_code_2(bundle, arguments, words):
    command, *rest = arguments
    code, out, err = eexit(command, "--bundle", bundle, *rest)
    assert code == 2
    assert words in err
    assert out == ""
    assert "Traceback" not in err


@pytest.mark.parametrize("command", ["calibrate", "evaluate"])
def test_a_text_of_training_that_is_not_here_is_named_before_a_model_loads(command, own):
    record = json.loads((own / "eexit.json").read_text())
    record["training"]["data"]["dataset_name"] = "elsewhere.jsonl"
    (own / "eexit.json").write_text(json.dumps(record))
    code, out, err = eexit(command, "--bundle", own, "--model-name", "not/loaded")
    assert (code, out) == (2, "")
    assert "were trained on cannot be read: no file elsewhere.jsonl" in err
    assert "--dataset-name" in err
