"""The layer for multi-token prediction that a checkpoint brings: its formula, what it drafts, and that nothing else changes."""

import json
import shutil

import pytest
import torch
from commands import eexit, output_of
from mtp_files import random_layer, right_backbone, rolled, write_layer
from own_drafters import compared, drafted_in_part, repeating, taken_over
from safetensors.torch import load_file, save_file
from tiny_models import byte_tokenizer, family_config

from early_exit_cli.backbone.load import load_backbone
from early_exit_cli.bundle.load import load_engine
from early_exit_cli.config import BackboneConfig, InferenceConfig, SamplingConfig
from early_exit_cli.decoding.answer import generate
from early_exit_cli.decoding.text import Request
from early_exit_cli.drafting.chances import MTP_PRIOR, mtp_survival
from early_exit_cli.drafting.choose import make_drafter
from early_exit_cli.drafting.eagle import MtpDrafter
from early_exit_cli.errors import BackboneError
from early_exit_cli.evaluation.bench_methods import Setup, load_method
from early_exit_cli.heads import mtp
from early_exit_cli.heads.exit_heads import ExitHeads
from early_exit_cli.heads.mtp import MtpRunner

FAMILIES = ("qwen3_5", "qwen3_next", "qwen3_5_moe", "glm4_moe", "glm4_moe_lite", "deepseek_v3")
TEXT = [(7 * place * place + 3 * place) % 251 for place in range(90)]


@pytest.fixture(scope="session")
def with_layer(tiny_folder, tmp_path_factory):
    """family -> (folder, the layer's block, the tensors in front of it), random."""
    made = {}

    def make(family):
        if family not in made:
            block, front = random_layer(family_config(family))
            place = tmp_path_factory.mktemp(f"mtp-{family}")
            folder = write_layer(tiny_folder(family), place / "model", block, front, place / "layer")
            made[family] = folder, block, front
        return made[family]

    return make


@pytest.fixture(scope="session")
def right_folder(tmp_path_factory):
    """share of noise -> folder of a model whose layer is right, but for the noise."""
    made = {}

    def make(noise=0.0):
        if noise not in made:
            model, block, front = right_backbone(family_config("qwen3_5"))
            front["join"] = front["join"] + noise * torch.randn_like(front["join"])
            place = tmp_path_factory.mktemp("right")
            model.save_pretrained(place / "plain")
            byte_tokenizer().save_pretrained(place / "plain")
            made[noise] = write_layer(place / "plain", place / "model", block, front, place / "layer")
        return made[noise]

    return make


