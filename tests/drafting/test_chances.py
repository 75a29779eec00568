"""What a bundle's record says of drafts, and the chances that follow from it."""

import math

import pytest

from early_exit_cli.drafting.chances import DraftChances, Survival, draft_chances_of, save_draft_chances
from early_exit_cli.drafting.suffix_automaton import PRIOR
from early_exit_cli.files.atomic import read_json, write_json


def test_survival_falls_with_the_entropy_as_the_logistic_says():
    survival = Survival(intercept=2.0, slope=-1.5, mean=0.5)
    assert survival.at(0.0) == pytest.approx(1 / (1 + math.exp(-2.0)))
    assert survival.at(2.0) == pytest.approx(1 / (1 + math.exp(1.0)))
    assert Survival(intercept=-1e6, slope=0.0, mean=0.5).at(1.0) == pytest.approx(0.0)
    assert Survival(intercept=1e6, slope=0.0, mean=0.5).at(1.0) == 1.0


def test_without_a_calibration_lookup_has_its_prior_and_the_head_nothing():
    assert draft_chances_of(None) == DraftChances(lookup=list(PRIOR), eagle=[], checked=[])


def test_chances_are_kept_beside_what_the_record_holds(tiny_bundle, tmp_path):
    before = read_json(tiny_bundle / "eexit.json")
    write_json(tmp_path / "eexit.json", before)
    survival = Survival(intercept=2.0, slope=-1.5, mean=0.5, entropies=(0.1, 0.9))
    chances = DraftChances(lookup=[0.25] * len(PRIOR), eagle=[survival], checked=[(0.4, 0.5)], eagle_temperature=0.7)
    save_draft_chances(chances, tmp_path)
    after = read_json(tmp_path / "eexit.json")
    kept = after.pop("drafting")
    assert after == before
    assert DraftChances.model_validate(kept) == chances
