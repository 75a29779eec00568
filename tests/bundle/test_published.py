"""EAGLE-3 heads that others published: imported, they draft by their own formula, and never change a token."""

import json
import os
import pickle
import subprocess
from pathlib import Path

import pytest
import torch
from commands import eexit, output_of
from drafters import always
from dssd_files import Touch
from eagle3_files import (
    DRAFT,
    HIDDEN,
    LAYERS,
    VOCAB,
    Head,
    random_weights,
    roll_out,
    settings_of,
    write_checkpoint,
)
from safetensors.torch import load_file, save_file

from early_exit_cli.bundle.files import read_bundle_record
from early_exit_cli.bundle.load import load_engine
from early_exit_cli.bundle.published import Target, convert, exit_layers_of, read_published
from early_exit_cli.config import BackboneConfig, BundleConfig
from early_exit_cli.data.documents import Document
from early_exit_cli.data.packing import pack
from early_exit_cli.decoding.answer import generate
from early_exit_cli.decoding.text import Request
from early_exit_cli.drafting.drafter import NoDrafter
from early_exit_cli.drafting.eagle import EagleDrafter
from early_exit_cli.errors import BundleError
from early_exit_cli.heads.eagle import load_eagle
from early_exit_cli.heads.eagle_runner import EagleRunner
from early_exit_cli.hidden_states.live import run_states

TARGET = Target("tiny", "llama", HIDDEN, VOCAB, 6, "none")
WIDE = {"hidden": 32, "heads": 2, "kv_heads": 2, "size": 16}


def imported(checkpoint, folder):
    folder.mkdir()
    convert(read_published(checkpoint, "ORG/HEAD"), "ORG/HEAD", TARGET, folder)
    return folder


def engine_of(bundle, tiny_folder):
    backbone = BackboneConfig(model_name=str(tiny_folder("llama")), quantization="none", device="cpu")
    return load_engine(backbone, BundleConfig(bundle=str(bundle)))


@pytest.mark.parametrize(
    ("head", "more", "with_embedding", "pickled"),
    [
        (Head(), {}, False, True),  # as SafeAILab publishes it: no rope_theta, a pickle, the backbone's embedding
        (Head(theta=500.0), {"rope_theta": 500.0, "rope_scaling": None}, True, False),
        (Head(**WIDE), {"target_hidden_size": HIDDEN}, True, False),
        (Head(norm_before_residual=True, qk_norm=True), {"norm_before_residual": True}, False, False),
        (Head(norm_output=True, fc_norm=True), {"norm_output": True, "fc_norm": True}, False, False),
        (Head(norm_before_fc=True, theta=20000.0), {"norm_before_fc": True, "rope_theta": 20000}, False, False),
    ],
    ids=["plain", "embedding", "narrow", "residual", "output", "joint"],
)
def test_logits_over_a_roll_out_are_those_of_the_formula(
    tmp_path, tiny_folder, tiny_backbone, head, more, with_embedding, pickled
):
    weights = random_weights(head, with_embedding)
    generator = torch.Generator().manual_seed(1)
    norms = {f"fc_norm.{number}.weight": head.target for number in range(3 * head.fc_norm)}
    norms |= {"input_norm.weight": 3 * head.target} if head.norm_before_fc else {}
    norms |= {f"midlayer.self_attn.{name}_norm.weight": head.size for name in "qk" if head.qk_norm}
    weights |= {name: 1 + 0.3 * torch.randn(width, generator=generator) for name, width in norms.items()}
    checkpoint = write_checkpoint(tmp_path / "head", settings_of(head, **more), weights, pickled)
    engine = engine_of(imported(checkpoint, tmp_path / "bundle"), tiny_folder)
    ids = torch.randint(256, (24,), generator=generator)
    states = run_states(engine.backbone, pack([Document(ids.tolist(), "s")], 24, 0)[0], engine.eagle.exit_layers)
    assert engine.eagle.exit_layers == LAYERS
    embedding = weights.get("embed_tokens.weight", engine.backbone.embedding_weight)
    with torch.inference_mode():
        trained = engine.eagle(states, 4)
    runner = EagleRunner(engine.eagle)
    for position in (0, 9, 17):
        expected = roll_out(head, weights, embedding, states.exits, ids, position, 4)
        runner.rewind()
        part = slice(0, position + 1)
        with torch.inference_mode():
            hidden = runner.read(
                ids[1 : position + 2].tolist(), [state[part] for state in (*states.exits, states.final)]
            )
            for step in range(4):
                place = (trained[step].positions == position + 1 + step).nonzero()[0, 0]
                assert torch.allclose(trained[step].logits[place], expected[step], atol=2e-4)
                assert torch.allclose(runner.lm_head(engine.eagle.said(hidden))[0], expected[step], atol=2e-4)
                token, _ = runner.choose(hidden)
                best = int(expected[step].argmax())
                assert token == best + int(weights["d2t"][best])
                if step < 3:
                    hidden = runner.step(int(ids[position + 2 + step]), hidden, step + 1)


