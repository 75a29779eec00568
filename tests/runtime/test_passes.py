"""Rows of any number through few widths: padded, cut, and what comes back is as if neither had been done."""

import pytest
import torch
from runs import almost_known, answer, ids_of, same

from early_exit_cli.drafting.exit import ExitDrafter
from early_exit_cli.errors import NumericsError
from early_exit_cli.runtime import invariant_widths
from early_exit_cli.runtime.blocks import LARGEST_WIDTH
from early_exit_cli.runtime.fused_blocks import FusedBlocks
from early_exit_cli.runtime.passes import Passes


class Watched(FusedBlocks):
    """Notes the width of each call."""

    def __init__(self, backbone, widths):
        super().__init__(backbone)
        self.widths, self.seen = widths, []

    def run_through(self, hidden, cache, position, stops, first=0):
        self.seen.append((position, hidden.shape[0]))
        return super().run_through(hidden, cache, position, stops, first)

    def finish(self, hidden):
        self.seen.append(hidden.shape[0])
        return super().finish(hidden)

    def logits(self, normed):
        self.seen.append(normed.shape[0])
        return super().logits(normed)


@pytest.fixture
def blocks(tiny_backbone):
    return Watched(tiny_backbone("llama"), (1, 2, 4, 6))


@pytest.mark.parametrize(
    ("rows", "widths"),
    [(1, [1]), (3, [4]), (5, [6]), (6, [6]), (7, [6, 1]), (9, [6, 4]), (16, [6, 6, 4]), (LARGEST_WIDTH + 1, [17])],
)
def test_rows_take_passes_of_the_widths_there_are(blocks, rows, widths):
    """All of it the same whether rows come as tokens or as states; passes wider than decoding's stay as they are."""
    passes, tokens = Passes(blocks), ids_of(rows).tolist()
    with torch.inference_mode():
        by_token = passes.run_tokens(tokens, blocks.new_cache(64), 5, [2, blocks.num_blocks])
        starts = [5 + sum(widths[:number]) for number in range(len(widths))]
        assert blocks.seen == list(zip(starts, widths, strict=True))
        by_state = passes.run_through(blocks.embed_tokens(tokens), blocks.new_cache(64), 5, [2, blocks.num_blocks])
        assert all(map(torch.equal, by_token, by_state))
        expected = blocks.run(blocks.embed_tokens(tokens), blocks.new_cache(64), 5, 0, 2)
        torch.testing.assert_close(by_token[0], expected, atol=1e-3, rtol=1e-3)
        assert [len(states) for states in by_token] == [rows, rows]

        blocks.seen.clear()
        normed, choices = passes.finish(by_token[1])
        again, logits = passes.logits(by_token[1])
        assert blocks.seen == widths + widths
    assert torch.equal(normed, again)
    assert torch.equal(choices, logits.argmax(-1))
    assert len(normed) == len(choices) == rows


@pytest.mark.parametrize("rows", [1, 3, 9])
def test_a_row_that_is_not_finite_is_found_wherever_it_stands(blocks, rows):
    passes = Passes(blocks)
    for bad in range(rows):
        hidden = torch.randn(rows, blocks.backbone.hidden_size, generator=torch.Generator().manual_seed(1))
        hidden[bad] = float("nan")
        with torch.inference_mode():
            for read in (passes.finish, passes.logits):
                with pytest.raises(NumericsError, match="NaN or infinite"):
                    read(hidden)


def test_drafts_wider_than_the_widest_pass_are_verified_in_parts(tiny_model, monkeypatch):
    """A device whose fused kernels end at 4 rows: the same text and states at every width asked for."""
    monkeypatch.setattr(invariant_widths, "fused_widths", lambda _blocks, _candidates: (1, 2, 3, 4))
    model = tiny_model("llama")
    assert model.blocks.is_invariant
    assert model.blocks.widths[-1] == 4
    expected = answer(model)
    for width in (4, 8, 16):
        run = answer(model, almost_known(expected.token_ids), width=width)
        assert same(run, expected), width
        assert run.stats.tokens_accepted > 0
    for thresholds in ([1e9] * 3, [2.0, 3.0, 1e9]):
        assert same(answer(model, ExitDrafter(thresholds), width=16), expected)
