"""On-policy answers in batches against `transformers.generate` one prompt at a time, same weights, in one run.

    python benchmarks/on_policy_answers.py PROMPTS.jsonl [--batch 48]

New tokens per second, and prompt and new tokens per second, both ways.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from early_exit_cli.batched import answer_together
from early_exit_cli.config import BackboneConfig
from early_exit_cli.data import read_prompts
from early_exit_cli.fused_blocks import FusedBlocks
from early_exit_cli.loading import load_backbone

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("prompts", type=Path)
parser.add_argument("--batch", type=int, default=48)
parser.add_argument("--tokens", type=int, default=96)
arguments = parser.parse_args()
backbone = load_backbone(BackboneConfig())
prompts = [backbone.encode_prompt(row["prompt"]) for row in read_prompts(arguments.prompts)]
prompts = sorted((ids for ids in prompts[:400] if len(ids) <= 384), key=len)
middle = len(prompts) // 2
chosen = prompts[middle - arguments.batch // 2 : middle + arguments.batch // 2]
blocks = FusedBlocks(backbone)


def one_by_one(ids: list[int]) -> int:
    inputs = torch.tensor([ids])
    with torch.inference_mode():
        output = backbone.model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=arguments.tokens,
            do_sample=False,
        )
    return output.shape[1] - len(ids)


one_by_one(chosen[0])
started = time.perf_counter()
sample = chosen[:: max(1, len(chosen) // 6)]
single_new = sum(one_by_one(ids) for ids in sample)
single = time.perf_counter() - started
started = time.perf_counter()
answers = answer_together(blocks, chosen, arguments.tokens)
batched = time.perf_counter() - started
batched_new = sum(map(len, answers))
single_rate, batched_rate = single_new / single, batched_new / batched
print(
    f"one at a time: {single_rate:.1f} new tokens/s, {(single_new + sum(map(len, sample))) / single:.1f} with prompts"
)
print(
    f"{len(chosen)} together: {batched_rate:.1f} new tokens/s, {(batched_new + sum(map(len, chosen))) / batched:.1f} with prompts"
)
print(f"{batched_rate / single_rate:.1f}x")