def test_a_head_is_imported_used_and_calibrated_as_a_person_does_it(tmp_path, tiny_folder):
    checkpoint = write_checkpoint(tmp_path / "head", settings_of(Head()), random_weights(Head(), False))
    bundle = tmp_path / "bundle"
    backbone = ["--model-name", tiny_folder("llama"), "--quantization", "none"]
    code, out, err = eexit("import", checkpoint, "--output-dir", bundle)
    assert (code, out) == (2, "")
    assert "does not say which model it is for" in err
    code, out, err = eexit("import", checkpoint, "--output-dir", bundle, *backbone)
    assert code == 0, err
    assert out.strip() == str(bundle)
    assert "an EAGLE-3 head in SafeAILab's layout, after 1, 3, 5 of 6 blocks" in err
    ask = ["infer", "--bundle", bundle, "--prompt", "Hello world", "--max-tokens", 24, "--json"]
    plain = json.loads(output_of(*ask, "--mode", "full"))["full"]["token_ids"]
    code, out, err = eexit(*ask)
    assert json.loads(out)["auto"]["token_ids"] == plain
    assert "the EAGLE head is not calibrated" in err
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"line {i} of the text says {i * i}. " * 3}) + "\n" for i in range(40)))
    found = json.loads(
        output_of(
            "calibrate", "--bundle", bundle, "--dataset-name", text, "--holdout", 0.5, "--max-length", 64, "--json"
        )
    )
    assert len(found["drafting"]["eagle"]) == 7
    assert json.loads(output_of(*ask, "--drafter", "eagle"))["eagle"]["token_ids"] == plain
    engine = engine_of(bundle, tiny_folder)
    request = Request(engine.backbone.encode_prompt("Hello world"), 24)
    bold = EagleDrafter(engine.eagle, always(), lambda rows: 10.0, 0.1, 0.1)
    run = generate(engine, request, bold, mode="eagle")
    assert run.token_ids == plain
    assert run.stats.tokens_drafted > 24
    code, _, err = eexit("train", "--head", "eagle", "--start-from", bundle, "--dataset-name", text, *backbone)
    assert code
    code, out, err = eexit("infer", "--bundle", checkpoint, "--prompt", "Hello")
    assert code == 1
    assert f"eexit import {checkpoint}" in err


def test_it_drafts_for_a_backbone_whose_blocks_are_the_librarys(tmp_path, tiny_model):
    checkpoint = write_checkpoint(tmp_path / "head", settings_of(Head()), random_weights(Head(), False))
    engine = tiny_model("gemma2", "hf")
    bundle = imported(checkpoint, tmp_path / "bundle")
    layout = read_bundle_record(bundle).eagle.layout
    head = load_eagle(bundle / "eagle.safetensors", engine.backbone, LAYERS, layout)
    request = Request([72, 101, 108, 108, 111], 16)
    plain = generate(engine, request, NoDrafter(), mode="full")
    run = generate(engine, request, EagleDrafter(head, always(), lambda rows: 10.0, 0.1, 0.1), mode="eagle")
    assert run.token_ids == plain.token_ids
    assert run.stats.tokens_drafted > 16


