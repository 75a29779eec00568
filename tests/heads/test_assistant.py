"""Gemma 4's assistants: they say what transformers' own class says, change no bit of an answer, and fit or are refused."""

import json

import pytest
import torch
import transformers
from assistant_files import assistant_config, nearly_right, random_assistant, rolled
from commands import eexit, output_of
from own_drafters import compared, drafted_in_part, repeating, taken_over, willing
from packaging.version import Version
from tiny_models import family_config
from transformers import Gemma4AssistantForCausalLM

from early_exit_cli.bundle.load import load_engine
from early_exit_cli.calibration.mtp import read_mtp
from early_exit_cli.config import BackboneConfig, InferenceConfig, SamplingConfig
from early_exit_cli.data.documents import Document
from early_exit_cli.data.packing import apart, pack
from early_exit_cli.decoding.loop import decode
from early_exit_cli.decoding.text import Request
from early_exit_cli.drafting.chances import MTP_PRIOR, mtp_survival
from early_exit_cli.drafting.choose import make_drafter
from early_exit_cli.drafting.eagle import runner_of
from early_exit_cli.errors import EexitError
from early_exit_cli.evaluation.bench_methods import Setup, load_method
from early_exit_cli.heads.uncertainty import entropy
from early_exit_cli.library import EarlyExitModel

pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.24"),
    reason="transformers before 5.24 builds no assistant whose blocks all read another's keys",
)

TEXT = [(7 * place * place + 3 * place) % 251 for place in range(90)]


def engine_of(model, assistant, quantization="none"):
    settings = {"model_name": str(model), "assistant": str(assistant), "quantization": quantization, "device": "cpu"}
    return load_engine(BackboneConfig(**settings), None, with_mtp=True)


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """Folders of a model and an assistant that is right often: Gemma 4 as E2B and E4B are."""
    return nearly_right(family_config("gemma4-inputs"), tmp_path_factory.mktemp("gemma4"), 0.1)


@pytest.mark.parametrize(("family", "ordered"), [("gemma4", False), ("gemma4-inputs", True), ("gemma4_unified", True)])
def test_it_says_what_transformers_own_says(tiny_folder, tmp_path, family, ordered):
    """Behind texts shorter and longer than the window of 24, over tokens that it did not say itself."""
    model = random_assistant(assistant_config(family_config(family), ordered=ordered))
    model.save_pretrained(tmp_path)
    engine = engine_of(tiny_folder(family), tmp_path)
    runner, drafted = runner_of(engine.mtp), [3, 77, 200]
    for length in (2, 24, 25, 26, 27, 90):
        ids, seen = TEXT[:length], []
        with torch.inference_mode():
            cache = engine.prefill(ids, 8, engine.mtp.exit_layers, lambda *found, seen=seen: seen.append(found))
            runner.follow(cache)
            hidden = runner.read(*seen[-1])
            expected = rolled(engine.backbone.model, model, ids, drafted)
            for number, wanted in enumerate(expected):
                if number:
                    hidden = runner.step(drafted[number - 1], hidden, number)
                logits, tokens = engine.mtp.said(hidden)
                wanted_there = wanted if tokens is None else wanted[tokens]
                assert (tokens is None) == (not ordered)
                assert torch.allclose(logits[0], wanted_there, atol=1e-4, rtol=1e-4), (length, number)
                assert runner.choose(hidden)[0] == int(wanted.argmax())


def test_partly_wrong_drafts_change_no_bit(pair):
    assert drafted_in_part(engine_of(*pair), repeating(150), 149) > 10


def test_behind_rejected_drafts_it_says_what_it_says_of_the_text_alone(pair):
    engine, text = engine_of(*pair), repeating(60)
    own = Gemma4AssistantForCausalLM.from_pretrained(pair[1], dtype=torch.float32).eval()
    rejected = 0
    for step in decode(engine, Request(text.copy(), 50, stop_ids=()), willing(engine)):
        wrong = [token for token, _ in step.rejected]
        draft, rejected = [*step.tokens[: step.accepted], *wrong], rejected + len(wrong)
        if draft:
            assert rolled(engine.backbone.model, own, text, draft[:-1]).argmax(-1).tolist() == draft
        text += step.tokens
    assert rejected > 10


def test_a_later_text_drafts_from_what_it_takes_over(pair):
    taken_over(engine_of(*pair))


def test_in_4_bit_it_is_too_and_keeps_nothing_of_the_text(pair):
    engine = engine_of(*pair, "4bit")
    assistant = engine.mtp.assistant
    modules = [*assistant.blocks.modules(), assistant.enter, assistant.leave]
    assert {type(module).__name__ for module in modules if hasattr(module, "in_features")} == {"Linear4bit"}
    runs = compared(engine, repeating(150), 60)
    assert runs["mtp"].stats.acceptance_rate > 0.1
    with torch.inference_mode():
        cache, runner = engine.prefill(TEXT, 8), runner_of(engine.mtp)
        runner.follow(cache)
        runner.read([1], [torch.zeros(1, engine.backbone.hidden_size, dtype=torch.bfloat16)])
    kept = {buffer.data_ptr() for buffer in (*cache.keys, *cache.values)}
    keys, values = runner.keys["full_attention"]
    assert {keys.data_ptr(), values.data_ptr()} <= kept


