"""From the name of a way of decoding to its drafter; and which exit heads pay here."""

from __future__ import annotations

from pathlib import Path

from early_exit_cli.backbone.backbone import Backbone
from early_exit_cli.backbone.families import ASSISTANTS
from early_exit_cli.config import DYNAMIC_LENGTH, InferenceConfig
from early_exit_cli.drafting.auto import AutoDrafter
from early_exit_cli.drafting.chances import draft_chances_of, mtp_survival
from early_exit_cli.drafting.corpus import Corpus
from early_exit_cli.drafting.costs import Costs, cost_table, pass_costs
from early_exit_cli.drafting.drafter import Drafter, NoDrafter
from early_exit_cli.drafting.eagle import EagleDrafter, MtpDrafter
from early_exit_cli.drafting.exit import DynamicDrafter, ExitDrafter, FixedDrafter
from early_exit_cli.drafting.lookup import LookupDrafter
from early_exit_cli.drafting.round_costs import NEED
from early_exit_cli.engine import Engine, default_width
from early_exit_cli.errors import BackboneError, BundleError, DataError
from early_exit_cli.files.atomic import read_text
from early_exit_cli.files.schemas import HeadSet
from early_exit_cli.heads.uncertainty import level_key
from early_exit_cli.runtime.blocks import LARGEST_WIDTH


def expected_rate(
    costs: Costs, choice: HeadSet, exit_layers: list[int], num_blocks: int, widths: list[int], width: int
) -> float:
    """Expected tokens per millisecond when the heads of `choice` are read and at most width - 1 tokens are drafted.

    Tokens exit and agree independently of each other in this model. A round drafts k tokens with probability
    p^k (1 - p), or p^K at the cap K = width - 1, where p is the sum of exit shares; draft i counts when all before it
    agree, a^i; one more token is the backbone's own (Leviathan et al. 2023, section 3.1, with a gate in front).
    """
    base = min(widths)
    layers = [exit_layers[head] for head in choice.heads]
    p = sum(choice.exit_share)
    a = sum(s * r for s, r in zip(choice.exit_share, choice.agreement, strict=True)) / p if p else 0.0
    block = costs.per_block[base]
    # One drafting step: blocks up to the layer that decides, and a reading of every head on the way.
    exits = sum(
        share * (layer * block + (number + 1) * costs.head)
        for number, (layer, share) in enumerate(zip(layers, choice.exit_share, strict=True))
    )
    declined = layers[-1] * block + len(layers) * costs.head
    step_exit = exits / p if p else 0.0
    cap = width - 1
    tokens = time_spent = 0.0
    for k in range(cap + 1):
        chance = p**k * (1 - p) if k < cap else p**k
        rows = next(w for w in widths if w >= k + 1)
        last_step = declined if k < cap else layers[0] * block
        begin = layers[0] if k else layers[-1]
        verify = (num_blocks - begin) * costs.per_block[rows] + costs.finish[rows]
        tokens += chance * (1 + sum(a**i for i in range(1, k + 1)))
        time_spent += chance * (k * step_exit + last_step + verify)
    return tokens / time_spent


def choose_heads(engine: Engine, level: float, width: int, costs: Costs | None = None) -> list[int]:
    """The heads to read at a level on this device; none when no set is expected to beat plain decoding by more than the
    costs may be wrong, those of drafting one way and those of plain decoding the other.

    A bundle whose calibration counted no sets (one made elsewhere) has all its heads read.
    """
    if engine.heads is None:
        return []
    counted = None if engine.record is None else engine.record.calibration.head_sets.get(level_key(level))
    if not counted:
        return list(range(len(engine.heads)))
    width = min(width, engine.blocks.widths[-1])
    widths = [w for w in engine.blocks.widths if w <= max(width, min(engine.blocks.widths))]
    widths = widths if widths[-1] >= width else [*widths, engine.blocks.pass_width(width)]
    costs = costs or cost_table(engine)
    best, best_rate = [], NEED * (1 + 2 * costs.error) / costs.plain(engine.blocks.num_blocks, min(widths))
    for choice in counted:
        rate = expected_rate(costs, choice, engine.heads.exit_layers, engine.blocks.num_blocks, widths, width)
        if rate > best_rate:
            best, best_rate = choice.heads, rate
    return best


def lookup_drafter(engine: Engine, corpus: Path | None = None) -> LookupDrafter:
    """Prompt lookup with the pass costs of this device and the bundle's calibrated chances.

    Args:
        corpus: a text file to draft from as well.

    Raises:
        DataError: it cannot be read.
    """
    text = None if corpus is None else Corpus(corpus_tokens(engine.backbone, corpus))
    return LookupDrafter(pass_costs(cost_table(engine), engine.blocks), draft_chances_of(engine.record).lookup, text)


def corpus_tokens(backbone: Backbone, corpus: Path) -> list[int]:
    """Token ids of a text file.

    Raises:
        DataError: it cannot be read, or holds a token that the model has no embedding of.
    """
    ids: list[int] = backbone.tokenizer(read_text(corpus))["input_ids"]
    fault = backbone.unknown_token(ids)
    if fault is not None:
        raise DataError(f"{corpus} holds {fault}", hint="leave that token out of the text")
    return ids


