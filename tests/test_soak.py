"""Two thousand prompts in one process: memory is flat after the first hundred."""

import gc
import os
import random
import resource
from pathlib import Path

import pytest
import torch

from early_exit_cli.bundle.load import load_engine
from early_exit_cli.config import SHIPPED_BUNDLE, BackboneConfig, BundleConfig
from early_exit_cli.decoding.answer import generate
from early_exit_cli.decoding.text import Request
from early_exit_cli.drafting.chances import Survival
from early_exit_cli.drafting.choose import auto_drafter, eagle_drafter, exit_drafter, lookup_drafter
from early_exit_cli.drafting.drafter import Drafter, NoDrafter
from early_exit_cli.drafting.eagle import EagleDrafter
from early_exit_cli.drafting.exit import ExitDrafter, FixedDrafter
from early_exit_cli.drafting.lookup import LookupDrafter
from early_exit_cli.engine import Engine
from early_exit_cli.heads.eagle import EagleHead

PROMPTS, SETTLED = int(os.environ.get("EEXIT_SOAK", "2000")), 100
ALLOWED = 16 << 20
"""Bytes that the process may hold more at the end than after the first hundred prompts: what an allocator keeps, no leak.
A leak of 10 KB a prompt would be above it."""
COMPILED = 32 << 20
"""The same for a model in bfloat16, whose products oneDNN compiles for every length; were they all kept, 300 MB."""


def resident() -> int:
    """Bytes of memory that the process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def living_tensors() -> int:
    """Tensors that Python knows of."""
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def soak(model: Engine, drafters: list[Drafter], texts: list[list[int]], tokens: int) -> list[int]:
    """Answer all texts, drafters in turns, each like plain decoding now and then.

    Returns:
        Bytes held after each hundred of them.
    """
    held, tensors = [], 0
    for number, ids in enumerate(texts, start=1):
        drafter = drafters[number % len(drafters)]
        found = generate(model, Request(ids, tokens), drafter, mode="soak")
        if number % 50 == 0:
            assert found.token_ids == generate(model, Request(ids, tokens), NoDrafter(), mode="soak").token_ids
        if number % SETTLED == 0:
            held.append(resident())
            tensors = tensors or living_tensors()
    print(f"MB held after each {SETTLED} prompts: {[round(found / 2**20, 1) for found in held]}")
    assert living_tensors() <= tensors + 20
    return held


@pytest.mark.slow
def test_memory_is_flat_over_two_thousand_prompts(tiny_model):
    model = tiny_model("llama")
    torch.manual_seed(0)
    head = EagleHead(model.backbone, [2, 4], None).requires_grad_(False)
    head.start_from(model.backbone)
    drafters = [
        NoDrafter(),
        ExitDrafter([3.4, 3.4, 3.6]),
        FixedDrafter(1),
        LookupDrafter(lambda rows: 1.0 + 0.05 * rows),
        EagleDrafter(head, [Survival(intercept=0.0, slope=-0.1, mean=0.5)], lambda rows: 1.0, 0.05, 0.05),
    ]
    dice = random.Random(0)
    texts = [[dice.randrange(256) for _ in range(dice.randrange(1, 200))] for _ in range(PROMPTS)]
    held = soak(model, drafters, texts, 16)
    assert max(held) - held[0] < ALLOWED


@pytest.mark.slow
def test_memory_is_flat_over_two_thousand_prompts_of_the_embedded_model(smollm2):
    model = load_engine(BackboneConfig(device="cpu"), BundleConfig(bundle=SHIPPED_BUNDLE))
    drafters = [
        NoDrafter(),
        exit_drafter(model, 0.9, 8, "all"),
        lookup_drafter(model),
        eagle_drafter(model),
        auto_drafter(model, 0.9, 8, "auto"),
    ]
    dice = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz    "
    texts = [
        model.backbone.encode_prompt("".join(dice.choices(letters, k=dice.randrange(9, 200)))) for _ in range(PROMPTS)
    ]
    held = soak(model, drafters, texts, 6)
    assert max(held) - held[0] < COMPILED
    assert max(held) - held[len(held) // 2] < ALLOWED
