"""`eexit cache`: extract hidden states once, look at them, check and mend them; and what is kept in the user's cache folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from early_exit_cli.cli.options import configured
from early_exit_cli.errors import CacheError, ConfigError
from early_exit_cli.report import console
from early_exit_cli.resolve import Resolved

if TYPE_CHECKING:
    from early_exit_cli.files.kept import Kept
    from early_exit_cli.hidden_states.cache import Cache
    from early_exit_cli.hidden_states.extract import Estimate


@configured("backbone", "heads", "data", "cache")
def extract(resolved: Resolved, as_json: bool) -> None:
    """Run the backbone over text once and keep its hidden states; goes on where a stopped run was."""
    if resolved.config.data.dataset_name is None:
        raise ConfigError("no text to run the backbone over", hint="--dataset-name FILE.jsonl")
    show(find_or_extract(resolved), as_json)


@configured("cache")
def info(resolved: Resolved, as_json: bool) -> None:
    """What a cache holds and what it costs; without --cache-dir, what the user's cache folder does."""
    if resolved.config.cache.cache_dir is not None:
        show(named_cache(resolved), as_json)
        return
    from early_exit_cli.files.kept import kept

    show_kept(kept(), as_json)


@configured("clear", argument="clear.kind")
def clear(resolved: Resolved, as_json: bool) -> None:
    """Remove what is kept in the user's cache folder, and say what; it is made again when it is needed."""
    from early_exit_cli.files.kept import clear as remove
    from early_exit_cli.files.kept import cleared, kept

    config = resolved.config.clear
    found = kept(cleared(config.kind))
    show_kept(found, as_json)
    if not config.dry_run:
        for one in found:
            remove(one)
    if not as_json:
        console.note("nothing was removed" if config.dry_run else "removed")


@configured("cache")
def verify(resolved: Resolved, as_json: bool) -> None:
    """Check every file of a cache against its manifest; exit code 1 when one is damaged."""
    from early_exit_cli.hidden_states.cache import damage_record, foreign_files
    from early_exit_cli.hidden_states.cache import verify as verify_files

    cache = named_cache(resolved)
    with console.progress("checking shards", len(cache.shards)) as ticker:
        damaged = verify_files(cache, lambda done, total, rate: ticker.update(done, f"{rate:,.0f} tokens/s", total))
    foreign = foreign_files(cache)
    if as_json:
        console.emit_json({"damaged": damage_record(damaged), "foreign": foreign, "shards": len(cache.shards)})
    for name in foreign:
        console.warn(f"shards/{name} is not part of this cache; it is never read")
    if damaged:
        named = "\n".join(f"{damage.file}: {damage.what}" for damage in damaged)
        raise CacheError(named, hint=f"eexit cache repair --cache-dir {cache.folder}")
    if not as_json:
        console.note(f"{len(cache.shards)} shards, {cache.tokens:,} tokens: all as they were written")


@configured("cache")
def repair(resolved: Resolved, as_json: bool) -> None:
    """Compute damaged files of a cache again, and only those."""
    from early_exit_cli.backbone.load import load_backbone
    from early_exit_cli.cli.shared import load_text
    from early_exit_cli.config import BackboneConfig, CacheConfig
    from early_exit_cli.hidden_states.cache import damage_record
    from early_exit_cli.hidden_states.cache import verify as verify_files
    from early_exit_cli.hidden_states.extract import repair as repair_files

    cache = named_cache(resolved)
    damaged = verify_files(cache)
    changed: list[str] = []
    if damaged:
        made = cache.manifest.request
        settings = made.model_dump(include={"model_name", "revision", "quantization"})
        kept = made.model_dump(include={"store", "shard_tokens", "held_out_rows"})
        backbone = load_backbone(BackboneConfig.model_validate(settings))
        train, held_out = load_text(cache.data, backbone)
        with console.progress("computing shards", len(damaged)) as ticker:
            changed = repair_files(
                cache,
                damaged,
                backbone,
                train,
                held_out,
                cache.data,
                CacheConfig.model_validate(kept),
                lambda done, total, rate: ticker.update(done, f"{rate:,.0f} tokens/s", total),
            )
    if as_json:
        console.emit_json({"repaired": damage_record(damaged), "changed": changed})
        return
    for damage in damaged:
        console.note(f"repaired {damage.file} ({damage.what})")
    for name in changed:
        console.warn(f"{name} is whole, but not byte for byte what it was: another device or another version")
    if not damaged:
        console.note("nothing to repair")


def named_cache(resolved: Resolved) -> Cache:
    """The cache that --cache-dir names."""
    from early_exit_cli.hidden_states.cache import Cache

    folder = resolved.config.cache.cache_dir
    if folder is None:
        raise ConfigError("which cache?", hint="--cache-dir FOLDER; eexit cache extract prints it")
    return Cache(folder)


