"""Exit heads: small modules from a hidden state to the logits of the next token.

Three kinds. `linear`: RMSNorm and an untied map to the vocabulary, the shape of DSSD's file. `adapter`: a small residual
map that moves a hidden state towards the last block's, then the backbone's own final norm and LM head, whose rows may be
cut down to a draft vocabulary. `attention`: an adapter that first attends over the text's states after the same block, as
Kangaroo's does (Liu et al. 2024). An adapter of rank 576 on SmolLM2 is 1.3 MB, with attention 3.1, an untied map 57.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from early_exit_cli.backbone.output import AttentionShape, BackboneView, LastBlock, rms_norm
from early_exit_cli.config import HeadsConfig
from early_exit_cli.data.packing import Batch
from early_exit_cli.errors import BundleError, ConfigError
from early_exit_cli.files.atomic import write_atomic
from early_exit_cli.files.forms import to_exit_layers
from early_exit_cli.heads.attention import HeadCache, rotary, rotate
from early_exit_cli.hidden_states.states import States

DRAFT_VOCAB = "draft_vocab"
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def default_placement(num_heads: int, num_blocks: int) -> list[int]:
    """What stands for `head_layer_indices` where it is not set, evenly spread: 3 heads on 30 blocks give 7, 15, 22."""
    return [int(index) for index in np.linspace(0, num_blocks, num_heads + 2, dtype=int)[1:-1]]


def exit_layers_of(config: HeadsConfig, num_blocks: int) -> list[int]:
    """Exit layers of the configured or default placement, checked against the depth; an EAGLE head has two by default.

    Raises:
        ConfigError: a block number outside 0 .. num_blocks - 2 (after the last block there is nothing to skip), or
            more heads than places.
    """
    blocks = config.head_layer_indices or default_placement(config.num_heads, num_blocks)
    if config.kind == "eagle" and config.head_layer_indices is None:
        blocks = default_placement(3, num_blocks)[:2]
    if len(set(blocks)) < len(blocks):
        raise ConfigError(
            f"heads.num_heads = {len(blocks)}: a backbone of {num_blocks} blocks has no place for so many"
        )
    if blocks[-1] > num_blocks - 2:
        raise ConfigError(
            f"heads.head_layer_indices: block {blocks[-1]} is out of range; a backbone of {num_blocks} blocks takes "
            f"heads after blocks 0 to {num_blocks - 2}"
        )
    return to_exit_layers(blocks)


class LinearHead(nn.Module):
    """An RMSNorm that starts as the backbone's, then a map of its own, [*, hidden] -> [*, vocab]: DSSD's shape."""

    def __init__(self, hidden_size: int, vocab_size: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.ParameterDict({"weight": nn.Parameter(torch.ones(hidden_size))})
        self.linear = nn.Linear(hidden_size, vocab_size, bias=False)
        self.eps = eps

    def forward(self, hidden: Tensor, _lm_head: DraftLMHead) -> Tensor:
        return self.linear(rms_norm(hidden, self.norm["weight"], self.eps))


class AdapterHead(nn.Module):
    """h + up(silu(down(norm(h)))), then the backbone's final norm and LM head, [*, hidden] -> [*, draft vocab].

    `up` starts at zero: an untrained adapter is the logit lens (nostalgebraist 2020).
    """

    def __init__(self, hidden_size: int, rank: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.ParameterDict({"weight": nn.Parameter(torch.ones(hidden_size))})
        self.down = nn.Linear(hidden_size, rank, bias=False)
        self.up = nn.Linear(rank, hidden_size, bias=False)
        nn.init.normal_(self.down.weight, std=hidden_size**-0.5)
        nn.init.zeros_(self.up.weight)
        self.eps = eps

    def forward(self, hidden: Tensor, lm_head: DraftLMHead) -> Tensor:
        moved = hidden + self.up(F.silu(self.down(rms_norm(hidden, self.norm["weight"], self.eps))))
        return lm_head(moved)


class AttentionHead(AdapterHead):
    """h + attention(norm(h)), causal over the text's states after the head's block; then as `AdapterHead`.

    Its projections start as those of the backbone's last block, the last of them at zero: untrained, it is the logit lens.
    """

    def __init__(self, hidden_size: int, rank: int, eps: float, shape: AttentionShape) -> None:
        super().__init__(hidden_size, rank, eps)
        self.shape = shape
        self.attention_norm = nn.ParameterDict({"weight": nn.Parameter(torch.ones(hidden_size))})
        self.q_proj = nn.Linear(hidden_size, shape.query_width, bias=False)
        self.k_proj = nn.Linear(hidden_size, shape.kv_width, bias=False)
        self.v_proj = nn.Linear(hidden_size, shape.kv_width, bias=False)
        self.o_proj = nn.Linear(shape.query_width, hidden_size, bias=False)
        nn.init.zeros_(self.o_proj.weight)

    def start_from(self, last: LastBlock) -> None:
        """Take over what the backbone's last block looks at, but nothing of what it makes of it."""
        if not last.weights:
            return
        self.attention_norm["weight"].data.copy_(last.weights["input_layernorm.weight"])
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(self, name).weight.data.copy_(last.weights[f"self_attn.{name}.weight"])

    def over_text(self, hidden: Tensor, batch: Batch, positions: Tensor) -> Tensor:
        """Attend within packed documents: all states [valid places, hidden] -> those at `positions`, [positions, hidden]."""
        valid = batch.valid
        placed = hidden.new_zeros(*valid.shape, hidden.shape[-1]).index_put((valid,), hidden)  # [batch, seq, hidden]
        rows, seq, _ = placed.shape
        qkv = self._projected(placed).view(rows, seq, -1, self.shape.head_dim).transpose(1, 2)
        query, key, value = qkv.split((self.shape.query_heads, *[self.shape.kv_heads] * 2), 1)
        tables = rotary(torch.arange(seq, device=hidden.device), self.shape)
        attended = F.scaled_dot_product_attention(
            *(rotate(query, *tables), rotate(key, *tables), value), attn_mask=batch.block_mask(), enable_gqa=True
        )
        return hidden[positions] + self.o_proj(attended.transpose(1, 2).flatten(2)[valid][positions])

    def over_cache(self, hidden: Tensor, cache: HeadCache, position: int, last: int) -> Tensor:
        """Attend over one text: states [rows, hidden] at `position` -> the last ones, [last, hidden]; all stay in the cache."""
        return hidden[-last:] + self.o_proj(cache.attend(self._projected(hidden), position, last))

    def _projected(self, hidden: Tensor) -> Tensor:
        """[*, hidden] -> queries, keys and values one behind another."""
        normed = rms_norm(hidden, self.attention_norm["weight"], self.eps)
        return torch.cat((self.q_proj(normed), self.k_proj(normed), self.v_proj(normed)), -1)


