"""manifest.json of a cache, and its shards' records."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from early_exit_cli.backbone.output import BlockShape, LogitMap
from early_exit_cli.config import DataConfig, Quantization
from early_exit_cli.files.forms import Absent, Count, Form, Name, Positive, require_ascending, to_exit_layers
from early_exit_cli.files.schemas import Version

Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
StoredSplit = Literal["train", "eval"]


class OpenForm(Form):
    """Base of those that are compared or written as a whole: keys that are unknown here belong to them."""

    model_config = ConfigDict(extra="allow")

    def as_json(self) -> dict[str, Any]:
        """What was read, or given."""
        return self.model_dump(by_alias=True, exclude_unset=True)


class Plan(OpenForm):
    """Which sequences a shard holds: its part of one of the two texts, and a hash of it."""

    file: str = Field(pattern=r"^(train|eval)-[0-9]{5,9}\.safetensors$")
    split: StoredSplit
    first: Count
    last: Positive
    tokens: Positive
    text: str

    @property
    def rows(self) -> int:
        """How many sequences."""
        return self.last - self.first


class Shard(Plan):
    """A shard that was written. checked, agreed: how many of its states were looked at, and had the same choice."""

    bytes: Positive
    sha256: Hash
    checked: Count = 0
    agreed: Count = 0

    @model_validator(mode="after")
    def _sizes_fit(self) -> Shard:
        if not 0 < self.rows <= self.tokens <= self.bytes:
            raise ValueError("a shard has at least a sequence, a token for each, and a byte for each of these")
        return self


class CacheRequest(OpenForm):
    """What a cache was asked for (`cache.cache_request`), as far as anybody asks back."""

    model_name: Name = Field(alias="backbone.model_name")
    revision: str | None = Field(alias="backbone.revision", default=None)
    quantization: Quantization = Field(alias="backbone.quantization")
    store: Literal["bf16", "fp8"] = Field(alias="cache.store")
    shard_tokens: Positive = Field(alias="cache.shard_tokens")
    held_out_rows: Positive = Field(alias="cache.held_out_rows")


class CacheFingerprint(OpenForm):
    """The backbone's fingerprint, and the part of it that a cache is read by."""

    vocab_size: Positive
    quantization: str


class StoredOutput(Form):
    """The file with the LM head and the last block's weights."""

    sha256: Hash


class ManifestForm(Form):
    """manifest.json of a cache. `last_block` is missing in one that is not complete, and null in one of an older version
    whose backbone's blocks have not the Llama shape."""

    format_version: Version
    request: CacheRequest
    data: DataConfig
    fingerprint: CacheFingerprint
    layers: list[Count] = Field(min_length=1)
    hidden_size: Positive
    num_blocks: Positive
    norm_eps: float = Field(gt=0.0)
    eos_token_ids: list[Count]
    store: Literal["bf16", "fp8"]
    max_length: Positive
    available_sequences: Positive
    complete: bool
    shards: list[Shard]
    last_block: BlockShape | None = None
    norm_subtracts_mean: bool = False
    logit_map: Annotated[LogitMap | None, Absent] = None
    readout: Annotated[StoredOutput | None, Absent] = None

    @property
    def exit_layers(self) -> list[int]:
        """Numbers of blocks run before each of the stored states."""
        return to_exit_layers(self.layers)

    @model_validator(mode="after")
    def _belongs_together(self) -> ManifestForm:
        require_ascending(self.layers, self.num_blocks, "layers")
        if any(token >= self.fingerprint.vocab_size for token in self.eos_token_ids):
            raise ValueError("an end token is not in the vocabulary")
        names = [shard.file for shard in self.shards]
        if len(set(names)) < len(names):
            raise ValueError("a shard stands there twice")
        if self.complete:
            for split in ("train", "eval"):
                ends = [0, *(end for shard in self.shards if shard.split == split for end in (shard.first, shard.last))]
                if len(ends) == 1 or any(a != b for a, b in zip(ends[::2], ends[1::2], strict=False)):
                    raise ValueError(f"sequences of the {split} text are missing between its shards")
        return self
