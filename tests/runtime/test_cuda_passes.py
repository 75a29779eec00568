"""SmolLM2 whole on our kernels on a card: every drafter and every width leave plain decoding's tokens and bits."""

import itertools

import pytest
import torch
from drafters import ScriptedDrafter, tokens_of
from runs import answer, ids_of, same

from early_exit_cli.bundle.load import load_engine
from early_exit_cli.config import BackboneConfig, BundleConfig, InferenceConfig
from early_exit_cli.decoding.answer import generate
from early_exit_cli.decoding.batch import decode_batch, generate_batch
from early_exit_cli.decoding.loop import decode
from early_exit_cli.decoding.prefixes import Prefixes
from early_exit_cli.decoding.text import Request
from early_exit_cli.drafting.chances import Survival
from early_exit_cli.drafting.choose import make_drafter
from early_exit_cli.drafting.drafter import NoDrafter
from early_exit_cli.drafting.eagle import EagleDrafter
from early_exit_cli.drafting.lookup import LookupDrafter
from early_exit_cli.heads.cuda_eagle import CudaEagle
from early_exit_cli.runtime.cuda_blocks import SHORT_PROMPT, CudaBlocks

pytestmark = pytest.mark.gpu

TEXTS = (
    "Write three sentences about the sea.",
    "List the planets of the solar system, and say them once more: list the planets of the solar system.",
    "What is 12 times 12? " * 30,
)
TOKENS = 64


@pytest.fixture(scope="module")
def model():
    return load_engine(BackboneConfig(device="cuda"), BundleConfig())


@pytest.fixture(scope="module")
def plain(model):
    """(prompt, its plain answer) of each text."""
    prompts = [model.backbone.encode_prompt(text) for text in TEXTS]
    return [(prompt, answer(model, prompt=prompt, tokens=TOKENS)) for prompt in prompts]


def test_a_model_on_a_gpu_runs_on_our_kernels(model):
    assert isinstance(model.blocks, CudaBlocks)
    assert model.blocks.without_kernels is None
    assert model.blocks.is_invariant
    assert model.blocks.widths == CudaBlocks.candidate_widths
    with torch.inference_mode():
        assert model.blocks.check() is None


@pytest.mark.parametrize("width", [2, 3, 4, 8, 16])
def test_a_known_continuation_leaves_words_and_bits(model, plain, width):
    """With tokens wrong here and there, so that at every width some drafts hold one."""
    drafters = [
        (ScriptedDrafter(own.token_ids, lambda i: i % 11 in (1, 2, 8), prompt), prompt) for prompt, own in plain
    ]
    drafted = [answer(model, drafter, prompt, TOKENS, width) for drafter, prompt in drafters]
    accepted = sum(own.stats.tokens_accepted for own in drafted)
    assert 0 < accepted < sum(own.stats.tokens_drafted for own in drafted)
    for own, (_, expected) in zip(drafted, plain, strict=True):
        assert same(own, expected)


def drafter_of(model, kind):
    """(drafter, width). The eager ones draft whatever it costs here, the others as they are measured to pay."""
    if kind == "eager eagle":
        survival = Survival(intercept=2.0, slope=-0.5, mean=0.9)
        return EagleDrafter(model.eagle, [survival], lambda rows: 1 + 0.01 * rows, 0.05, 0.02), 16
    if kind == "eager lookup":
        return LookupDrafter(lambda rows: 10 + 0.1 * rows), 16
    if kind == "every exit":
        return make_drafter(model, InferenceConfig(read_heads="all"), "exit")
    return make_drafter(model, InferenceConfig(), kind)


@pytest.mark.parametrize("kind", ["every exit", "eager eagle", "eager lookup", "exit", "eagle", "lookup", "auto"])
def test_every_drafter_leaves_words_and_bits(model, plain, kind):
    drafter, width = drafter_of(model, kind)
    drafted = [answer(model, drafter, prompt, TOKENS, width) for prompt, _ in plain]
    if " " in kind:
        assert sum(own.stats.tokens_drafted for own in drafted) > 0
    for own, (_, expected) in zip(drafted, plain, strict=True):
        assert same(own, expected)


def test_the_eagle_head_runs_on_our_kernels(model):
    assert isinstance(drafter_of(model, "eager eagle")[0].runner, CudaEagle)