class DraftLMHead:
    """The backbone's final norm and the rows of its LM head that heads may choose; frozen, not part of any file."""

    def __init__(self, view: BackboneView, draft_vocab: Tensor | None) -> None:
        self.norm, self.logit_map = view.final_norm, view.logit_map
        self.weight, self.bias = view.lm_head_weight, view.lm_head_bias
        if draft_vocab is not None:
            rows = draft_vocab.to(self.weight.device)
            self.weight, self.bias = self.weight[rows], None if self.bias is None else self.bias[rows]

    def __call__(self, hidden: Tensor) -> Tensor:
        normed = self.norm(hidden)
        bias = None if self.bias is None else self.bias.to(normed.dtype)
        return self.logit_map(F.linear(normed, self.weight.to(normed.dtype), bias))


class ExitHeads(nn.Module):
    """All heads of a bundle, in depth order.

    `exit_layers` are the numbers of blocks run before each. With a draft vocabulary, column j of the logits is token
    `draft_vocab[j]`.
    """

    draft_vocab: Tensor | None

    def __init__(
        self, view: BackboneView, kind: str, exit_layers: Sequence[int], rank: int, draft_vocab: Tensor | None
    ) -> None:
        super().__init__()
        eps = view.final_norm.eps
        self.kind = kind
        self.rank = rank
        self.exit_layers = list(exit_layers)
        hidden, vocab = view.hidden_size, view.vocab_size
        make: dict[str, Callable[[], nn.Module]] = {
            "linear": lambda: LinearHead(hidden, vocab, eps),
            "adapter": lambda: AdapterHead(hidden, rank, eps),
            "attention": lambda: AttentionHead(hidden, rank, eps, view.last_block.shape.attention),
        }
        if kind not in make:
            raise BundleError(f"heads of kind {kind!r} are unknown here; known: {', '.join(make)}")
        self.heads = nn.ModuleList(make[kind]() for _ in exit_layers)
        self.register_buffer("draft_vocab", draft_vocab)
        self.lm_head = DraftLMHead(view, draft_vocab)

    def __len__(self) -> int:
        return len(self.heads)

    def forward(self, states: States, positions: Tensor) -> list[Tensor]:
        """Logits of each head at some positions of packed text, [positions, draft vocab] each.

        Args:
            states: after each head's exit layer, whole documents.
            positions: [positions] int64, of `states`.
        """
        found = []
        for head, hidden in zip(self.heads, states.exits, strict=True):
            if isinstance(head, AttentionHead):
                moved = head.over_text(hidden, states.batch, positions)
            else:
                moved = hidden[positions]
            found.append(head(moved, self.lm_head))
        return found

    def logits(self, head: int, hidden: Tensor) -> Tensor:
        """Logits of one head, [*, hidden] -> [*, draft vocab]; of one with attention, from where that has been."""
        return self.heads[head](hidden, self.lm_head)

    def token_ids(self, columns: Tensor) -> Tensor:
        """Columns of the logits to token ids."""
        return columns if self.draft_vocab is None else self.draft_vocab[columns]

    def start_from(self, view: BackboneView) -> None:
        """Linear heads start as the backbone's own norm and LM head, nearly so where that norm is no RMSNorm or the LM head has
        a bias; attentions as its last block's.
        """
        for head in self.heads:
            if isinstance(head, LinearHead):
                head.norm["weight"].data.copy_(view.final_norm.weight.float())
                head.linear.weight.data.copy_(view.lm_head_weight.float() / view.logit_map.divisor)
            elif isinstance(head, AttentionHead):
                head.start_from(view.last_block)

    def save(self, path: Path, dtype: torch.dtype) -> None:
        """Write heads.safetensors: `{i}.norm.weight` and so on in `dtype`, and `draft_vocab` where there is one."""
        tensors = {
            name.removeprefix("heads."): value.detach().to("cpu", dtype).contiguous()
            for name, value in self.state_dict().items()
            if name != DRAFT_VOCAB
        }
        if self.draft_vocab is not None:
            tensors[DRAFT_VOCAB] = self.draft_vocab.to("cpu", torch.int32)
        write_atomic(path, lambda temporary: save_file(tensors, temporary, metadata={"kind": self.kind}))

    def dssd_state_dict(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The keys and shapes of DSSD's aux_heads.pt; for linear heads only."""
        return {
            name.removeprefix("heads."): value.detach().to("cpu", dtype) for name, value in self.state_dict().items()
        }


def head_shapes(
    kind: str, num_heads: int, hidden_size: int, vocab_size: int, rank: int, widths: tuple[int, int] = (0, 0)
) -> dict[str, list[int]]:
    """Names and shapes of all tensors of a set of heads.

    Args:
        widths: of an attention's queries, and of its keys.

    Raises:
        BundleError: an unknown kind.
    """
    query, key = widths
    adapter = {"norm.weight": [hidden_size], "down.weight": [rank, hidden_size], "up.weight": [hidden_size, rank]}
    kinds = {
        "linear": {"norm.weight": [hidden_size], "linear.weight": [vocab_size, hidden_size]},
        "adapter": adapter,
        "attention": {
            **adapter,
            "attention_norm.weight": [hidden_size],
            "q_proj.weight": [query, hidden_size],
            "k_proj.weight": [key, hidden_size],
            "v_proj.weight": [key, hidden_size],
            "o_proj.weight": [hidden_size, query],
        },
    }
    if kind not in kinds:
        raise BundleError(f"heads of kind {kind!r} are unknown here; known: {', '.join(kinds)}")
    return {f"{head}.{name}": shape for head in range(num_heads) for name, shape in kinds[kind].items()}


def require_tensors(path: Path, tensors: Mapping[str, Tensor], shapes: Mapping[str, list[int]]) -> None:
    """Refuse any other names and shapes, and weights that are NaN or infinite.

    Raises:
        BundleError
    """
    for name, shape in shapes.items():
        found = tensors.get(name)
        if found is None or list(found.shape) != shape:
            raise BundleError(f"{path}: {name} should be {shape}, found {None if found is None else list(found.shape)}")
        if found.dtype not in WEIGHT_DTYPES or not torch.isfinite(found).all():
            raise BundleError(f"{path}: {name} holds NaN or infinity, or no floats")
    unknown = sorted(set(tensors) - set(shapes))
    if unknown:
        raise BundleError(f"{path}: {len(tensors)} tensors where {len(shapes)} belong; {unknown[0]} is none of them")


def read_tensors(path: Path, vocab_size: int) -> tuple[dict[str, Tensor], Tensor | None]:
    """All tensors of a file of heads, whatever they are.

    Returns:
        (tensors by name, the draft vocabulary [draft vocab] int64 where there is one).

    Raises:
        BundleError: missing or damaged file, a draft vocabulary beyond the backbone's.
    """
    if not path.is_file():
        raise BundleError(f"no file {path}", hint="a bundle is made by eexit train")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no dict)
    except Exception as error:  # besides its own, the reader raises what torch does with a strange dtype or shape
        raise BundleError(
            f"{path} is damaged: {' '.join(str(error).split())[:300]}",
            hint="copy or pull the bundle again, or train anew",
        ) from error
    draft_vocab = tensors.pop(DRAFT_VOCAB, None)
    if draft_vocab is not None:
        if draft_vocab.dtype not in (torch.int32, torch.int64) or draft_vocab.ndim != 1 or not draft_vocab.numel():
            raise BundleError(f"{path}: draft_vocab is no list of tokens")
        draft_vocab = draft_vocab.to(torch.int64)
        if draft_vocab.min() < 0 or draft_vocab.max() >= vocab_size:
            raise BundleError(f"{path}: draft_vocab holds tokens outside the backbone's {vocab_size}")
    return tensors, draft_vocab


