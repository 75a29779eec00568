"""The library: `EarlyExitModel` answers as the `generate` of a transformers model does, sooner.

`generate` is transformers' own, with `custom_generate` in the place of its decoding loop. So configuration, defaults,
lengths, logits processors, stopping criteria and errors are transformers', and what its loop would do with them is done
here: by drafting and verifying. What drafting and verifying cannot do is refused by name.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.generation import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    LogitsProcessorList,
    MaxLengthCriteria,
    StopStringCriteria,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation.streamers import BaseStreamer

from early_exit_cli.backbone.load import adopt_backbone
from early_exit_cli.bundle.load import bundle_source, load_engine, with_names_of_bundle
from early_exit_cli.config import SHIPPED_BUNDLE, SamplingConfig
from early_exit_cli.decoding.answer import Generation, generate
from early_exit_cli.decoding.batch import generate_batch
from early_exit_cli.decoding.text import Request, StopsAfter
from early_exit_cli.drafting.choose import DRAFTS_BY_MTP, HEADLESS, make_drafter
from early_exit_cli.drafting.drafter import Drafter
from early_exit_cli.engine import Engine
from early_exit_cli.errors import ConfigError
from early_exit_cli.resolve import resolve
from early_exit_cli.sampling import GREEDY, Chooser, Sampler

HARMLESS: dict[str, Any] = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), 1),
    **dict.fromkeys(("output_attentions", "output_hidden_states", "output_scores", "output_logits"), False),
    **dict.fromkeys(("token_healing", "use_mtp", "is_assistant", "synced_gpus"), False),
    "diversity_penalty": 0.0,
    "use_cache": True,
    "cache_implementation": "dynamic",
    **dict.fromkeys(("penalty_alpha", "dola_layers", "constraints", "force_words_ids")),
    **dict.fromkeys(("prompt_lookup_num_tokens", "assistant_early_exit", "speculation_type")),
    **dict.fromkeys(("assistant_model", "assistant_tokenizer", "assistant_ensemble_weight")),
    **dict.fromkeys(("cache", "past_key_values", "inputs", "inputs_embeds", "custom_generate", "trust_remote_code")),
}
"""What `generate` of transformers takes and drafting cannot honour, with the value that asks for nothing (as None does)."""
WHOLE_BATCH = (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
"""Processors that hold something of every row, in shapes of their own."""
CACHES = ("cache", "past_key_values")
"""What transformers calls its KV cache: the second before 5.24."""
PREPARED = {"attention_mask", "position_ids", *CACHES, "logits_to_keep", "use_cache"}
"""What transformers prepares for a forward pass of its own."""


class EarlyExitModel:
    """A causal language model that drafts its next tokens and verifies them: the same output, sooner.

    tokenizer: the backbone's. answers: of the newest call, one a row, with `text`, `token_ids` and `stats`
    (`accept_length`, `tokens_per_second` ...).
    """

    def __init__(self, engine: Engine, drafter: Drafter, width: int) -> None:
        self.engine, self.drafter, self.width = engine, drafter, width
        self.model = engine.backbone.model
        self.tokenizer = engine.backbone.tokenizer
        self.answers: list[Generation] = []

    @classmethod
    def from_pretrained(
        cls,
        bundle: str | Path | None = SHIPPED_BUNDLE,
        *,
        backbone: str | Path | None = None,
        revision: str | None = None,
        quantization: str | None = None,
        device: str | None = None,
        assistant: str | Path | None = None,
        drafter: str = "auto",
        accuracy_level: float | None = None,
        lookup_corpus: str | Path | None = None,
        model: Any = None,
        tokenizer: Any = None,
    ) -> EarlyExitModel:
        """Load a bundle and its backbone.

        Args:
            bundle: the shipped one, a folder, or a Hub id (ORG/NAME or ORG/NAME@REVISION). None: a backbone without
                heads, which drafts by its assistant or its checkpoint's MTP layer, if there is one, and by lookup.
            backbone, revision, quantization, device: as `--model-name`, `--revision` ... of the commands; by default
                the bundle's backbone as its heads were trained on it.
            assistant: as `--assistant`: what drafts for a Gemma 4 model, a folder or a Hub id.
            drafter: exit, eagle, mtp, lookup, auto or none.
            accuracy_level: target accuracy of exited tokens, a calibrated level.
            lookup_corpus: a text file that lookup, alone or in auto, may draft from besides the prompt.
            model: the backbone as a loaded transformers model, whose weights are then held once; it is put in
                evaluation mode, gradients off.
            tokenizer: of `model`; by default the one that lies where the model was loaded from.

        Raises:
            EexitError: settings that do not go together, or a bundle or backbone that cannot be had.
        """
        asked = {
            "bundle.bundle": (bundle and str(bundle), "bundle"),
            "backbone.model_name": (backbone and str(backbone), "backbone"),
            "backbone.revision": (revision, "revision"),
            "backbone.quantization": (quantization, "quantization"),
            "backbone.device": (device, "device"),
            "backbone.assistant": (assistant and str(assistant), "assistant"),
            "inference.drafter": (drafter, "drafter"),
            "inference.accuracy_level": (accuracy_level, "accuracy_level"),
            "inference.lookup_corpus": (lookup_corpus and str(lookup_corpus), "lookup_corpus"),
        }
        given = {key: setting for key, setting in asked.items() if setting[0] is not None}
        loaded = [name for key, (_, name) in given.items() if key.startswith("backbone.") and name != "assistant"]
        faults = []
        if model is not None and loaded:
            faults.append(f"{', '.join(loaded)}: model is loaded already")
        if model is None and tokenizer is not None:
            faults.append("tokenizer: it goes with model; a backbone that is loaded here brings its own")
        if bundle is None and drafter not in HEADLESS:
            faults.append(f"drafter {drafter!r} needs a bundle")
        if faults:
            raise ConfigError("\n".join(faults))
        config = resolve(given).config
        with _libraries_as_they_were():
            settings = config.backbone
            if bundle is not None and model is None:
                settings = with_names_of_bundle(settings, bundle_source(config.bundle).folder)
            engine = load_engine(
                settings,
                config.bundle if bundle is not None else None,
                with_thresholds=drafter not in HEADLESS or drafter == "auto",
                with_mtp=drafter in DRAFTS_BY_MTP,
                backbone=None if model is None else adopt_backbone(model, tokenizer),
            )
            if accuracy_level is not None and engine.thresholds is not None:
                engine.thresholds.at(accuracy_level)  # one that was not calibrated is refused, whoever will draft
            return cls(engine, *make_drafter(engine, config.inference, drafter))

    @property
    def last(self) -> Generation | None:
        """The newest answer; of several rows the last one's. None before the first."""
        return self.answers[-1] if self.answers else None

    @property
    def device(self) -> torch.device:
        return self.engine.backbone.device

    def generate(
        self,
        input_ids: Tensor,
        generation_config: GenerationConfig | None = None,
        *,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        streamer: BaseStreamer | None = None,
        **kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """What `generate` of the transformers model returns for the same arguments.

        Args:
            input_ids: [rows, tokens] int64, padded on the left. Several rows share the backbone's passes, and each is
                what it is alone.
            kwargs: fields of a `GenerationConfig`, `attention_mask`, and `tokenizer` for `stop_strings` (by default
                the model's own).

        Returns:
            [rows, tokens + new] int64, padded on the right, or with `return_dict_in_generate` an output whose `sequences` it is.

        Raises:
            ConfigError: settings that cannot be honoured, an empty prompt, or one beyond the context.
            NumericsError: the backbone's logits are not finite.
        """
        config = copy.deepcopy(generation_config)
        refuse({**(config.to_dict() if config else {}), **kwargs})
        criteria = StoppingCriteriaList(stopping_criteria or [])
        # transformers hands neither tokenizer nor streamer on to a callable
        tokenizer = kwargs.pop("tokenizer", None) or self.tokenizer
        stop_strings = kwargs.pop("stop_strings", None) or (config and config.stop_strings)
        if stop_strings:
            criteria.append(StopStringCriteria(tokenizer, stop_strings))
            if config:
                config.stop_strings = None
        return self.model.generate(
            input_ids,
            config,
            logits_processor=logits_processor,
            stopping_criteria=criteria,
            streamer=streamer,
            custom_generate=functools.partial(self.custom_generate, streamer=streamer),
            **kwargs,
        )

    def custom_generate(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer: BaseStreamer | None = None,
        **model_kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """The decoding loop for `model.generate(..., custom_generate=this)`, where this was made with `model=model`.

        transformers hands its streamer to no callable; with one, call `generate` of this class.

        Raises:
            ConfigError, NumericsError: as `generate`.
        """
        if model is not self.model:
            raise ConfigError("custom_generate was called by another model than the backbone of this EarlyExitModel")
        self.engine.blocks.refuse_later_changes()
        unknown = {name: value for name, value in model_kwargs.items() if name not in PREPARED}
        known = {name: getattr(generation_config, name, None) for name in HARMLESS}
        caches = {name: model_kwargs.get(name) for name in CACHES}
        own_caches = {name: cache for name, cache in caches.items() if getattr(cache, "_is_user_defined", False)}
        refuse(known | unknown | own_caches, also=tuple(unknown))
        if streamer is not None and len(input_ids) > 1:
            raise ConfigError(f"a streamer shows one text, and {len(input_ids)} rows were given")
        max_new_tokens, stop_ids = length_and_stops(stopping_criteria, input_ids)
        requests = []
        for number, prompt in enumerate(prompts_of(input_ids, model_kwargs)):
            row = input_ids[number : number + 1]
            own = processors_of(logits_processor, number, len(input_ids))
            chooser = chooser_of(generation_config, own, row[:, : row.shape[1] - len(prompt)])
            stops_after = other_stops(stopping_criteria, row, max_new_tokens)
            requests.append(Request(prompt, max_new_tokens, chooser, stop_ids, stops_after=stops_after))
        if len(requests) == 1:
            answer = generate(
                self.engine,
                requests[0],
                self.drafter,
                mode=self.drafter.name,
                width=self.width,
                on_token=None if streamer is None else lambda token: streamer.put(torch.tensor([token])),
            )
            self.answers = [answer]
        else:
            self.answers = generate_batch(
                self.engine,
                requests,
                self.drafter,
                mode=self.drafter.name,
                batch=len(requests),
                width=self.width,
            )
        if streamer is not None:
            streamer.end()
        sequences: Any = torch.cat([input_ids, self._padded_answers(generation_config).to(input_ids.device)], -1)
        return GenerateDecoderOnlyOutput(sequences) if generation_config.return_dict_in_generate else sequences

    def _padded_answers(self, config: GenerationConfig) -> Tensor:
        """The newest tokens, [rows, longest] int64."""
        longest = max(len(answer.token_ids) for answer in self.answers)
        padding = config.pad_token_id if config.pad_token_id is not None else 0
        rows = [answer.token_ids + [padding] * (longest - len(answer.token_ids)) for answer in self.answers]
        return torch.tensor(rows)

    def answer(self, prompt: str, *, raw: bool = False, **kwargs: Any) -> str:
        """The text that follows a prompt.

        Args:
            raw: use the prompt as it is, without the model's chat template.
            kwargs: as for `generate`.
        """
        ids = self.engine.backbone.encode_prompt(prompt, raw=raw)
        self.generate(torch.tensor([ids], device=self.device), **kwargs)
        return self.answers[0].text


def refuse(settings: Mapping[str, Any], also: tuple[str, ...] = ()) -> None:
    """Refuse what drafting cannot honour, all of it at once.

    Args:
        also: names that are refused whatever they are.

    Raises:
        ConfigError
    """
    faults = [
        f"{name}={value!r}" if _is_scalar(value) else name
        for name, value in settings.items()
        if name in also
        or (name in HARMLESS and value is not None and not (_is_scalar(value) and value == HARMLESS[name]))
    ]
    if faults:
        raise ConfigError(
            f"early exits cannot honour {', '.join(faults)}",
            hint="leave them out, or call the transformers model's own generate",
        )


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str))


