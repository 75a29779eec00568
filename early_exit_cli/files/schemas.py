"""What must stand in the JSON files that we read, a model for each; checked where a file is read, never later.

Nothing is converted: a number in quotes is a fault, and so are NaN and infinity. Keys that nobody here reads are left alone.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict, ValidationError, model_validator

from early_exit_cli.config import DataConfig, Quantization, UncertaintyMetric
from early_exit_cli.errors import BundleError, EexitError, shown
from early_exit_cli.files.atomic import read_json

FORMAT_VERSION = 1
"""Of bundles and of caches."""
Count = Annotated[int, Field(ge=0, le=2**53)]
Positive = Annotated[int, Field(gt=0, le=2**53)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Cost = Annotated[float, Field(gt=0.0)]
Name = Annotated[str, Field(min_length=1, max_length=1000, pattern=r"^[^\x00]*$")]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _known(version: int) -> int:
    if version > FORMAT_VERSION:
        raise ValueError(f"{version} is of a newer eexit; this one reads {FORMAT_VERSION}")
    return version


Version = Annotated[int, Field(ge=1), AfterValidator(_known)]


class Form(BaseModel):
    """Base of all."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, protected_namespaces=())


def require_ascending(numbers: list[int], below: int, what: str) -> None:
    """Refuse numbers that do not rise, or that are not all between 0 and `below` - 1."""
    if any(b <= a for a, b in itertools.pairwise(numbers)) or (numbers and not 0 <= numbers[0] <= numbers[-1] < below):
        raise ValueError(f"{what} must be ascending, between 0 and {below - 1}")


class TrainingSettings(Form):
    """`training_config` of config.json."""

    dataset_name: str | None = None


class BundleForm(Form):
    """config.json of a bundle: the seven keys that DSSD's loader requires."""

    model_name: Name
    num_heads: Count
    head_layer_indices: list[Count]
    quantization: Quantization
    hidden_size: Positive
    vocab_size: Positive
    num_hidden_layers: Positive
    training_config: TrainingSettings | None = None

    @model_validator(mode="after")
    def _layers_fit(self) -> BundleForm:
        layers = self.head_layer_indices
        if len(layers) != self.num_heads:
            raise ValueError(f"num_heads is {self.num_heads}, but head_layer_indices names {len(layers)} blocks")
        require_ascending(layers, self.num_hidden_layers, "head_layer_indices")
        return self


class Statistics(Form):
    """A head in calibration.json."""

    overall_accuracy: Share | None = None
    num_samples: Count = 0


class CalibrationForm(Form):
    """calibration.json, as far as thresholds go; `hub.check_calibration` asks for the rest."""

    calibration_dataset: str = ""
    calibration_samples: Count = 0
    uncertainty_metric: UncertaintyMetric = "entropy"
    accuracy_levels: list[Share]
    thresholds: dict[str, dict[str, float]]
    statistics: dict[str, Statistics] = {}


class Heads(Form):
    """The exit heads of eexit.json."""

    kind: str
    rank: Count = 0
    draft_vocab: Count = 0


class Eagle(Form):
    """The EAGLE head of eexit.json."""

    exit_layers: list[Positive] = Field(min_length=1)


class Training(Form):
    """How the exit heads were trained."""

    data: DataConfig | None = None
    step: Count = 0
    tokens_seen: Count = 0


class HeadSet(Form):
    """A set of heads, the share of tokens that exits at each, and their agreement."""

    heads: list[Count] = Field(min_length=1)
    exit_share: list[Share]
    agreement: list[Share]

    @model_validator(mode="after")
    def _one_each(self) -> HeadSet:
        if not len(self.heads) == len(self.exit_share) == len(self.agreement):
            raise ValueError("there must be an exit share and an agreement for each head")
        return self


class CalibratedHead(Form):
    """What calibration found of a head, at each level."""

    agreement: Share | None = None
    coverage: dict[str, Share] = {}
    agreement_at: dict[str, Share | None] = {}


