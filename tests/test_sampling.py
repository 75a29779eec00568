"""Sampling: the library's distribution, exactly, and with one seed the same words and bits whoever drafts."""

import itertools
import math
from collections import Counter

import pytest
import torch
from drafters import always, make_drafter, some_head, tokens_of
from pydantic import ValidationError
from tiny_models import byte_tokenizer, family_config
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from early_exit_cli.backbone.load import load_backbone
from early_exit_cli.calibration.draft_chances import fit_temperature
from early_exit_cli.calibration.held_out import TEMPERATURES, overlap, read_held_out
from early_exit_cli.config import BackboneConfig, SamplingConfig
from early_exit_cli.data.documents import Document
from early_exit_cli.data.packing import pack
from early_exit_cli.decoding.answer import generate
from early_exit_cli.decoding.batch import decode_batch
from early_exit_cli.decoding.loop import decode
from early_exit_cli.decoding.text import Request
from early_exit_cli.drafting.auto import AutoDrafter
from early_exit_cli.drafting.drafter import NoDrafter
from early_exit_cli.drafting.eagle import EagleDrafter
from early_exit_cli.drafting.exit import ExitDrafter, FixedDrafter
from early_exit_cli.drafting.lookup import LookupDrafter
from early_exit_cli.engine import Engine
from early_exit_cli.heads.eagle import EagleHead
from early_exit_cli.heads.exit_heads import ExitHeads
from early_exit_cli.runtime.fused_blocks import FusedBlocks
from early_exit_cli.runtime.invariant_widths import measure_widths
from early_exit_cli.sampling import GREEDY, Sampler, make_chooser, nucleus, penalized, truncated

PROMPT = [72, 101, 108, 108, 111, 32, 72, 101, 108, 108, 111, 32]
SETTINGS = {
    "pure": dict(temperature=1.0),
    "cool": dict(temperature=0.7),
    "processed": dict(temperature=0.9, top_k=40, top_p=0.9, min_p=0.02, repetition_penalty=1.2),
    "penalty alone": dict(repetition_penalty=1.3),
}
DRAFTERS = ("exit", "fixed", "lookup", "eagle", "auto")


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("who", DRAFTERS)
@pytest.mark.parametrize("family", ["llama", "mistral-window"])
def test_a_seed_gives_the_same_words_and_bits_with_every_drafter(tiny_model, family, who, name):
    model = tiny_model(family)
    accepted = rejected = 0
    for seed in range(2):
        settings = SamplingConfig(**SETTINGS[name], seed=seed)
        plain, drafted = (
            generate(
                model, Request(PROMPT, 24, chooser=make_chooser(settings)), drafter, mode="x", width=6, keep_states=True
            )
            for drafter in (NoDrafter(), make_drafter(who, model))
        )
        assert drafted.token_ids == plain.token_ids
        assert torch.equal(drafted.states, plain.states)
        accepted += drafted.stats.tokens_accepted
        rejected += drafted.stats.tokens_drafted - drafted.stats.tokens_accepted
    assert accepted or who not in ("exit", "fixed")  # the others guess at a random model
    assert rejected


def test_a_seed_is_reproducible_and_another_one_says_something_else(tiny_model):
    model = tiny_model("llama")

    def text(seed):
        chooser = make_chooser(SamplingConfig(temperature=1.0, seed=seed))
        return [
            t
            for step in decode(model, Request(PROMPT, 20, chooser=chooser, stop_ids=()), NoDrafter())
            for t in step.tokens
        ]

    assert text(0) == text(0)
    assert len({tuple(text(seed)) for seed in range(5)}) == 5


