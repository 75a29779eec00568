"""Which heads are worth reading: the expected rate against a simulation, and the choice at the extremes."""

import json
import random
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from drafters import some_head

from early_exit_cli.calibration.thresholds import count_head_sets
from early_exit_cli.drafting import costs as measuring
from early_exit_cli.drafting.choose import choose_heads, expected_rate
from early_exit_cli.drafting.costs import Costs, cost_table, fastest_in_turns, measure_costs, never_falling, pass_costs
from early_exit_cli.files.schemas import CalibratedHead, CalibrationRecord, HeadSet, RecordForm
from early_exit_cli.heads.head_runner import HeadRunner

WIDTHS = [2, 4, 8]
COSTS = Costs(
    per_block={2: 0.25, 4: 0.28, 8: 0.4},
    finish={2: 2.5, 4: 3.0, 8: 5.0},
    head=0.6,
    eagle_read=0.0,
    eagle_step=0.0,
)


def simulate(choice: HeadSet, layers: list[int], depth: int, width: int, tokens: int) -> float:
    """Tokens per millisecond of rounds played out by chance, with the same costs."""
    dice = random.Random(0)
    made = spent = 0.0
    while made < tokens:
        right = 0
        all_right = True
        k = 0
        while True:
            if k == width - 1:
                spent += layers[0] * COSTS.per_block[2]
                break
            draw, head = dice.random(), None
            for number, share in enumerate(choice.exit_share):
                if draw < share:
                    head = number
                    break
                draw -= share
            if head is None:
                spent += layers[-1] * COSTS.per_block[2] + len(layers) * COSTS.head
                break
            spent += layers[head] * COSTS.per_block[2] + (head + 1) * COSTS.head
            k += 1
            average = sum(s * r for s, r in zip(choice.exit_share, choice.agreement, strict=True)) / sum(
                choice.exit_share
            )
            all_right = all_right and dice.random() < average
            right += all_right
        rows = next(w for w in WIDTHS if w >= k + 1)
        spent += (depth - (layers[0] if k else layers[-1])) * COSTS.per_block[rows] + COSTS.finish[rows]
        made += right + 1
    return made / spent


@pytest.mark.parametrize(
    "choice",
    [
        HeadSet(heads=[0], exit_share=[0.3], agreement=[0.8]),
        HeadSet(heads=[0, 2], exit_share=[0.2, 0.3], agreement=[0.9, 0.7]),
        HeadSet(heads=[1], exit_share=[0.9], agreement=[0.95]),
        HeadSet(heads=[2], exit_share=[0.0], agreement=[0.0]),
    ],
)
def test_the_expected_rate_is_what_chance_gives(choice):
    layers = [[8, 16, 23][head] for head in choice.heads]
    expected = expected_rate(COSTS, choice, [8, 16, 23], 30, WIDTHS, 8)
    assert expected == pytest.approx(simulate(choice, layers, 30, 8, 40_000), rel=0.02)


def record(*sets):
    """What a bundle keeps of sets of heads, (heads, exit shares, agreement) each."""
    found = [HeadSet(heads=heads, exit_share=shares, agreement=agreed) for heads, shares, agreed in sets]
    calibration = CalibrationRecord(heads=[CalibratedHead()] * 3, head_sets={"0.80": found})
    return RecordForm(fingerprint={}, calibration=calibration)


def model_of_known_costs(tiny_model):
    model = tiny_model("llama")
    model.blocks.widths = tuple(WIDTHS)
    return model


def test_heads_that_never_exit_are_not_read(tiny_model):
    model = model_of_known_costs(tiny_model)
    model.record = record(([0], [0.0], [0.0]), ([0, 1, 2], [0.0, 0.0, 0.01], [0.0, 0.0, 0.5]))
    assert choose_heads(model, 0.8, 8, COSTS) == []


def test_the_set_that_earns_most_is_read(tiny_model):
    model = model_of_known_costs(tiny_model)
    model.record = record(([0], [0.05], [0.8]), ([1], [0.95], [0.99]), ([0, 1], [0.05, 0.9], [0.8, 0.99]))
    costs = COSTS.model_copy(update={"head": 0.05})
    assert choose_heads(model, 0.8, 8, costs) in ([1], [0, 1])


