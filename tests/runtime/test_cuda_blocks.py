"""Passes of our own kernels, run where there is no card: the same lists of kernels, in PyTorch's double precision.

What the kernels themselves compute is tested on a card (`-m gpu`); here is what surrounds them: which kernel reads
what, where a pass stands, what is recorded, and that every drafter says plain decoding's words.
"""

import pytest
import torch
from nf4_models import KINDS, nf4_backbone, on_reference  # noqa: F401 (a fixture)
from runs import almost_known, answer, distance, ids_of, same
from tiny_models import VOCAB

from early_exit_cli.decoding.answer import generate
from early_exit_cli.decoding.prefixes import Prefixes
from early_exit_cli.decoding.text import Request
from early_exit_cli.drafting.drafter import NoDrafter
from early_exit_cli.drafting.exit import ExitDrafter
from early_exit_cli.engine import Engine
from early_exit_cli.errors import UnsupportedBackboneError
from early_exit_cli.heads.exit_heads import ExitHeads
from early_exit_cli.runtime.cuda_blocks import CudaBlocks, why_not_ours
from early_exit_cli.runtime.fused_blocks import FusedBlocks
from early_exit_cli.runtime.kv_cache import Part
from early_exit_cli.runtime.reference_kernels import ReferenceKernels


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_gives_what_the_fused_runner_gives(backbone, kind):
    ours, theirs = on_reference(backbone(kind)), FusedBlocks(backbone(kind))
    ids = ids_of(48, vocab=VOCAB)
    caches = ours.new_cache(64), theirs.new_cache(64)
    with torch.inference_mode():
        for start in range(0, 48, 8):
            rows = ids[start : start + 8]
            mine = ours.run_tokens(rows.tolist(), caches[0], start, [1, 3, 4])
            other = theirs.run_tokens(rows.tolist(), caches[1], start, [1, 3, 4])
            for state, expected in zip(mine, other, strict=True):
                assert distance(state, expected) < 0.04
            normed, choices = ours.finish(mine[-1])
            assert torch.equal(choices, ours.logits(normed).argmax(-1))
    for name in ("keys", "values"):
        for block in range(4):
            found, expected = (getattr(cache, name)[block][:, :48].float() for cache in caches)
            assert distance(found, expected) < 0.04


def test_rows_have_the_same_bits_at_every_width_and_through_parts(backbone):
    blocks = on_reference(backbone("qwen3-norms"))
    ids = ids_of(64, vocab=VOCAB).tolist()
    with torch.inference_mode():
        whole = blocks.new_cache(64)
        expected = torch.cat([blocks.run_tokens(ids[at : at + 16], whole, at, [2, 4])[1] for at in range(0, 64, 16)])
        for width in (1, 4, 8):
            cache = blocks.new_cache(96)
            for at in range(0, 64, width):
                half = blocks.run(blocks.embed_tokens(ids[at : at + width]), cache, at, 0, 2)
                found = blocks.run(half, cache, at, 2, 4)
                assert torch.equal(found, expected[at : at + width])


def test_texts_together_have_the_bits_of_each_alone(backbone):
    blocks = on_reference(backbone("mistral-window"))
    texts = [ids_of(count, seed=count, vocab=VOCAB) for count in (1, 4, 2)]
    with torch.inference_mode():
        alone, caches = [], []
        for tokens in texts:
            pair = [blocks.new_cache(64), blocks.new_cache(64)]
            for cache in pair:
                blocks.run_tokens(ids_of(12, seed=9, vocab=VOCAB).tolist(), cache, 0, [4])
            alone.append(blocks.run_through(blocks.embed(tokens), pair[0], 12, [1, 4]))
            caches.append(pair[1])
        parts = [Part(cache, 12, len(tokens)) for cache, tokens in zip(caches, texts, strict=True)]
        rows = torch.cat([blocks.embed(torch.cat(texts)), blocks.embed(texts[0])])  # the last row is padding
        together = blocks.run_batch(rows, parts, [1, 4])
    for place, states in enumerate(zip(*alone, strict=True)):
        assert torch.equal(together[place], torch.cat(states))


@pytest.mark.parametrize("kind", KINDS)
def test_every_drafter_says_plain_decodings_words_and_bits(backbone, kind):
    torch.manual_seed(2)
    heads = ExitHeads(backbone(kind), "adapter", [1, 3], 16, None).requires_grad_(False).to(torch.bfloat16)
    model = Engine(backbone(kind), on_reference(backbone(kind)), heads)
    plain = answer(model)
    for drafter in (almost_known(plain.token_ids), ExitDrafter([9.0, 9.0]), ExitDrafter([4.0, 9.0])):
        drafted = answer(model, drafter)
        assert drafted.stats.tokens_drafted > 0
        assert drafted.token_ids == plain.token_ids
        assert torch.equal(drafted.states, plain.states)


