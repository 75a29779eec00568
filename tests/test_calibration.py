import json

import pytest
import torch

from early_exit_cli.calibration import calibrate, calibration_json, save_calibration, threshold_for
from early_exit_cli.config import CalibrationConfig
from early_exit_cli.data import Document, pack
from early_exit_cli.engine import read_batch, read_thresholds
from early_exit_cli.errors import BundleError

ENTROPIES = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
#            cumulative accuracy   1    1/2  2/3  3/4  3/5  1/2
CORRECT = torch.tensor([True, False, True, True, False, False])


@pytest.mark.parametrize(
    ("strategy", "level", "expected"),
    [
        ("max_coverage", 0.75, 0.4),
        ("max_coverage", 0.6, 0.5),
        ("max_coverage", 0.5, 0.6),
        ("max_coverage", 0.9, 0.1),
        ("min_coverage", 0.6, 0.1),
        ("midpoint", 0.75, 0.45),
        ("midpoint", 0.5, 0.6),
    ],
)
def test_thresholds_follow_the_rules_on_numbers_worked_by_hand(strategy, level, expected):
    assert threshold_for(ENTROPIES, CORRECT, level, strategy) == pytest.approx(expected)


@pytest.mark.parametrize("strategy", ["max_coverage", "min_coverage", "midpoint"])
def test_an_unreachable_level_never_exits(strategy):
    threshold = threshold_for(ENTROPIES, torch.zeros(6, dtype=torch.bool), 0.6, strategy)
    assert threshold == pytest.approx(0.1)
    assert not (threshold > ENTROPIES).any()


def test_platt_scaling_finds_the_level_of_a_known_logistic():
    generator = torch.Generator().manual_seed(0)
    entropies = torch.rand(60_000, generator=generator).mul(6).sort().values
    chance = torch.sigmoid(3 - 1.5 * entropies)
    correct = torch.rand(60_000, generator=generator) < chance
    # sigmoid(3 - 1.5 x) = 0.8  at  x = (3 - ln 4) / 1.5
    assert threshold_for(entropies, correct, 0.8, "platt_scaling") == pytest.approx((3 - 1.3863) / 1.5, abs=0.06)
    assert threshold_for(entropies, correct, 0.99, "platt_scaling") == pytest.approx(float(entropies[0]))


@pytest.fixture(scope="module")
def calibrated(tiny_model):
    model = tiny_model("llama")
    generator = torch.Generator().manual_seed(0)
    documents = [Document(torch.randint(255, (50,), generator=generator).tolist(), "s") for _ in range(12)]
    batches = pack(documents, 64, 0)
    return (
        model,
        batches,
        calibrate(model, batches, CalibrationConfig(accuracy_levels=[0.1, 0.3, 0.9]), "some/data"),
    )


def test_coverage_and_agreement_are_those_of_the_threshold(calibrated):
    model, batches, calibration = calibrated
    readings = [read_batch(model, batch) for batch in batches]
    entropies = torch.cat([reading.entropies for reading in readings], 1)
    correct = torch.cat([reading.tokens == reading.choices for reading in readings], 1)
    assert any(cell.coverage > 0 for head in calibration.heads for cell in head.cells.values())
    for index, head in enumerate(calibration.heads):
        assert head.samples == entropies.shape[1]
        for level, cell in head.cells.items():
            exits = entropies[index] < cell.threshold
            assert cell.coverage == pytest.approx(float(exits.double().mean()))
            if cell.coverage:
                assert cell.agreement == pytest.approx(float(correct[index][exits].double().mean()))
                # one token less than the position that reached the level: within one token of it
                assert cell.agreement >= float(level) - 1 / int(exits.sum())


def test_calibration_json_loads_in_dssd_by_keyword(calibrated, tmp_path):
    """DSSD's loader takes these names and no other, a block for every level and a number for every head."""

    def dssd_loader(
        model_config_path,
        calibration_dataset,
        calibration_samples,
        uncertainty_metric,
        accuracy_levels,
        thresholds,
        statistics,
    ):
        for level in accuracy_levels:
            for head in range(3):
                assert isinstance(thresholds[f"{level:.2f}"][str(head)], float)
        for head in range(3):
            assert set(statistics[str(head)]) == {
                "mean_uncertainty",
                "std_uncertainty",
                "overall_accuracy",
                "num_samples",
            }
        assert uncertainty_metric == "entropy"
        return calibration_samples

    record = json.loads(json.dumps(calibration_json(calibrated[2])))
    assert dssd_loader(**record) == len(calibrated[1])
    (tmp_path / "eexit.json").write_text('{"kept": 1}')
    save_calibration(calibrated[2], tmp_path, tmp_path / "calibration.json")
    assert read_thresholds(tmp_path / "calibration.json", 3).at(0.3) == [
        head.cells["0.30"].threshold for head in calibrated[2].heads
    ]
    ours = json.loads((tmp_path / "eexit.json").read_text())
    assert ours["kept"] == 1
    assert len(ours["calibration"]["heads"]) == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r["thresholds"].pop("0.30"), "level 0.3 has no thresholds"),
        (lambda r: r["thresholds"]["0.30"].pop("1"), "head 1: no threshold"),
        (lambda r: r["thresholds"]["0.30"].update({"1": None}), "head 1: no threshold"),
        (lambda r: r["thresholds"]["0.30"].update({"1": float("nan")}), "head 1: no threshold"),
        (lambda r: r.pop("accuracy_levels"), "must hold accuracy_levels"),
        (lambda r: r["accuracy_levels"].append("x"), "level 'x' has no thresholds"),
    ],
)
def test_broken_calibrations_are_named(calibrated, tmp_path, change, words):
    record = calibration_json(calibrated[2])
    change(record)
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(record))
    with pytest.raises(BundleError, match=words):
        read_thresholds(path, 3)
