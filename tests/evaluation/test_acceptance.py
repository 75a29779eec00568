"""The walk on texts small enough to follow by hand, and against real decoding."""

import pytest
import torch

from early_exit_cli.calibration.head_outputs import HeadOutputs, join_head_outputs, read_batch
from early_exit_cli.data.documents import Document
from early_exit_cli.data.packing import pack
from early_exit_cli.decoding.answer import generate
from early_exit_cli.decoding.text import Request
from early_exit_cli.drafting.drafter import NoDrafter
from early_exit_cli.drafting.exit import ExitDrafter
from early_exit_cli.evaluation.acceptance import explain_acceptance
from early_exit_cli.evaluation.agreement import agreement_by

SURE, UNSURE = 0.1, 0.9


def head_outputs(*rows, documents=None):
    """rows: (backbone's choice, (token, uncertainty) of each head) per position."""
    count = len(rows)
    owners = torch.tensor(documents or [0] * count)
    places = torch.tensor([int((owners[:i] == owner).sum()) for i, owner in enumerate(owners)])
    choices = torch.tensor([row[0] for row in rows])
    tokens, uncertainties = (torch.tensor([[head[part] for head in row[1:]] for row in rows]).T for part in (0, 1))
    five = torch.zeros(count, 5, dtype=torch.int64)
    return HeadOutputs(choices, choices, owners, places, five, tokens, uncertainties, five.expand(len(tokens), -1, -1))


def walk(found, draft_vocab=None, heads=1, draft_length=7):
    return explain_acceptance(found, [0.5] * heads, draft_vocab, 0.9, draft_length)


RIGHT, WRONG = (5, (5, SURE)), (5, (6, SURE))
UNSURE_RIGHT, UNSURE_WRONG = (5, (5, UNSURE)), (5, (6, UNSURE))


def test_every_reason_is_counted_where_it_belongs():
    """Round 1: two accepted, one wrong, one behind it, and the token that ends the draft. Round 2 begins behind the wrong
    one: it drafts what round 1 threw away, and stops at the same token, now for lack of certainty. Round 3: nobody
    knows. Round 4: nobody can say 9."""
    found = walk(
        head_outputs(RIGHT, RIGHT, WRONG, RIGHT, UNSURE_RIGHT, UNSURE_WRONG, (9, (6, UNSURE))), torch.tensor([5, 6])
    )
    assert found.counts == {"accepted": 3, "vocabulary": 1, "head": 2, "threshold": 1, "position": 2}
    assert (found.tokens, found.rounds, found.asked, found.drafted) == (7, 4, 9, 5)
    record = found.record()
    assert sum(record["shares"].values()) == pytest.approx(1)
    assert record["acceptance_rate"] == 3 / 5
    assert record["accept_length"] == 7 / 4


def test_a_deeper_head_that_would_have_known_does_not_excuse_the_one_that_exited():
    assert walk(head_outputs((5, (6, SURE), (5, SURE))), heads=2).counts["head"] == 1
    assert walk(head_outputs((5, (6, UNSURE), (5, SURE))), heads=2).counts["accepted"] == 1
    assert walk(head_outputs((5, (6, UNSURE), (5, UNSURE))), heads=2).counts["threshold"] == 1


def test_a_full_draft_is_followed_by_a_token_that_was_not_asked_for():
    found = walk(head_outputs(*[RIGHT] * 6), draft_length=2)
    assert (found.rounds, found.asked, found.counts["accepted"]) == (2, 4, 4)
    assert found.record()["accept_length"] == 3


def test_a_draft_ends_with_its_answer():
    found = walk(head_outputs(*[RIGHT] * 5, documents=[0, 0, 1, 1, 1]))
    assert (found.rounds, found.asked, found.counts["accepted"]) == (2, 5, 5)


def test_the_walk_counts_what_decoding_does(tiny_model):
    """Along the backbone's own greedy answers: the same rounds. An answer's last token may be drafted here, where the
    decoding loop leaves it to the backbone."""
    model = tiny_model("llama")
    thresholds = [1.5, 2.5, 3.5]
    rounds = drafted = accepted = 0
    documents = []
    for seed in range(10):
        prompt = torch.randint(255, (12,), generator=torch.Generator().manual_seed(seed)).tolist()
        answer = generate(model, Request(prompt, 40), NoDrafter(), mode="full").token_ids
        run = generate(model, Request(prompt, 40), ExitDrafter(thresholds), mode="adaptive", width=4)
        rounds, drafted = rounds + len(run.rounds), drafted + run.stats.tokens_drafted
        accepted += run.stats.tokens_accepted
        documents.append(Document(prompt + answer, "s", len(prompt)))
    rows = [row for document in documents for row in pack([document], len(document.ids), 0)]  # none is cut
    found = explain_acceptance(join_head_outputs([read_batch(model, row) for row in rows]), thresholds, None, 0.9, 3)

    assert 0 < accepted < drafted
    assert found.rounds == rounds
    assert accepted <= found.counts["accepted"] <= accepted + len(documents)


def test_agreement_is_grouped_by_position_frequency_and_source():
    """Token 5 is 6 of 8 choices, 9 and 7 one each; the second document begins at the seventh position."""
    rows = [RIGHT, RIGHT, WRONG, RIGHT, RIGHT, (9, (6, SURE)), RIGHT, (7, (7, SURE))]
    found = agreement_by(head_outputs(*rows, documents=[0] * 6 + [1] * 2), ["b", "a"])
    shown = {title: [(g.name, g.tokens, g.agreement) for g in groups] for title, groups in found.items()}
    assert shown == {
        "position": [("1", 2, [1.0]), ("2-4", 4, [0.75]), ("5-16", 2, [0.5])],
        "frequency": [("1 % or more", 8, [0.75])],
        "source": [("a", 2, [1.0]), ("b", 6, [pytest.approx(4 / 6)])],
    }
    many = head_outputs(*[RIGHT] * 996, *[(token, (token if token < 52 else 6, SURE)) for token in range(50, 54)])
    assert [(g.name, g.tokens, g.agreement) for g in agreement_by(many, ["s"])["frequency"]] == [
        ("1 % or more", 996, [1.0]),
        ("0.1 % to 1 %", 4, [0.5]),
    ]