def engine_of(folder, quantization="none"):
    config = BackboneConfig(model_name=str(folder), quantization=quantization, device="cpu")
    return load_engine(config, None, with_mtp=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layer_says_what_its_formula_says(with_layer, family, monkeypatch):
    """Over states that come in pieces, and over tokens that it drafts itself, of which some are taken back."""
    monkeypatch.setattr(mtp, "ROOM", 64)  # grown on the way
    folder, block, front = with_layer(family)
    engine = engine_of(folder)
    backbone, runner = engine.backbone, MtpRunner(engine.mtp)
    with torch.inference_mode():
        states = backbone.hidden_states_at(torch.tensor([TEXT]), torch.ones(1, len(TEXT), dtype=torch.int64), [])[-1][0]
        read = 0
        for end in (70, 71, 75):
            hidden = runner.read(TEXT[read + 1 : end + 1], [states[read:end]])
            read = end
            said, drafted = [engine.mtp.lm_head(hidden)], [3, 77, 200]
            for number, token in enumerate(drafted, 1):
                hidden = runner.step(token, hidden, number)
                said.append(engine.mtp.lm_head(hidden))
            expected = rolled(backbone.model, block, front, TEXT[: end + 1], drafted)
            assert torch.allclose(torch.cat(said), expected, atol=1e-3, rtol=1e-4), end


def test_partly_wrong_drafts_change_no_bit_of_a_model_with_states(right_folder):
    engine = engine_of(right_folder(0.2))
    engine.heads = ExitHeads(engine.backbone, "adapter", [1], 16, None).requires_grad_(False)
    drafted_in_part(engine, repeating(300), 290)


def test_a_later_text_takes_over_what_the_layer_reads(right_folder):
    taken_over(engine_of(right_folder()))


@pytest.mark.slow
def test_a_layer_that_is_right_is_right_after_14_000_tokens(right_folder, monkeypatch):
    engine = engine_of(right_folder())
    monkeypatch.setattr(engine.backbone.config, "max_position_embeddings", 32_768)
    chance = torch.Generator().manual_seed(1)
    prompt = torch.randint(251, (14_000,), generator=chance).tolist()
    runs = compared(engine, prompt, 200)
    assert runs["mtp"].stats.acceptance_rate > 0.9
    noisy = engine_of(right_folder(0.12))
    monkeypatch.setattr(noisy.backbone.config, "max_position_embeddings", 32_768)
    runs = compared(noisy, prompt, 200)
    assert runs["mtp"].stats.partly_rejected_drafts > 3


def test_in_4_bit_the_layer_is_too_and_the_kept_copy_is_of_the_model_alone(right_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("EEXIT_HOME", str(tmp_path))
    plain = [
        load_backbone(BackboneConfig(model_name=str(right_folder() / f"../{name}"), device="cpu"))
        for name in ("plain", "model")
    ]
    assert plain[0].fingerprint == plain[1].fingerprint
    for _ in range(2):  # the second time from the kept copy
        engine = engine_of(right_folder(), "4bit")
        kinds = {type(module).__name__ for module in engine.mtp.layer.block.blocks.modules()}
        assert "Linear4bit" in kinds
        assert "Linear" not in kinds
        assert type(engine.mtp.layer.join).__name__ == "Linear4bit"
        runs = compared(engine, repeating(150), 60)
        assert runs["mtp"].stats.acceptance_rate > 0.5
    assert len([path for path in (tmp_path / "weights").iterdir() if path.is_dir()]) == 2


def test_the_commands_draft_with_it_and_calibrate_it(right_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("EEXIT_HOME", str(tmp_path / "home"))
    model = ["--model-name", right_folder(), "--quantization", "none"]
    text = tmp_path / "text.jsonl"
    rows = [{"text": f"line {i} of the text says that {i} times {i} is {i * i}. " * 2} for i in range(40)]
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["--dataset-name", text, "--max-length", 64, "--holdout", 0.5]
    found = json.loads(output_of("calibrate", *model, *data, "--json"))["mtp"]
    assert found["survival"][0]["mean"] > 0.9
    assert len(found["survival"]) == len(found["checked"]) == 7
    engine = engine_of(right_folder())
    assert [one.model_dump(mode="json") for one in mtp_survival(engine.backbone)] == found["survival"]
    drafter, _ = make_drafter(engine, InferenceConfig(), "auto")
    assert [choice.name for choice, _ in drafter.choices] == ["mtp", "lookup"]
    code, out, err = eexit(
        "infer", "one two three", *model, "--drafter", "mtp", "--mode", "compare", "--max-tokens", 30, "--json"
    )
    assert code == 0, err
    assert json.loads(out)["bit_exact"]
    code, out, err = eexit("infer", "one two three", *model, "--max-tokens", 12, "--json")
    assert code == 0, err
    assert err.count("MTP layer drafts, and lookup") == 1
    config = BackboneConfig(model_name=str(right_folder()), quantization="none", device="cpu")
    setup = Setup(config, None, SamplingConfig(), 0.9, "auto")
    answers = {name: load_method(name, setup).answer(TEXT, 24) for name in ("full", "mtp", "auto")}  # as bench has them
    assert {answer.states_hash for answer in answers.values()} == {answers["full"].states_hash}
    assert answers["full"].accept_length == 1.0


def test_what_is_not_there_or_not_whole_is_said_in_one_line(tiny_folder, with_layer, tmp_path):
    without = engine_of(tiny_folder("qwen3_5"))
    assert (without.mtp, without.without_mtp) == (None, None)
    with pytest.raises(BackboneError, match="brings no layer for multi-token prediction"):
        make_drafter(without, InferenceConfig(), "mtp")
    folder = tmp_path / "model"
    shutil.copytree(with_layer("glm4_moe")[0], folder)
    whole = load_file(folder / "model.safetensors")
    for changes, said in (
        ({"model.layers.6.eh_proj.weight": None}, "has no tensor"),
        ({"model.layers.6.self_attn.o_proj.weight": None}, "lacks 1 of the model's tensors"),
        ({"model.layers.6.self_attn.o_proj.weight": torch.zeros(64, 64, dtype=torch.int8)}, "quantized in a form"),
    ):
        tensors = {name: tensor for name, tensor in (whole | changes).items() if tensor is not None}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        engine = engine_of(folder)
        assert engine.mtp is None
        assert said in engine.without_mtp
        make_drafter(engine, InferenceConfig(), "auto")


def test_without_calibration_a_layer_that_is_always_wrong_is_soon_left_alone(with_layer):
    engine = engine_of(with_layer("qwen3_5")[0])
    assert mtp_survival(engine.backbone) == MTP_PRIOR
    drafter = MtpDrafter(engine.mtp, MTP_PRIOR, lambda rows: 10.0 + rows, 0.5, 0.5)
    run = generate(engine, Request(TEXT, 120, stop_ids=()), drafter, mode="mtp", width=16)
    assert 0 < run.stats.draft_attempts < 40