def prompts_of(input_ids: Tensor, prepared: Mapping[str, Any]) -> list[list[int]]:
    """Token ids of each row, without its padding on the left.

    Args:
        prepared: `attention_mask` and `position_ids`, where there are any.

    Raises:
        ConfigError: a mask with holes; positions that do not count from 0.
    """
    attention_mask, position_ids = prepared.get("attention_mask"), prepared.get("position_ids")
    prompts = []
    for number, row in enumerate(input_ids.tolist()):
        hidden = 0 if attention_mask is None else int((attention_mask[number] == 0).sum())
        if attention_mask is not None and not attention_mask[number, hidden:].all():
            raise ConfigError("attention_mask hides tokens behind the first one that it shows")
        if position_ids is not None:
            positions = position_ids[number if len(position_ids) > 1 else 0, hidden:]
            if positions.tolist() != list(range(len(row) - hidden)):
                raise ConfigError("position_ids do not count from 0")
        prompts.append(row[hidden:])
    return prompts


def processors_of(processors: LogitsProcessorList, row: int, rows: int) -> LogitsProcessorList:
    """The processors of one row: copies, since some remember their text, without what they know of other rows.

    Raises:
        ConfigError: several rows, and a processor that cannot be taken apart.
    """
    whole = [type(each).__name__ for each in processors if isinstance(each, WHOLE_BATCH)]
    if rows > 1 and whole:
        raise ConfigError(f"{', '.join(whole)} takes one row at a time, and {rows} were given")
    own = LogitsProcessorList(copy.copy(each) for each in processors)
    for each in own:
        ignored = getattr(each, "prompt_ignore_length", None)
        if isinstance(ignored, Tensor):
            each.prompt_ignore_length = ignored[row : row + 1]
    return own


