"""The backbone: a frozen causal language model in 4 bit, and the few library internals the rest relies on.

The only module that knows how `transformers` lays out a model. Everyone else sees `Backbone`; `load` makes one.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from early_exit_cli.backbone.block_layout import BlockLayout, layout_of
from early_exit_cli.backbone.chat import Prompt, encode_prompt
from early_exit_cli.backbone.contents import content_of, content_of_tensors
from early_exit_cli.backbone.families import FAMILIES, LAYERS_WITH_STATE, LAYERS_WITHOUT_KEYS, Family, longest_alike
from early_exit_cli.backbone.output import BlockShape, FinalNorm, LastBlock, LogitMap
from early_exit_cli.backbone.plain import changed_modules, is_within, library_modules, told
from early_exit_cli.config import Quantization
from early_exit_cli.errors import UnsupportedBackboneError, shown
from early_exit_cli.files.atomic import sha256_of
from early_exit_cli.files.environment import processor_name

BLOOM_CONTEXT = 2048
"""What BLOOM was trained on, whose smaller sizes do not say it."""
NORM_EPS = 1e-5
"""Of a final norm that does not say its own."""


@dataclass
class Backbone:
    """A frozen causal language model and its tokenizer, in evaluation mode, gradients off.

    quantization: 4bit, 8bit or none; another name where the checkpoint was saved quantized by another package.
    files: what it was loaded from; None where somebody else loaded it, and may have changed it since.
    """

    model: Any  # transformers' PreTrainedModel and tokenizer; their stubs do not know what the instances have
    tokenizer: Any
    name: str
    quantization: str
    revision: str | None = None
    files: Sequence[Path] | None = None

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def device_name(self) -> str:
        """What computes, as a person knows it."""
        return device_name(self.device)

    @property
    def dtype(self) -> torch.dtype:
        """dtype of hidden states."""
        return self.embedding.weight.dtype

    @property
    def hidden_size(self) -> int:
        return int(self.config.hidden_size)

    @property
    def vocab_size(self) -> int:
        """Rows of the LM head; the tokenizer may know fewer (padded vocabularies)."""
        return int(self.lm_head.weight.shape[0])

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    @property
    def context_length(self) -> int:
        """Positions the model was made for, as far as its rotary tables are the same for every text."""
        # of nearly all, of MPT, of BLOOM's larger ones
        names = ("max_position_embeddings", "max_seq_len", "seq_length")
        found = int(next((value for name in names if (value := getattr(self.config, name, None))), BLOOM_CONTEXT))
        return min(found, longest_alike(self.config) or found)

    @property
    def embedding(self) -> nn.Embedding:
        return self.model.get_input_embeddings()

    @property
    def lm_head(self) -> nn.Linear:
        return self.model.get_output_embeddings()

    @property
    def family(self) -> Family:
        return FAMILIES[self.config.model_type]

    @property
    def has_llama_shape(self) -> bool:
        """Whether an EAGLE head can start from its last block, and our CUDA kernels may run its blocks."""
        return self.without_llama_shape is None

    @property
    def without_llama_shape(self) -> str | None:
        """Why its blocks are not Llama's and nothing else; None where they are."""
        reason = self.without_layout
        if reason is not None:
            return reason
        unlike = self.block_layout.unlike_llama
        return None if unlike is None else f"{self.config.model_type} has {unlike}"

    @property
    def without_layout(self) -> str | None:
        """Why code that reads its weights cannot know what it computes; None where it can, by `block_layout`."""
        if self.family.runner != "fused" or self.quantization not in get_args(Quantization):
            return f"{self.config.model_type} ({self.quantization}) has others"
        changed = next(iter(self.changes.items()), None)
        return None if changed is None else f"of this one {told(*changed)}; merge_and_unload() merges an adapter"

    @property
    def block_layout(self) -> BlockLayout:
        """How its blocks are laid out, where `without_layout` is None."""
        tables = self.rotary_tables(torch.zeros(1, dtype=torch.int64, device=self.device))
        rotary_dim = next(int(cos.shape[-1]) for cos, _ in tables.values())
        return layout_of(self.config, self.family, self.blocks[0], self.embedding, rotary_dim)

    @cached_property
    def _library_modules(self) -> dict[str, type[nn.Module]]:
        return library_modules(self.model)

    @property
    def changes(self) -> dict[str, str]:
        """Modules that somebody wrapped, hooked or replaced: `changed_modules`. Looked up anew each time, in 2 ms."""
        return changed_modules(self.model, self._library_modules)

    @property
    def has_plain_lm_head(self) -> bool:
        """Whether the product with `lm_head.weight` is all that the LM head does."""
        head = self.lm_head
        return type(head) is nn.Linear and head.bias is None and not is_within(self._name_of(head), tuple(self.changes))

    def refuse_lost_changes(self) -> None:
        """Refuse changes outside the modules that `HFBlocks` calls as modules, of which nothing would hear, and those that
        leave no weight where device, dtype and size are read.

        Raises:
            UnsupportedBackboneError: naming the first.
        """
        trunk, family = self.family.trunk, self.family
        called = [f"{trunk}.{family.blocks}.{number}" for number in range(self.num_blocks)]
        called += [
            f"{trunk}.{family.norm}",
            f"{trunk}.{family.rotary}",
            *map(self._name_of, (self.embedding, self.lm_head)),
            *([f"{trunk}.{family.embedding_norm}"] if family.embedding_norm else []),
        ]
        changes = self.changes
        lost = [(name, "no runner here calls") for name in changes if not is_within(name, tuple(called))]
        read = {self._name_of(module): module for module in (self.embedding, self.norm, self.lm_head)}
        lost += [
            (name, "has no weight")
            for name in read
            if name in changes and not isinstance(getattr(read[name], "weight", None), Tensor)
        ]
        for name, why in lost:
            raise UnsupportedBackboneError(
                f"{told(name, changes[name])}, which {why}", hint="take it off; merge_and_unload() merges an adapter"
            )

    def _name_of(self, module: nn.Module) -> str:
        return next(name for name, found in self.model.named_modules(remove_duplicate=False) if found is module)

    @property
    def trunk(self) -> Any:
        """The library's model without the LM head."""
        return self.model.get_submodule(self.family.trunk)

    @property
    def blocks(self) -> nn.ModuleList:
        return getattr(self.trunk, self.family.blocks)

    @property
    def norm(self) -> Any:
        """The library's final norm, in front of the LM head."""
        return getattr(self.trunk, self.family.norm)

    @property
    def final_norm(self) -> FinalNorm:
        norm = self.norm
        weight = torch.ones(self.hidden_size, device=self.device) if self.norm_weight is None else self.norm_weight
        weight = 1.0 + weight if self.family.adds_one else weight
        eps = next((getattr(norm, name) for name in ("eps", "variance_epsilon") if hasattr(norm, name)), NORM_EPS)
        subtracts_mean = isinstance(norm, nn.LayerNorm) or self.family.subtracts_mean
        return FinalNorm(weight, float(eps), subtracts_mean, getattr(norm, "bias", None))

    @property
    def norm_weight(self) -> Tensor | None:
        """What the final norm multiplies by; OLMo's has none."""
        return getattr(self.norm, "weight", None)

    @property
    def logit_map(self) -> LogitMap:
        divisor, cap = (getattr(self.config, name, None) for name in ("logits_scaling", "final_logit_softcapping"))
        factor = getattr(self.config, "logit_scale", None)  # Cohere
        factor = factor or getattr(self.config, "lm_head_multiplier", None)  # Falcon-H1
        return LogitMap(divisor=1.0 / factor if factor else divisor or 1.0, cap=cap)

    @property
    def lm_head_weight(self) -> Tensor:
        return self.lm_head.weight

    @property
    def lm_head_bias(self) -> Tensor | None:
        return self.lm_head.bias

    @property
    def embedding_weight(self) -> Tensor:
        return self.embedding.weight

    @property
    def last_block(self) -> LastBlock:
        if not self.has_llama_shape:
            return LastBlock(BlockShape.near(self.config), {})
        layout = self.block_layout
        weights = {
            f"{name}.weight": dense_weight(module) if isinstance(module, nn.Linear) else module.weight.detach()
            for name, module in self.blocks[-1].named_modules()
            if getattr(module, "weight", None) is not None
        }
        shape = BlockShape(
            query_heads=layout.query_heads,
            kv_heads=layout.kv_heads,
            head_dim=layout.head_dim,
            inner=layout.inner,
            activation=layout.activation,
            rope_theta=float(self.config.rope_parameters["rope_theta"]),
        )
        return LastBlock(shape, weights)

    def embed(self, token_ids: Tensor) -> Tensor:
        """[*] int64 -> [*, hidden], scaled as the family does; learned positions come later (`add_positions`)."""
        embedded = self.embedding(token_ids)  # Gemma scales within
        if self.family.embedding_norm is not None:
            embedded = getattr(self.trunk, self.family.embedding_norm)(embedded)
        scale = getattr(self.config, "embedding_multiplier", None)  # Granite
        return embedded if scale is None else embedded * scale

    def add_positions(self, embedded: Tensor, positions: Tensor) -> Tensor:
        """Learned positions on embedded tokens [rows, hidden], for families that have them; `positions` [rows] int64.

        Padding may stand behind the last position there is, and takes that one.
        """
        if self.family.positions is None:
            return embedded
        rows = positions.clamp(max=self.context_length - 1) + self.family.first_position
        return embedded + F.embedding(rows, getattr(self.trunk, self.family.positions).weight)

    def rotary_tables(self, positions: Tensor) -> dict[str | None, tuple[Tensor, Tensor]]:
        """cos and sin by the kind of block (`rotary_kind`), [positions, rotary dimensions] each; none without.

        In the order in which the family's blocks take them (GPT-J: the sines first).
        """
        rotary = getattr(self.trunk, self.family.rotary, None)
        if rotary is None:
            return {}
        # padding may stand behind the context, where a table ends (GPT-J) or another one begins (longrope)
        if hasattr(rotary, "embed_positions") or longest_alike(self.config):
            positions = positions.clamp(max=self.context_length - 1)
        like, places = torch.empty(0, dtype=self.dtype, device=self.device), positions[None]
        tables = {}
        for kind in {self.rotary_kind(block) for block in range(self.num_blocks)}:
            found = rotary(like, places) if kind is None else rotary(like, places, kind)
            cos, sin = (found.real, found.imag) if self.family.complex_rotary else found
            tables[kind] = cos[0], sin[0]
        return tables

    def rotary_kind(self, block: int) -> str | None:
        """Which rotary table a block reads, where there are several: Gemma 3's local and global ones differ."""
        tables = getattr(self.config, "rope_parameters", None) or {}
        return self.config.layer_types[block] if any(isinstance(table, dict) for table in tables.values()) else None

    def kv_shapes(self, block: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """(heads, numbers a head) that a block's attention keeps of a token, twice: keys and values; with latent attention,
        which expands both from less, the two parts of the latent. No heads where a block keeps none.
        """
        config = self.config
        if getattr(config, "kv_lora_rank", None):
            return (1, int(config.kv_lora_rank)), (1, int(config.qk_rope_head_dim))
        config = config.per_layer_config[block] if getattr(config, "per_layer_config", None) else config
        queries = int(self.config.num_attention_heads)
        heads = int(getattr(config, "num_key_value_heads", None) or queries)
        if self.config.model_type == "falcon" and self.config.multi_query and not self.config.new_decoder_architecture:
            heads = 1
        size = int(getattr(config, "head_dim", None) or self.hidden_size // queries)
        heads *= self.has_keys(block)
        return (heads, size), (heads, size)

    def layer_kind(self, block: int) -> str | None:
        """What the configuration's `layer_types` call a block; None where it tells no kinds."""
        kinds = getattr(self.config, "layer_types", None)
        return kinds[block] if kinds else None

    def has_state(self, block: int) -> bool:
        """Whether a block folds all tokens so far into a state."""
        return self.layer_kind(block) in LAYERS_WITH_STATE

    @cached_property
    def blocks_with_state(self) -> list[int]:
        return [block for block in range(self.num_blocks) if self.has_state(block)]

    @property
    def runs_documents_alone(self) -> bool:
        """Whether no mask tells packed documents apart: states go on into the next, chunks of attention begin with the text,
        and distances are made from a mask of tokens (BLOOM, Falcon).
        """
        kinds = {self.layer_kind(block) for block in range(self.num_blocks)}
        counts_tokens = self.config.model_type == "bloom" or getattr(self.config, "alibi", False)
        return bool(self.blocks_with_state) or "chunked_attention" in kinds or counts_tokens

    def has_keys(self, block: int) -> bool:
        """Whether a block keeps keys and values of all tokens so far."""
        return self.attends(block) and block < self.num_blocks - (
            getattr(self.config, "num_kv_shared_layers", None) or 0
        )

    def attends(self, block: int) -> bool:
        """Whether a block has attention: over keys of its own, or over those of the last block of its kind that keeps any."""
        return self.layer_kind(block) not in LAYERS_WITHOUT_KEYS

    def window_of(self, block: int) -> int | None:
        """Sliding attention window of a block in tokens; none for full attention."""
        window = getattr(self.config, "sliding_window", None)
        if not window or getattr(self.config, "use_sliding_window", True) is False:
            return None
        kinds = getattr(self.config, "layer_types", None)
        return None if kinds and kinds[block] != "sliding_attention" else int(window)

    @property
    def pad_token_id(self) -> int:
        """The tokenizer's padding token, else an end token: padding is masked everywhere, its value never counts."""
        pad = self.tokenizer.pad_token_id
        if pad is None or not 0 <= pad < len(self.embedding.weight):  # added to the tokenizer, not to the model
            return min(self.eos_token_ids, default=0)
        return int(pad)

    @cached_property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end the text: the generation config's, the tokenizer's, as far as the model can say them."""
        found: set[int] = set()
        for value in (self.model.generation_config.eos_token_id, self.tokenizer.eos_token_id):
            if value is not None:
                found.update(value if isinstance(value, (list, tuple)) else [value])
        return frozenset(int(token) for token in found if 0 <= token < self.vocab_size)

    def unknown_token(self, ids: Sequence[int]) -> str | None:
        """What is wrong with the first token that the model has no embedding of; None where it knows them all."""
        rows = len(self.embedding.weight)
        unknown = next((token for token in ids if not 0 <= token < rows), None)
        if unknown is None:
            return None
        name, tokens = self.tokenizer.convert_ids_to_tokens(unknown), len(self.tokenizer)
        return f"token {unknown} ({shown(name)}): the tokenizer has {tokens} tokens, the embedding {rows} rows"

    @cached_property
    def tokenizer_hash(self) -> str:
        """Identity of the tokenizer: its vocabulary with ids."""
        vocabulary = sorted(self.tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
        return sha256_of(json.dumps(vocabulary, ensure_ascii=True))[:16]

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """Identity of this backbone, compared whenever heads are loaded. Holds no path, so it travels."""
        rows = self.embedding.weight[:: max(1, self.vocab_size // 64)].float().cpu()
        final = torch.zeros(0) if self.norm_weight is None else self.norm_weight.float().cpu()
        return {
            "model_type": self.config.model_type,
            "hidden_size": self.hidden_size,
            "vocab_size": self.vocab_size,
            "num_hidden_layers": self.num_blocks,
            "quantization": self.quantization,
            "tokenizer": self.tokenizer_hash,
            "weights": sha256_of(rows.numpy().tobytes(), final.numpy().tobytes())[:16],
        }

    @cached_property
    def content(self) -> str:
        """Hash of all that decides what it computes: of the files that it was loaded from, else of its tensors."""
        found = None
        with contextlib.suppress(OSError):
            found = content_of(self.files) if self.files is not None else None
        return found or content_of_tensors(self.model)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What is kept of its work on this machine is named by this: the fingerprint, the content, and changes."""
        changes = sha256_of(json.dumps(self.changes))[:16]
        return {**self.fingerprint, "content": self.content, **({"changes": changes} if self.changes else {})}

    def encode_prompt(self, prompt: Prompt, *, raw: bool = False) -> list[int]:
        """Token ids of a text, or of a conversation's turns; with the chat template where there is one, unless `raw`."""
        return encode_prompt(self.tokenizer, prompt, raw=raw)

    def hidden_states_at(self, input_ids: Tensor, attention_mask: Tensor, exit_layers: list[int]) -> list[Tensor]:
        """Run all blocks over whole sequences and keep the states after `exit_layers`, and the final normed state.

        Args:
            input_ids: [batch, seq].
            attention_mask: [batch, seq], or [batch, 1, seq, seq] bool, causal within documents.
            exit_layers: numbers of blocks run, ascending.

        Returns:
            len(exit_layers) + 1 tensors [batch, seq, hidden]; the last one has the final norm applied.
        """
        masks: dict[str, Any] = {"attention_mask": attention_mask}
        if attention_mask.ndim == 4 and self.runs_documents_alone:
            return self._states_of_documents(input_ids, attention_mask, exit_layers)
        if attention_mask.ndim == 4:
            masks = {
                "attention_mask": self._library_masks(attention_mask),
                "position_ids": attention_mask.sum(-1)[:, 0] - 1,  # within the document: what a row sees, but itself
            }
        kept: dict[int, Tensor] = {}
        hooks = [
            self.blocks[layer - 1].register_forward_hook(
                lambda _module, _args, output, layer=layer: kept.__setitem__(
                    layer, output[0] if isinstance(output, tuple) else output
                )
            )
            for layer in exit_layers
        ]
        try:
            with torch.no_grad():
                final = self.trunk(input_ids=input_ids, use_cache=False, **masks).last_hidden_state
        finally:
            for hook in hooks:
                hook.remove()
        return [*(kept[layer] for layer in exit_layers), final]

    def _states_of_documents(self, input_ids: Tensor, seen: Tensor, exit_layers: list[int]) -> list[Tensor]:
        """`hidden_states_at` of packed documents, each run alone."""
        rows = []
        for ids, places in zip(input_ids, seen.sum(-1)[:, 0] - 1, strict=True):
            starts = (places == 0).nonzero()[:, 0].tolist()
            ends = [*starts[1:], len(ids)]
            alone = [ids[None, start:end] for start, end in zip(starts, ends, strict=True)]
            states = [self.hidden_states_at(part, torch.ones_like(part), exit_layers) for part in alone]
            rows.append([torch.cat(parts, 1) for parts in zip(*states, strict=True)])
        return [torch.cat(states) for states in zip(*rows, strict=True)]

    def _library_masks(self, seen: Tensor) -> Tensor | dict[str, Tensor]:
        """[batch, 1, seq, seq] bool as the library takes masks it shall not make: additive, sliding windows applied.

        A family whose blocks differ in their windows takes one for each kind of block.
        """
        distance = torch.arange(seen.shape[-1], device=seen.device)
        distance = distance[:, None] - distance
        masks = {}
        for window in {self.window_of(block) for block in range(self.num_blocks)}:
            near = seen if window is None else seen & (distance < window)
            masks[window] = torch.zeros(near.shape, dtype=self.dtype, device=near.device).masked_fill(
                ~near, float("-inf")
            )
        if len(masks) == 1:
            return next(iter(masks.values()))
        return {"full_attention" if window is None else "sliding_attention": mask for window, mask in masks.items()}


def device_name(device: torch.device) -> str:
    """A GPU by its own name, else the processor by its."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()


def dense_weight(module: nn.Linear) -> Tensor:
    """The weight of a linear map in whatever form it is stored, [out, in]: its product with the identity."""
    if type(module) is nn.Linear:
        return module.weight.detach()
    with torch.inference_mode():
        identity = torch.eye(module.in_features, dtype=torch.bfloat16, device=module.weight.device)
        product = module(identity)
        return (product if module.bias is None else product - module.bias).t().contiguous()