def test_heads_must_pay_by_more_than_the_costs_may_be_wrong(tiny_model):
    model = model_of_known_costs(tiny_model)
    model.record = record(([1], [0.95], [0.99]))
    for error, read in ((0.0, [1]), (10.0, [])):
        assert choose_heads(model, 0.8, 8, COSTS.model_copy(update={"error": error})) == read


def test_a_bundle_without_counts_has_all_heads_read(tiny_model):
    model = tiny_model("llama")
    model.record = None
    assert choose_heads(model, 0.8, 8, COSTS) == [0, 1, 2]


def test_head_sets_are_counted_in_order():
    entropies = torch.tensor([[0.1, 0.9, 0.2, 0.9], [0.1, 0.1, 0.9, 0.1]])
    correct = torch.tensor([[True, True, False, True], [True, False, True, True]])
    counted = {tuple(entry.heads): entry for entry in count_head_sets(entropies, correct, [0.5, 0.5])}
    assert counted[(0,)] == HeadSet(heads=[0], exit_share=[0.5], agreement=[0.5])
    assert counted[(1,)].exit_share == [0.75]
    assert counted[(0, 1)].exit_share == [0.5, 0.5]
    assert counted[(0, 1)].agreement == [0.5, 0.5]


def test_measured_costs_are_times_of_this_device(tiny_model):
    costs = measure_costs(tiny_model("llama"), [8, 16])
    assert set(costs.per_block) == set(costs.finish) == {8, 16}
    assert all(value > 0 for value in [*costs.per_block.values(), *costs.finish.values(), costs.head])


def test_a_spoilt_moment_spoils_one_entry_at_most():
    assert never_falling({1: 90.0, 2: 11.0, 4: 12.0, 8: 20.0}) == {1: 11.0, 2: 11.0, 4: 12.0, 8: 20.0}
    assert never_falling({1: 10.0, 2: 11.0, 4: 99.0, 8: 20.0}) == {1: 10.0, 2: 11.0, 4: 20.0, 8: 20.0}


def test_runs_take_turns_and_the_first_only_warms_up(monkeypatch):
    clock, happened = [0.0], []
    monkeypatch.setattr(measuring, "PATIENCE", float("inf"))
    monkeypatch.setattr("early_exit_cli.drafting.costs.time.perf_counter", lambda: clock[0])
    seconds = {"a": iter([9.0, 0.5, 0.3, 0.3, 0.2]), "b": iter([1.0, *[2.0] * 4])}

    def call(name):
        happened.append(name)
        clock[0] += next(seconds[name])

    def before():
        clock[0] += 100.0  # is not counted

    calls = {name: (before, lambda name=name: call(name)) for name in ("a", "b")}
    found = fastest_in_turns(calls, torch.device("cpu"))
    assert found == {"a": pytest.approx(200.0), "b": pytest.approx(2000.0)}  # b's 1.0 s was its warm-up
    assert happened == ["a", "b"] * 5


def test_costs_are_measured_once_and_again_when_asked(tiny_model, monkeypatch, tmp_path):
    monkeypatch.setenv("EEXIT_HOME", str(tmp_path))
    model = tiny_model("llama")
    first = cost_table(model)
    assert set(first.per_block) == {1, *model.blocks.widths}
    assert cost_table(model) == first
    (kept,) = (tmp_path / "costs").iterdir()
    kept.write_text("{")  # a damaged file is measured anew, not an error
    cost_table(model)
    assert set(json.loads(kept.read_text())["costs"]) == {
        "per_block",
        "finish",
        "head",
        "eagle_read",
        "eagle_step",
        "mtp_read",
        "mtp_step",
        "error",
    }
    assert cost_table(model, refresh=True) == cost_table(model)