def chooser_of(config: GenerationConfig, processors: LogitsProcessorList, padding: Tensor) -> Chooser:
    """How the tokens follow from the logits, as transformers has prepared it.

    The processors decide the text: they are applied to each token's logits once, in the order of the text. Drafts keep to
    the settings that a head can follow. Noise is seeded from torch's own generator (`torch.manual_seed`).

    Args:
        padding: [1, padding] ids on the left of the prompt, which processors see as well.
    """
    if not config.do_sample and not processors:
        return GREEDY
    settings = {"repetition_penalty": config.repetition_penalty}
    if config.do_sample:
        settings |= {name: getattr(config, name) for name in ("top_k", "min_p")}
        temperature, top_p = (1.0 if value is None else value for value in (config.temperature, config.top_p))
        settings |= {"temperature": temperature, "seed": int(torch.randint(2**63 - 1, ()))}
        settings["top_p"] = min(max(top_p, 1e-9), 1.0)  # transformers takes any, and cuts nothing from 1 on
    known = SamplingConfig.model_validate({name: value for name, value in settings.items() if value is not None})
    apply: Any = processors
    return Sampler(known, lambda ids, scores: apply(torch.cat([padding.to(ids.device), ids], -1), scores))


def length_and_stops(criteria: StoppingCriteriaList, input_ids: Tensor) -> tuple[int, set[int]]:
    """The most new tokens of a row, and those that end a text."""
    longest = min(each.max_length for each in criteria if type(each) is MaxLengthCriteria)
    stop_ids = {
        int(token) for each in criteria if type(each) is EosTokenCriteria for token in each.eos_token_id.tolist()
    }
    return longest - input_ids.shape[1], stop_ids


def other_stops(criteria: StoppingCriteriaList, input_ids: Tensor, max_new_tokens: int) -> StopsAfter | None:
    """All further criteria of a row; None without any.

    Args:
        input_ids: [1, tokens]; criteria see them with every new token behind.
    """
    others = StoppingCriteriaList(each for each in criteria if type(each) not in (EosTokenCriteria, MaxLengthCriteria))
    if not others:
        return None
    length = input_ids.shape[1]
    ids = torch.cat([input_ids, input_ids.new_zeros(1, max_new_tokens)], -1)  # [1, tokens + new]

    def stops_after(token: int) -> bool:
        nonlocal length
        ids[0, length] = token
        length += 1
        return bool(others(ids[:, :length], None).all())  # scores are not kept

    return stops_after


@contextmanager
def _libraries_as_they_were() -> Iterator[None]:
    """What loading does to keep the libraries quiet is undone: this process is somebody else's."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with warnings.catch_warnings():
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()
