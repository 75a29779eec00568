"""The EAGLE head in compiled code, on CPUs that have it: a step is a fifth of a pass in PyTorch's hands."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from early_exit_cli.backbone.quantization import HEAD_STEP
from early_exit_cli.heads.cuda_eagle import cuda_eagle
from early_exit_cli.heads.eagle import EagleHead
from early_exit_cli.heads.eagle_runner import EagleRunner
from early_exit_cli.heads.native_head_cache import NativeHeadCache
from early_exit_cli.runtime.native_buffers import Held
from early_exit_cli.runtime.native_code import Eagle, has_native_code, native_code
from early_exit_cli.runtime.nf4_linear import VOCAB_TILE
from early_exit_cli.runtime.thread_count import pass_threads
from early_exit_cli.sampling import GREEDY, Chooser


class NativeEagle(EagleRunner):
    """`EagleRunner` in one call a step, with a choice and its entropy beside the state."""

    cache_kind = NativeHeadCache

    def load_weights(self) -> None:
        head, block, attention = self.head, self.head.block, self.head.block.self_attn
        layout = head.layout
        self.code = native_code()
        self.held = Held(self.code)
        q_proj, k_proj, v_proj, o_proj = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
        q_norm, k_norm = (None if norm is None else norm.weight for norm in (attention.q_norm, attention.k_norm))
        weights = (
            [head.fc.weight],
            [block.mlp.gate_proj.weight, block.mlp.up_proj.weight],
            [block.mlp.down_proj.weight],
            [head.lm_head_weight],
        )
        part_norms = [cast(Tensor, norm.weight) for norm in head.fc_norm]
        norms = (block.input_layernorm, block.hidden_norm, block.post_attention_layernorm, head.norm)
        self.weights = Eagle(
            self.held.attention(
                attention.shape,
                (q_proj.weight, k_proj.weight, v_proj.weight, o_proj.weight),
                (q_norm, k_norm),
                layout.eps,
            ),
            *(self.held.int8_of(*parts) for parts in weights),
            self.held.address(torch.cat(part_norms) if part_norms else None),
            self.held.address(None if head.input_norm is None else head.input_norm.weight),
            *(self.held.address(norm.weight) for norm in norms),
            self.held.address(head.embedding_weight),
            *(head.parts, len(part_norms), head.state_size, layout.hidden, self.inner),
            *(layout.norm_before_residual, layout.norm_output, layout.eps),
        )
        self._hold_results()

        vocab = head.draft_vocab
        self.draft_ids = None if vocab is None else vocab.tolist()

    def _hold_results(self) -> None:
        self.logits = torch.empty(1, self.weights.lm_head.outputs)
        self.token, self.entropy = ctypes.c_int64(), ctypes.c_float()

    def fork(self) -> EagleRunner:
        other = cast(NativeEagle, super().fork())
        other._hold_results()
        return other

    def read(self, tokens: list[int], states: list[Tensor]) -> Tensor:
        states = [state.contiguous() for state in states[: self.head.parts]]
        pointers = (ctypes.c_void_p * len(states))(*(state.data_ptr() for state in states))
        hidden = self._run(tokens, pointers, None, self.cache.length)
        self.cache.length += len(tokens)
        return hidden

    def step(self, token: int, hidden: Tensor, ahead: int) -> Tensor:
        return self._run([token], None, hidden.data_ptr(), self.cache.length + ahead - 1)

    def _run(self, tokens: list[int], states: object, own: int | None, position: int) -> Tensor:
        """The block over rows at `position` -> the last one's state, [1, hidden]; logits, token and entropy stay here.

        Args:
            tokens: the one that follows each row. states: addresses of the states that are fused, [rows, hidden] each; None
                for one row of the head's own state, at the address `own`.
        """
        rows, cache = len(tokens), cast(NativeHeadCache, self.cache)
        cache.reserve(position + rows)
        state = torch.empty(1, self.weights.hidden, dtype=torch.bfloat16)
        failed = self.code.eexit_eagle(
            *(self.weights, states, own, (ctypes.c_int64 * rows)(*tokens), rows, position, cache.buffers),
            *(state.data_ptr(), self.logits.data_ptr(), self.token, self.entropy, pass_threads.now),
        )
        if failed:
            raise MemoryError
        return state

    def choose(
        self, hidden: Tensor, chooser: Chooser = GREEDY, drafted: Sequence[int] = (), temperature: float = 1.0
    ) -> tuple[int, float]:
        """For the state that the last call gave."""
        uncertainty = self.entropy.value
        if chooser.reads_logits:
            return chooser.draft(self.logits, self.head.draft_vocab, list(drafted), temperature), uncertainty
        column = self.token.value
        return column if self.draft_ids is None else self.draft_ids[column], uncertainty


def eagle_runner(head: EagleHead) -> EagleRunner:
    """The runner for a head on its device: compiled code or a GPU's kernels where they fit, else PyTorch."""
    if head.fc.weight.device.type == "cuda":
        return cuda_eagle(head) or EagleRunner(head)
    return NativeEagle(head) if _fits(head) else EagleRunner(head)


def _fits(head: EagleHead) -> bool:
    """Whether compiled code takes a head, by where its weights are and by its sizes."""
    weight, shape, mlp = head.fc.weight, head.block.self_attn.shape, head.block.mlp
    if weight.device.type != "cpu" or not head.suits_kernels:
        return False
    sizes = (weight.shape[0], head.state_size, mlp.down_proj.in_features, head.lm_head_weight.shape[0])
    return not shape.head_dim % HEAD_STEP and not any(size % VOCAB_TILE for size in sizes) and has_native_code()
