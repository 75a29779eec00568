"""Exit heads with an attention of their own: what they read while drafting is what they read over whole texts."""

import json
import math

import pytest
import torch
from commands import output_of

from early_exit_cli.data.documents import Document
from early_exit_cli.data.packing import pack
from early_exit_cli.decoding.answer import generate
from early_exit_cli.decoding.batch import generate_batch
from early_exit_cli.decoding.text import Request
from early_exit_cli.drafting.auto import AutoDrafter
from early_exit_cli.drafting.costs import measure_costs
from early_exit_cli.drafting.drafter import NoDrafter
from early_exit_cli.drafting.exit import ExitDrafter, FixedDrafter
from early_exit_cli.drafting.lookup import LookupDrafter
from early_exit_cli.engine import Engine
from early_exit_cli.errors import BundleError
from early_exit_cli.heads.exit_heads import ExitHeads, load_heads, read_heads
from early_exit_cli.heads.exit_runner import ExitRunner, NativeExitRunner, exit_runner
from early_exit_cli.heads.uncertainty import entropy
from early_exit_cli.hidden_states.live import run_states
from early_exit_cli.runtime.native_code import has_native_code

PROMPT = list(range(20, 40))
OTHER = [7, 9, 7, 9, 7, 9, 30]
NEW = 40


def some_heads(backbone, exit_layers=(1, 3, 5), vocab=None) -> ExitHeads:
    """Attention heads that look around, with the last block's queries and keys."""
    torch.manual_seed(3)
    heads = ExitHeads(backbone, "attention", exit_layers, 16, vocab)
    heads.start_from(backbone)
    for head in heads.heads:
        torch.nn.init.normal_(head.o_proj.weight, std=0.05)
        torch.nn.init.normal_(head.up.weight, std=0.05)
    return heads.to(backbone.dtype).requires_grad_(False)


@pytest.fixture(scope="module")
def model(tiny_model, tiny_backbone):
    return Engine(tiny_backbone("llama"), tiny_model("llama").blocks, some_heads(tiny_backbone("llama")))


def entropies_over(model, ids) -> torch.Tensor:
    """[heads, places]: what the heads say of each place of a text, all of it at once."""
    batch = pack([Document(ids, "s")], len(ids), 0)[0]
    with torch.inference_mode():
        states = run_states(model.backbone, batch, model.heads.exit_layers)
        return torch.stack([entropy(said) for said in model.heads(states, torch.arange(len(ids)))])


def thresholds(model, share) -> list[float]:
    """Below which so large a share of an answer's places lies, for each head."""
    plain = generate(model, Request(PROMPT, NEW), NoDrafter(), mode="full").token_ids
    found = entropies_over(model, [*PROMPT, *plain])[:, len(PROMPT) - 1 : -1]
    return found.quantile(share, 1).tolist()


def test_an_untrained_head_is_the_logit_lens(tiny_backbone):
    backbone = tiny_backbone("llama")
    heads = ExitHeads(backbone, "attention", [2, 4], 8, None)
    heads.start_from(backbone)
    states = run_states(backbone, pack([Document(PROMPT, "s")], 20, 0)[0], heads.exit_layers)
    with torch.no_grad():
        for said, hidden in zip(heads(states, torch.arange(20)), states.exits, strict=True):
            assert torch.allclose(said, backbone.lm_head(backbone.norm(hidden)), atol=1e-5)


def test_packed_documents_do_not_see_each_other(model):
    documents = [Document(PROMPT, "a"), Document(OTHER, "b")]
    states = run_states(model.backbone, pack(documents, 40, 0)[0], model.heads.exit_layers)
    with torch.inference_mode():
        together = model.heads(states, torch.arange(len(PROMPT) + len(OTHER)))
        alone = run_states(model.backbone, pack(documents[1:], 40, 0)[0], model.heads.exit_layers)
        for said, own in zip(together, model.heads(alone, torch.arange(len(OTHER))), strict=True):
            assert torch.allclose(said[len(PROMPT) :], own, atol=1e-4)


def test_a_state_depends_on_what_was_before_it_and_on_nothing_later(model):
    ids = [*PROMPT, 5, 6]
    found = entropies_over(model, ids)
    changed = entropies_over(model, [99, *ids[1:-1], 200])
    assert (found[:, 5:20] - changed[:, 5:20]).abs().amax() > 1e-3
    assert torch.allclose(found[:, :-1], entropies_over(model, [*ids[:-1], 200])[:, :-1], atol=1e-4)


