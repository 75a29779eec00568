"""From a name to a drafter: with what it was calibrated, what passes cost here, and how many tokens it may draft."""

import dataclasses

import pytest
from drafters import some_head

from early_exit_cli.config import InferenceConfig
from early_exit_cli.drafting import choose
from early_exit_cli.drafting.auto import AutoDrafter
from early_exit_cli.drafting.chances import DraftChances, Survival
from early_exit_cli.drafting.choose import choose_heads, exit_drafter, make_drafter
from early_exit_cli.drafting.costs import Costs
from early_exit_cli.drafting.drafter import NoDrafter
from early_exit_cli.drafting.eagle import EagleDrafter
from early_exit_cli.drafting.exit import DynamicDrafter, ExitDrafter, FixedDrafter
from early_exit_cli.drafting.lookup import LookupDrafter
from early_exit_cli.errors import BundleError, ConfigError, DataError
from early_exit_cli.files.schemas import CalibratedHead, CalibrationRecord, HeadSet, RecordForm
from early_exit_cli.heads.uncertainty import Thresholds

WIDTHS = (2, 4, 8, 16)
BY_WIDTH = {1: 0.9, 2: 1.0, 4: 1.2, 8: 1.5, 16: 2.5}
COSTS = Costs(per_block=BY_WIDTH, finish=BY_WIDTH, head=0.01, eagle_read=0.6, eagle_step=0.3)
LEVELS = {"0.60": [0.6, 0.5, 0.4], "0.90": [0.3, 0.2, 0.1]}
CHANCES = DraftChances(
    lookup=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6],
    eagle=[Survival(intercept=1.0, slope=-1.0, mean=0.5)],
    checked=[],
    exit_temperature=0.7,
    eagle_temperature=0.8,
)
PAYING = HeadSet(heads=[1], exit_share=[0.95], agreement=[0.99])


@pytest.fixture
def model(tiny_model, monkeypatch):
    """A tiny Llama that has everything, on a device whose costs are known."""
    model = tiny_model("llama")
    model.blocks.widths = WIDTHS
    monkeypatch.setattr(choose, "cost_table", lambda engine: {id(model): COSTS}[id(engine)])
    model.thresholds = Thresholds(LEVELS, "confidence")
    model.eagle = some_head(model.backbone)
    calibration = CalibrationRecord(heads=[CalibratedHead()] * 3, head_sets={"0.60": [PAYING]})
    model.record = RecordForm(fingerprint={}, calibration=calibration, drafting=CHANCES.model_dump())
    return model


def without(model, **changes):
    """The same model without some of it, in place: costs are known of this one."""
    for name, value in changes.items():
        setattr(model, name, value)
    return model


SETTINGS = InferenceConfig(accuracy_level=0.6, fixed_head=1, draft_length=5)


def pass_of(rows):
    """Milliseconds of six blocks and the LM head."""
    return 7 * BY_WIDTH[next(width for width in WIDTHS if width >= rows)]


def test_plain_decoding_and_one_head_take_the_widths_that_were_asked_for(model):
    drafter, width = make_drafter(model, SETTINGS, "none")
    assert isinstance(drafter, NoDrafter)
    assert width == 8
    assert make_drafter(model, SETTINGS.model_copy(update={"width": 6}), "none")[1] == 6
    drafter, width = make_drafter(model, SETTINGS, "fixed")
    assert isinstance(drafter, FixedDrafter)
    assert (drafter.active, drafter.thresholds, width) == ([1], [float("inf")] * 2, 6)


def test_exits_have_the_thresholds_of_their_level_and_the_heads_that_pay(model):
    drafter, width = make_drafter(model, SETTINGS, "exit")
    assert type(drafter) is ExitDrafter
    assert (drafter.thresholds, drafter.active) == (LEVELS["0.60"], [1])
    assert (drafter.metric, drafter.temperature, width) == ("confidence", 0.7, 8)
    every, width = make_drafter(model, SETTINGS.model_copy(update={"read_heads": "all", "width": 4}), "exit")
    assert (every.active, width) == (None, 4)
    other, _ = make_drafter(model, SETTINGS.model_copy(update={"accuracy_level": 0.9}), "exit")
    assert (other.thresholds, other.active) == (LEVELS["0.90"], [0, 1, 2])  # of that level nothing was counted
    dynamic, width = make_drafter(model, SETTINGS, "dynamic")
    assert isinstance(dynamic, DynamicDrafter)
    assert (dynamic.thresholds, dynamic.active, width) == (LEVELS["0.60"], None, 11)
    assert (dynamic.metric, dynamic.temperature) == ("confidence", 0.7)


def test_the_eagle_head_weighs_its_own_costs_and_chances(model):
    drafter, width = make_drafter(model, SETTINGS, "eagle")
    assert isinstance(drafter, EagleDrafter)
    assert (drafter.survival, drafter.temperature) == (CHANCES.eagle, 0.8)
    assert (drafter.read_cost, drafter.step_cost, width) == (0.6, 0.3, 16)
    assert drafter.passes.in_batch(1)[1:] == pytest.approx([pass_of(rows) for rows in range(1, 17)])
    assert make_drafter(model, SETTINGS.model_copy(update={"width": 5}), "eagle")[1] == 5


