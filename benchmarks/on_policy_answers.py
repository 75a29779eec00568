"""On-policy answers in batches against `transformers.generate` one prompt at a time, same weights, in one run.

    python benchmarks/on_policy_answers.py PROMPTS.jsonl [--batch 48|auto] [--count 0] [--device cuda]

New tokens per second, and prompt and new tokens per second, both ways. Batched ones twice: at first, with what a first batch
costs (on a GPU steps are recorded then), and again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from early_exit_cli.backbone.backbone import Backbone
from early_exit_cli.backbone.load import load_backbone
from early_exit_cli.config import EMBEDDED_MODEL, BackboneConfig
from early_exit_cli.data.answers import GROUP, Answer, answer_together, answerer, groups_together
from early_exit_cli.data.rows import read_prompts
from early_exit_cli.runtime.fused_blocks import FusedBlocks


def answers_per_second(
    backbone: Backbone,
    prompts: list[list[int]],
    max_new_tokens: int,
    batch: int | None = None,
    answer: Answer | None = None,
) -> float:
    """New tokens per second over all prompts [ids], greedy, in order of length; recording and reading prompts counted.

    Args:
        batch: prompts answered together; by default as many as training has answered together.
        answer: by default a new answerer, made within the time measured. The same one again has its recordings.
    """
    return timed(backbone, prompts, max_new_tokens, batch, answer)[0]


def timed(
    backbone: Backbone, prompts: list[list[int]], max_new_tokens: int, batch: int | None, answer: Answer | None
) -> tuple[float, float]:
    """New tokens per second, and prompt and new tokens per second, as `answers_per_second`."""
    batch = batch or GROUP * groups_together(backbone)
    ordered = sorted(prompts, key=len)
    generator = torch.Generator(backbone.device).manual_seed(0)
    synchronize(backbone)
    started = time.perf_counter()
    answer = answer or answerer(backbone)
    made = sum(
        len(tokens)
        for start in range(0, len(ordered), batch)
        for tokens in answer(ordered[start : start + batch], max_new_tokens, None, generator)
    )
    synchronize(backbone)
    seconds = time.perf_counter() - started
    return made / seconds, (made + sum(map(len, prompts))) / seconds


def one_by_one(backbone: Backbone, prompts: list[list[int]], max_new_tokens: int) -> tuple[float, float]:
    """The same rates by the library's `generate`, a prompt at a time."""
    new = 0
    started = time.perf_counter()
    for ids in prompts:
        inputs = torch.tensor([ids], device=backbone.device)
        with torch.inference_mode():
            output = backbone.model.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=max_new_tokens,
                do_sample=False,
            )
        new += output.shape[1] - len(ids)
    seconds = time.perf_counter() - started
    return new / seconds, (new + sum(map(len, prompts))) / seconds


def synchronize(backbone: Backbone) -> None:
    if backbone.device.type == "cuda":
        torch.cuda.synchronize(backbone.device)


def batch_size(text: str) -> int | None:
    return None if text == "auto" else int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--model-name", default=EMBEDDED_MODEL)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch", type=batch_size, default=GROUP, help="a number, or auto: as training does")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--count", type=int, help="prompts of middling length; default: a batch; 0: all")
    parser.add_argument("--single", type=int, default=6, help="prompts answered one by one; 0: none")
    arguments = parser.parse_args()
    backbone = load_backbone(BackboneConfig(model_name=arguments.model_name, device=arguments.device))
    rows = read_prompts(arguments.prompts)
    encoded = sorted(
        (ids for ids in (backbone.encode_prompt(row["prompt"]) for row in rows) if len(ids) <= 384), key=len
    )
    batch = arguments.batch or GROUP * groups_together(backbone)
    count = batch if arguments.count is None else arguments.count or len(encoded)
    first = max(0, (len(encoded) - count) // 2)
    chosen = encoded[first : first + count]
    single = None
    if arguments.single:
        one_by_one(backbone, chosen[:1], 4)
        single = one_by_one(backbone, chosen[:: -(-len(chosen) // arguments.single)], arguments.tokens)
        print(f"one at a time: {single[0]:.1f} new tokens/s, {single[1]:.1f} with prompts")
    # side by side on a CPU too, where training may take compiled passes: that is what `--batch auto` measures there
    answer: Answer = answerer(backbone)
    if arguments.batch is not None and backbone.device.type == "cpu":
        answer = together(backbone)
    for turn in ("at first", "again"):
        rates = timed(backbone, chosen, arguments.tokens, batch, answer)
        times = f", {rates[0] / single[0]:.1f}x" if single else ""
        print(
            f"{len(chosen)} prompts, {min(batch, len(chosen))} together, {turn}: {rates[0]:.1f} new tokens/s, "
            f"{rates[1]:.1f} with prompts{times}"
        )
    failure = getattr(answer, "failure", None)
    if failure:
        print(f"steps were not recorded: {failure}")


def together(backbone: Backbone) -> Callable[..., Any]:
    """Rows side by side in PyTorch, whatever else this CPU has."""
    blocks = FusedBlocks(backbone)
    return lambda *arguments: answer_together(blocks, *arguments)


if __name__ == "__main__":
    main()