def test_nothing_is_recorded_inside_an_answer(backbone):
    recorded = []
    model = Engine(backbone(), on_reference(backbone(), recorded))
    with torch.inference_mode():
        model.blocks.prepare()
    before = len(recorded)
    assert before == 3 * len(CudaBlocks.candidate_widths)
    plain = answer(model)
    answer(model, almost_known(plain.token_ids), width=16)
    assert len(recorded) == before


def test_a_text_has_no_more_rows_than_its_cache(backbone):
    blocks = on_reference(backbone())
    with pytest.raises(IndexError, match="rows up to 65 in a KV cache of 64"):
        blocks.run_tokens([1] * 5, blocks.new_cache(64), 60, [4])
    with pytest.raises(IndexError, match="of which 320 are embedded"):
        blocks.run_tokens([VOCAB], blocks.new_cache(64), 0, [4])


def test_a_wrong_kernel_is_found_at_load(backbone):
    blocks = on_reference(backbone())
    assert blocks.check() is None

    class Wrong(ReferenceKernels):
        def gated(self, weight, x, out):
            step = super().gated(weight, x, out)
            return lambda: (step(), out.mul_(1.05))

    blocks.kernels = Wrong()
    assert "gate and up" in blocks.check()


def test_what_the_kernels_do_not_take_is_said(backbone, tiny_backbone):
    assert why_not_ours(backbone()) is None
    assert "4 bit" in why_not_ours(tiny_backbone("llama"))
    assert "Llama shape" in why_not_ours(tiny_backbone("gpt2"))
    assert "gemma3_text has norms behind attention and MLP" in why_not_ours(tiny_backbone("gemma3"))


def test_what_they_do_not_know_of_a_model_is_said(backbone, monkeypatch):
    monkeypatch.setattr(backbone().config, "hidden_act", "gelu")
    assert "activation silu" in why_not_ours(backbone())
    with pytest.raises(UnsupportedBackboneError, match="activation silu"):
        on_reference(backbone())


def test_a_prompt_longer_than_a_pass_goes_through_pytorch_in_large_pieces(backbone):
    model = Engine(backbone(), on_reference(backbone()))
    prompt = ids_of(300, vocab=256).tolist()
    seen = []
    run = FusedBlocks.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            FusedBlocks, "run", lambda self, hidden, *rest: seen.append(len(hidden)) or run(self, hidden, *rest)
        )
        plain = answer(model, prompt=prompt, tokens=8)
    assert seen == [299]
    drafted = answer(model, almost_known([0] * 8, prompt), prompt=prompt, tokens=8)
    assert drafted.token_ids == plain.token_ids
    assert torch.equal(drafted.states, plain.states)


def test_a_short_conversation_takes_over_all_that_was_read_and_said(backbone):
    model, prefixes, read = Engine(backbone(), on_reference(backbone())), Prefixes(10**9), []
    run = model.blocks.run_tokens
    model.blocks.run_tokens = lambda tokens, *rest: read.append(len(tokens)) or run(tokens, *rest)

    def said(prompt, kept=None, tokens=8):
        read.clear()
        request = Request(prompt, tokens, stop_ids=())
        return generate(model, request, NoDrafter(), mode="", keep_states=True, prefixes=kept)

    prompt = ids_of(90, vocab=256).tolist()
    first = said(prompt, prefixes)
    second = [*prompt, *first.token_ids, *prompt[3:10]]
    taken_over = said(second, prefixes)
    assert read[0] <= 8  # what is new, and the last token of the first answer
    assert same(taken_over, said(second))
    assert len(read) > 8 + 6
    beyond = [*second, *prompt]  # which PyTorch reads, as it would anew
    assert same(said(beyond, prefixes), said(beyond))
    assert read[0] == len(beyond) - 1


def test_a_prompt_may_come_again_with_room_for_a_longer_answer(backbone):
    model, prefixes = Engine(backbone(), on_reference(backbone())), Prefixes(10**9)
    prompt = ids_of(260, vocab=256).tolist()  # the last step of 64 keys reaches beyond what a short answer needs
    for tokens in (8, 70, 8):
        request = Request(prompt, tokens, stop_ids=())
        found = generate(model, request, NoDrafter(), mode="", keep_states=True, prefixes=prefixes)
        assert same(found, generate(model, request, NoDrafter(), mode="", keep_states=True))