def find_or_extract(resolved: Resolved) -> Cache:
    """The cache that fits the settings; what is missing of it is extracted.

    Raises:
        CacheError: a cache made otherwise than asked for.
        ConfigError: neither a cache nor the text to make one.
    """
    from accelerate import PartialState

    from early_exit_cli.backbone.load import load_backbone, pick_device
    from early_exit_cli.cli.shared import load_text
    from early_exit_cli.data.rows import read_records
    from early_exit_cli.heads.exit_heads import head_layers
    from early_exit_cli.hidden_states.cache import (
        MANIFEST,
        Cache,
        bytes_per_token,
        cache_request,
        check_request,
        default_folder,
        wanted_sequences,
    )
    from early_exit_cli.hidden_states.extract import extract as extract_states

    config = resolved.config
    if config.data.dataset_name is None:
        return existing_cache(resolved)
    request = cache_request(config.backbone, config.heads, config.data, config.cache)
    folder = config.cache.cache_dir or default_folder(request)
    # without saying so, accelerate takes processes on a CPU for so many single ones
    processes = PartialState(cpu=pick_device(config.backbone.device).type == "cpu")
    if (folder / MANIFEST).exists():
        cache = Cache(folder)
        check_request(cache, request)
        if cache.is_complete and not cache.is_shorter_than(config.cache, config.training, processes.num_processes):
            console.note(f"using the cache in {folder}")
            return cache
    records = read_records(config.data)  # refuse unreadable data before a model loads
    backbone = load_backbone(config.backbone)
    layers = head_layers(config.heads, backbone.num_blocks)
    if config.data.on_policy and processes.is_main_process:
        token_bytes = bytes_per_token(backbone.hidden_size, len(layers), config.cache.store)
        every_turn = config.data.answer_turns == "every"
        turns = sorted((len(record["sample"].prompts(every_turn)) for record in records), reverse=True)
        prompts = sum(turns[: config.data.max_documents])
        longest = prompts * (config.data.prompt_tokens + config.data.answer_tokens) // config.data.max_length + 1
        bounds = (config.cache, config.training, config.data.max_length, token_bytes, longest, processes.num_processes)
        most = (wanted_sequences(*bounds) + config.cache.held_out_rows) * config.data.max_length * token_bytes
        console.note(f"answering {prompts:,} prompts first; the cache will then take {most / 1e9:.2f} GB at most")
    train, held_out = load_text(config.data, backbone)
    with console.progress("extracting shards", 1) as ticker:
        return extract_states(
            folder,
            request,
            backbone,
            layers,
            train,
            held_out,
            config.data,
            config.cache,
            config.training,
            processes,
            lambda estimate: show_plan(folder, estimate),
            lambda done, total, rate: ticker.update(done, f"{rate:,.0f} tokens/s", total),
        )


def existing_cache(resolved: Resolved) -> Cache:
    """A cache that is named and complete, for training without its text."""
    if resolved.config.cache.cache_dir is None:
        raise ConfigError("neither a cache nor text to make one from", hint="--cache-dir FOLDER or --dataset-name FILE")
    cache = named_cache(resolved)
    cache.require_complete()
    for name in ("model_name", "quantization"):
        asked = getattr(resolved.config.backbone, name)
        made = getattr(cache.manifest.request, name)
        if not resolved.is_default(f"backbone.{name}") and asked != made:
            raise CacheError(
                f"the cache in {cache.folder} was made otherwise (backbone.{name}: {made!r} there, {asked!r} asked for)"
            )
    return cache


def show_kept(found: list[Kept], as_json: bool) -> None:
    """What is kept, by kind."""
    from early_exit_cli.files.environment import user_cache_dir

    if as_json:
        kinds = {one.kind: {"files": one.files, "bytes": one.bytes} for one in found}
        console.emit_json({"folder": str(user_cache_dir()), "kinds": kinds, "bytes": sum(one.bytes for one in found)})
        return
    rows = [(one.kind, f"{one.files:,}", f"{one.bytes / 1e6:,.1f} MB", one.meaning) for one in found]
    console.table(str(user_cache_dir()), ["kind", "files", "size", "what"], rows, result=True)


def show_plan(folder: Path, estimate: Estimate) -> None:
    """What is about to happen."""
    console.note(
        f"{folder}: {estimate.sequences:,} sequences, {estimate.tokens:,} tokens, {estimate.total_bytes / 1e9:.2f} GB; "
        f"missing {estimate.missing_shards} shards, {estimate.missing_bytes / 1e9:.2f} GB of "
        f"{estimate.free_bytes / 1e9:.2f} GB free"
        + (f", about {estimate.seconds / 60:.1f} minutes" if estimate.seconds is not None else "")
    )


def show(cache: Cache, as_json: bool) -> None:
    """The facts of a cache."""
    from early_exit_cli.hidden_states.cache import info as facts_of

    facts = facts_of(cache)
    if as_json:
        console.emit_json(facts)
        return
    agreement = facts["agreement_of_stored_states"]
    rows = [
        ("backbone", f"{facts['model_name']}, {facts['quantization']}"),
        ("states after blocks", f"{', '.join(map(str, facts['layers']))}, and the last"),
        ("sequences", f"{facts['sequences']:,} of {facts['available_sequences']:,} that the text gives"),
        ("tokens", f"{facts['tokens']:,} in {facts['shards']} shards"),
        ("size", f"{facts['bytes'] / 1e9:.3f} GB, {facts['store']}"),
        (
            "bytes a token",
            f"{facts['bytes_per_token']:,.0f} ({facts['bytes_per_token_expected']:,} by formula; "
            f"{facts['bytes_per_token_with_logits']:,} if logits were stored)",
        ),
        ("agreement after storing", "-" if agreement is None else f"{agreement:.2%} of the backbone's own choices"),
        ("complete", "yes" if facts["complete"] else "no: run cache extract again"),
    ]
    console.table(facts["folder"], ["", "value"], rows, result=True)