def test_a_busy_first_measurement_does_not_last(tiny_model, monkeypatch, tmp_path):
    """Measured again on later occasions, a few in all; the smaller of each figure stays, and the record says how many."""
    monkeypatch.setenv("EEXIT_HOME", str(tmp_path))
    model = tiny_model("llama")
    clock = [1000.0]
    monkeypatch.setattr("early_exit_cli.drafting.costs.time.time", lambda: clock[0])
    widths = sorted({1, *model.blocks.widths})
    made = []

    def measure(*_):
        slow = (3.0, 1.0, 2.0, 0.1)[len(made)]
        made.append(slow)
        finish = 7.0 if slow == 1.0 else 4.0
        return Costs(
            per_block=dict.fromkeys(widths, slow),
            finish=dict.fromkeys(widths, finish), head=slow, eagle_read=0.0, eagle_step=0.0, error=0.01 * slow,
        )  # fmt: skip

    monkeypatch.setattr(measuring, "measure_costs", measure)
    found = []
    for after in (0.0, 1.0, measuring.APART, 1.0, measuring.APART, measuring.APART, 1e6):
        clock[0] += after
        monkeypatch.setattr(measuring, "STARTED", clock[0])  # another process
        costs = cost_table(model)
        clock[0] += measuring.APART
        assert cost_table(model) == costs  # not again in the same one
        clock[0] -= measuring.APART
        found.append((len(made), costs.plain(1, 1), costs.head, costs.error))
    assert found == [
        (1, 7.0, 3.0, 0.03), (1, 7.0, 3.0, 0.03), (2, 5.0, 1.0, 0.01), (2, 5.0, 1.0, 0.01), *[(3, 5.0, 1.0, 0.01)] * 3,
    ]  # fmt: skip
    (kept,) = (tmp_path / "costs").iterdir()
    assert len(json.loads(kept.read_text())["measured"]) == measuring.OCCASIONS == 3
    assert cost_table(model, refresh=True).head == 0.1  # what was measured before is forgotten
    assert len(json.loads(kept.read_text())["measured"]) == 1


KNOWN = {("blocks", 1): 60.0, ("blocks", 8): 120.0}

KNOWN |= {("finish", 1): 4.0, ("finish", 8): 5.0, ("head", 1): 0.7, ("eagle read", 1): 0.6, ("eagle step", 1): 0.2}


def measured(model, monkeypatch, times=KNOWN):
    """Costs where each call is made once, whatever it takes, and these are the times."""

    def once(calls, device):
        for before, call in calls.values():
            before()
            call()
        return {key: times[key] for key in calls}

    monkeypatch.setattr(measuring, "fastest_in_turns", once)
    return measure_costs(model, [1, 8])


def test_what_was_timed_is_what_a_cost_says(tiny_model, monkeypatch):
    model = tiny_model("llama")
    model.eagle = some_head(model.backbone)
    costs = measured(model, monkeypatch)
    assert costs.per_block == {1: 10.0, 8: 20.0}  # of six blocks
    assert costs.finish == {1: 4.0, 8: 5.0}
    assert (costs.head, costs.eagle_read, costs.eagle_step) == (0.7, 0.6, 0.2)
    assert costs.plain(6, 8) == 125.0
    bare = tiny_model("llama")
    bare.heads = None
    costs = measured(bare, monkeypatch)
    assert (costs.head, costs.eagle_read, costs.eagle_step) == (0.0, 0.0, 0.0)
    assert (costs.mtp_read, costs.mtp_step) == (0.0, 0.0)


def test_a_step_of_a_chain_is_what_each_further_one_adds(tiny_model, monkeypatch):
    """Where steps run all at once: a chain of five takes 2.6, reading and the first choice 0.6."""
    asked = []

    class Chained:
        most_steps = 5

        def __init__(self, head):
            self.cache = type("Cache", (), {"length": 0})

        def follow(self, text):
            pass

        rewind = HeadRunner.rewind

        def read(self, tokens, states):
            self.cache.length += len(tokens)

        def chain(self, tokens, states, count):
            asked.append((self.cache.length, len(tokens), [len(state) for state in states], count))
            self.cache.length += len(tokens)

    monkeypatch.setattr(measuring, "runner_of", Chained)
    model = tiny_model("llama")
    model.eagle = some_head(model.backbone)
    costs = measured(model, monkeypatch, KNOWN | {("eagle step", 1): 2.6})
    assert costs.eagle_read == 0.6
    assert costs.eagle_step == pytest.approx(0.5)
    assert asked[:2] == [(256, 2, [2, 2, 2], 1), (256, 2, [2, 2, 2], 5)]
    assert measured(model, monkeypatch, KNOWN | {("eagle step", 1): 0.5}).eagle_step == 0.0  # never less than nothing


