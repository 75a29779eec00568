"""The bundle on disk is the best evaluation's; the last one stands beside it."""

import pytest
import torch
from safetensors.torch import load_file
from small_training import trainer

from early_exit_cli.files.atomic import read_json

AGREEMENTS = {2: [0.2, 0.3], 4: [0.6, 0.5], 6: [0.9, 0.1], 8: [0.5, 0.6], 10: [0.1, 0.2]}
"""By step. Step 4 is the best: what counts is the sum, and a later evaluation that is as good does not replace it."""


def evaluated(backbone, folder, monkeypatch, **changes):
    """A training run whose evaluations are scripted, and a weight of the first head at each of them."""
    settings = {"max_steps": 10, "eval_every": 2, "save_every": 5} | changes
    training = trainer(backbone, folder, **settings)
    weights = {}

    def evaluate():
        weights[training.step] = training.student.module.state_dict()["heads.0.up.weight"].clone()
        return AGREEMENTS[training.step]

    monkeypatch.setattr(training, "evaluate", evaluate)
    return training, weights


def step_of(folder, weights):
    """The evaluation at which the heads had the weights that a folder holds."""
    saved = load_file(folder / "heads.safetensors")
    (step,) = [step for step, kept in weights.items() if torch.equal(kept, saved["0.up.weight"])]
    return step


def test_the_best_evaluation_stays_whatever_comes_later(tmp_path, tiny_backbone, monkeypatch):
    training, weights = evaluated(tiny_backbone("llama"), tmp_path, monkeypatch)
    result = training.run()
    assert (result.best_step, result.best_agreement) == (4, AGREEMENTS[4])
    assert result.last_agreement == AGREEMENTS[10]
    for folder, step in ((tmp_path, 4), (tmp_path / "last", 10)):
        assert read_json(folder / "eexit.json")["training"]["step"] == step
        assert read_json(folder / "eexit.json")["training"]["agreement"] == AGREEMENTS[step]
        assert step_of(folder, weights) == step


def test_a_resumed_run_knows_what_was_best_before(tmp_path, tiny_backbone, monkeypatch):
    training, _ = evaluated(tiny_backbone("llama"), tmp_path, monkeypatch)

    def stop(report):
        if report.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.run(stop)
    resumed, _ = evaluated(tiny_backbone("llama"), tmp_path, monkeypatch, resume=True)
    result = resumed.run()
    assert (result.best_step, result.best_agreement) == (4, AGREEMENTS[4])
    assert read_json(tmp_path / "eexit.json")["training"]["step"] == 4
    assert read_json(tmp_path / "last" / "eexit.json")["training"]["step"] == 10
