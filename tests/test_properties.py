"""Whatever is drafted, the answer is plain decoding's, token for token and bit for bit: over random models, heads, drafters,
widths, thresholds, prompts, ends and caps.

Small models in float32, two to four blocks and a vocabulary of 24 tokens, in which random heads are right now and then.
"""

import os
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from tiny_models import byte_tokenizer, family_config
from transformers import AutoModelForCausalLM

from early_exit_cli.backbone.backbone import Backbone
from early_exit_cli.decoding.answer import collect_stats
from early_exit_cli.decoding.loop import decode
from early_exit_cli.decoding.text import Request, Round
from early_exit_cli.drafting.auto import AutoDrafter
from early_exit_cli.drafting.chances import Survival
from early_exit_cli.drafting.drafter import Draft, Drafter, NoDrafter
from early_exit_cli.drafting.eagle import EagleDrafter
from early_exit_cli.drafting.exit import ExitDrafter, FixedDrafter
from early_exit_cli.drafting.lookup import LookupDrafter
from early_exit_cli.drafting.reasons import Match
from early_exit_cli.engine import Engine
from early_exit_cli.heads.eagle import EagleHead
from early_exit_cli.heads.exit_heads import ExitHeads
from early_exit_cli.runtime.fused_blocks import FusedBlocks
from early_exit_cli.runtime.hf_blocks import HFBlocks
from early_exit_cli.runtime.invariant_widths import measure_widths

VOCAB = 24
FEW, MANY = 250, int(os.environ.get("EEXIT_PROPERTIES", "10000"))
POOL = (
    # family, blocks, hidden, runner, heads, draft vocabulary
    ("llama", 2, 16, "fused", "adapter", None),
    ("llama", 4, 32, "hf", "linear", None),
    ("llama3-rope", 3, 32, "fused", "adapter", 12),
    ("linear-rope", 2, 32, "fused", "linear", None),
    ("mistral-window", 3, 16, "fused", "adapter", 20),
    ("mistral-window", 2, 32, "hf", "adapter", None),
    ("qwen2", 3, 16, "fused", "adapter", None),
    ("qwen2-window", 4, 32, "fused", "adapter", 16),
    ("qwen3", 3, 32, "fused", "linear", None),
    ("smollm", 4, 32, "fused", "adapter", 1),
    ("gemma2", 4, 32, "hf", "adapter", None),
    ("gpt_neox", 3, 32, "hf", "linear", None),
    ("mixtral", 2, 16, "hf", "adapter", 16),
)


@dataclass(frozen=True)
class Subject:
    """A small model with random exit heads, and a random EAGLE head where its blocks have the Llama shape."""

    model: Engine
    eagle: EagleHead | None


