"""Heads in compiled code, beside PyTorch's: the shipped ones over the real small model."""

import itertools

import pytest
import torch
from native_runners import (  # noqa: F401 (fixtures among them)
    AVX2_WHEN_SLOW,
    blocks_by_instruction_set,
    blocks_of_any_instruction_set,
    compiled_blocks,
    real_ids,
)

from early_exit_cli.backbone.output import LogitMap
from early_exit_cli.bundle.load import load_engine
from early_exit_cli.config import SHIPPED_BUNDLE, BackboneConfig, BundleConfig, SamplingConfig
from early_exit_cli.heads.eagle_runner import EagleRunner
from early_exit_cli.heads.exit_heads import ExitHeads
from early_exit_cli.heads.exit_runner import ExitRunner, NativeExitRunner, exit_runner
from early_exit_cli.heads.native_eagle import NativeEagle, eagle_runner
from early_exit_cli.heads.uncertainty import entropy
from early_exit_cli.sampling import Sampler


@AVX2_WHEN_SLOW
def test_compiled_eagle_steps_say_what_pytorchs_say(any_blocks, smollm2):
    """The shipped head, over a prompt read in pieces and rolled forward: near states, equal choices, near entropies."""
    head = load_engine(BackboneConfig(device="cpu"), BundleConfig(bundle=SHIPPED_BUNDLE)).eagle
    ids = real_ids(smollm2, 160)
    words = ids.tolist()
    native, plain = eagle_runner(head), EagleRunner(head)
    assert type(native) is NativeEagle
    columns = {token: column for column, token in enumerate(head.draft_vocab.tolist())}
    agreed = rolled = 0
    with torch.inference_mode():
        cache, states = any_blocks.new_cache(192), [any_blocks.embed(ids[:-1])]
        for first, last in itertools.pairwise([0, *head.exit_layers, any_blocks.num_blocks]):
            states.append(any_blocks.run(states[-1], cache, 0, first, last))
        read = [*states[1:-1], any_blocks.final_norm(states[-1])]
        start = 0
        for end in (60, 61, 64, 72, 100, 101, 103, 130, 159):
            verified = (words[start + 1 : end + 1], [state[start:end] for state in read])
            both = [runner.read(*verified) for runner in (native, plain)]
            for ahead in range(1, 4):
                (ours, sure), (theirs, as_sure) = native.choose(both[0]), plain.choose(both[1])
                assert (both[0] - both[1]).float().norm() < 0.1 * both[1].float().norm()
                assert sure == pytest.approx(as_sure, abs=1.0)
                assert native.logits[0, columns[theirs]] > native.logits.max() - 0.5  # both round their weights to int8
                agreed, rolled = agreed + (ours == theirs), rolled + 1
                both = [r.step(theirs, h, ahead) for r, h in zip((native, plain), both, strict=True)]
            start = end
    assert rolled == 27
    assert agreed > 20


def test_what_the_compiled_eagle_says_of_itself_is_so(smollm2):
    """Choice and entropy of the logits beside them, and another text does not disturb the first."""
    head = load_engine(BackboneConfig(device="cpu"), BundleConfig(bundle=SHIPPED_BUNDLE)).eagle
    runner = eagle_runner(head)
    states = [torch.randn(5, smollm2.hidden_size, dtype=torch.bfloat16) for _ in range(3)]
    with torch.inference_mode():
        hidden = runner.read([5, 6, 7, 8, 9], states)
        token, uncertainty = runner.choose(hidden)
        assert uncertainty == pytest.approx(float(entropy(runner.logits)), abs=1e-3)
        assert token == int(head.draft_vocab[runner.logits.argmax()])
        other = runner.fork()
        other.read([1, 2], [state[:2] for state in states])
        assert runner.choose(hidden) == (token, uncertainty)
        assert runner.cache.length == 5
        assert torch.equal(runner.step(3, hidden, 1), runner.step(3, hidden, 1))
        runner.rewind()
        assert torch.equal(runner.read([5, 6, 7, 8, 9], states), hidden)


def heads_of_kind(kind, backbone):
    """The shipped ones, or a linear one that begins as the backbone's own norm and LM head."""
    if kind == "adapter":
        return load_engine(BackboneConfig(device="cpu"), BundleConfig(bundle=SHIPPED_BUNDLE)).heads
    heads = ExitHeads(backbone, "linear", [24], 0, None)
    heads.start_from(backbone)
    return heads.to(torch.bfloat16).requires_grad_(False)


@AVX2_WHEN_SLOW
@pytest.mark.parametrize("kind", ["adapter", "linear"])
def test_compiled_exit_heads_say_what_pytorchs_say(any_blocks, smollm2, kind):
    """Each head over each place of a text: near logits, and choice, entropy and confidence of these."""
    heads = heads_of_kind(kind, smollm2)
    native, plain = exit_runner(heads), ExitRunner(heads)
    assert type(native) is NativeExitRunner
    ids = real_ids(smollm2, 60)
    with torch.inference_mode():
        states = any_blocks.run_through(any_blocks.embed(ids), any_blocks.new_cache(96), 0, heads.exit_layers)
        agreed = 0
        for head, state in itertools.product(range(len(heads)), range(len(ids))):
            row = states[head][state : state + 1]
            entropies = native.read(head, [row]), plain.read(head, [row])
            assert entropies[0] == pytest.approx(float(entropy(native.logits)), abs=1e-3)
            assert entropies[0] == pytest.approx(entropies[1], abs=0.3)
            assert native.token() == int(heads.token_ids(native.logits.argmax()))
            assert (native.logits - plain.logits).norm() < 0.05 * plain.logits.float().norm()
            assert -native.read(head, [row], "confidence") == pytest.approx(
                float(native.logits.softmax(-1).max()), abs=1e-4
            )
            agreed += native.token() == plain.token()
    assert agreed > 0.9 * len(heads) * len(ids)


def test_a_sampled_draft_of_a_compiled_exit_head_is_made_from_its_logits(smollm2):
    heads = load_engine(BackboneConfig(device="cpu"), BundleConfig(bundle=SHIPPED_BUNDLE)).heads
    reader = exit_runner(heads)
    generator = torch.Generator().manual_seed(0)
    state = torch.randn(1, smollm2.hidden_size, generator=generator).to(torch.bfloat16)
    drawn = set()
    for seed in range(20):
        sampler = Sampler(SamplingConfig(temperature=1.0, seed=seed))
        sampler.begin(smollm2.vocab_size, [1])
        with torch.inference_mode():
            reader.read(0, [state])
            token = reader.token(sampler)
            assert token == sampler.draft(reader.logits, heads.draft_vocab, [])
        drawn.add(token)
    assert len(drawn) > 1


@pytest.mark.parametrize("other", ["linear, float32", "float32", "cap", "rank"])
def test_exit_heads_of_other_forms_are_read_by_pytorch(smollm2, other):
    kind, rank = ("linear" if "linear" in other else "adapter"), (20 if other == "rank" else 32)
    heads = ExitHeads(smollm2, kind, [8], rank, torch.arange(64)).to(
        torch.float32 if "float32" in other else torch.bfloat16
    )
    if other == "cap":
        heads.lm_head.logit_map = LogitMap(cap=30.0)
    assert type(exit_runner(heads)) is ExitRunner