def test_what_two_measurements_differ_by_must_be_expected_beyond_plain_decoding(tiny_model, monkeypatch):
    model = tiny_model("llama")
    first = KNOWN | {("blocks", 8): 132.0, ("eagle step", 1): 0.5}
    slower = iter([first, KNOWN])
    monkeypatch.setattr(measuring, "fastest_in_turns", lambda calls, device: dict.fromkeys(calls, 1.0) | next(slower))
    costs = measure_costs(model, [1, 8])
    assert costs.per_block == {1: 10.0, 8: 20.0}
    assert costs.error == pytest.approx(12 / 120)  # what is small beside a pass counts by its share of one


def test_a_disturbed_measurement_is_made_again_and_the_quietest_counts():
    def tries(*errors):
        left = [COSTS.model_copy(update={"error": error}) for error in errors]
        found = measuring.quietest(lambda: left.pop(0))
        return found.error, len(left)

    assert tries(0.05, 0.0, 0.0) == (0.05, 2)
    assert tries(0.5, 0.02, 0.0) == (0.02, 1)
    assert tries(0.5, 0.3, 0.9, 0.0) == (0.3, 1)


def test_other_heads_have_costs_of_their_own(tiny_model, monkeypatch, tmp_path):
    monkeypatch.setenv("EEXIT_HOME", str(tmp_path))
    made = []
    known = COSTS.model_copy(update={name: dict.fromkeys(range(1, 17), 1.0) for name in ("per_block", "finish")})
    monkeypatch.setattr(measuring, "measure_costs", lambda engine, widths: made.append(widths) or known)
    for heads, eagle in ((True, False), (False, False), (True, True), (False, True)):
        model = tiny_model("llama")
        model.heads = model.heads if heads else None
        model.eagle = some_head(model.backbone) if eagle else None
        for _ in range(2):
            assert cost_table(model) == known
    assert made == [sorted({1, *model.blocks.widths})] * 4


def test_passes_beyond_the_measured_widths_cost_what_the_last_step_of_rows_did(tiny_model, monkeypatch):
    blocks = tiny_model("llama").blocks
    blocks.widths = (2, 4, 8)
    costs = pass_costs(COSTS, blocks)
    known = {width: 6 * COSTS.per_block[width] + COSTS.finish[width] for width in WIDTHS}
    assert [costs(rows) for rows in (1, 2, 3, 4, 5, 8)] == [known[width] for width in (2, 2, 4, 4, 8, 8)]
    assert costs(11) == known[8]  # no pass has more rows
    monkeypatch.setattr(type(blocks), "batch_rows", 32)
    assert pass_costs(COSTS, blocks)(11) == pytest.approx(known[8] + 3 * (known[8] - known[4]) / 4)


@pytest.mark.parametrize("watched", [[0], []], ids=["attends", "does not"])
def test_a_head_is_timed_over_one_more_token_behind_a_text(watched):
    happened = []

    class Reader:
        def watched(self, heads):
            assert heads == [0]
            return watched

        def process(self, head, states):
            happened.append(("process", head, len(states)))

        def read(self, head, rows):
            happened.append(("read", head, [len(row) for row in rows]))

    call = measuring._head_call(Reader(), torch.zeros(9, 4))
    for _ in range(2):
        call()
    seen = [("process", head, 9) for head in watched]
    assert happened == [*seen, *2 * [*(("process", head, 1) for head in watched), ("read", 0, [1])]]


def test_a_measurement_that_takes_long_is_not_repeated(monkeypatch):
    monkeypatch.setattr(measuring, "PATIENCE", 0.0)
    runs: list[str] = []
    calls = {name: (lambda: None, partial(runs.append, name)) for name in "ab"}
    found = fastest_in_turns(calls, torch.device("cpu"))
    assert runs == ["a", "b"]
    assert found.keys() == {"a", "b"}
    assert all(taken > 0 for taken in found.values())
    disturbed = SimpleNamespace(error=1.0)
    assert measuring.quietest(iter([disturbed]).__next__) is disturbed