def subject(number: int) -> Subject:
    family, blocks, hidden, runner, kind, draft_vocab = POOL[number]
    known = family_config(family).to_dict()
    known.pop("layer_types", None)
    small = {"num_hidden_layers": blocks, "hidden_size": hidden, "intermediate_size": 32, "vocab_size": VOCAB}
    small |= {"eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 0, "head_dim": hidden // 4, "max_window_layers": 1}
    if known.get("sliding_window"):
        small["sliding_window"] = 7
    config = type(family_config(family))(**{**known, **{name: value for name, value in small.items() if name in known}})
    torch.manual_seed(number)
    library = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    backbone = Backbone(library, byte_tokenizer(), family, "none")
    runner_of_blocks = HFBlocks(backbone) if runner == "hf" else FusedBlocks(backbone)
    with torch.inference_mode():
        measure_widths(runner_of_blocks)
    vocab = torch.randperm(VOCAB)[:draft_vocab].sort().values if draft_vocab else None
    heads = ExitHeads(backbone, kind, range(1, blocks), 4, vocab).requires_grad_(False)
    heads.start_from(backbone)
    for parameter in heads.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    eagle = None
    if backbone.has_llama_shape:
        eagle = EagleHead(backbone, [1], vocab).requires_grad_(False)
        eagle.start_from(backbone)
    return Subject(Engine(backbone, runner_of_blocks, heads), eagle)


@pytest.fixture(scope="module")
def pool() -> list[Subject]:
    return [subject(number) for number in range(len(POOL))]


class Scripted(Drafter):
    """Proposes the true continuation, with some tokens made wrong; an eager one more of it than it is asked for."""

    name = "scripted"

    def __init__(self, prompt: int, truth: list[int], wrong: list[bool], eager: int) -> None:
        self.prompt, self.truth, self.wrong, self.eager = prompt, truth, wrong, eager

    def draft(self, model, cache, pending, limit, stop_ids):
        done = cache.length + 1 - self.prompt
        tokens = [
            (token + 1) % VOCAB if self.wrong[(done + place) % len(self.wrong)] else token
            for place, token in enumerate(self.truth[done : done + limit + self.eager])
        ]
        return Draft(tokens=tokens, reasons=[Match(1)] * len(tokens))


def drafters(subject: Subject, prompt: list[int], truth: list[int]) -> st.SearchStrategy[Drafter]:
    """Every kind of drafter, with whatever it can be told."""
    heads = len(subject.model.heads)
    thresholds = st.sampled_from([float("-inf"), 0.0, 1e-3, 1.0, 2.0, 2.5, 3.0, 3.2, float("inf")])
    costs = st.sampled_from([lambda rows: 1.0, lambda rows: 1.0 + 0.05 * rows, lambda rows: float(rows)])
    chances = st.lists(st.floats(0.01, 0.99), min_size=6, max_size=6)
    survivals = st.lists(
        st.builds(Survival, intercept=st.floats(-9, 9), slope=st.floats(-3, 3), mean=st.floats(0.0, 1.0)),
        min_size=1,
        max_size=4,
    )
    free = st.floats(0.0, 0.2)
    exits = st.builds(
        ExitDrafter,
        st.lists(thresholds, min_size=heads, max_size=heads),
        st.none() | st.lists(st.integers(0, heads - 1), unique=True).map(sorted),
        st.sampled_from(["entropy", "confidence"]),
    )
    lookup = st.builds(LookupDrafter, costs, chances)
    eagle = st.nothing()
    if subject.eagle is not None:
        eagle = st.builds(EagleDrafter, st.just(subject.eagle), survivals, costs, free, free)
    lengths = st.integers(0, 15)
    auto = st.tuples(lookup, exits | eagle, lengths, lengths).map(
        lambda drawn: AutoDrafter([(drawn[0], drawn[2]), (drawn[1], drawn[3])])
    )
    wrong = st.lists(st.booleans(), min_size=1, max_size=7)
    scripted = st.builds(Scripted, st.just(len(prompt)), st.just(truth), wrong, st.sampled_from([0, 0, 0, 1, 15]))
    fixed = st.integers(0, heads - 1).map(FixedDrafter)
    return st.one_of(exits, fixed, lookup, eagle, auto, scripted, st.builds(NoDrafter))


PROMPTS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30) | st.tuples(
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=5), st.integers(1, 16)
).map(lambda drawn: drawn[0] * drawn[1])


def answer(model: Engine, request: Request, drafter: Drafter, **more) -> list[Round]:
    return list(decode(model, request, drafter, keep_states=True, **more))


def tokens_of(rounds: list[Round]) -> list[int]:
    return [token for step in rounds for token in step.tokens]