def test_where_a_checkpoint_does_not_say_it_reads_the_three_layers_of_eagle_3(tmp_path):
    settings = settings_of(Head())
    del settings["eagle_config"]
    published = read_published(write_checkpoint(tmp_path, settings, {"d2t": torch.zeros(1)}), "ORG/HEAD")
    assert exit_layers_of(published, Target("m", "llama", 64, 320, 32, "4bit")) == [2, 16, 29]
    with pytest.raises(BundleError, match=r"after \[2, 3, 3\] blocks are not supported"):
        exit_layers_of(published, TARGET)


def drop(name):
    return lambda weights: weights.pop(name)


def put(name, tensor):
    return lambda weights: weights.update({name: tensor})


SPECULATORS = {"speculators_model_type": "eagle3", "draft_vocab_size": DRAFT, "transformer_layer_config": {}}
SPECULATORS |= {"eagle_aux_hidden_state_layer_ids": LAYERS}


@pytest.mark.parametrize(
    ("settings", "change", "words"),
    [
        ({"draft_vocab_size": None, "architectures": ["LlamaForCausalLM"]}, None, "EAGLE-1 or EAGLE-2 head"),
        ({"medusa_num_heads": 3}, None, "Medusa heads"),
        ({"speculators_model_type": "dflash"}, None, "speculators' type 'dflash', not eagle3"),
        ({"draft_vocab_size": None, "num_hidden_layers": 32}, None, "a whole model"),
        ({"num_hidden_layers": 2}, None, "num_hidden_layers 2 is not supported"),
        ({"attention_bias": True}, None, "attention_bias: True is not supported"),
        ({"quantization_config": {"bits": 4}}, None, "quantization_config: .* is not supported"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, None, "rope_type 'dynamic' is not supported"),
        ({"hidden_act": "glu"}, None, "hidden_act 'glu' is not supported"),
        ({"norm_before_fc": True, "fc_norm": True}, None, "exclude each other"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, None, "eagle_config.use_aux_hidden_state is false"),
        ({"eagle_aux_hidden_state_layer_ids": [0, 2, 4]}, None, "eagle_aux_hidden_state_layer_ids: the states after"),
        ({"head_dim": 16}, None, r"q_proj.weight should be \[64, 128\]"),
        ({"hidden_size": "64"}, None, "hidden_size: it must be a whole number"),
        ({**SPECULATORS, "new_trick": 3}, None, "new_trick is not supported"),
        (
            {**SPECULATORS, "transformer_layer_config": {"model_type": "gpt2"}},
            None,
            "model_type 'gpt2' is not supported",
        ),
        ({}, drop("lm_head.weight"), "lm_head.weight should be"),
        ({}, drop("d2t"), "d2t should be 96 whole numbers"),
        ({}, put("d2t", torch.arange(DRAFT) * -1), "d2t names tokens twice"),
        ({}, put("t2d", torch.ones(VOCAB, dtype=torch.bool)), "t2d and d2t name different tokens"),
        ({}, put("midlayer.self_attn.q_proj.bias", torch.zeros(128)), "q_proj.bias is none of them"),
        ({}, put("embed_tokens.weight", torch.zeros(8, HIDDEN)), "embed_tokens.weight should be"),
        ({}, put("fc.weight", torch.full((HIDDEN, 3 * HIDDEN), torch.nan)), "fc.weight holds NaN"),
    ],
)
def test_what_is_not_supported_is_refused_by_its_name(tmp_path, settings, change, words):
    base = {} if "transformer_layer_config" in settings else settings_of(Head())
    told = {key: value for key, value in (base | settings).items() if value is not None}
    weights = random_weights(Head(), False)
    if change:
        change(weights)
    with pytest.raises(BundleError, match=words) as caught:
        imported(write_checkpoint(tmp_path / "head", told, weights), tmp_path / "bundle")
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_pickle_that_holds_code_is_not_run(tmp_path, save):
    checkpoint = write_checkpoint(tmp_path / "head", settings_of(Head()), {"d2t": torch.zeros(1)})
    (checkpoint / "model.safetensors").unlink()
    save(random_weights(Head(), False) | {"norm.weight": Touch(tmp_path / "touched")}, checkpoint / "pytorch_model.bin")
    with pytest.raises(BundleError, match="it could run code"):
        imported(checkpoint, tmp_path / "bundle")
    assert not (tmp_path / "touched").exists()