def eagle_drafter(engine: Engine) -> EagleDrafter:
    """The bundle's EAGLE head, with its calibrated chances and the costs of this device.

    Raises:
        BundleError: no such head, or not calibrated.
    """
    if engine.eagle is None:
        raise BundleError("the bundle has no EAGLE head", hint="eexit train --head eagle --output-dir BUNDLE")
    chances = draft_chances_of(engine.record)
    if not chances.eagle:
        raise BundleError("the EAGLE head is not calibrated", hint="eexit calibrate --bundle FOLDER")
    costs = cost_table(engine)
    passes = pass_costs(costs, engine.blocks)
    return EagleDrafter(
        engine.eagle,
        chances.eagle,
        passes,
        costs.eagle_read,
        costs.eagle_step,
        chances.eagle_temperature,
    )


def mtp_drafter(engine: Engine) -> MtpDrafter:
    """The MTP layer that the checkpoint brings, or the assistant, with its chances and the costs of this device.

    Raises:
        BackboneError: there is none, or one that is not read.
    """
    if engine.mtp is None:
        hint = "--drafter auto drafts with what there is"
        if engine.backbone.config.model_type in ASSISTANTS.values():
            hint = f"--assistant names the drafter of a Gemma 4 model; {hint}"
        raise BackboneError(
            engine.without_mtp or f"{engine.backbone.name} brings no layer for multi-token prediction", hint=hint
        )
    costs = cost_table(engine)
    passes = pass_costs(costs, engine.blocks)
    return MtpDrafter(engine.mtp, mtp_survival(engine.backbone, engine.mtp), passes, costs.mtp_read, costs.mtp_step)


def auto_drafter(engine: Engine, level: float, width: int, read_heads: str, corpus: Path | None = None) -> AutoDrafter:
    """The checkpoint's MTP layer or assistant, lookup or the EAGLE head, whichever promises most; with neither layer nor
    calibrated EAGLE head, lookup and the exits that pay.

    Args:
        width: rows of a pass at most, for the exit heads; the others weigh all widths.
        corpus: as for `lookup_drafter`.
    """
    lookup = lookup_drafter(engine, corpus)
    choices: list[tuple[Drafter, int]] = [(lookup, LARGEST_WIDTH - 1)]
    if engine.mtp is not None:
        choices.insert(0, (mtp_drafter(engine), LARGEST_WIDTH - 1))
    if engine.eagle is not None and draft_chances_of(engine.record).eagle:
        choices.append((eagle_drafter(engine), LARGEST_WIDTH - 1))
    elif engine.thresholds is not None and engine.mtp is None:
        exits = exit_drafter(engine, level, width, read_heads)
        if exits.active != []:
            choices.append((exits, width - 1))
    return AutoDrafter(choices, lookup.passes.in_batch(1)[1])


def exit_drafter(engine: Engine, level: float, width: int, read_heads: str) -> ExitDrafter:
    """Early exit at a calibrated level, reading the heads that are worth it (`auto`) or `all`.

    Raises:
        BundleError: no calibration.
        ConfigError: a level that was not calibrated.
    """
    if engine.thresholds is None:
        raise BundleError("the bundle is not calibrated", hint="eexit calibrate --bundle FOLDER")
    thresholds = engine.thresholds.at(level)
    active = choose_heads(engine, level, width) if read_heads == "auto" else None
    return ExitDrafter(thresholds, active, engine.thresholds.metric, draft_chances_of(engine.record).exit_temperature)


HEADLESS = ("none", "lookup", "mtp", "auto")
"""Kinds that a backbone without a bundle can have."""
DRAFTS_BY_MTP = ("mtp", "auto")
"""Kinds for which the MTP layer or the assistant is to be loaded."""


def make_drafter(engine: Engine, settings: InferenceConfig, kind: str) -> tuple[Drafter, int]:
    """The drafter of a kind, and the width of its passes.

    Args:
        kind: none, exit, eagle, mtp, lookup, auto; fixed and dynamic, the seed's.

    Raises:
        BackboneError: mtp, and there is neither such a layer nor an assistant.
        BundleError: the bundle lacks what the kind drafts with, or is not calibrated.
        ConfigError: a level that was not calibrated.
        DataError: the lookup corpus cannot be read.
    """
    level, read_heads = settings.accuracy_level, settings.read_heads
    width = settings.width or default_width(engine)
    widest = settings.width or LARGEST_WIDTH  # for those that weigh draft lengths at every width
    if kind == "fixed":
        return FixedDrafter(settings.fixed_head), settings.draft_length + 1
    if kind == "dynamic":
        exits = exit_drafter(engine, level, DYNAMIC_LENGTH + 1, "all")
        return DynamicDrafter(exits.thresholds, None, exits.metric, exits.temperature), DYNAMIC_LENGTH + 1
    if kind == "exit":
        return exit_drafter(engine, level, width, read_heads), width
    if kind == "lookup":
        return lookup_drafter(engine, settings.lookup_corpus), widest
    if kind == "eagle":
        return eagle_drafter(engine), widest
    if kind == "mtp":
        return mtp_drafter(engine), widest
    if kind == "auto":
        return auto_drafter(engine, level, width, read_heads, settings.lookup_corpus), widest
    return NoDrafter(), width
