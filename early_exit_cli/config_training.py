"""Sections of what makes heads: what they are, the text, hidden states on disk, training, calibration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, model_validator

from early_exit_cli.config_fields import Endpoint, FloatList, IntList, Section, setting, todays_word

DEFAULT_ACCURACY_LEVELS = [0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.99]

UncertaintyMetric = Literal["entropy", "confidence"]
ThresholdRule = Literal["conditional", "independent"]


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
