"""Answering many prompts together, for training data.

Texts advance together, a token at a time; those that have ended are dropped. Compiled passes take each with a KV cache of
its own. Elsewhere prompts of like length stand side by side, padded on the left: there only the number of tokens per second
counts, a token's bits may differ from those of decoding one text. Blocks of other shapes than Llama's are left to the
library's own `generate`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from early_exit_cli.backbone import Backbone
from early_exit_cli.blocks import PREFILL_WIDTH, Part
from early_exit_cli.fused_blocks import FusedBlocks
from early_exit_cli.native_blocks import NativeBlocks, compiled_blocks

Answer = Callable[[list[list[int]], int, float | None, torch.Generator], list[list[int]]]
"""(prompts, most new tokens, temperature, its randomness) -> new tokens for each, as `answer_together`."""

PREFILL_ROWS = 512
KEPT_SHARE = 0.8
"""Ended rows are dropped when fewer than this share still go on."""


class _Rows:
    """The prompts in work: where each begins, and keys and values [rows, kv_heads, capacity, head_dim] per block."""

    def __init__(self, blocks: FusedBlocks, starts: Tensor, capacity: int) -> None:
        backbone = blocks.backbone
        shape = (starts.numel(), blocks.kv_heads, capacity, blocks.head_dim)
        self.blocks = blocks
        self.starts = starts
        self.keys = [torch.zeros(shape, dtype=backbone.dtype, device=backbone.device) for _ in range(blocks.num_blocks)]
        self.values = [
            torch.zeros(shape, dtype=backbone.dtype, device=backbone.device) for _ in range(blocks.num_blocks)
        ]
        self.cos, self.sin = blocks.rotary_tables(capacity)[None]

    def keep(self, rows: Tensor) -> None:
        """Drop all but `rows`."""
        self.starts = self.starts[rows]
        for block in range(len(self.keys)):
            self.keys[block], self.values[block] = self.keys[block][rows], self.values[block][rows]

    def run(self, ids: Tensor, position: int) -> Tensor:
        """All blocks over [rows, count] token ids at `position`; the last token's states, [rows, hidden]."""
        blocks = self.blocks
        count, width = ids.shape
        end = position + width
        heads, group = blocks.query_heads + blocks.kv_heads, blocks.query_heads // blocks.kv_heads
        half = blocks.head_dim // 2
        cos, sin = self.cos[position:end], self.sin[position:end]
        masks = {window: self._mask(position, end, window) for window in set(blocks.windows)}
        hidden = blocks.embed(ids.flatten())
        shape = (hidden.shape[-1],)
        for block, layer in enumerate(blocks.layers):
            qkv = layer.qkv(layer.input_norm * F.rms_norm(hidden, shape, None, blocks.eps)).view(count, width, -1)
            qk = qkv[..., : heads * blocks.head_dim].view(count, width, heads, blocks.head_dim)
            if layer.qk_norm is not None:
                qk = layer.qk_norm * F.rms_norm(qk, (blocks.head_dim,), None, blocks.eps)
            qk = qk * cos + qk.roll(half, -1) * sin
            keys, values = self.keys[block], self.values[block]
            keys[:, :, position:end] = qk[:, :, blocks.query_heads :].transpose(1, 2)
            new_values = qkv[..., heads * blocks.head_dim :]
            values[:, :, position:end] = new_values.view(count, width, blocks.kv_heads, -1).transpose(1, 2)
            query = qk[:, :, : blocks.query_heads].unflatten(2, (blocks.kv_heads, group)).permute(0, 2, 1, 3, 4)
            attended = F.scaled_dot_product_attention(
                query.flatten(2, 3),  # [rows, kv_heads, width * group, head_dim]
                keys[:, :, :end],
                values[:, :, :end],
                attn_mask=masks[blocks.windows[block]],
                scale=blocks.scale,
            )
            attended = attended.view(count, blocks.kv_heads, width, -1).transpose(1, 2).reshape(count * width, -1)
            hidden = hidden + layer.output(attended)
            gate_up = layer.gate_up(layer.mlp_norm * F.rms_norm(hidden, shape, None, blocks.eps))
            hidden = hidden + layer.down(blocks.activation(gate_up[:, : layer.inner]) * gate_up[:, layer.inner :])
        return hidden.view(count, width, -1)[:, -1]

    def _mask(self, position: int, end: int, window: int | None) -> Tensor:
        """[rows, 1, width * group, end] bool: causal, from the row's start on; padding sees itself, to stay finite."""
        row = torch.arange(position, end, device=self.starts.device)[:, None]
        key = torch.arange(end, device=self.starts.device)
        seen = key <= row
        if window is not None:
            seen &= key > row - window
        seen = (seen & (key >= self.starts[:, None, None])) | (key == row)
        return seen.repeat_interleave(self.blocks.query_heads // self.blocks.kv_heads, 1)[:, None]


def answerer(backbone: Backbone) -> Answer:
    """How many prompts are answered together by this backbone."""
    if not backbone.has_llama_shape:
        return partial(answer_by_library, backbone)
    compiled = compiled_blocks(backbone)
    if compiled is not None:
        return partial(answer_side_by_side, compiled)
    return partial(answer_together, FusedBlocks(backbone))


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
            (states,) = blocks.run_together(blocks.embed(chosen[rows]), parts, [depth])
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
        rows = _Rows(blocks, starts, longest + max_new_tokens)
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
                rows.keep(kept)
                chosen, owners = chosen[kept], [owners[row] for row in going]
            states = rows.run(chosen[:, None], position)
    return answers