def test_without_settings_decoding_is_greedy():
    assert make_chooser(SamplingConfig()) is GREEDY
    assert make_chooser(SamplingConfig(seed=7)) is GREEDY


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 7, 5000])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.5, 0.01])
@pytest.mark.parametrize("min_p", [0.0, 0.05, 1.0])
def test_the_same_tokens_survive_as_in_the_library(temperature, top_k, top_p, min_p):
    generator = torch.Generator().manual_seed(0)
    settings = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    for scale in (0.5, 3.0):
        scores = torch.randn(3000, generator=generator) * scale
        kept_scores, kept = truncated(scores / temperature, settings)
        expected = warpers(torch.zeros(1, 1, dtype=torch.int64), scores[None])[0]
        ours = torch.full_like(scores, -math.inf)
        ours[torch.arange(scores.numel()) if kept is None else kept] = kept_scores
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("cut", [{"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}])
def test_something_is_left_of_scores_that_are_no_numbers(cut):
    sampler = Sampler(SamplingConfig(temperature=0.7, **cut))
    sampler.begin(9, [1])
    assert 0 <= sampler.draft(torch.full((1, 9), math.nan), None, []) < 9


def test_a_nucleus_wider_than_the_first_guess_is_found_in_the_whole_vocabulary():
    scores = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * 0.1
    assert len(nucleus(scores, 0.9)) > 10_000


def test_the_repetition_penalty_is_the_librarys():
    scores = torch.randn(300, generator=torch.Generator().manual_seed(0))
    text = [5, 7, 7, 299]
    repeated = torch.zeros(300, dtype=torch.bool)
    repeated[text] = True
    expected = RepetitionPenaltyLogitsProcessor(1.4)(torch.tensor([text]), scores[None].clone())[0]
    ours = penalized(scores, repeated, 1.4)
    assert torch.equal(ours, expected)
    vocab = torch.tensor([299, 3, 5])  # a draft vocabulary: the same tokens, elsewhere
    assert torch.equal(penalized(scores[vocab], repeated[vocab], 1.4), expected[vocab])


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Eight tokens, two blocks, two heads: every text of three tokens has a probability that can be worked out."""
    folder = tmp_path_factory.mktemp("eight")
    torch.manual_seed(4)
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.5,
        eos_token_id=7,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    backbone = load_backbone(BackboneConfig(model_name=str(folder), quantization="none", device="cpu"))
    blocks = FusedBlocks(backbone)
    with torch.inference_mode():
        measure_widths(blocks)
    heads = ExitHeads(backbone, "adapter", [1], 4, None).requires_grad_(False)
    return Engine(backbone, blocks, heads)


def exact_distribution(model, prompt, settings, length):
    """Probability of each text, from the library's own forward and processors."""
    warpers = LogitsProcessorList()
    if settings.repetition_penalty != 1:
        warpers.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
    warpers.append(TemperatureLogitsWarper(settings.temperature))
    if settings.top_k:
        warpers.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1:
        warpers.append(TopPLogitsWarper(settings.top_p))
    found = {(): 1.0}
    for _ in range(length):
        longer = {}
        for text, chance in found.items():
            ids = torch.tensor([[*prompt, *text]])
            with torch.inference_mode():
                scores = model.backbone.model(input_ids=ids).logits[:, -1].float()
            for token, share in enumerate(warpers(ids, scores)[0].softmax(-1).tolist()):
                if share:
                    longer[(*text, token)] = chance * share
        found = longer
    return found


def small_drafter(name, model):
    torch.manual_seed(5)
    head = EagleHead(model.backbone, [1], None)
    head.start_from(model.backbone)
    eagle = EagleDrafter(head.requires_grad_(False), always(), lambda rows: 10.0, 0.1, 0.1, 0.7)
    lookup = LookupDrafter(lambda rows: 10.0 + 0.1 * rows)
    return {
        "none": NoDrafter,
        "exit": lambda: ExitDrafter([1.9], temperature=0.7),
        "lookup": lambda: lookup,
        "eagle": lambda: eagle,
        "auto": lambda: AutoDrafter([(lookup, 15), (eagle, 15)]),
    }[name]()


@pytest.mark.parametrize("name", ["none", "exit", "lookup", "eagle", "auto"])
@pytest.mark.parametrize(
    "settings",
    [dict(temperature=1.0), dict(temperature=0.8, top_k=5, top_p=0.9, repetition_penalty=1.3)],
    ids=["pure", "processed"],
)
def test_three_tokens_together_have_the_exact_distribution(small, name, settings):
    """Pearson's chi-square over texts of three tokens; rare ones are taken together (five expected at least)."""
    prompt, samples, length = [1, 2, 1, 3, 1, 2], 600, 3
    expected = exact_distribution(small, prompt, SamplingConfig(**settings), length)
    drafter = small_drafter(name, small)
    counts, accepted, rejected = Counter(), 0, 0
    for seed in range(samples):
        chooser = Sampler(SamplingConfig(**settings, seed=seed))
        rounds = list(decode(small, Request(prompt, length, chooser=chooser, stop_ids=()), drafter, width=4))
        counts[tuple(itertools.chain.from_iterable(step.tokens for step in rounds))] += 1
        accepted += sum(step.accepted for step in rounds)
        rejected += sum(step.drafted - step.accepted for step in rounds)
    assert set(counts) <= set(expected)
    if name != "none":
        assert accepted > 20
        assert rejected > 20
    common = {text: chance for text, chance in expected.items() if samples * chance >= 5}
    cells = [(counts[text], samples * chance) for text, chance in common.items()]
    seen_rare = samples - sum(count for count, _ in cells)
    cells.append((seen_rare, samples * (1 - sum(common.values()))))
    cells = [(seen, mean) for seen, mean in cells if mean > 1e-6]
    statistic = sum((seen - mean) ** 2 / mean for seen, mean in cells)
    freedom = len(cells) - 1
    assert freedom > 15
    # Wilson and Hilferty 1931: the cube root of chi-square / freedom is nearly normal; 4 deviations
    bound = freedom * (1 - 2 / (9 * freedom) + 4 * math.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < bound


def test_the_overlap_is_one_where_both_say_the_same():
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    shares = overlap(logits, logits, None)
    assert torch.allclose(shares[:, TEMPERATURES.index(1.0)], torch.ones(5))
    vocab = torch.arange(10)
    reduced = overlap(logits, logits[:, :10], vocab)
    best = logits.softmax(-1)[:, :10].sum(-1)
    assert (reduced <= best[:, None] + 1e-6).all()


@pytest.mark.parametrize("sharpness", [1 / 0.6, 1 / 0.8, 1 / 1.2])
def test_the_fitted_temperature_undoes_what_a_head_is_too_sure_of(sharpness):
    logits = 3 * torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    assert fit_temperature(overlap(logits, logits / sharpness, None)) == pytest.approx(1 / sharpness)


def test_temperatures_are_fitted_for_the_heads_that_are_there(tiny_model):
    model = tiny_model("llama")
    generator = torch.Generator().manual_seed(0)
    documents = [Document(torch.randint(256, (60,), generator=generator).tolist(), "s", 5) for _ in range(4)]
    batches = pack(documents, 64, 0)
    alone = read_held_out(model, batches).overlaps
    assert fit_temperature(alone["exit"]) in TEMPERATURES
    assert fit_temperature(alone.get("eagle")) == 1.0  # there is no such head
    with_both = Engine(model.backbone, model.blocks, model.heads, eagle=some_head(model.backbone))
    both = read_held_out(with_both, batches).overlaps
    assert torch.equal(both["exit"], alone["exit"])
    assert fit_temperature(both["eagle"]) in TEMPERATURES


@pytest.mark.parametrize("cut", [dict(top_k=5), dict(top_p=0.5), dict(min_p=0.1)])
def test_a_cut_without_a_temperature_is_refused(cut):
    with pytest.raises(ValidationError, match="temperature"):
        SamplingConfig(**cut)


# Shared noise (docs/decisions/0013): where head and backbone have one distribution, every draft is accepted


@pytest.mark.parametrize("vocab", [None, torch.arange(0, 50, 2)], ids=["whole", "draft vocabulary"])
@pytest.mark.parametrize("kept", [5, 3, 1])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_equal_distributions_choose_alike_at_every_place(settings, kept, vocab):
    """Round by round, of which `kept` tokens are committed: where a draft stands counts, not when it was made."""
    chooser = make_chooser(SamplingConfig(**settings, seed=3))
    chooser.begin(50, [4, 7, 7])
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        logits = 2 * torch.randn(5, 50, generator=generator)
        if vocab is not None:  # the backbone, too, says nothing else
            logits[:, 1::2] = -math.inf
        drafted = []
        for row in logits[:4]:
            said = row[None] if vocab is None else row[None, vocab]
            drafted.append(chooser.draft(said, vocab, drafted))
        choices = chooser.choose(logits, drafted)
        assert choices[:4] == drafted
        assert len(choices) == 5
        chooser.commit(choices[:kept])


def test_processors_of_the_caller_see_the_text_so_far_and_stand_for_the_settings():
    settings = SamplingConfig(temperature=0.7, top_k=9, repetition_penalty=1.3, seed=4)
    processors = LogitsProcessorList(
        [RepetitionPenaltyLogitsProcessor(1.3), TemperatureLogitsWarper(0.7), TopKLogitsWarper(9)]
    )
    seen = []

    def watched(ids, scores):
        seen.append(ids.tolist())
        return processors(ids, scores)

    theirs, ours = Sampler(settings, watched), Sampler(settings)
    for chooser in (theirs, ours):
        chooser.begin(50, [3, 3])
        text = [3, 3]
        generator = torch.Generator().manual_seed(0)
        seen.clear()
        for _ in range(5):
            said = torch.randn(3, 50, generator=generator)
            first = chooser.choose(said[:1], [])
            drafted = [*first, 49]
            choices = chooser.choose(said, drafted)
            assert choices[:1] == first
            text += choices
            chooser.commit(choices)
            if chooser is not ours:
                start = text[: len(text) - len(choices)]
                assert seen[-len(choices) :] == [[start + drafted[:row]] for row in range(len(choices))]
        if chooser is theirs:
            expected = text
        assert text == expected


@pytest.mark.parametrize("text_temperature", [1.0, 0.6])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_a_heads_temperature_undoes_what_it_is_too_sure_of(temperature, text_temperature):
    chooser = make_chooser(SamplingConfig(temperature=text_temperature, seed=2))
    chooser.begin(50, [1])
    logits = 2 * torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    for row in logits:
        drafted = chooser.draft(row[None] * temperature, None, [], temperature)
        assert chooser.choose(row[None], []) == [drafted]
        chooser.commit([drafted])


def test_a_greedy_draft_is_the_best_token_of_the_draft_vocabulary():
    said = torch.tensor([[0.5, 3.0, 1.0]])
    assert GREEDY.draft(said, torch.tensor([5, 9, 2]), []) == 9
    assert GREEDY.draft(said, None, []) == 1


def test_every_place_has_noise_of_its_own():
    """The same logits everywhere: what is chosen differs from place to place, within a round and between rounds."""
    chooser = make_chooser(SamplingConfig(temperature=1.0, seed=1))
    chooser.begin(1000, [1])
    flat = torch.zeros(5, 1000)
    tokens = []
    for _ in range(4):
        drafted = []
        for row in flat[:4]:
            drafted.append(chooser.draft(row[None], None, drafted))
        tokens += chooser.choose(flat, drafted)
        chooser.commit(tokens[-5:])
    assert len(set(tokens)) == 20


@pytest.fixture(scope="module")
def echoing(tmp_path_factory):
    """Its last two blocks add nothing, so a head that reads before them has the backbone's own distribution."""
    folder = tmp_path_factory.mktemp("echoing")
    torch.manual_seed(0)
    model = LlamaForCausalLM(family_config("llama"))
    for block in model.model.layers[4:]:
        block.self_attn.o_proj.weight.data.zero_()
        block.mlp.down_proj.weight.data.zero_()
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    backbone = load_backbone(BackboneConfig(model_name=str(folder), quantization="none", device="cpu"))
    blocks = FusedBlocks(backbone)
    with torch.inference_mode():
        measure_widths(blocks)
    heads = ExitHeads(backbone, "adapter", [2, 4], 4, None).requires_grad_(False)
    return Engine(backbone, blocks, heads, eagle=some_head(backbone))


class Informed(EagleDrafter):
    """Its head says of each place what the backbone says there, as long as its drafts are accepted."""

    def __init__(self, engine, truth):
        super().__init__(engine.eagle, always(), lambda rows: 10.0, 0.1, 0.1)
        self.truth = truth  # [positions, vocab]
        self.runner.lm_head = self.say

    def draft(self, engine, cache, pending, limit, stop_ids):
        self.place = cache.length
        return super().draft(engine, cache, pending, limit, stop_ids)

    def say(self, hidden):
        self.place += 1
        return self.truth[self.place - 1][None]


def informed(name, engine, text):
    """A drafter whose distribution is the backbone's."""
    if name == "exit":
        return ExitDrafter([-math.inf, math.inf])
    if name == "fixed":
        return FixedDrafter(1)
    with torch.inference_mode():
        truth = engine.backbone.model(input_ids=torch.tensor([text])).logits[0]
    eagle = Informed(engine, truth)
    return eagle if name == "eagle" else AutoDrafter([(eagle, 15)])


@pytest.mark.parametrize("who", ["exit", "fixed", "eagle", "auto"])
@pytest.mark.parametrize("name", SETTINGS)
def test_where_head_and_backbone_agree_every_sampled_draft_is_accepted(echoing, who, name):
    settings = SamplingConfig(**SETTINGS[name], seed=11)
    request = Request(PROMPT, 41, chooser=make_chooser(settings), stop_ids=())
    plain = tokens_of(decode(echoing, request, NoDrafter()))
    assert len(set(plain)) > 10
    request = Request(PROMPT, 41, chooser=make_chooser(settings), stop_ids=())
    rounds = list(decode(echoing, request, informed(who, echoing, PROMPT + plain), width=6))
    assert tokens_of(rounds) == plain
    assert [step.drafted for step in rounds[:-1]] == [5] * 6
    assert [step.accepted for step in rounds[:-1]] == [5] * 6
    assert rounds[-1].accepted == rounds[-1].drafted


def test_each_text_of_a_batch_drafts_with_noise_of_its_own(echoing):
    """The same prompt with other seeds: other texts, and in each of them every draft is accepted."""

    def requests():
        return [Request(PROMPT, 31, make_chooser(SamplingConfig(temperature=1.0, seed=seed)), ()) for seed in range(3)]

    plain = [tokens_of(decode(echoing, request, NoDrafter())) for request in requests()]
    assert len(set(map(tuple, plain))) == 3
    rounds = [[], [], []]
    for number, step, _ in decode_batch(echoing, requests(), FixedDrafter(1), batch=2, width=6):
        rounds[number].append(step)
    assert [tokens_of(steps) for steps in rounds] == plain
    assert all(step.accepted == step.drafted for steps in rounds for step in steps)
    assert all(sum(step.drafted for step in steps) >= 20 for steps in rounds)
