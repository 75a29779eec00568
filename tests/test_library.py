"""The library: whatever `generate` of the transformers model returns, with drafts that are accepted and rejected."""

import functools
import inspect
import subprocess
import sys
from collections import Counter

import pytest
import torch
from tiny_models import END, FAMILIES, VOCAB, byte_tokenizer
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
)
from transformers.utils import logging as transformers_logging

from early_exit_cli import EarlyExitModel
from early_exit_cli.drafting.drafter import NoDrafter
from early_exit_cli.drafting.exit import ExitDrafter
from early_exit_cli.errors import BackboneError, BundleError, ConfigError, UnsupportedBackboneError
from early_exit_cli.library import CACHES

PROMPT = torch.tensor([list(b"one two three")])


@pytest.fixture(scope="module")
def early_of(tiny_model):
    """family -> EarlyExitModel whose untrained heads are right now and then."""
    return lambda family: EarlyExitModel(tiny_model(family), ExitDrafter([3.4, 3.4, 3.6]), 8)


@pytest.fixture(scope="module")
def early(early_of):
    return early_of("llama")


@pytest.fixture
def plain(early):
    """`generate` of the transformers model itself."""
    return early.model.generate


class Recorder:
    """A streamer that keeps what it is given."""

    def __init__(self):
        self.seen = []

    def put(self, value):
        self.seen.append((value.tolist(), value.dtype, str(value.device)))

    def end(self):
        self.seen.append("end")


class StopAfter(StoppingCriteria):
    """Stops at a length, and keeps what it was shown."""

    def __init__(self, length):
        self.length, self.seen = length, []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids.clone())
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