LLAMA = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 1,
    "intermediate_size": 96,
}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2}
QWEN3 = {**LLAMA, "model_type": "qwen3", "head_dim": 32, "num_key_value_heads": 1}
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3_ROPE |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize(
    ("block", "options"),
    [
        (LLAMA, {"draft_vocab_size": DRAFT, "eagle_aux_hidden_state_layer_ids": [1, 3, 5]}),
        ({**LLAMA, "rope_parameters": LLAMA3_ROPE}, {"draft_vocab_size": VOCAB, "norm_before_residual": True}),
        ({**LLAMA, "rope_parameters": YARN, "hidden_act": "gelu"}, {"draft_vocab_size": DRAFT, "fc_norm": True}),
        (QWEN3, {"draft_vocab_size": DRAFT, "norm_output": True, "fc_norm": True}),
        (QWEN3, {"draft_vocab_size": DRAFT, "norm_before_fc": True, "norm_before_residual": True}),
    ],
    ids=["plain", "llama3-rope", "yarn", "qwen3-output", "qwen3-joint"],
)
def test_logits_over_a_roll_out_are_those_of_speculators(
    speculators_python, tmp_path, tiny_folder, tiny_backbone, block, options
):
    """Checkpoints that the package itself wrote, with random weights; by default after blocks 2, 4 and the last one."""
    options = {"eagle_aux_hidden_state_layer_ids": [2, 4, 6], **options}
    backbone = tiny_backbone("llama")
    ids = torch.randint(256, (40,), generator=torch.Generator().manual_seed(1))
    batch = pack([Document(ids.tolist(), "s")], 40, 0)[0]
    with torch.inference_mode():
        theirs = backbone.model(ids[None], output_hidden_states=True).hidden_states  # the last one has been normed
    states = run_states(backbone, batch, options["eagle_aux_hidden_state_layer_ids"])
    for layer, state in zip(options["eagle_aux_hidden_state_layer_ids"], states.exits, strict=True):
        assert layer == 6 or torch.equal(state, theirs[layer][0])
    assert torch.allclose(backbone.norm(states.exits[-1]), states.final) == (
        options["eagle_aux_hidden_state_layer_ids"][-1] == 6
    )
    save_file({"states": torch.cat(states.exits, -1), "ids": ids}, tmp_path / "inputs.safetensors")
    worker = Path(__file__).parents[1] / "support" / "speculators_maker.py"
    files = [
        tmp_path / "head",
        json.dumps({**options, "block": block}),
        tmp_path / "inputs.safetensors",
        tmp_path / "outputs",
    ]
    surroundings = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([speculators_python, str(worker), *map(str, files)], check=True, env=surroundings)
    bundle = tmp_path / "bundle"
    output_of(
        *("import", tmp_path / "head", "--output-dir", bundle),
        *("--model-name", tiny_folder("llama"), "--quantization", "none"),
    )
    head = engine_of(bundle, tiny_folder).eagle
    expected = load_file(tmp_path / "outputs")
    runner, position = EagleRunner(head), 20
    with torch.inference_mode():
        trained = head(states, 4)
        hidden = runner.read(
            ids[1 : position + 2].tolist(), [state[: position + 1] for state in (*states.exits, states.final)]
        )
        for step, said in enumerate(trained):
            positions = said.positions - 1 - step
            assert torch.allclose(expected[f"step{step}"][positions], said.logits, atol=1e-4), step
            assert torch.allclose(runner.lm_head(head.said(hidden))[0], expected[f"step{step}"][position], atol=1e-4)
            if step < 3:
                hidden = runner.step(int(ids[position + 2 + step]), hidden, step + 1)