@pytest.mark.parametrize("active", [None, [0], [2], [0, 2]])
@pytest.mark.parametrize("width", [2, 4, 8])
def test_drafts_are_gated_by_what_training_sees_and_change_nothing(model, active, width):
    """Through accepted, partly and wholly rejected drafts, the entropies are those of the whole text."""
    plain = generate(model, Request(PROMPT, NEW), NoDrafter(), mode="full", keep_states=True)
    expected = entropies_over(model, [*PROMPT, *plain.token_ids])
    partly = checked = 0
    for share in (0.3, 0.7):
        drafter = ExitDrafter(thresholds(model, share), active)
        run = generate(model, Request(PROMPT, NEW), drafter, mode="adaptive", width=width, keep_states=True)
        assert run.token_ids == plain.token_ids
        assert torch.equal(run.states, plain.states)
        place = len(PROMPT) - 1
        for step in run.rounds:
            for offset, reason in enumerate(step.decided_by):
                if reason is not None:
                    assert reason.entropy == pytest.approx(float(expected[reason.head, place + offset]), abs=1e-4)
                    checked += 1
            place += len(step.tokens)
        partly += run.stats.partly_rejected_drafts
    assert checked > 0 or active == [0]
    assert partly > 0 or width == 2 or active == [0]


def test_every_kind_of_decoding_reads_them(model):
    plain = generate(model, Request(PROMPT, NEW), NoDrafter(), mode="full", keep_states=True)
    lookup = LookupDrafter(lambda rows: 10.0 + 0.1 * rows)
    auto = AutoDrafter([(lookup, 7), (ExitDrafter(thresholds(model, 0.7)), 3)])
    for drafter in (FixedDrafter(1), auto, FixedDrafter(2)):
        run = generate(model, Request(PROMPT, NEW), drafter, mode="some", width=8, keep_states=True)
        assert run.token_ids == plain.token_ids
        assert torch.equal(run.states, plain.states)
        assert run.stats.tokens_drafted > 0


@pytest.mark.parametrize("drafter", ["none", "exit", "lookup"])
def test_a_trace_shows_every_heads_view_whoever_drafts(model, drafter):
    made = {
        "none": NoDrafter(),
        "exit": ExitDrafter(thresholds(model, 0.6), [1]),
        "lookup": LookupDrafter(lambda rows: 10.0 + 0.1 * rows),
    }[drafter]
    run = generate(model, Request(OTHER, NEW), made, mode="traced", trace=True, width=8)
    expected = entropies_over(model, [*OTHER, *run.token_ids])
    traced = [traced for step in run.rounds for traced in step.traced]
    assert len(traced) == len(run.token_ids)
    for place, views in enumerate(traced, start=len(OTHER) - 1):
        assert [view.head for view in views] == [0, 1, 2]
        for view in views:
            assert view.entropy == pytest.approx(float(expected[view.head, place]), abs=1e-4)
    assert drafter == "none" or run.stats.tokens_drafted > 0


def test_texts_together_keep_to_their_own(model):
    drafter = ExitDrafter(thresholds(model, 0.6))
    prompts = [PROMPT, OTHER, [1, 2, 3], PROMPT[:5]]
    requests = [Request(prompt, NEW) for prompt in prompts]
    found = generate_batch(model, requests, drafter, mode="adaptive", batch=3, width=4)
    assert any(run.stats.partly_rejected_drafts for run in found)
    for prompt, run in zip(prompts, found, strict=True):
        alone = generate(model, Request(prompt, NEW), drafter, mode="adaptive", width=4)
        assert run.token_ids == alone.token_ids
        assert run.stats.tokens_drafted == alone.stats.tokens_drafted


def test_reading_costs_something(model):
    assert measure_costs(model, model.blocks.widths).head > 0


