"""Decoding as it runs on a card, without one: every tensor is made where it is used, and recordings wait for nothing.

`cards` refuses what a card would refuse, in the paths that decode there: PyTorch's passes, recorded and not, the library's
blocks with their states, heads of every kind, sampling, texts together, beginnings that are taken over, and our kernels' passes
and chains with the kernels in PyTorch. The words are those of the CPU.
"""

import dataclasses
from unittest import mock

import pytest
import torch
from assistant_files import assistant_config, random_assistant
from cards import CARD, OnCard, a_card, on_card, on_host, record
from drafters import make_drafter, some_head
from mtp_files import random_layer, write_layer
from own_drafters import willing
from tiny_models import family_config

from early_exit_cli.backbone import load_assistant, mtp
from early_exit_cli.backbone.backbone import Backbone
from early_exit_cli.backbone.load import load_backbone
from early_exit_cli.calibration.head_outputs import read_batch
from early_exit_cli.calibration.held_out import read_held_out
from early_exit_cli.config import BackboneConfig, SamplingConfig
from early_exit_cli.data.documents import Document
from early_exit_cli.data.packing import pack
from early_exit_cli.decoding.answer import generate
from early_exit_cli.decoding.batch import generate_batch
from early_exit_cli.decoding.prefixes import Prefixes
from early_exit_cli.decoding.text import Request
from early_exit_cli.drafting import costs
from early_exit_cli.drafting.drafter import NoDrafter
from early_exit_cli.engine import Engine
from early_exit_cli.files.schemas import EagleLayout
from early_exit_cli.heads import cuda_eagle
from early_exit_cli.heads.cuda_eagle import CudaEagle
from early_exit_cli.heads.eagle import EagleHead
from early_exit_cli.heads.exit_heads import ExitHeads
from early_exit_cli.heads.load_mtp import load_assistant_head, load_mtp_head
from early_exit_cli.runtime.cuda_graphs import Graphs
from early_exit_cli.runtime.fused_blocks import FusedBlocks
from early_exit_cli.runtime.hf_blocks import HFBlocks
from early_exit_cli.runtime.reference_kernels import ReferenceKernels
from early_exit_cli.sampling import make_chooser

LONG = [(7 * place) % 250 for place in range(150)]


def loaded(folder):
    return load_backbone(BackboneConfig(model_name=str(folder), quantization="none", device="cpu"))


def on_the_card(backbone):
    backbone.model.to(CARD)
    assert isinstance(backbone.lm_head.weight, OnCard)
    assert backbone.device == CARD
    return backbone


def said(engine, drafter, prompt=LONG, prefixes=None, tokens=6, **more):
    return generate(engine, Request(prompt, tokens, stop_ids=(), **more), drafter, mode="x", prefixes=prefixes)


@pytest.mark.parametrize("kind", ["adapter", "attention", "linear"])
def test_every_drafter_decodes_there(tiny_folder, tiny_model, kind):
    expected = said(tiny_model("llama", "fused"), NoDrafter()).token_ids
    with a_card() as waits:
        backbone = on_the_card(loaded(tiny_folder("llama")))
        engine = Engine(backbone, FusedBlocks(backbone), ExitHeads(backbone, kind, [1, 3, 5], 16, None))
        engine.heads.to(CARD).requires_grad_(False)
        engine.eagle = some_head(backbone)
        if kind != "linear":
            engine.blocks.graphs = Graphs(record)
        plain, drafted = said(engine, NoDrafter()), 0
        assert plain.token_ids == expected
        assert waits.count("_to_copy") <= 4 * len(expected)
        for name in ("exit", "fixed", "lookup", "eagle", "auto") if kind == "adapter" else ("exit",):
            found = said(engine, make_drafter(name, engine))
            drafted += found.stats.tokens_drafted
            assert found.token_ids == expected, name
        assert drafted > 0 or kind == "linear"
        assert engine.blocks.graphs is None or (
            engine.blocks.graphs.failure is None and engine.blocks.graphs.recordings
        )
        if kind == "adapter":
            generate_batch(
                engine,
                [Request(LONG[:20], 6), Request(LONG[:9], 6)],
                make_drafter("eagle", engine),
                mode="x",
                batch=2,
                width=4,
            )
            prefixes = Prefixes(10**9)
            first = said(engine, make_drafter("eagle", engine), prefixes=prefixes)
            second = [*LONG, *first.token_ids, 3, 4]
            turns = [said(engine, make_drafter("eagle", engine), second, kept) for kept in (prefixes, None)]
            assert turns[0].token_ids == turns[1].token_ids


def test_sampling_draws_there(tiny_folder):
    settings = SamplingConfig(temperature=0.9, top_k=40, top_p=0.9, min_p=0.02, repetition_penalty=1.2, seed=3)
    with a_card():
        backbone = on_the_card(loaded(tiny_folder("llama")))
        engine = Engine(backbone, FusedBlocks(backbone), eagle=some_head(backbone))
        runs = [
            said(engine, drafter, LONG[:30], chooser=make_chooser(settings, {5: 2.0})).token_ids
            for drafter in (NoDrafter(), make_drafter("eagle", engine))
        ]
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    "family", ["qwen3_5", "gemma4-inputs", "bloom", pytest.param("qwen3_5_moe", marks=pytest.mark.slow)]
)
def test_the_librarys_blocks_decode_there(tiny_folder, tiny_model, family):
    expected = said(tiny_model(family, "hf"), NoDrafter(), LONG[:70]).token_ids
    with a_card():
        backbone = on_the_card(loaded(tiny_folder(family)))
        engine, prefixes = Engine(backbone, HFBlocks(backbone)), Prefixes(10**9)
        assert said(engine, NoDrafter(), LONG[:70], prefixes).token_ids == expected
        assert said(engine, NoDrafter(), LONG[:70], prefixes).token_ids == expected


