"""From the name of a way of decoding to its drafter, and the rows of the passes that verify what it drafts."""

from __future__ import annotations

from early_exit_cli.blocks import LARGEST_WIDTH
from early_exit_cli.config import DYNAMIC_LENGTH, InferenceConfig
from early_exit_cli.costs import auto_drafter, exit_drafter, lookahead_drafter, lookup_drafter
from early_exit_cli.decoding import default_width
from early_exit_cli.drafters import Drafter, DynamicDrafter, FixedDrafter, NoDrafter
from early_exit_cli.engine import Engine

HEADLESS = ("none", "lookup", "auto")
"""Kinds that a backbone without a bundle can have."""


def make_drafter(model: Engine, settings: InferenceConfig, kind: str) -> tuple[Drafter, int]:
    """The drafter of a kind, and the width of its passes.

    Args:
        kind: none, exit, lookahead, lookup, auto; fixed and dynamic, the seed's.

    Raises:
        BundleError: the bundle lacks what the kind drafts with, or is not calibrated.
        ConfigError: a level that was not calibrated, or a width out of range.
        DataError: the lookup corpus cannot be read.
    """
    level, read_heads = settings.accuracy_level, settings.read_heads
    width = settings.width or default_width(model)
    widest = settings.width or LARGEST_WIDTH  # for those that weigh draft lengths at every width
    if kind == "fixed":
        return FixedDrafter(settings.fixed_head), settings.draft_length + 1
    if kind == "dynamic":
        exits = exit_drafter(model, level, DYNAMIC_LENGTH + 1, "all")
        return DynamicDrafter(exits.thresholds, None, exits.metric, exits.temperature), DYNAMIC_LENGTH + 1
    if kind == "exit":
        return exit_drafter(model, level, width, read_heads), width
    if kind == "lookup":
        return lookup_drafter(model, settings.lookup_corpus), widest
    if kind == "lookahead":
        return lookahead_drafter(model), widest
    if kind == "auto":
        return auto_drafter(model, level, width, read_heads, settings.lookup_corpus), widest
    return NoDrafter(), width