@pytest.mark.skipif(not has_native_code(), reason="no compiled code on this machine")
def test_compiled_readings_say_what_pytorchs_say(smollm2):
    """Token by token over a text, in rounds whose drafts are partly taken back."""
    heads = some_heads(smollm2, (4, 8), torch.arange(8192))
    for head in heads.heads:
        head.up.weight.mul_(0.02)
    native, plain = exit_runner(heads), ExitRunner(heads)
    assert type(native) is NativeExitRunner
    ids = smollm2.tokenizer("The sea is wide, and the ships that sail on it are small. " * 40)["input_ids"]
    agreed = rounds = 0
    with torch.inference_mode():
        states = run_states(smollm2, pack([Document(ids, "s")], len(ids), 0)[0], heads.exit_layers)
        whole = heads(states, torch.arange(len(ids)))
        for number, all_states in enumerate(states.exits):
            rows = all_states.split(1)
            place = 500  # the buffers grow at 512
            for reader in (native, plain):
                reader.process(number, all_states[:place])
            while place + 4 < len(rows):
                for count in (1, 2, 4):
                    found = [reader.read(number, rows[place : place + count]) for reader in (native, plain)]
                    assert found[0] == pytest.approx(found[1], abs=0.3)
                    assert found[0] == pytest.approx(float(entropy(native.logits)), abs=1e-3)
                    expected = whole[number][place + count - 1].float()
                    for reader in (native, plain):
                        assert (reader.logits[0] - expected).norm() < 0.05 * expected.norm()
                    agreed += native.token() == plain.token()
                    rounds += 1
                for reader in (native, plain):
                    reader.process(number, all_states[place : place + 3])
                place += 3
    assert rounds > 50
    assert agreed > 0.9 * rounds


def test_a_file_is_read_strictly(model, tiny_backbone, tmp_path):
    backbone, path = tiny_backbone("llama"), tmp_path / "heads.safetensors"
    model.heads.save(path, torch.float32)
    loaded = load_heads(path, backbone, "attention", [1, 3, 5], 16)
    states = run_states(backbone, pack([Document(PROMPT, "s")], 20, 0)[0], loaded.exit_layers)
    for ours, theirs in zip(loaded(states, torch.arange(20)), model.heads(states, torch.arange(20)), strict=True):
        assert torch.equal(ours, theirs)
    read_heads(path, "attention", 3, 64, backbone.vocab_size, 16)
    for kind, rank in (("adapter", 16), ("attention", 8)):
        with pytest.raises(BundleError):
            load_heads(path, backbone, kind, [1, 3, 5], rank)
        with pytest.raises(BundleError):
            read_heads(path, kind, 3, 64, backbone.vocab_size, rank)


def test_for_other_families_they_start_from_chance_and_add_nothing_yet(tiny_backbone):
    backbone = tiny_backbone("gpt2")
    made = ExitHeads(backbone, "attention", [2], 8, None)
    made.start_from(backbone)
    (head,) = made.heads
    assert head.shape.query_width == backbone.hidden_size
    assert head.q_proj.weight.std() > 0
    assert not head.o_proj.weight.any()


def test_from_training_to_an_answer(tmp_path, tiny_folder):
    """Online and from a cache, resumed from a bundle; calibrated, evaluated, and the same words as without."""
    rows = [{"text": f"line {i} of the text says that {i} times {i} is {i * i}. " * 3} for i in range(60)]
    text, bundle = tmp_path / "text.jsonl", tmp_path / "heads"
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    backbone = ["--model-name", tiny_folder("llama"), "--quantization", "none"]
    data = ["--dataset-name", text, "--max-length", 64, "--holdout", 0.3]
    heads = ["--head", "attention", "--head-layer-indices", "1,3", "--rank", 16, "--lr", "0.01"]

    trained = [*heads, "--max-steps", 8, "--json"]
    first = json.loads(output_of("train", *backbone, *data, *trained, "--output-dir", bundle))
    assert json.loads((bundle / "eexit.json").read_text())["heads"]["kind"] == "attention"
    cached = ["--mode", "offline", "--cache-dir", tmp_path / "states"]
    second = json.loads(
        output_of(
            *("train", *backbone, *data, *trained, *cached, "--start-from", bundle),
            *("--output-dir", tmp_path / "more"),
        )
    )
    assert sum(second["best_agreement"]) >= sum(first["best_agreement"])
    output_of("calibrate", "--bundle", bundle, *data, "--accuracy-levels", "0.1,0.3,0.9")
    evaluation = json.loads(output_of("evaluate", "--bundle", bundle, *data, "--json"))
    assert len(evaluation["auxiliary_heads"]) == 2
    answer = ["--bundle", bundle, "--prompt", "line 7", "--raw", "--max-tokens", 24, "--read-heads", "all"]
    compared = json.loads(
        output_of("infer", *answer, "--mode", "compare", "--drafter", "exit", "--accuracy-level", "0.10", "--json")
    )
    assert compared["identical"]
    assert compared["bit_exact"]
    assert compared["adaptive_early_exit"]["stats"]["tokens_drafted"] > 0
    assert math.isfinite(compared["speedup"])