class Watcher(LogitsProcessor):
    """Changes scores by what it saw before, and keeps which texts it was asked about."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append(input_ids.clone())
        return scores + torch.arange(scores.shape[1]).roll(len(self.seen))[None] / 100


@pytest.mark.parametrize("family", FAMILIES)
def test_generates_what_the_transformers_model_generates(early_of, family):
    early = early_of(family)
    accepted = partly = 0
    for prompt in (PROMPT, torch.tensor([[10]]), torch.arange(60, 130)[None]):
        for settings in (
            {"max_new_tokens": 40},
            {"max_length": 90},
            {},
            {"generation_config": GenerationConfig(max_new_tokens=40, eos_token_id=[7, 99, END], pad_token_id=3)},
        ):
            expected = early.model.generate(prompt, **settings)
            found = early.generate(prompt, **settings)
            assert torch.equal(found, expected)
            assert found.dtype == torch.int64
            assert early.last.token_ids == expected[0, prompt.shape[1] :].tolist()
            accepted += early.last.stats.tokens_accepted
            partly += early.last.stats.partly_rejected_drafts
    assert accepted > 0
    assert partly > 0 or family == "smollm"


def test_an_end_token_inside_a_draft_ends_the_text(early, plain):
    ids = plain(PROMPT, max_new_tokens=40)[0, PROMPT.shape[1] :].tolist()
    cut = 0
    for end in list(dict.fromkeys(ids))[:12]:
        found = early.generate(PROMPT, max_new_tokens=40, eos_token_id=[end, 300])
        assert torch.equal(found, plain(PROMPT, max_new_tokens=40, eos_token_id=[end, 300]))
        assert found[0, -1] == end
        cut += early.last.rounds[-1].accepted == len(early.last.rounds[-1].tokens)  # no bonus token: cut in the draft
    assert cut > 0


@pytest.mark.parametrize("length", range(1, 20))
def test_stopping_criteria_see_every_token_and_cut_there(early, plain, length):
    ours, theirs = StopAfter(PROMPT.shape[1] + length), StopAfter(PROMPT.shape[1] + length)
    expected = plain(PROMPT, max_new_tokens=40, stopping_criteria=[theirs])
    assert torch.equal(early.generate(PROMPT, max_new_tokens=40, stopping_criteria=[ours]), expected)
    assert early.last.stats.total_tokens_generated == length
    assert len(ours.seen) == len(theirs.seen) == length
    assert all(map(torch.equal, ours.seen, theirs.seen))


def test_the_time_limit_is_asked_after_every_token(early, plain):
    expected = plain(PROMPT, max_new_tokens=40, max_time=0.0)
    assert torch.equal(early.generate(PROMPT, max_new_tokens=40, max_time=0.0), expected)
    assert expected.shape[1] == PROMPT.shape[1] + 1


@pytest.mark.parametrize("in_config", [False, True])
def test_stop_strings_end_the_text(early, plain, in_config):
    text = early.tokenizer.decode(plain(PROMPT, max_new_tokens=40)[0, PROMPT.shape[1] :])
    letters = [letter for letter in text if letter.isascii() and letter.isprintable()]
    for stop in (letters[1], [letters[5], "never there"]):
        settings = {"max_new_tokens": 40, "stop_strings": stop}
        expected = plain(PROMPT, tokenizer=early.tokenizer, **settings)
        assert expected.shape[1] < PROMPT.shape[1] + 40
        found = (
            early.generate(PROMPT, GenerationConfig(**settings)) if in_config else early.generate(PROMPT, **settings)
        )
        assert torch.equal(found, expected)


def test_a_streamer_gets_prompt_and_tokens_as_from_transformers(early, plain):
    ours, theirs = Recorder(), Recorder()
    plain(PROMPT, max_new_tokens=24, streamer=theirs)
    early.generate(PROMPT, max_new_tokens=24, streamer=ours)
    assert ours.seen == theirs.seen
    assert len(ours.seen) == 26
    assert early.last.stats.tokens_accepted > 0


def test_a_dictionary_holds_the_sequences(early, plain):
    output = early.generate(PROMPT, max_new_tokens=12, return_dict_in_generate=True)
    assert type(output) is type(plain(PROMPT, max_new_tokens=12, return_dict_in_generate=True))
    assert torch.equal(output.sequences, plain(PROMPT, max_new_tokens=12))


def test_the_transformers_model_decodes_with_custom_generate(early, plain):
    expected = plain(PROMPT, max_new_tokens=40)
    inputs = {"input_ids": PROMPT, "attention_mask": torch.ones_like(PROMPT)}
    before = early.last
    assert torch.equal(plain(**inputs, max_new_tokens=40, custom_generate=early.custom_generate), expected)
    assert early.last is not before
    assert early.last.stats.tokens_accepted > 0
    streamer = Recorder()
    custom = functools.partial(early.custom_generate, streamer=streamer)
    plain(**inputs, max_new_tokens=4, custom_generate=custom, streamer=streamer)
    assert streamer.seen[0][0] == PROMPT.tolist()
    assert len(streamer.seen) == 6


def test_custom_generate_of_another_model_is_refused(early, early_of):
    with pytest.raises(ConfigError, match="another model"):
        early_of("qwen3").model.generate(PROMPT, custom_generate=early.custom_generate, max_new_tokens=4)


PROCESSED = {
    "repetition_penalty": {"repetition_penalty": 1.4},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "bias": {"bad_words_ids": [[8], [35, 7]], "suppress_tokens": [64, 65], "sequence_bias": [[[46], 4.0]]},
    "forced_eos_token_id": {"forced_eos_token_id": END},
    "guidance_scale": {"guidance_scale": 1.5, "negative_prompt_ids": torch.tensor([[65, 66]])},
    "watermarking_config": {"watermarking_config": {"bias": 3.0}},
    "prefix": {"prefix_allowed_tokens_fn": lambda row, ids: [token for token in range(VOCAB) if token % 3]},
    "top_k 1": {"do_sample": True, "top_k": 1, "temperature": 0.7, "repetition_penalty": 1.2},
}


@pytest.mark.parametrize("name", PROCESSED)
def test_processed_logits_decide_as_in_transformers(early, plain, name):
    settings = {"max_new_tokens": 32, **PROCESSED[name]}
    expected = plain(PROMPT, **settings)
    assert torch.equal(early.generate(PROMPT, **settings), expected)
    assert early.last.stats.tokens_drafted > 0
    assert not torch.equal(expected, plain(PROMPT, max_new_tokens=32))


def test_the_end_waits_for_the_fewest_new_tokens(early, plain):
    prompt = torch.tensor([list(b"What is it?")])
    assert plain(prompt, max_new_tokens=32).shape[1] < prompt.shape[1] + 20
    expected = plain(prompt, max_new_tokens=32, min_new_tokens=20)
    assert expected.shape[1] >= prompt.shape[1] + 20
    assert torch.equal(early.generate(prompt, max_new_tokens=32, min_new_tokens=20), expected)


def test_a_processor_is_asked_about_each_token_once_in_order(early, plain):
    padded, mask = torch.cat([torch.full((1, 3), END), PROMPT], -1), torch.ones(1, 16, dtype=torch.int64)
    mask[0, :3] = 0
    for ids, attention_mask in ((PROMPT, None), (padded, mask)):
        ours, theirs = Watcher(), Watcher()
        settings = {"attention_mask": attention_mask, "max_new_tokens": 32, "repetition_penalty": 1.1}
        expected = plain(ids, logits_processor=LogitsProcessorList([theirs]), **settings)
        assert torch.equal(early.generate(ids, logits_processor=LogitsProcessorList([ours]), **settings), expected)
        assert len(ours.seen) == len(theirs.seen) > 10
        assert all(map(torch.equal, ours.seen, theirs.seen))


def test_torchs_seed_decides_what_is_sampled_whoever_drafts(early):
    plainly = EarlyExitModel(early.engine, NoDrafter(), 8)
    settings = {"max_new_tokens": 24, "do_sample": True, "temperature": 0.9, "top_p": 0.95, "min_p": 0.01}
    texts, accepted = [], 0
    for seed in (0, 0, 1, 2):
        torch.manual_seed(seed)
        texts.append(early.generate(PROMPT, **settings))
        accepted += early.last.stats.tokens_accepted
        torch.manual_seed(seed)
        assert torch.equal(plainly.generate(PROMPT, **settings), texts[-1])
    assert torch.equal(texts[0], texts[1])
    assert len({tuple(text[0].tolist()) for text in texts}) == 3
    assert accepted > 0
    whole = []
    for top_p in (1.0, 7.0):  # transformers takes both
        torch.manual_seed(0)
        whole.append(early.generate(PROMPT, **settings | {"top_p": top_p}))
    assert torch.equal(*whole)


def test_two_tokens_are_sampled_from_the_distribution_of_transformers(early, plain):
    """Chi-square over the joint distribution of two tokens, of which the second is drafted now and then."""
    settings = {"do_sample": True, "top_k": 3, "temperature": 1.5, "max_new_tokens": 2}

    def probabilities(ids):
        output = plain(ids, **settings | {"max_new_tokens": 1}, output_scores=True, return_dict_in_generate=True)
        return {token: p for token, p in enumerate(output.scores[0][0].softmax(0).tolist()) if p}

    expected = {}
    for first, p in probabilities(PROMPT).items():
        for second, q in probabilities(torch.cat([PROMPT, torch.tensor([[first]])], -1)).items():
            expected[first, second] = p * q
    torch.manual_seed(0)
    draws = 500
    counts = Counter(tuple(early.generate(PROMPT, **settings)[0, -2:].tolist()) for _ in range(draws))
    assert set(counts) <= set(expected)
    assert len(expected) == 9
    statistic = sum((counts[pair] - draws * p) ** 2 / (draws * p) for pair, p in expected.items())
    assert statistic < 26.1  # 8 degrees of freedom, one in a thousand


def test_padding_on_the_left_changes_nothing(early, plain):
    padded = torch.cat([torch.full((1, 5), END), PROMPT], -1)
    mask = torch.tensor([[0] * 5 + [1] * PROMPT.shape[1]])
    found = early.generate(padded, attention_mask=mask, max_new_tokens=20)
    assert torch.equal(found, plain(padded, attention_mask=mask, max_new_tokens=20))
    assert torch.equal(found[:, 5:], plain(PROMPT, max_new_tokens=20))


def test_what_cannot_be_honoured_is_refused_by_name_all_together(early):
    with pytest.raises(ConfigError, match=r"num_beams=4, penalty_alpha=0\.6, use_cache=False, assistant_model"):
        early.generate(PROMPT, num_beams=4, penalty_alpha=0.6, use_cache=False, assistant_model=early.model)
    with pytest.raises(ConfigError, match="output_attentions=True, dola_layers='low'"):
        early.generate(PROMPT, GenerationConfig(dola_layers="low"), output_attentions=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_return_sequences", 2),
        ("output_scores", True),
        ("output_logits", True),
        ("output_hidden_states", True),
        ("cache_implementation", "static"),
        ("cache_implementation", "paged"),
        ("prompt_lookup_num_tokens", 4),
        ("assistant_early_exit", 2),
        ("token_healing", True),
        ("inputs_embeds", torch.zeros(1, 3, 64)),
        ("past_key_values", object()),
        ("custom_generate", print),
    ],
)
def test_refuses(early, name, value):
    with pytest.raises(ConfigError, match=f"cannot honour {name}"):
        early.generate(PROMPT, max_new_tokens=4, **{name: value})


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"num_beams": 2}, "num_beams=2"),
        ({"use_cache": False}, "use_cache=False"),
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"inputs_embeds": torch.zeros(1, 13, 64)}, "inputs_embeds"),
    ],
)
def test_custom_generate_refuses_too(early, plain, settings, named):
    with pytest.raises(ConfigError, match=named):
        plain(PROMPT, max_new_tokens=4, custom_generate=early.custom_generate, **settings)


def test_a_cache_of_the_caller_is_refused(early, plain):
    from transformers import DynamicCache

    name = next(name for name in CACHES if name in inspect.signature(early.model.forward).parameters)
    with pytest.raises(ConfigError, match=name):
        plain(PROMPT, max_new_tokens=4, custom_generate=early.custom_generate, **{name: DynamicCache()})


ROWS = torch.tensor([[*[END] * 4, *range(40, 49)], [*range(60, 73)], [*[END] * 11, 65, 66]])
MASK = torch.tensor([[0] * 4 + [1] * 9, [1] * 13, [0] * 11 + [1] * 2])


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral-window"])
def test_rows_are_generated_together_as_each_is_alone(early_of, family):
    early = early_of(family)
    alone = [early.generate(row[mask.bool()][None], max_new_tokens=30) for row, mask in zip(ROWS, MASK, strict=True)]
    news = [found[0, int(mask.sum()) :].tolist() for found, mask in zip(alone, MASK, strict=True)]
    ends = [news[0][2], news[1][9]]  # rows that end early, and at different places
    for settings in ({}, {"eos_token_id": ends}, {"eos_token_id": ends, "pad_token_id": 9}):
        expected = early.model.generate(ROWS, attention_mask=MASK, max_new_tokens=30, **settings)
        found = early.generate(ROWS, attention_mask=MASK, max_new_tokens=30, **settings)
        assert torch.equal(found, expected)
    assert len({len(answer.token_ids) for answer in early.answers}) > 1
    assert sum(answer.stats.tokens_accepted for answer in early.answers) > 0
    found = early.generate(ROWS, attention_mask=MASK, max_new_tokens=30)
    assert [answer.token_ids for answer in early.answers] == news


def test_criteria_and_processors_look_at_each_row(early, plain):
    settings = dict(attention_mask=MASK, max_new_tokens=20, repetition_penalty=1.3, no_repeat_ngram_size=2)
    expected = plain(ROWS, **settings, stopping_criteria=[StopAfter(ROWS.shape[1] + 11)])
    assert torch.equal(early.generate(ROWS, **settings, stopping_criteria=[StopAfter(ROWS.shape[1] + 11)]), expected)
    assert expected.shape[1] == ROWS.shape[1] + 11


def test_a_processor_of_the_whole_batch_takes_one_row(early):
    with pytest.raises(ConfigError, match=r"Guidance.* takes one row at a time, and 3 were given"):
        early.generate(ROWS, attention_mask=MASK, max_new_tokens=4, guidance_scale=1.5)


def test_rows_are_sampled_by_their_own_seeds(early):
    def sampled(drafter):
        torch.manual_seed(5)
        early.drafter, before = drafter, early.drafter
        try:
            return early.generate(PROMPT.repeat(4, 1), max_new_tokens=12, do_sample=True)
        finally:
            early.drafter = before

    found = sampled(early.drafter)
    assert len({tuple(row) for row in found.tolist()}) == 4
    assert torch.equal(found, sampled(NoDrafter()))


def test_refuses_rows_masks_and_positions_that_it_cannot_decode(early):
    with pytest.raises(ConfigError, match="a streamer shows one text"):
        early.generate(PROMPT.repeat(2, 1), max_new_tokens=4, streamer=Recorder())
    holes = torch.ones_like(PROMPT)
    holes[0, 4] = 0
    with pytest.raises(ConfigError, match="hides tokens behind"):
        early.generate(PROMPT, attention_mask=holes, max_new_tokens=4)
    with pytest.raises(ConfigError, match="position_ids"):
        early.generate(PROMPT, position_ids=torch.arange(3, 16)[None], max_new_tokens=4)
    with pytest.raises(ConfigError, match="exceed the context of 512"):
        early.generate(PROMPT, max_new_tokens=512)
    with pytest.raises(ValueError, match="max_new_token"):
        early.generate(PROMPT, max_new_token=5)


@pytest.fixture
def loaded(tiny_folder):
    """The tiny Llama as a person loads it."""
    return AutoModelForCausalLM.from_pretrained(tiny_folder("llama"), dtype=torch.float32)


def test_a_loaded_model_is_the_backbone_and_its_weights_are_held_once(loaded, tiny_bundle):
    expected = loaded.generate(PROMPT, max_new_tokens=40)
    early = EarlyExitModel.from_pretrained(tiny_bundle, model=loaded, drafter="exit", accuracy_level=0.6)
    assert early.model is loaded
    assert early.engine.backbone.embedding.weight is loaded.get_input_embeddings().weight
    merged = early.engine.blocks.layers[0].qkv(torch.eye(64)).t()
    assert torch.equal(merged[:64], loaded.model.layers[0].self_attn.q_proj.weight)
    assert torch.equal(early.generate(PROMPT, max_new_tokens=40), expected)
    assert torch.equal(loaded.generate(PROMPT, max_new_tokens=40), expected)
    assert torch.equal(loaded.generate(PROMPT, max_new_tokens=40, custom_generate=early.custom_generate), expected)
    assert early.device == torch.device("cpu")


@pytest.mark.parametrize("drafter", ["auto", "exit", "lookup", "none"])
def test_a_bundle_brings_its_backbone(tiny_bundle, plain, drafter):
    early = EarlyExitModel.from_pretrained(str(tiny_bundle), device="cpu", drafter=drafter, accuracy_level=0.6)
    assert torch.equal(early.generate(PROMPT, max_new_tokens=40), plain(PROMPT, max_new_tokens=40))
    assert early.last.stats.mode == early.drafter.name


@pytest.mark.parametrize("drafter", ["auto", "exit"])
def test_refuses_a_level_that_was_not_calibrated(tiny_bundle, drafter):
    with pytest.raises(ConfigError, match=r"accuracy level 0\.12 was not calibrated; calibrated: "):
        EarlyExitModel.from_pretrained(str(tiny_bundle), device="cpu", drafter=drafter, accuracy_level=0.12)


def test_a_backbone_without_a_bundle_drafts_by_lookup(tiny_folder):
    early = EarlyExitModel.from_pretrained(None, backbone=str(tiny_folder("qwen2")), quantization="none", device="cpu")
    prompt = torch.tensor([[65, 66, 67] * 12])
    assert torch.equal(early.generate(prompt, max_new_tokens=40), early.model.generate(prompt, max_new_tokens=40))
    assert early.last.stats.tokens_drafted > 0


def test_refuses_heads_of_another_backbone(tiny_folder, tiny_bundle):
    other = AutoModelForCausalLM.from_pretrained(tiny_folder("qwen2"), dtype=torch.float32)
    with pytest.raises(BundleError, match="model_type: heads 'llama', backbone 'qwen2'"):
        EarlyExitModel.from_pretrained(str(tiny_bundle), model=other)


def test_refuses_arguments_that_do_not_go_together(loaded, tiny_bundle):
    with pytest.raises(ConfigError, match="quantization, device: model is loaded already"):
        EarlyExitModel.from_pretrained(str(tiny_bundle), model=loaded, quantization="4bit", device="cpu")
    with pytest.raises(ConfigError, match="tokenizer"):
        EarlyExitModel.from_pretrained(str(tiny_bundle), tokenizer=byte_tokenizer())
    with pytest.raises(ConfigError, match="'exit' needs a bundle"):
        EarlyExitModel.from_pretrained(None, model=loaded, drafter="exit")
    with pytest.raises(ConfigError, match=r"quantization: .*'3bit'"):
        EarlyExitModel.from_pretrained(str(tiny_bundle), quantization="3bit")
    with pytest.raises(ConfigError, match=r"drafter: .*'magic'"):
        EarlyExitModel.from_pretrained(str(tiny_bundle), drafter="magic")


def test_refuses_what_is_no_backbone(loaded, tiny_bundle):
    with pytest.raises(BackboneError, match="LlamaModel is not a causal language model"):
        EarlyExitModel.from_pretrained(None, model=loaded.model)
    other = GPTBigCodeForCausalLM(GPTBigCodeConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=16))
    with pytest.raises(UnsupportedBackboneError, match="'gpt_bigcode'"):
        EarlyExitModel.from_pretrained(None, model=other, tokenizer=byte_tokenizer())
    loaded.model.layers[0].to("meta")
    with pytest.raises(BackboneError, match="lies on cpu, meta"):
        EarlyExitModel.from_pretrained(None, model=loaded)


def test_answers_a_prompt_in_text(early, plain):
    prompt = early.tokenizer("What is it?", return_tensors="pt").input_ids
    expected = early.tokenizer.decode(plain(prompt, max_new_tokens=16)[0, prompt.shape[1] :], skip_special_tokens=True)
    assert early.answer("What is it?", max_new_tokens=16) == early.last.text
    assert early.last.text == expected.rstrip("\ufffd")
    assert early.last.stats.accept_length > 1
    assert early.last.stats.tokens_per_second > 0


def test_loading_leaves_the_libraries_talkative(tiny_bundle):
    transformers_logging.set_verbosity_warning()
    transformers_logging.enable_progress_bar()
    EarlyExitModel.from_pretrained(str(tiny_bundle), device="cpu")
    assert transformers_logging.get_verbosity() == transformers_logging.WARNING
    assert transformers_logging.is_progress_bar_enabled()


def test_the_package_is_imported_without_torch_and_gives_the_class_on_use():
    code = (
        "import sys, early_exit_cli\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        "from early_exit_cli import EarlyExitModel\n"
        "assert 'torch' in sys.modules and EarlyExitModel is early_exit_cli.EarlyExitModel\n"
        "try: early_exit_cli.EarlyExit\n"
        "except AttributeError as error: print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    assert "no attribute 'EarlyExit'" in run.stdout
