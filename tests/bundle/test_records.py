"""What a bundle's files say, as types; and what nobody here reads, which stays when a file is changed."""

import json
import shutil

import pytest
from drafters import some_head

from early_exit_cli.bundle.files import read_bundle_config, read_bundle_record
from early_exit_cli.bundle.push import check_bundle
from early_exit_cli.bundle.save import save_bundle, save_eagle
from early_exit_cli.calibration.calibrate import Calibration, save_calibration
from early_exit_cli.drafting.chances import DraftChances, draft_chances_of, save_draft_chances
from early_exit_cli.errors import BundleError
from early_exit_cli.files.schemas import CalibrationForm


@pytest.fixture
def bundle(linear_bundle, tmp_path):
    return shutil.copytree(linear_bundle, tmp_path / "heads")


def read(path):
    return json.loads(path.read_text())


def change(path, **values):
    path.write_text(json.dumps(read(path) | values))


def with_more(value):
    """Keys that nobody knows, in every object of a JSON value but those that hold settings or are read by number."""
    if isinstance(value, list):
        return [with_more(item) for item in value]
    if not isinstance(value, dict):
        return value
    named = {
        key: item if key in ("data", "fingerprint", "coverage", "rules", "drafting") else with_more(item)
        for key, item in value.items()
    }
    return named if all(key[:1].isdigit() for key in value) else {**named, "note": "by hand"}


@pytest.fixture
def annotated(bundle):
    path = bundle / "eexit.json"
    path.write_text(json.dumps(with_more(read(path))))
    return bundle


def test_a_record_with_more_in_it_says_the_same(bundle, annotated, linear_bundle):
    assert read_bundle_record(annotated) == read_bundle_record(linear_bundle)
    assert check_bundle(annotated).calibration == check_bundle(linear_bundle).calibration


def test_new_chances_change_nothing_else(annotated):
    before = read(annotated / "eexit.json")
    chances = DraftChances(lookup=[0.25] * 6, eagle=[], checked=[])
    save_draft_chances(chances, annotated)
    after = read(annotated / "eexit.json")
    assert after == {**before, "drafting": {**chances.model_dump()}}
    assert list(after) == list(before)
    assert draft_chances_of(read_bundle_record(annotated)) == chances


def test_a_new_calibration_changes_nothing_else(annotated):
    before = read(annotated / "eexit.json")
    empty = Calibration([], [], "text", 0, "max_coverage", "entropy", "conditional", 0.01, None, 0, [], {})
    save_calibration(empty, annotated, annotated / "calibration.json")
    after = read(annotated / "eexit.json")
    assert after["calibration"]["heads"] == []
    assert {**after, "calibration": None} == {**before, "calibration": None}


def test_an_eagle_head_changes_nothing_else_and_outlives_new_exit_heads(annotated, tiny_model):
    model = tiny_model("llama")
    before = read(annotated / "eexit.json")
    save_eagle(annotated, model.backbone, some_head(model.backbone), {}, {"training": {"step": 3, "note": "mine"}})
    after = read(annotated / "eexit.json")
    assert {key: value for key, value in after.items() if key != "eagle"} == before
    assert after["eagle"]["training"] == {"step": 3, "note": "mine"}
    save_bundle(annotated, model.backbone, model.heads, {}, {"training": {"step": 1}})
    assert read(annotated / "eexit.json")["eagle"] == after["eagle"]
    assert read_bundle_record(annotated).training.step == 1


def test_calibration_json_holds_the_keys_that_the_check_asks_for(bundle):
    written = read(bundle / "calibration.json")
    assert list(written) == list(CalibrationForm.model_fields)
    assert list(written["statistics"]["0"]) == [
        "mean_uncertainty",
        "std_uncertainty",
        "overall_accuracy",
        "num_samples",
    ]
    for key in CalibrationForm.model_fields:
        (bundle / "calibration.json").write_text(json.dumps({k: v for k, v in written.items() if k != key}))
        with pytest.raises(BundleError, match=key):
            check_bundle(bundle)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"eagle": None}, "eagle: it must hold a JSON object, found None"),
        ({"eagle": []}, r"eagle: it must hold a JSON object, found \[\]"),
        ({"imported": None}, "imported: it must hold a JSON object, found None"),
        ({"imported": {}}, "no 'imported.from'"),
        ({"training": {"step": "3"}}, "training.step: it must be a whole number, found '3'"),
        ({"training": {"data": {"max_length": 1}}}, "training.data.max_length: "),
    ],
)
def test_a_damaged_record_says_where(bundle, values, words):
    change(bundle / "eexit.json", **values)
    with pytest.raises(BundleError, match=words):
        read_bundle_record(bundle)


def test_heads_and_training_may_be_unknown(bundle):
    change(bundle / "eexit.json", heads=None, drafting=None)
    record = read_bundle_record(bundle)
    assert record.heads is record.eagle is record.drafting is None
    assert read_bundle_config(bundle).num_heads == 2