def check_case(pool: list[Subject], data: st.DataObject, seen: Counter) -> None:
    subject = data.draw(st.sampled_from(pool), label="model")
    model = subject.model
    prompt, cap = data.draw(PROMPTS, label="prompt"), data.draw(st.integers(1, 28), label="cap")
    truth = tokens_of(answer(model, Request(prompt, cap, stop_ids=()), NoDrafter()))
    ends = st.sampled_from(truth) | st.integers(0, VOCAB - 1)
    stops = data.draw(st.frozensets(ends, max_size=3), label="ends")
    width = data.draw(st.integers(1, 16), label="width")
    trace = data.draw(st.integers(0, 9), label="trace") == 0
    drafter = data.draw(drafters(subject, prompt, truth), label="drafter")

    request = Request(prompt, cap, stop_ids=stops)
    plain = answer(model, request, NoDrafter())
    end = next((place + 1 for place, token in enumerate(truth) if token in stops), cap)
    assert tokens_of(plain) == truth[:end]
    found = answer(model, request, drafter, width=width, trace=trace)
    assert tokens_of(found) == truth[:end]
    states, theirs = (torch.cat([step.states for step in rounds]) for rounds in (found, plain))
    assert torch.equal(states, theirs)
    check_counts(model, found, cap, end, trace)
    again = answer(model, request, drafter, width=width)  # nothing is left over from a text
    assert tokens_of(again) == truth[:end]

    seen["cases"] += 1
    seen[drafter.name] += 1
    seen["accepted"] += sum(step.accepted for step in found)
    seen["partly rejected"] += sum(0 < step.accepted < step.drafted for step in found)
    seen["all rejected"] += sum(0 == step.accepted < step.drafted for step in found)
    seen["ended inside a draft"] += end < cap and found[-1].accepted == len(found[-1].tokens)


def check_counts(model: Engine, rounds: list[Round], cap: int, end: int, trace: bool) -> None:
    for number, step in enumerate(rounds, start=1):
        kept = len(step.tokens)
        assert kept == len(step.decided_by) == len(step.states) > 0
        assert 0 <= step.accepted <= min(step.drafted, kept)
        assert kept == step.accepted + 1 or number == len(rounds)  # only the last round may lack its bonus token
        assert all(reason is not None for reason in step.decided_by[: step.accepted])
        assert all(reason is None for reason in step.decided_by[step.accepted :])
        assert len(step.rejected) <= step.drafted - step.accepted
        assert len(step.traced) == (kept if trace else 0)
    stats = collect_stats(model, "x", rounds, 3, 1.0, 0.1)
    assert stats.total_tokens_generated == sum(stats.exit_distribution.values()) == end <= cap
    assert stats.tokens_accepted == end - stats.exit_distribution["full"] <= stats.tokens_drafted
    assert stats.accept_length == end / len(rounds) >= 1.0
    assert (stats.acceptance_rate is None) == (stats.tokens_drafted == 0) == (stats.draft_attempts == 0)


def check_seen(seen: Counter, cases: int) -> None:
    """That what was to be tested did come about."""
    assert seen["cases"] >= cases
    names = {"adaptive_early_exit", "fixed_layerskip", "lookup", "eagle", "auto", "scripted", "full"}
    assert all(seen[name] > cases / 50 for name in names), seen
    assert all(seen[what] > cases / 20 for what in ("accepted", "partly rejected", "all rejected")), seen
    assert seen["ended inside a draft"] > cases / 100, seen


COMMON = dict(
    deadline=None, database=None, suppress_health_check=list(HealthCheck), phases=(Phase.generate, Phase.shrink)
)


def test_the_small_models_are_of_many_kinds_and_keep_their_bits(pool):
    assert all(subject.model.blocks.is_invariant for subject in pool)
    plain = [
        tuple(tokens_of(answer(subject.model, Request([1, 2, 3], 20, stop_ids=()), NoDrafter()))) for subject in pool
    ]
    assert len(set(plain)) == len(pool)


def test_no_drafter_changes_a_token_or_a_bit(pool):
    seen: Counter = Counter()

    @settings(max_examples=FEW, derandomize=True, **COMMON)
    @given(st.data())
    def cases(data):
        check_case(pool, data, seen)

    cases()
    check_seen(seen, FEW)


@pytest.mark.slow
def test_no_drafter_changes_a_token_or_a_bit_in_ten_thousand_cases(pool):
    seen: Counter = Counter()

    @seed(20261101)
    @settings(max_examples=MANY, **COMMON)
    @given(st.data())
    def cases(data):
        check_case(pool, data, seen)

    cases()
    print(dict(seen))
    check_seen(seen, MANY)