def test_the_commands_draft_with_it_and_calibrate_it(pair, tmp_path, monkeypatch):
    monkeypatch.setenv("EEXIT_HOME", str(tmp_path / "home"))
    model, assistant = pair
    named = ["--model-name", model, "--assistant", assistant, "--quantization", "none"]
    text = tmp_path / "text.jsonl"
    rows = [{"text": f"line {i} of the text says that {i} times {i} is {i * i}. " * 2} for i in range(40)]
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["--dataset-name", text, "--max-length", 64, "--holdout", 0.5]
    found = json.loads(output_of("calibrate", *named, *data, "--json"))["mtp"]
    assert len(found["survival"]) == len(found["checked"]) == 7
    assert 0.3 < found["survival"][0]["mean"] < 1.0
    engine = engine_of(*pair)
    assert [one.model_dump(mode="json") for one in mtp_survival(engine.backbone, engine.mtp)] == found["survival"]
    assert mtp_survival(engine.backbone) == MTP_PRIOR  # of another drafter nothing is known
    drafter, _ = make_drafter(engine, InferenceConfig(), "auto")
    assert [choice.name for choice, _ in drafter.choices] == ["mtp", "lookup"]
    code, out, err = eexit("infer", "one two three", *named, "--mode", "compare", "--max-tokens", 30, "--json")
    assert code == 0, err
    assert json.loads(out)["bit_exact"]
    assert err.count("its assistant drafts, and lookup") == 1
    loaded = {"model": engine.backbone.model, "tokenizer": engine.backbone.tokenizer}
    early = EarlyExitModel.from_pretrained(None, **loaded, assistant=assistant, drafter="mtp")
    prompt = torch.tensor([TEXT])
    plain = early.model.generate(prompt, max_new_tokens=20, do_sample=False)
    assert early.generate(prompt, max_new_tokens=20, do_sample=False).tolist() == plain.tolist()
    assert early.last.stats.tokens_drafted > 0
    config = BackboneConfig(model_name=str(model), assistant=str(assistant), quantization="none", device="cpu")
    setup = Setup(config, None, SamplingConfig(), 0.9, "auto")
    answers = {name: load_method(name, setup).answer(TEXT, 24) for name in ("full", "mtp", "auto")}  # as bench has them
    assert {answer.states_hash for answer in answers.values()} == {answers["full"].states_hash}


def test_calibration_rolls_it_out_from_each_position_as_drafting_does(tiny_folder, tmp_path):
    model = random_assistant(assistant_config(family_config("gemma4")))
    model.save_pretrained(tmp_path)
    engine, texts = engine_of(tiny_folder("gemma4"), tmp_path), [TEXT[50:70], TEXT[:40]]
    batches = apart(pack([Document(ids, "a text") for ids in texts], 64, 0), 2048)
    found = read_mtp(engine, engine.mtp, batches)
    for number in (0, 1):
        expected = [
            rolled(engine.backbone.model, model, ids[:place], ids[place : place + number])[number]
            for ids in texts
            for place in range(2, len(ids) - number)
        ]
        assert torch.allclose(found[number][0], torch.stack([entropy(logits) for logits in expected]), atol=1e-3)


def test_what_does_not_fit_is_refused_before_its_weights_are_read(pair, tiny_folder, tmp_path):
    model, assistant = pair
    right = family_config("gemma4-inputs")
    wrong = {
        "made for a hidden size of 128, not 64": {"backbone_hidden_size": 128},
        "made for a vocabulary of 352, not 320": {"text": {"vocab_size": 352}},
        "sliding_attention blocks read 1 key heads of 16, not 2 of 16": {"text": {"num_key_value_heads": 1}},
        "full_attention blocks read 1 key heads of 64, not 1 of 32": {"text": {"global_head_dim": 64}},
        "its 33 clusters do not divide the vocabulary": {"ordered": True, "num_centroids": 33},
    }
    refused = {}
    for number, (line, changes) in enumerate(wrong.items()):
        refused[line] = model, tmp_path / str(number)
        assistant_config(right, **changes).save_pretrained(refused[line][1])  # and no weights
    refused |= {
        "drafts for models of family 'gemma4_text', and": (tiny_folder("gemma4_unified"), assistant),
        "is no assistant of Gemma 4: it is of family 'llama'": (model, tiny_folder("llama")),
        "drafts for models of family 'gemma4_text'": (tiny_folder("llama"), assistant),
        "cannot find the assistant": (model, "nobody/assistant"),
        "is a file": (model, assistant / "config.json"),
        "cannot load the assistant": (model, tmp_path / "fits"),
    }
    assistant_config(right).save_pretrained(tmp_path / "fits")
    for line, named in refused.items():
        with pytest.raises(EexitError) as told:
            engine_of(*named)
        assert line in told.value.message, told.value.message
        assert "\n" not in told.value.message
    code, _, err = eexit("infer", "one", "--model-name", assistant)
    assert code == 2
    assert "--model-name takes the model that it drafts for, --assistant this one" in err
    code, _, err = eexit("infer", "one", "--model-name", model, "--drafter", "mtp", "--quantization", "none")
    assert code == 1
    assert "--assistant names the drafter of a Gemma 4 model" in err
