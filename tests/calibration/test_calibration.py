import json
from dataclasses import replace

import pytest
import torch

from early_exit_cli.bundle.load import read_thresholds
from early_exit_cli.calibration.calibrate import (
    calibrate,
    calibration_json,
    calibration_record,
    save_calibration,
)
from early_exit_cli.calibration.head_outputs import join_head_outputs, read_batch
from early_exit_cli.calibration.held_out import read_held_out
from early_exit_cli.calibration.intervals import lower_bound
from early_exit_cli.calibration.thresholds import Sample
from early_exit_cli.config import CalibrationConfig
from early_exit_cli.data.documents import Document
from early_exit_cli.data.packing import pack
from early_exit_cli.decoding.answer import generate
from early_exit_cli.decoding.text import Request
from early_exit_cli.drafting.choose import exit_drafter
from early_exit_cli.drafting.drafter import NoDrafter
from early_exit_cli.errors import BundleError

TOKENS = 8
#                     exit at 0.75: 0 1 2         left: 3 .. 7
SHALLOW = ([0.1, 0.2, 0.3, 0.4, 0.9, 0.9, 0.9, 0.9], [1, 1, 1, 0, 0, 0, 0, 0])
DEEP = ([0.1, 0.1, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [1, 1, 1, 1, 0, 1, 1, 0])
SAMPLE = Sample(torch.tensor([SHALLOW[0], DEEP[0]]), torch.tensor([SHALLOW[1], DEEP[1]]).bool(), torch.arange(TOKENS))


def calibrated_by_hand(second=SAMPLE, **settings):
    config = CalibrationConfig(accuracy_levels=[0.75], **settings)
    return calibrate(SAMPLE, second, [3, 6], config, "some/data", 2)


def test_both_rules_are_counted_and_the_chosen_one_is_written():
    """The deep head at 0.75. Alone: all but the last are below 0.6, 6 of 7 right. Of the tokens that the shallow head
    left: 3, 4 and 5 are below 0.5, 2 of 3 right."""
    for rule, threshold in (("conditional", 0.5), ("independent", 0.6)):
        calibration = calibrated_by_hand(threshold_rule=rule)
        assert calibration_json(calibration)["thresholds"]["0.75"] == pytest.approx({"0": 0.4, "1": threshold})
        (share,) = [entry.exit_share for entry in calibration.head_sets["0.75"] if entry.heads == [0, 1]]
        assert share == [3 / 8, {"conditional": 3 / 8, "independent": 4 / 8}[rule]]
    alone, left = (calibration.heads[1].cells[rule]["0.75"] for rule in ("independent", "conditional"))
    assert (alone.tokens, alone.coverage, alone.agreement) == (7, 7 / 8, pytest.approx(6 / 7))
    assert (left.tokens, left.coverage, left.agreement) == (3, 3 / 8, pytest.approx(2 / 3))
    record = calibration_record(calibration)
    assert record["threshold_rule"] == "independent"
    assert record["heads"][1]["coverage"] == {"0.75": 7 / 8}
    assert record["heads"][1]["rules"]["conditional"]["0.75"]["threshold"] == pytest.approx(0.5)


def test_the_check_reads_the_heads_in_order_on_the_second_text():
    second = Sample(
        torch.tensor([[0.3, 0.9, 0.9, 0.9, 0.9], [0.0, 0.2, 0.45, 0.55, 0.7]]),
        torch.tensor([[1, 0, 0, 0, 0], [0, 1, 0, 1, 1]]).bool(),
        torch.zeros(5, dtype=torch.int64),
    )
    calibration = calibrated_by_hand(second)
    shallow, deep = (head.cells["conditional"]["0.75"] for head in calibration.heads)
    assert (shallow.checked_tokens, shallow.reached) == (1, 1.0)
    assert (deep.checked_tokens, deep.reached) == (2, 0.5)
    beside = calibration.heads[1].cells["independent"]["0.75"]
    assert (beside.checked_tokens, beside.reached) == (3, pytest.approx(2 / 3))
    assert calibration.checked_tokens == 5


def test_promises_are_judged_where_many_tokens_exit(monkeypatch):
    monkeypatch.setattr("early_exit_cli.calibration.calibrate.ENOUGH_CHECKED", 2)
    calibration = calibrated_by_hand()
    assert calibration.kept("conditional") == (1, 2)  # 3 of 3 at the shallow head, 2 of 3 at the deep one
    assert calibration.kept("independent") == (2, 2)  # 3 of 3, and 3 of 4 in order
    assert calibrated_by_hand(margin=0.1).kept("conditional") == (2, 2)
    assert "level 0.75, head 1: 66.7% reached on 3 tokens of the second text" in calibration.faults()
    monkeypatch.setattr("early_exit_cli.calibration.calibrate.ENOUGH_CHECKED", 3)
    assert calibration.kept("conditional") == (0, 0)
    assert calibration.kept("independent") == (1, 1)


def test_too_few_tokens_and_unreachable_levels_are_faults():
    wrong = Sample(SAMPLE.uncertainties, torch.zeros_like(SAMPLE.correct), SAMPLE.documents)
    calibration = calibrate(wrong, wrong, [3, 6], CalibrationConfig(accuracy_levels=[0.75]), "some/data", 2)
    for _, _, cell in calibration.cells():
        assert not cell.reachable
        assert cell.tokens == 0
        assert cell.threshold == pytest.approx(0.1)
    assert calibration.faults() == [f"level 0.75, head {head}: unreachable, the head never exits" for head in (0, 1)]
    few = calibrated_by_hand()
    deep = few.heads[1].cells["conditional"]["0.75"]
    #  2.7055 * 0.74 * 0.26 / 0.01^2 = 5206 tokens are needed at an agreement not above 0.75
    assert deep.missing == 5206 - 3
    assert deep.at_least == pytest.approx(float(lower_bound(torch.tensor(2 / 3).double(), torch.tensor(3.0))), abs=1e-6)
    assert "level 0.75, head 1: 3 exiting tokens are too few, by 5,203" in few.faults()


def test_histograms_hold_every_token_once():
    calibration = calibrated_by_hand()
    for index, head in enumerate(calibration.heads):
        assert sum(head.right) == int(SAMPLE.correct[index].sum())
        assert sum(head.right) + sum(head.wrong) == TOKENS
        assert len(calibration.edges) == len(head.right) + 1
        assert head.right[0] >= 1  # the surest tokens are right


def calibrated_on(model, fit, check, config):
    first, second = (read_held_out(model, batches, config.uncertainty_metric).exits for batches in (fit, check))
    return calibrate(first, second, model.heads.exit_layers, config, "some/data", len(fit))


@pytest.fixture(scope="module")
def calibrated(tiny_model):
    model = tiny_model("llama")
    generator = torch.Generator().manual_seed(0)
    documents = [Document(torch.randint(255, (50,), generator=generator).tolist(), "s") for _ in range(12)]
    batches = pack(documents, 64, 0)
    return (
        model,
        batches,
        calibrated_on(model, batches[:6], batches[6:], CalibrationConfig(accuracy_levels=[0.1, 0.3, 0.9])),
    )


def test_coverage_agreement_and_check_are_those_of_the_thresholds(calibrated):
    model, batches, calibration = calibrated
    first, second = (
        join_head_outputs([read_batch(model, batch) for batch in part]) for part in (batches[:6], batches[6:])
    )
    assert any(cell.coverage > 0 for _, _, cell in calibration.cells())
    for index, head in enumerate(calibration.heads):
        assert head.samples == first.choices.numel()
        for level, cell in head.cells["independent"].items():
            exits = first.uncertainties[index] < cell.threshold
            assert cell.coverage == pytest.approx(float(exits.double().mean()))
            if cell.coverage:
                right = (first.tokens == first.choices)[index][exits]
                assert cell.agreement == pytest.approx(float(right.double().mean()))
                # one token less than the position that reached the level: within one token of it
                assert cell.agreement >= float(level) - 1 / int(exits.sum())
    for level in ("0.10", "0.30", "0.90"):
        left = torch.ones(second.choices.numel(), dtype=torch.bool)
        for index, head in enumerate(calibration.heads):
            cell = head.cells["conditional"][level]
            exits = left & (second.uncertainties[index] < cell.threshold)
            assert cell.checked_tokens == int(exits.sum())
            left &= ~exits


def test_a_bundle_calibrated_by_confidence_is_gated_by_it(calibrated, tmp_path):
    model, batches, _ = calibrated
    config = CalibrationConfig(accuracy_levels=[0.1], uncertainty_metric="confidence")
    save_calibration(calibrated_on(model, batches, batches, config), tmp_path, tmp_path / "calibration.json")
    thresholds = read_thresholds(tmp_path / "calibration.json", 3)
    assert thresholds.metric == "confidence"
    assert all(-1 <= threshold <= 0 for threshold in thresholds.at(0.1))
    drafter = exit_drafter(replace(model, thresholds=thresholds), 0.1, 8, "all")
    prompt = batches[0].input_ids[0, :20].tolist()
    plain = generate(model, Request(prompt, 40), NoDrafter(), mode="full")
    run = generate(model, Request(prompt, 40), drafter, mode="adaptive", trace=True)
    assert run.token_ids == plain.token_ids
    exits = [reason for step in run.rounds for reason in step.decided_by if reason is not None]
    assert exits
    for reason in exits:
        assert reason.entropy < reason.threshold == thresholds.at(0.1)[reason.head] <= 0


def test_another_output_keeps_its_record_beside_it(calibrated, tmp_path):
    """Which heads pay is counted with the thresholds in use, wherever they were written."""
    (tmp_path / "eexit.json").write_text('{"calibration": {"of": "the bundle"}}')
    save_calibration(calibrated[2], tmp_path, tmp_path / "other" / "mine.json")
    assert json.loads((tmp_path / "eexit.json").read_text()) == {"calibration": {"of": "the bundle"}}
    record = json.loads((tmp_path / "other" / "mine.eexit.json").read_text())
    assert record["calibration"]["head_sets"].keys() == {"0.10", "0.30", "0.90"}


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
    assert dssd_loader(**record) == 6
    (tmp_path / "eexit.json").write_text('{"kept": 1}')
    save_calibration(calibrated[2], tmp_path, tmp_path / "calibration.json")
    assert read_thresholds(tmp_path / "calibration.json", 3).at(0.3) == [
        head.cells["conditional"]["0.30"].threshold for head in calibrated[2].heads
    ]
    ours = json.loads((tmp_path / "eexit.json").read_text())
    assert ours["kept"] == 1
    assert len(ours["calibration"]["heads"]) == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r["thresholds"].pop("0.30"), "level 0.3 has no thresholds"),
        (lambda r: r["thresholds"]["0.30"].pop("1"), "head 1: no threshold"),
        (
            lambda r: r["thresholds"]["0.30"].update({"1": None}),
            r"thresholds\.0\.30\.1: it must be a number, found None",
        ),
        (lambda r: r["thresholds"]["0.30"].update({"1": float("nan")}), "it should be a finite number, found nan"),
        (lambda r: r.pop("accuracy_levels"), "no 'accuracy_levels'"),
        (lambda r: r["accuracy_levels"].append("x"), "it must be a number, found 'x'"),
        (lambda r: r.update(uncertainty_metric="margin"), "it should be 'entropy' or 'confidence', found 'margin'"),
    ],
)
def test_broken_calibrations_are_named(calibrated, tmp_path, change, words):
    record = calibration_json(calibrated[2])
    change(record)
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(record))
    with pytest.raises(BundleError, match=words):
        read_thresholds(path, 3)