class CalibrationRecord(Form):
    """`calibration` of eexit.json."""

    heads: list[CalibratedHead] = []
    head_sets: dict[str, list[HeadSet]] = {}

    @model_validator(mode="after")
    def _of_these_heads(self) -> CalibrationRecord:
        for level, sets in self.head_sets.items():
            for entry in sets:
                require_ascending(entry.heads, len(self.heads), f"the heads of a set at level {shown(level)}")
        return self


class Imported(Form):
    """Where heads that were not trained here come from."""

    source: str = Field(alias="from")


class RecordForm(Form):
    """eexit.json of a bundle."""

    format_version: Version = FORMAT_VERSION
    fingerprint: dict[str, str | int]
    heads: Heads | None = None
    eagle: Eagle = Field(default=None)  # type: ignore[assignment]  # absent, never null
    training: Training = Training()
    calibration: CalibrationRecord = CalibrationRecord()
    imported: Imported = Field(default=None)  # type: ignore[assignment]


class CalibrationBeside(Form):
    """NAME.eexit.json, beside a calibration that is not the bundle's own."""

    calibration: CalibrationRecord = CalibrationRecord()


class Survival(Form):
    """`eagle_drafter.Survival`."""

    intercept: float = Field(ge=-1e6, le=1e6)
    slope: float = Field(ge=-1e6, le=1e6)
    mean: Share
    entropies: Annotated[list[Annotated[float, Field(ge=0.0, le=1e3)]], Strict(False)] = Field(
        default=[], max_length=64
    )


class DraftingForm(Form):
    """`drafting` of eexit.json (`policy.DraftChances`)."""

    lookup: list[Share]
    eagle: list[Survival]
    exit_temperature: float = Field(gt=0.0, default=1.0)
    eagle_temperature: float = Field(gt=0.0, default=1.0)
    checked: list[Annotated[tuple[Share, Share], Strict(False)]]  # JSON has lists only


class Shard(Form):
    """A shard of a cache."""

    file: str = Field(pattern=r"^(train|eval)-[0-9]{5,9}\.safetensors$")
    split: Literal["train", "eval"]
    first: Count
    last: Positive
    tokens: Positive
    text: str
    bytes: Positive
    sha256: Hash
    checked: Count = 0
    agreed: Count = 0

    @model_validator(mode="after")
    def _sizes_fit(self) -> Shard:
        if not 0 < self.last - self.first <= self.tokens <= self.bytes:
            raise ValueError("a shard has at least a sequence, a token for each, and a byte for each of these")
        return self


class BlockShape(BaseModel):
    """`backbone.LastBlock` without its weights; nothing else, since it is made of exactly these."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")
    query_heads: Positive
    kv_heads: Positive
    head_dim: Positive
    inner: Positive
    activation: str
    rope_theta: float = Field(gt=0.0)


class LogitMapForm(BaseModel):
    """`readout.LogitMap`; nothing else, since one is made of exactly these."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")
    divisor: float = Field(gt=0.0, default=1.0)
    cap: float | None = Field(gt=0.0, default=None)


class Readout(Form):
    """The readout of a cache."""

    sha256: Hash


class Request(Form):
    """What a cache was asked for, as far as anybody asks back."""

    model_name: Name = Field(alias="backbone.model_name")
    revision: str | None = Field(alias="backbone.revision", default=None)
    quantization: Quantization = Field(alias="backbone.quantization")
    store: Literal["bf16", "fp8"] = Field(alias="cache.store")
    shard_tokens: Positive = Field(alias="cache.shard_tokens")
    held_out_rows: Positive = Field(alias="cache.held_out_rows")


class CacheFingerprint(Form):
    """The part of a fingerprint that a cache is read by."""

    vocab_size: Positive


class ManifestForm(Form):
    """manifest.json of a cache."""

    format_version: Version
    request: Request
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
    logit_map: LogitMapForm = Field(default=None)  # type: ignore[assignment]
    readout: Readout = Field(default=None)  # type: ignore[assignment]

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