def test_lookup_has_its_calibrated_chances_and_its_corpus(model, tmp_path):
    drafter, width = make_drafter(model, SETTINGS, "lookup")
    assert isinstance(drafter, LookupDrafter)
    assert (drafter.prior, drafter.corpus, width) == (CHANCES.lookup, None, 16)
    assert drafter.passes.in_batch(1)[1:] == pytest.approx([pass_of(rows) for rows in range(1, 17)])
    (tmp_path / "corpus.txt").write_text("one two")
    settings = SETTINGS.model_copy(update={"lookup_corpus": tmp_path / "corpus.txt", "width": 7})
    for kind in ("lookup", "auto"):
        drafter, width = make_drafter(model, settings, kind)
        lookup = drafter if kind == "lookup" else drafter.choices[0][0]
        assert lookup.corpus.tokens == model.backbone.tokenizer("one two")["input_ids"]
        assert width == 7


def test_a_corpus_with_a_token_that_the_model_lacks_is_refused(model, tmp_path, monkeypatch):
    (tmp_path / "corpus.txt").write_text("one")
    monkeypatch.setattr(type(model.backbone), "unknown_token", lambda self, ids: "token 9 of nobody")
    with pytest.raises(DataError, match=r"corpus\.txt holds token 9 of nobody"):
        choose.lookup_drafter(model, tmp_path / "corpus.txt")


def kinds(drafter):
    return [(type(choice), longest) for choice, longest in drafter.choices]


def test_auto_asks_the_eagle_head_else_the_exits_that_pay_else_lookup_alone(model):
    drafter, width = make_drafter(model, SETTINGS, "auto")
    assert isinstance(drafter, AutoDrafter)
    assert kinds(drafter) == [(LookupDrafter, 15), (EagleDrafter, 15)]
    assert (drafter.plain_cost, width) == (pytest.approx(pass_of(1)), 16)
    uncalibrated = model.record.model_copy(update={"drafting": CHANCES.model_copy(update={"eagle": []}).model_dump()})
    drafter, _ = make_drafter(without(model, record=uncalibrated), SETTINGS, "auto")
    assert kinds(drafter) == [(LookupDrafter, 15), (ExitDrafter, 7)]
    drafter, _ = make_drafter(without(model, eagle=None), SETTINGS.model_copy(update={"width": 4}), "auto")
    assert kinds(drafter) == [(LookupDrafter, 15), (ExitDrafter, 3)]
    exits = drafter.choices[1][0]
    assert (exits.active, exits.thresholds) == ([1], LEVELS["0.60"])
    read = SETTINGS.model_copy(update={"read_heads": "all"})
    assert make_drafter(model, read, "auto")[0].choices[1][0].active is None
    model.record.calibration.head_sets["0.60"] = [HeadSet(heads=[1], exit_share=[0.0], agreement=[0.0])]
    assert kinds(make_drafter(model, SETTINGS, "auto")[0]) == [(LookupDrafter, 15)]
    assert kinds(make_drafter(without(model, thresholds=None), SETTINGS, "auto")[0]) == [(LookupDrafter, 15)]


@pytest.mark.parametrize(("kind", "lacking"), [("exit", "thresholds"), ("dynamic", "thresholds"), ("eagle", "eagle")])
def test_what_a_drafter_needs_and_the_bundle_lacks_is_named(model, kind, lacking):
    setattr(model, lacking, None)
    with pytest.raises(BundleError, match=r"not calibrated|no EAGLE head") as refused:
        make_drafter(model, SETTINGS, kind)
    assert refused.value.hint.startswith("eexit train" if kind == "eagle" else "eexit calibrate")


def test_a_level_that_was_not_calibrated_is_refused(model):
    with pytest.raises(ConfigError, match=r"0\.75 was not calibrated"):
        exit_drafter(model, 0.75, 8, "all")


def test_heads_are_chosen_for_the_width_that_passes_will_have(model, monkeypatch):
    """The widths that are weighed: those up to the one asked for, and the one that holds it."""
    seen = []
    monkeypatch.setattr(choose, "expected_rate", lambda *arguments: seen.append(arguments) or 0.0)
    for width in (1, 2, 3, 8, 16, 40):
        choose_heads(model, 0.6, width)
    assert [(widths, width) for *_, widths, width in seen] == [
        ([2], 1),
        ([2], 2),
        ([2, 4], 3),
        ([2, 4, 8], 8),
        ([2, 4, 8, 16], 16),
        ([2, 4, 8, 16], 16),
    ]
    assert seen[0][:4] == (COSTS, PAYING, model.heads.exit_layers, 6)


def test_heads_must_beat_plain_decoding_by_what_the_model_leaves_out(model, monkeypatch):
    plain = 1 / pass_of(2)
    for rate, chosen in ((1.02 * plain, []), (1.04 * plain, [1])):
        monkeypatch.setattr(choose, "expected_rate", lambda *_, rate=rate: rate)
        assert choose_heads(model, 0.6, 8) == chosen
    dear = dataclasses.replace(model, heads=None)
    assert choose_heads(dear, 0.6, 8) == []


def test_of_several_sets_the_best_is_read(model, monkeypatch):
    sets = [
        HeadSet(heads=[head], exit_share=[share], agreement=[1.0]) for head, share in ((0, 0.3), (2, 0.9), (1, 0.9))
    ]
    model.record.calibration.head_sets["0.60"] = sets
    monkeypatch.setattr(choose, "expected_rate", lambda costs, choice, *_: choice.exit_share[0])
    assert choose_heads(model, 0.6, 8) == [2]
