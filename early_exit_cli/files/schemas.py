"""The JSON files that we read, a model for each, checked where a file is read, never later.

Here are those of several folders. What one folder reads alone stands there: `hidden_states.manifest`, `drafting.chances`,
`drafting.costs`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, Field, ValidationError, model_validator

from early_exit_cli.config import DataConfig, Quantization
from early_exit_cli.config_training import UncertaintyMetric
from early_exit_cli.errors import BundleError, EexitError, shown
from early_exit_cli.files.atomic import read_json
from early_exit_cli.files.forms import Absent, Count, Form, Name, Positive, Share, require_ascending, to_exit_layers

FORMAT_VERSION = 1
"""Of bundles and of caches."""
DECLARED = ("hidden_size", "vocab_size", "num_hidden_layers", "quantization")
"""What config.json says of the backbone: of heads made elsewhere, all that is known of its fingerprint."""
Read = TypeVar("Read", bound=Form)


def _known(version: int) -> int:
    if version > FORMAT_VERSION:
        raise ValueError(f"{version} is of a newer eexit; this one reads {FORMAT_VERSION}")
    return version


Version = Annotated[int, Field(ge=1), AfterValidator(_known)]


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

    @property
    def exit_layers(self) -> list[int]:
        """Numbers of blocks run before each head."""
        return to_exit_layers(self.head_layer_indices)

    @property
    def declared(self) -> dict[str, Any]:
        """The keys `DECLARED` and their values."""
        return {key: getattr(self, key) for key in DECLARED}

    @model_validator(mode="after")
    def _blocks_fit(self) -> BundleForm:
        blocks = self.head_layer_indices
        if len(blocks) != self.num_heads:
            raise ValueError(f"num_heads is {self.num_heads}, but head_layer_indices names {len(blocks)} blocks")
        require_ascending(blocks, self.num_hidden_layers, "head_layer_indices")
        return self


class Statistics(Form):
    """A head in calibration.json. What is `Any`, here and in `CalibrationForm`, we write for DSSD's loader and never read."""

    mean_uncertainty: Any = None
    std_uncertainty: Any = None
    overall_accuracy: Share | None = None
    num_samples: Count = 0


class CalibrationForm(Form):
    """calibration.json: the keys that DSSD's loader takes, by keyword, no more and no less. Heads are used where only the
    thresholds are there; `push.check_calibration` asks for the rest."""

    model_config_path: Any = None
    calibration_dataset: str = ""
    calibration_samples: Count = 0
    uncertainty_metric: UncertaintyMetric = "entropy"
    accuracy_levels: list[Share]
    thresholds: dict[str, dict[str, float]]
    statistics: dict[str, Statistics] = Field(default_factory=dict)


class Heads(Form):
    """The exit heads of eexit.json."""

    kind: str
    rank: Count = 0
    draft_vocab: Count = 0


class EagleLayout(Form, extra="forbid"):
    """What an EAGLE head computes, as far as EAGLE-3's checkpoints differ. All that hold no own part borrow the backbone's.

    hidden: width of its states. query_heads ... activation: of its block. rope: as transformers has `rope_parameters`, and
    positions: `max_position_embeddings`. eps: of its norms. reads_final: the backbone's final normed state comes after the
    exit layers'. fc_norm, joint_norm: a norm for each state before they are fused, or one for all together. qk_norm: of
    queries and keys. norm_before_residual: the block's residual begins at its normed state. norm_output: what it rolls
    forward from is normed. own_lm_head, own_embedding: part of its file.
    """

    hidden: Positive
    query_heads: Positive
    kv_heads: Positive
    head_dim: Positive
    inner: Positive
    activation: str
    rope: dict[str, Any]
    positions: Positive = 2048
    eps: float = Field(gt=0.0)
    reads_final: bool = False
    fc_norm: bool = False
    joint_norm: bool = False
    qk_norm: bool = False
    norm_before_residual: bool = False
    norm_output: bool = False
    own_lm_head: bool = True
    own_embedding: bool = False

    @model_validator(mode="after")
    def _heads_fit(self) -> EagleLayout:
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} has no halves to rotate")
        if self.query_heads % self.kv_heads:
            raise ValueError(f"{self.query_heads} query heads cannot share {self.kv_heads} key heads")
        return self


class Training(Form):
    """How heads were trained."""

    data: DataConfig | None = None
    step: Count = 0
    tokens_seen: Count = 0


class Eagle(Form):
    """The EAGLE head of eexit.json. layout: of one that was trained elsewhere; ours is as wide as the backbone's last block."""

    exit_layers: list[Positive] = Field(min_length=1)
    layout: Annotated[EagleLayout | None, Absent] = None
    training: Annotated[Training | None, Absent] = None


class HeadSet(Form):
    """A set of heads at one level: for each, the share of tokens that exit there (after those before it in the set
    declined) and how many of these agree with the backbone."""

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
    coverage: dict[str, Share] = Field(default_factory=dict)
    agreement_at: dict[str, Share | None] = Field(default_factory=dict)


class CalibrationRecord(Form):
    """`calibration` of eexit.json."""

    heads: list[CalibratedHead] = Field(default_factory=list)
    head_sets: dict[str, list[HeadSet]] = Field(default_factory=dict)

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
    """eexit.json of a bundle. `drafting` is checked by who drafts (`chances.draft_chances_of`): the heads work without."""

    format_version: Version = FORMAT_VERSION
    fingerprint: dict[str, str | int]
    heads: Heads | None = None
    eagle: Annotated[Eagle | None, Absent] = None
    training: Training = Training()
    calibration: CalibrationRecord = CalibrationRecord()
    drafting: Any = None
    imported: Annotated[Imported | None, Absent] = None


class CalibrationBeside(Form):
    """NAME.eexit.json, beside a calibration that is not the bundle's own."""

    calibration: CalibrationRecord = CalibrationRecord()


class WidthsForm(Form):
    """What `invariant_widths.measure_widths` found."""

    widths: list[int] = Field(min_length=1)
    is_invariant: bool
    any_length: bool
    argmax_widths: list[int]

    @model_validator(mode="after")
    def _ascending(self) -> WidthsForm:
        for name in ("widths", "argmax_widths"):
            require_ascending([0, *getattr(self, name)], 1 << 20, name)
        return self


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

    @property
    def exit_layer(self) -> int:
        """Number of blocks run before it."""
        return self.layer_idx + 1


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
    versions: dict[str, str] = Field(default_factory=dict)
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


def read_form(path: Path, form: type[Read], error: type[EexitError] = BundleError) -> Read:
    """Read a JSON object and check it.

    Raises:
        BundleError or `error`: missing, damaged, or not of that form; the first fault is named.
    """
    return require_form(read_json(path), form, str(path), error)


def require_form(value: Any, form: type[Read], source: str, error: type[EexitError] = BundleError) -> Read:
    """A JSON value in its form, or a refusal that names `source`, the place and what stands there.

    Raises:
        error
    """
    try:
        return form.model_validate(value)
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