def read_heads(
    path: Path, kind: str, num_heads: int, hidden_size: int, vocab_size: int, rank: int
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Read heads.safetensors strictly: as `read_tensors`, and names and shapes are those of the kind; without a backbone,
    an attention is as wide as the first head's.

    Raises:
        BundleError: names or shapes that do not fit, NaN or infinite weights.
    """
    tensors, draft_vocab = read_tensors(path, vocab_size)
    query, key = (len(tensors.get(f"0.{name}_proj.weight", ())) for name in "qk")
    require_tensors(path, tensors, head_shapes(kind, num_heads, hidden_size, vocab_size, rank, (query, key)))
    return tensors, draft_vocab


def load_heads(path: Path, view: BackboneView, kind: str, exit_layers: Sequence[int], rank: int) -> ExitHeads:
    """Heads for this backbone, frozen.

    Raises:
        BundleError: as `read_heads`.
    """
    tensors, draft_vocab = read_tensors(path, view.vocab_size)
    heads = ExitHeads(view, kind, exit_layers, rank, draft_vocab)
    shapes = {name.removeprefix("heads."): list(value.shape) for name, value in heads.state_dict().items()}
    require_tensors(path, tensors, {name: shape for name, shape in shapes.items() if name != DRAFT_VOCAB})
    state = {f"heads.{name}": value for name, value in tensors.items()}
    heads.load_state_dict(state | ({} if draft_vocab is None else {DRAFT_VOCAB: draft_vocab}))
    return heads.to(view.device, view.dtype).requires_grad_(False)