class WidthsForm(Form):
    """What `runners.measure_widths` found."""

    widths: list[int] = Field(min_length=1)
    is_invariant: bool
    any_length: bool
    argmax_widths: list[int]

    @model_validator(mode="after")
    def _ascending(self) -> WidthsForm:
        for name in ("widths", "argmax_widths"):
            require_ascending([0, *getattr(self, name)], 1 << 20, name)
        return self


class CostTable(BaseModel):
    """`costs.Costs`; nothing else, since one is made of exactly these."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")
    per_block: dict[str, Cost]
    per_block_far: dict[str, Cost]
    finish: dict[str, Cost]
    head: float = Field(ge=0.0)
    eagle_read: float = Field(ge=0.0)
    eagle_step: float = Field(ge=0.0)


class CostsForm(Form):
    """What `costs.measure_costs` found."""

    costs: CostTable


class AnswerForm(Form):
    """A line of the backbone's own answers."""

    index: Count
    answer: list[Count]


class MarkerForm(Form):
    """complete.json of a checkpoint."""

    step: Count
    tokens_seen: Count
    best_step: Count
    best_agreement: list[float]
    identity: dict[str, Any]


class Source(Form):
    """Which heads numbers were measured on."""

    heads: str | None = None


class ScoredHead(Form):
    """A head in an evaluation."""

    head_idx: Count
    layer_idx: Count
    accuracy: Share
    accuracy_vs_lm_head: Share
    top5_accuracy_vs_lm_head: Share


class Score(Form):
    """The backbone in an evaluation."""

    accuracy: Share


class EvaluationForm(Form):
    """The record of `eexit evaluate`, as far as a model card shows it."""

    num_samples: Count
    total_tokens: Count
    main_head: Score
    auxiliary_heads: list[ScoredHead] = Field(max_length=200)
    dataset: str = "unnamed text"
    bundle: Source = Source()


class BenchedMethod(Form):
    """A method in a bench."""

    tokens_per_second: float
    speedup_over_full: float
    accept_length: float | None
    identical_prompts: Count
    prompts: Count


class BenchEnvironment(Form):
    """What a bench ran on."""

    processor: str
    max_tokens: Positive
    repeats: Positive
    versions: dict[str, str] = {}
    bundle: Source = Source()


class BenchForm(Form):
    """report.json of `eexit bench`, as far as a model card shows it."""

    methods: dict[str, BenchedMethod]
    environment: BenchEnvironment


KINDS = {
    "dict_type": "it must hold a JSON object",
    "model_type": "it must hold a JSON object",
    "list_type": "it must hold a list",
    "int_type": "it must be a whole number",
    "float_type": "it must be a number",
    "string_type": "it must be text",
    "bool_type": "it must be true or false",
}
"""Pydantic's kinds of faults, in the words of a JSON file."""


def read_form(path: Path, form: type[BaseModel], error: type[EexitError] = BundleError) -> dict[str, Any]:
    """Read a JSON object and check it.

    Raises:
        BundleError or `error`: missing, damaged, or not of that form; the first fault is named.
    """
    value = read_json(path)
    require_form(value, form, str(path), error)
    return value


def require_form(value: Any, form: type[BaseModel], source: str, error: type[EexitError] = BundleError) -> None:
    """Refuse a JSON value that is not of the form, naming `source`, the place and what stands there.

    Raises:
        error
    """
    try:
        form.model_validate(value)
    except ValidationError as fault:
        raise error(f"{source}: {describe(fault)}") from None


def describe(fault: ValidationError) -> str:
    """The first fault of a validation in one line."""
    item = fault.errors(include_url=False)[0]
    key = ".".join(map(str, item["loc"]))
    if item["type"] == "missing":
        return f"no {shown(key)}"
    message = item["msg"].removeprefix("Value error, ")
    where = f"{shown(key)[1:-1]}: " if key else ""
    if item["type"] == "value_error":
        return f"{where}{message}"
    wanted = KINDS.get(item["type"], message.replace("Input should be", "it should be"))
    return f"{where}{wanted}, found {shown(item['input'])}"
