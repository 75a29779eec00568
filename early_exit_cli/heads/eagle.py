"""The EAGLE head: one block that rolls forward from the deep states of what is verified (EAGLE-3, Li et al. 2025).

For a verified token at position t it reads the backbone's states after some exit layers and after the last block, fused
into one, and the embedding of token t + 1; it predicts token t + 2. For the tokens after that, the fused state is its own
output of the step before. Its attention sees the fused states up to t and its own steps after it.

Names and shapes are those of EAGLE-3's checkpoints as `speculators` reads them. The heads trained here are of one layout:
`fc_norm`, `norm_output`, the last state with the backbone's final norm applied, which is that checkpoint's third
`fc_norm`, LM head and embedding the backbone's own, the LM head cut down to the draft vocabulary and neither part of the
file. Heads that were trained elsewhere say what they compute (`EagleLayout`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from early_exit_cli.backbone.output import AttentionShape, BackboneView
from early_exit_cli.backbone.rope import scaled_rotary
from early_exit_cli.errors import BundleError, said
from early_exit_cli.files.atomic import write_atomic
from early_exit_cli.files.schemas import EagleLayout
from early_exit_cli.heads.attention import rotary, rotate
from early_exit_cli.heads.exit_heads import DRAFT_VOCAB, read_tensors, require_tensors
from early_exit_cli.hidden_states.states import Prediction, States


class Attention(nn.Module):
    """Projections of grouped-query attention over [embedding; state], 2 * hidden wide."""

    def __init__(self, layout: EagleLayout) -> None:
        super().__init__()
        self.shape = shape = AttentionShape(
            *(layout.query_heads, layout.kv_heads, layout.head_dim, float(layout.rope.get("rope_theta", 0.0))),
            scaled_rotary(layout.rope, layout.head_dim, layout.positions),
        )
        hidden = layout.hidden
        self.q_proj = nn.Linear(2 * hidden, shape.query_width, bias=False)
        self.k_proj = nn.Linear(2 * hidden, shape.kv_width, bias=False)
        self.v_proj = nn.Linear(2 * hidden, shape.kv_width, bias=False)
        self.o_proj = nn.Linear(shape.query_width, hidden, bias=False)
        self.q_norm = nn.RMSNorm(shape.head_dim, layout.eps) if layout.qk_norm else None
        self.k_norm = nn.RMSNorm(shape.head_dim, layout.eps) if layout.qk_norm else None

    def normed(self, qkv: Tensor) -> Tensor:
        """Norms of queries and keys, where it has them, of [*, (query_heads + 2 kv_heads) * head_dim]."""
        if self.q_norm is None or self.k_norm is None:
            return qkv
        widths = (self.shape.query_width, self.shape.kv_width, self.shape.kv_width)
        query, key, value = qkv.split(widths, -1)

        def by_head(norm: nn.Module, x: Tensor) -> Tensor:
            return norm(x.unflatten(-1, (-1, self.shape.head_dim))).flatten(-2)

        return torch.cat((by_head(self.q_norm, query), by_head(self.k_norm, key), value), -1)


class GatedMLP(nn.Module):
    """[*, hidden] -> [*, hidden]."""

    def __init__(self, layout: EagleLayout) -> None:
        super().__init__()
        from transformers.activations import ACT2FN

        self.gate_proj = nn.Linear(layout.hidden, layout.inner, bias=False)
        self.up_proj = nn.Linear(layout.hidden, layout.inner, bias=False)
        self.down_proj = nn.Linear(layout.inner, layout.hidden, bias=False)
        self.activation_name = layout.activation
        self.activation = ACT2FN[layout.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One decoder block whose attention reads the normed embedding beside the normed state."""

    def __init__(self, layout: EagleLayout) -> None:
        super().__init__()
        self.norm_before_residual = layout.norm_before_residual
        self.input_layernorm = nn.RMSNorm(layout.hidden, layout.eps)  # of the embedding
        self.hidden_norm = nn.RMSNorm(layout.hidden, layout.eps)
        self.self_attn = Attention(layout)
        self.post_attention_layernorm = nn.RMSNorm(layout.hidden, layout.eps)
        self.mlp = GatedMLP(layout)

    def enter(self, embedded: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Embedding and state [*, hidden] -> what attention reads, [*, 2 * hidden], and the residual, [*, hidden]."""
        normed = self.hidden_norm(hidden)
        joined = torch.cat((self.input_layernorm(embedded), normed), -1)
        return joined, normed if self.norm_before_residual else hidden


class EagleHead(nn.Module):
    """See the module's docstring.

    Args:
        exit_layers: numbers of blocks run before the states that it reads, besides the last one's.
        draft_vocab: [draft vocab] int64, the tokens it may propose; None for all.
        layout: by default that of heads trained here.

    Raises:
        BundleError: a layout that asks for what is not supported.
    """

    draft_vocab: Tensor | None

    def __init__(
        self,
        view: BackboneView,
        exit_layers: Sequence[int],
        draft_vocab: Tensor | None,
        layout: EagleLayout | None = None,
    ) -> None:
        super().__init__()
        self.is_ours = layout is None
        """Whether it is of the layout that is trained here."""
        self.layout = layout = layout or our_layout(view)
        self.exit_layers, self.state_size = list(exit_layers), view.hidden_size
        self.parts = len(exit_layers) + layout.reads_final
        """States that are fused."""
        self.fc_norm = nn.ModuleList(
            nn.RMSNorm(self.state_size, layout.eps) for _ in (exit_layers if layout.fc_norm else ())
        )
        self.input_norm = nn.RMSNorm(self.parts * self.state_size, layout.eps) if layout.joint_norm else None
        self.fc = nn.Linear(self.parts * self.state_size, layout.hidden, bias=False)
        self.layers = nn.ModuleList([Block(layout)])
        self.norm = nn.RMSNorm(layout.hidden, layout.eps)
        self.register_buffer(DRAFT_VOCAB, draft_vocab)
        rows = view.vocab_size if draft_vocab is None else draft_vocab.numel()
        self.lm_head = nn.Linear(layout.hidden, rows, bias=False) if layout.own_lm_head else None
        self.embed_tokens = nn.Embedding(len(view.embedding_weight), layout.hidden) if layout.own_embedding else None
        # detached: borrowed from the backbone, no parameters of this module
        weight = view.lm_head_weight.detach()
        self._borrowed_lm_head = weight if draft_vocab is None else weight[draft_vocab.to(weight.device)]
        self._borrowed_embedding = view.embedding_weight.detach()
        self.on_device: Any = None
        """What runs it on a GPU, once made (`cuda_eagle`)."""

    @property
    def block(self) -> Block:
        return self.layers[0]  # type: ignore[return-value]

    @property
    def lm_head_weight(self) -> Tensor:
        """[draft vocab, hidden]"""
        return self._borrowed_lm_head if self.lm_head is None else self.lm_head.weight

    @property
    def embedding_weight(self) -> Tensor:
        """[vocab, hidden]"""
        return self._borrowed_embedding if self.embed_tokens is None else self.embed_tokens.weight

    @property
    def suits_kernels(self) -> bool:
        """Whether it is in bfloat16 and bends gates by SiLU, as our own code for CPUs and GPUs asks."""
        return (
            self.fc.weight.dtype == self.lm_head_weight.dtype == torch.bfloat16
            and self.block.mlp.activation_name == "silu"
        )

    def start_from(self, view: BackboneView) -> None:
        """Begin as the backbone's last block reading its final state; the embedding comes in from zero. Where that block has
        not the Llama shape, begin from chance, with a block that adds nothing to the final state yet.
        """
        hidden, weights = view.hidden_size, view.last_block.weights
        with torch.no_grad():
            self.fc.weight.zero_()
            self.fc.weight[:, -hidden:] = torch.eye(hidden)
            if not weights:
                self.norm.weight.fill_(float(view.final_norm.weight.float().square().mean().sqrt()))
                self.block.self_attn.o_proj.weight.zero_()
                self.block.mlp.down_proj.weight.zero_()
                return
            self.norm.weight.copy_(view.final_norm.weight)
            self.block.hidden_norm.weight.copy_(weights["input_layernorm.weight"])
            for name, parameter in self.block.named_parameters():
                if name in ("input_layernorm.weight", "hidden_norm.weight"):
                    continue
                if parameter.shape == weights[name].shape:
                    parameter.copy_(weights[name])
                else:  # [rows, 2 * hidden]: embedding beside state
                    parameter.zero_()
                    parameter[:, hidden:] = weights[name]

    def normed(self, states: Sequence[Tensor]) -> Tensor:
        """States after the exit layers and the final normed state, [*, hidden] each -> [*, states * hidden], for `fc`."""
        *exits, final = states
        exits = [state.to(self.norm.weight.dtype) for state in exits]
        if self.fc_norm:
            exits = [norm(state) for norm, state in zip(self.fc_norm, exits, strict=True)]
        joined = torch.cat([*exits, final] if self.layout.reads_final else exits, -1)
        return joined if self.input_norm is None else self.input_norm(joined)

    def said(self, hidden: Tensor) -> Tensor:
        """What the LM head reads of states that it rolls forward from, [*, hidden] -> [*, hidden]."""
        return hidden if self.layout.norm_output else self.norm(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """States that it rolls forward from, [*, hidden] -> [*, draft vocab]."""
        said = self.said(hidden)
        return F.linear(said, self.lm_head_weight.to(said.dtype))

    def token_ids(self, columns: Tensor) -> Tensor:
        """Columns of the logits to token ids."""
        return columns if self.draft_vocab is None else self.draft_vocab[columns]

    def forward(self, states: States, steps: int, only_measured: bool = False) -> list[Prediction]:
        """Roll out from every position of packed sequences, the text's own tokens in between.

        This is EAGLE-3's training-time test: step k reads the true fused states up to t and its own outputs of the
        steps before, so that it learns from what it will see when it drafts.

        Args:
            only_measured: predictions of answer tokens only; the columns of a batch before all answers are not rolled out.

        Returns:
            A prediction per step. Step k says token t + k + 2 from position t, for the t whose document reaches it.
        """
        batch = states.batch
        valid = batch.valid
        fused = self.fc(self.normed([*states.exits, states.final])).to(self.norm.weight.dtype)
        hidden = fused.new_zeros(*valid.shape, fused.shape[-1]).index_put((valid,), fused)  # [batch, seq, hidden]
        mask = batch.block_mask()
        rows, columns = valid.nonzero(as_tuple=True)
        owners = batch.documents[valid] * len(valid) + rows  # a document that goes on in another row is another one
        first = 0
        if only_measured and states.measured.any():
            first = max(int(columns[states.measured].amin()) - steps, 0)
        keys: list[Tensor] = []
        values: list[Tensor] = []
        predictions = []
        for step in range(steps):
            start = first if step else 0  # every token has keys and values, but not every one is rolled out
            if step == 1:
                hidden, mask = hidden[:, start:], mask[:, :, start:]
            embedded = F.embedding(batch.input_ids.roll(-1 - step, 1)[:, start:], self.embedding_weight)
            hidden = self._step(embedded, hidden, start + step, mask, keys, values)
            reach = 1 + step
            positions = (owners[:-reach] == owners[reach:]).nonzero()[:, 0]
            if only_measured:
                positions = positions[states.measured[positions + reach]]
            said = self.logits(hidden[rows[positions], columns[positions] - start])
            predictions.append(Prediction(said, positions + reach))
        return predictions

    def _step(
        self, embedded: Tensor, hidden: Tensor, place: int, mask: Tensor, keys: list[Tensor], values: list[Tensor]
    ) -> Tensor:
        """One step from all positions at once, [batch, seq, hidden] -> [batch, seq, hidden]; keys and values grow.

        Args:
            place: rotary position of the first column.
        """
        block, attention = self.block, self.block.self_attn
        rows, seq, _ = hidden.shape
        joined, residual = block.enter(embedded.to(self.norm.weight.dtype), hidden)
        cos, sin = rotary(torch.arange(place, seq + place, device=hidden.device), attention.shape)

        def split(projected: Tensor, norm: nn.Module | None = None) -> Tensor:  # -> [batch, heads, seq, head_dim]
            apart = projected.view(rows, seq, -1, attention.shape.head_dim)
            return (apart if norm is None else norm(apart)).transpose(1, 2)

        query = rotate(split(attention.q_proj(joined), attention.q_norm), cos, sin)
        keys.append(rotate(split(attention.k_proj(joined), attention.k_norm), cos, sin))
        values.append(split(attention.v_proj(joined)))
        attended = roll_out_attention(query, keys, values, mask)
        hidden = residual + attention.o_proj(attended.transpose(1, 2).reshape(rows, seq, -1))
        hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
        return self.norm(hidden) if self.layout.norm_output else hidden

    def save(self, path: Path, dtype: torch.dtype) -> None:
        """Write eagle.safetensors, weights in `dtype`."""
        tensors = {name: value.detach().to("cpu", dtype) for name, value in self.state_dict().items()}
        if self.draft_vocab is not None:
            tensors[DRAFT_VOCAB] = self.draft_vocab.to("cpu", torch.int32)
        write_atomic(path, lambda temporary: save_file(tensors, temporary, metadata={"kind": "eagle"}))


def roll_out_attention(query: Tensor, keys: list[Tensor], values: list[Tensor], mask: Tensor) -> Tensor:
    """Attention of step len(keys) - 1: over the true keys up to a position, and over that position's own later steps.

    Args:
        query: [batch, query_heads, seq, head_dim]. keys, values: per step, [batch, kv_heads, seq, head_dim]; of the first
            step for all columns, of which the others may have the last ones only.
        mask: [batch, 1, seq, columns] bool.
    """
    if len(keys) == 1:
        return F.scaled_dot_product_attention(query, keys[0], values[0], attn_mask=mask, enable_gqa=True)
    rows, heads, seq, width = query.shape
    columns = keys[0].shape[2]
    grouped = (
        query.view(rows, keys[0].shape[1], -1, seq, width) * width**-0.5
    )  # [batch, kv_heads, group, seq, head_dim]
    true = torch.matmul(grouped, keys[0][:, :, None].transpose(-1, -2)).masked_fill(~mask[:, :, None], float("-inf"))
    own = [(grouped * key[:, :, None]).sum(-1, keepdim=True) for key in keys[1:]]
    weights = torch.softmax(torch.cat([true, *own], -1), -1, dtype=torch.float32).to(query.dtype)
    attended = torch.matmul(weights[..., :columns], values[0][:, :, None])
    for step, value in enumerate(values[1:]):
        attended = attended + weights[..., columns + step, None] * value[:, :, None]
    return attended.view(rows, heads, seq, width)


def our_layout(view: BackboneView) -> EagleLayout:
    """The layout that is trained here: a block as wide as the backbone's last one."""
    shape = view.last_block.shape
    return EagleLayout(
        hidden=view.hidden_size,
        query_heads=shape.query_heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        inner=shape.inner,
        activation=shape.activation,
        rope={"rope_type": "default", "rope_theta": shape.rope_theta},
        eps=view.final_norm.eps,
        reads_final=True,
        fc_norm=True,
        norm_output=True,
        own_lm_head=False,
    )


def head_of(
    path: Path,
    tensors: dict[str, Tensor],
    view: BackboneView,
    exit_layers: Sequence[int],
    draft_vocab: Tensor | None,
    layout: EagleLayout | None,
) -> EagleHead:
    """The head that some tensors are the weights of, on the meta device: without time and memory for weights of its own.

    Args:
        path: where they were read. tensors: all but the draft vocabulary.

    Raises:
        BundleError: names or shapes that do not fit, NaN or infinite weights, a layout that no head can have.
    """
    if layout is not None and not layout.own_embedding and layout.hidden != view.hidden_size:
        raise BundleError(
            f"{path}: hidden_size {layout.hidden} without embed_tokens; {view.name} has {view.hidden_size}"
        )
    try:
        with torch.device("meta"):
            head = EagleHead(view, exit_layers, draft_vocab, layout)
    except (RuntimeError, OverflowError) as error:  # numbers that no tensor can have
        raise BundleError(f"{path}: no head has such a shape: {said(error)}") from error
    shapes = {name: list(value.shape) for name, value in head.state_dict().items() if name != DRAFT_VOCAB}
    require_tensors(path, tensors, shapes)
    return head


def load_eagle(
    path: Path, view: BackboneView, exit_layers: Sequence[int], layout: EagleLayout | None = None
) -> EagleHead:
    """Read eagle.safetensors strictly.

    Args:
        layout: of a head that was trained elsewhere.

    Raises:
        BundleError: damaged, or names or shapes that do not fit, NaN or infinite weights.
    """
    tensors, draft_vocab = read_tensors(path, view.vocab_size)
    head = head_of(path, tensors, view, exit_layers, draft_vocab, layout)
    head.load_state_dict(
        tensors if draft_vocab is None else {**tensors, DRAFT_VOCAB: draft_vocab}, strict=True, assign=True
    )
    head.to(view.device, view.dtype).requires_grad_(False)
    if head.embed_tokens is not None and torch.equal(head.embed_tokens.weight, view.embedding_weight):
        head.embed_tokens = None  # a copy of the backbone's
    return head