def test_calibration_and_costs_are_measured_there(tiny_folder, monkeypatch):
    for name, fewer in {"REPEATS": 0, "CONTEXT": 64}.items():
        monkeypatch.setattr(costs, name, fewer)
    batches, vocab = (
        pack([Document(LONG[:40], "a text"), Document(LONG[3:33], "another")], 64, 0),
        torch.arange(0, 320, 2),
    )
    found = []

    def measured(backbone):
        engine = Engine(backbone, FusedBlocks(backbone), ExitHeads(backbone, "attention", [1, 3], 16, vocab))
        torch.manual_seed(4)
        for parameter in engine.heads.parameters():
            parameter.data = torch.randn(parameter.shape) * 0.1
        engine.heads.to(backbone.device).requires_grad_(False)
        engine.eagle = some_head(backbone, vocab)
        held_out = read_held_out(engine, batches, "entropy")
        costs.measure_costs(engine, [4])
        found.append((held_out.exits.uncertainties, held_out.rolled[0][0], read_batch(engine, batches[0]).tokens))

    backbone = loaded(tiny_folder("llama"))
    measured(backbone)
    with a_card():
        measured(on_the_card(backbone))
    for expected, there in zip(*found, strict=True):
        torch.testing.assert_close(there, expected)


def carried(load):
    """What the library loads, which fills no tensors on a card that is not there."""

    def loaded(*args):
        with mock.patch.object(Backbone, "device", torch.device("cpu")):
            model = load(*args)
        return model.to(CARD)

    return loaded


@pytest.mark.parametrize("what", ["layer", "assistant"])
def test_what_a_model_brings_drafts_there(tiny_folder, tmp_path, monkeypatch, what):
    if what == "layer":
        block, front = random_layer(family_config("qwen3_5"))
        folder = write_layer(tiny_folder("qwen3_5"), tmp_path / "model", block, front, tmp_path / "files")
    else:
        folder = tiny_folder("gemma4-inputs")
        random_assistant(assistant_config(family_config("gemma4-inputs"), ordered=True)).save_pretrained(
            tmp_path / "files"
        )

    def engine_of(backbone):
        blocks = HFBlocks(backbone)
        own = load_mtp_head(blocks) if what == "layer" else load_assistant_head(blocks, str(tmp_path / "files"))
        return Engine(backbone, blocks, mtp=own)

    engine = engine_of(loaded(folder))
    expected = said(engine, willing(engine), LONG[:30], tokens=6)
    monkeypatch.setattr(mtp, "_one_block", carried(mtp._one_block))
    monkeypatch.setattr(load_assistant, "_load", carried(load_assistant._load))
    with a_card():
        engine = engine_of(on_the_card(loaded(folder)))
        found = said(engine, willing(engine), LONG[:30], tokens=6)
    assert found.token_ids == expected.token_ids
    assert found.stats.tokens_drafted == expected.stats.tokens_drafted > 0


@pytest.mark.parametrize(
    "layout", [{}, {"joint_norm": True, "reads_final": True}, {"norm_before_residual": True, "qk_norm": True}]
)
def test_a_heads_chain_runs_there(tiny_folder, monkeypatch, layout):
    """The kernels in PyTorch, over buffers and places on the card."""
    backbone, shape = (
        loaded(tiny_folder("llama")),
        {"hidden": 64, "query_heads": 2, "kv_heads": 1, "head_dim": 64, "inner": 128},
    )
    layout = EagleLayout(**shape, activation="silu", rope={"rope_theta": 500.0}, eps=1e-5, own_embedding=True, **layout)
    torch.manual_seed(5)
    head = EagleHead(backbone, [1, 3], torch.arange(0, 256, 2), layout).to(torch.bfloat16).requires_grad_(False)
    states = [torch.randn(150, head.state_size).to(torch.bfloat16) for _ in range(3)]
    with torch.inference_mode():
        expected = CudaEagle(head, ReferenceKernels(), lambda step: step).chain(LONG, states, 4)
    in_nf4 = cuda_eagle.in_nf4

    def on_host_in_nf4(weight):
        made = in_nf4(on_host(weight))
        return dataclasses.replace(made, packed=on_card(made.packed), scale=on_card(made.scale))

    monkeypatch.setattr(cuda_eagle, "in_nf4", on_host_in_nf4)
    with a_card():
        backbone = on_the_card(backbone)
        there = (
            EagleHead(backbone, [1, 3], torch.arange(0, 256, 2), layout).to(CARD, torch.bfloat16).requires_grad_(False)
        )
        there.load_state_dict(head.state_dict())
        chain = CudaEagle(there, ReferenceKernels(), lambda step: step).fork()
        with torch.inference_mode():
            assert chain.chain(LONG, [state.to(CARD) for state in states], 4) == expected


def test_what_a_card_refuses_is_refused():
    with a_card():
        x = torch.zeros(3, 4, device=CARD)
        assert (x + 1.0 + torch.tensor(2.0)).tolist() == [[3.0] * 4] * 3
        for wrong in (
            lambda: x + torch.ones(4),
            lambda: torch.cat([x, torch.ones(1, 4)]),
            lambda: torch.ones(3)[torch.tensor([1], device=CARD)],
            lambda: torch.nn.functional.embedding(torch.tensor([1]), x),
        ):
            with pytest.raises(RuntimeError, match=r"two devices|indices on the card"):
                wrong()
        for waiting in (lambda: int(x.sum()), x.nonzero, x.cpu, lambda: x[x > 0], lambda: torch.ones(4).to(CARD)):
            waiting()
            with pytest.raises(RuntimeError, match="inside a recording"):
                record(waiting)
