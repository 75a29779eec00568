"""Answering many prompts together, for training data.

Texts advance together, a token at a time; those that have ended are dropped. Compiled passes take each with a KV cache
of its own. Elsewhere prompts of like length stand side by side, padded on the left (`runtime.padded`), on a GPU by the
hundreds and in recorded steps (`recorded_answers`). There only tokens per second count: a token's bits may differ from
those of decoding one text. Blocks of other shapes than Llama's are left to the library's own `generate`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from early_exit_cli.backbone.backbone import Backbone
from early_exit_cli.data.kept_answers import GROUP
from early_exit_cli.data.recorded_answers import MOST_ROWS, RecordedAnswers
from early_exit_cli.runtime.blocks import PREFILL_WIDTH
from early_exit_cli.runtime.fused_blocks import FusedBlocks
from early_exit_cli.runtime.kv_cache import Part
from early_exit_cli.runtime.native_blocks import NativeBlocks, compiled_blocks
from early_exit_cli.runtime.padded import PaddedRows

Answer = Callable[[list[list[int]], int, float | None, torch.Generator], list[list[int]]]
"""(prompts, most new tokens, temperature, its randomness) -> new tokens for each, as `answer_together`."""
PREFILL_ROWS = 512
KEPT_SHARE = 0.8
"""Ended rows are dropped when fewer than this share still go on."""


def answerer(backbone: Backbone) -> Answer:
    """How many prompts are answered together by this backbone."""
    compiled = compiled_blocks(backbone)
    if compiled is not None:
        return partial(answer_side_by_side, compiled)
    if not backbone.has_llama_shape:
        return partial(answer_by_library, backbone)
    if backbone.device.type == "cuda":
        return RecordedAnswers(FusedBlocks(backbone))
    return partial(answer_together, FusedBlocks(backbone))


def groups_together(backbone: Backbone) -> int:
    """How many groups of GROUP prompts `answerer` is best given at once; it takes what the memory holds."""
    return MOST_ROWS // GROUP if backbone.device.type == "cuda" and backbone.has_llama_shape else 1


def answer_by_library(
    backbone: Backbone,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float | None,
    generator: torch.Generator,
) -> list[list[int]]:
    """As `answer_together`."""
    from transformers import GenerationConfig

    ends = backbone.eos_token_ids
    longest = max(map(len, prompts))
    rows = [[min(ends, default=0)] * (longest - len(prompt)) + prompt for prompt in prompts]
    seen = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature is not None,
        temperature=temperature or 1.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        eos_token_id=sorted(ends) or None,
        pad_token_id=min(ends, default=0),
    )
    with torch.random.fork_rng():
        torch.manual_seed(generator.initial_seed())
        found = backbone.model.generate(
            torch.tensor(rows, device=backbone.device),
            attention_mask=torch.tensor(seen, device=backbone.device),
            generation_config=config,
        )
    answers = found[:, longest:].tolist()
    return [answer[: next((i + 1 for i, t in enumerate(answer) if t in ends), None)] for answer in answers]


def answer_side_by_side(
    blocks: NativeBlocks,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float | None = None,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """As `answer_together`; each answer has the bits of its own decoding."""
    depth, ends = blocks.num_blocks, blocks.backbone.eos_token_ids
    answers: list[list[int]] = [[] for _ in prompts]
    with torch.inference_mode():
        caches = [blocks.new_cache(len(prompt) + max_new_tokens) for prompt in prompts]
        last = []
        for prompt, cache in zip(prompts, caches, strict=True):
            for piece in torch.tensor(prompt).split(PREFILL_WIDTH):
                hidden = blocks.run(blocks.embed(piece), cache, cache.length, 0, depth)
                cache.length += len(piece)
            last.append(hidden[-1:])
        states, going = torch.cat(last), list(range(len(prompts)))
        while True:
            chosen = _chosen(blocks, states, temperature, generator)
            for text, token in zip(going, chosen.tolist(), strict=True):
                answers[text].append(token)
            rows = [row for row, text in enumerate(going) if answers[text][-1] not in ends]
            rows = [row for row in rows if len(answers[going[row]]) < max_new_tokens]
            if not rows:
                return answers
            going = [going[row] for row in rows]
            parts = [Part(caches[text], caches[text].length, 1) for text in going]
            (states,) = blocks.run_batch(blocks.embed(chosen[rows]), parts, [depth])
            for text in going:
                caches[text].length += 1


def _chosen(
    blocks: NativeBlocks, states: Tensor, temperature: float | None, generator: torch.Generator | None
) -> Tensor:
    """The next token after each of the last block's states [rows, hidden]: the best one, or one sampled."""
    if temperature is None:
        return blocks.finish(states)[1]
    return _sampled(blocks.logits(blocks.final_norm(states)), temperature, generator)


def _sampled(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """A token for each row of logits [rows, vocab], from the whole distribution."""
    return torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=generator)[:, 0]


def answer_together(
    blocks: FusedBlocks,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float | None = None,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """New tokens for each prompt, up to and with an end token.

    Args:
        temperature: greedy without one, else sampled from the whole distribution.
    """
    backbone = blocks.backbone
    longest = max(map(len, prompts))
    pad = min(backbone.eos_token_ids, default=0)
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=backbone.device)
    starts = torch.tensor([longest - len(prompt) for prompt in prompts], device=backbone.device)
    answers: list[list[int]] = [[] for _ in prompts]
    owners = list(range(len(prompts)))  # the prompt that each row answers; -1 when it has ended
    with torch.inference_mode():
        rows = PaddedRows.allocate(blocks, blocks.layers, starts, longest + max_new_tokens)
        step = max(1, PREFILL_ROWS // len(prompts))
        for position in range(0, longest, step):
            states = rows.run(ids[:, position : position + step], position)
        for position in range(longest, longest + max_new_tokens):
            logits = blocks.logits(blocks.final_norm(states))
            chosen = logits.argmax(-1) if temperature is None else _sampled(logits, temperature, generator)
            for row, token in enumerate(chosen.tolist()):
                if owners[row] >= 0:
                    answers[owners[row]].append(token)
                    if token in backbone.eos_token_ids:
                        owners[row] = -1
            going = [row for row, owner in enumerate(owners) if owner >= 0]
            if not going or position == longest + max_new_tokens - 1:
                break
            if len(going) < KEPT_SHARE * len(owners):
                kept = torch.tensor(going, device=backbone.device)
                rows = rows.part(kept)
                chosen, owners = chosen[kept], [owners[row] for row in going]
            states = rows.run(chosen[:, None], position)
    return answers