@pytest.mark.parametrize("kind", ["none", "every exit", "eager eagle", "auto"])
def test_texts_decoded_together_are_each_what_they_are_alone(model, plain, kind):
    drafter, width = drafter_of(model, kind)
    requests = [Request(prompt, TOKENS) for prompt, _ in plain]
    for batch in (2, 3):
        texts = generate_batch(model, requests, drafter, mode="", batch=batch, width=width)
        assert [text.token_ids for text in texts] == [expected.token_ids for _, expected in plain]
        rounds = [[] for _ in requests]
        options = dict(batch=batch, width=width, keep_states=True)
        for number, step, _ in decode_batch(model, requests, drafter, **options):
            rounds[number].append(step)
        for own, (_, expected) in zip(rounds, plain, strict=True):
            assert tokens_of(own) == expected.token_ids
            assert torch.equal(torch.cat([step.states for step in own]), expected.states)


def test_an_answer_is_the_same_every_time_and_after_other_texts(model, plain):
    for prompt, expected in (*plain, *plain[::-1]):
        rounds = list(decode(model, Request(prompt, TOKENS), NoDrafter(), keep_states=True))
        assert tokens_of(rounds) == expected.token_ids
        assert torch.equal(torch.cat([step.states for step in rounds]), expected.states)


def test_blocks_in_parts_give_the_bits_of_all_blocks(model):
    """As early exits run them: some blocks, then the others."""
    blocks, depth = model.blocks, model.blocks.num_blocks
    ids = ids_of(256, vocab=model.backbone.vocab_size).tolist()
    with torch.inference_mode():
        for width, middle in itertools.product((1, 4, 16), (1, depth // 2, depth - 1)):
            caches = blocks.new_cache(256), blocks.new_cache(256)
            for at in range(0, 64 if width == 1 else 256, width):
                tokens = ids[at : at + width]
                expected = blocks.run_tokens(tokens, caches[0], at, [middle, depth])
                half = blocks.run(blocks.embed_tokens(tokens), caches[1], at, 0, middle)
                assert torch.equal(half, expected[0]), (width, middle, at)
                assert torch.equal(blocks.run(half, caches[1], at, middle, depth), expected[1]), (width, middle, at)
            for ours, theirs in zip(caches[1].keys + caches[1].values, caches[0].keys + caches[0].values, strict=True):
                assert torch.equal(ours, theirs)


@pytest.mark.parametrize("width", [1, 8, 16])
def test_kernels_that_start_early_give_the_bits_of_kernels_that_wait(model, width):
    """A recorded pass lets kernels start while the ones before still run; here each is waited for."""
    blocks, depth = model.blocks, model.blocks.num_blocks
    ids = ids_of(320, vocab=model.backbone.vocab_size).tolist()
    with torch.inference_mode():
        caches = blocks.new_cache(336), blocks.new_cache(336)
        for at in (*range(0, 304, 16), 304 - width):  # over two segments
            own = ids[at : at + 16] if at % 16 == 0 else ids[at : at + width]
            (expected,) = blocks.run_tokens(own, caches[0], at, [depth])
            for _ in range(3):
                (again,) = blocks.run_tokens(own, caches[0], at, [depth])
                assert torch.equal(again, expected)
            blocks._stand(caches[1], at, len(own), own)
            buffers = blocks._buffers(len(own))
            for step in blocks._steps(blocks.kernels, blocks.place, buffers, 0, depth, by_token=True):
                step()
                torch.cuda.synchronize()
            assert torch.equal(buffers.hidden[depth], expected)
        for ours, theirs in zip(caches[1].keys + caches[1].values, caches[0].keys + caches[0].values, strict=True):
            assert torch.equal(ours, theirs)


def test_a_pass_does_not_wait_for_the_gpu(model):
    blocks = model.blocks
    with torch.inference_mode():
        cache = blocks.new_cache(64)
        blocks.finish(blocks.run_tokens([1] * 8, cache, 0, [blocks.num_blocks])[0])
        torch.cuda.set_sync_debug_mode("error")
        try:
            for at in range(8, 56, 8):
                blocks.finish(blocks.run_tokens([2] * 8, cache, at, [blocks.num_blocks])[0])
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", ["none", "eager eagle"])
def test_a_short_conversation_takes_over_all_that_was_read_and_said(model, kind):
    prefixes = Prefixes(10**9)
    prompt = model.backbone.encode_prompt(TEXTS[0])

    def said(prompt, kept=None):
        drafter, width = drafter_of(model, kind)
        request = Request(prompt, 24, stop_ids=())
        return generate(model, request, drafter, mode="", width=width, keep_states=True, prefixes=kept)

    first = said(prompt, prefixes)
    second = [*prompt, *first.token_ids, *prompt[-8:]]
    assert len(second) <= SHORT_PROMPT
    assert prefixes.kept[0].reusable(model.blocks, second, []) >= len(prompt) + 22
    assert same(said(second, prefixes), said(second))
