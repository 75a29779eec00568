"""`eexit cache`: hidden states extracted once, looked at, checked and mended; and what is kept in the user's cache folder."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from early_exit_cli.cli.options import configured
from early_exit_cli.cli.shared import load_libraries
from early_exit_cli.errors import CacheError, ConfigError
from early_exit_cli.report import console
from early_exit_cli.resolve import Resolved

if TYPE_CHECKING:
    from early_exit_cli.config_files import KeptKind
    from early_exit_cli.files.kept import Entry
    from early_exit_cli.hidden_states.cache import Cache
    from early_exit_cli.hidden_states.extract import Estimate


@configured(
    *("cache", "data", "heads", "backbone"),
    without=("backbone.assistant",),
    examples=(
        "eexit cache extract --dataset-name text.jsonl --cache-gb 2",
        "eexit cache extract --dataset-name prompts.jsonl --on-policy --store fp8 --cache-dir states",
    ),
)
def extract(resolved: Resolved, as_json: bool) -> None:
    """Run the backbone over text once and keep its hidden states; goes on where a stopped run was."""
    load_libraries()
    if resolved.config.data.dataset_name is None:
        raise ConfigError("no text to run the backbone over", hint="--dataset-name FILE.jsonl")
    show(find_or_extract(resolved), as_json)


@configured("cache", examples=("eexit cache info --cache-dir states", "eexit cache info --cache-dir states --json"))
def info(resolved: Resolved, as_json: bool) -> None:
    """What a cache of hidden states holds and what it costs; without --cache-dir, the same as `ls`."""
    if resolved.config.cache.cache_dir is not None:
        show(named_cache(resolved), as_json)
        return
    from early_exit_cli.files.kept import kept

    show_kept(kept(), as_json)


@configured("kept", examples=("eexit cache ls", "eexit cache ls --kind models"))
def ls(resolved: Resolved, as_json: bool) -> None:
    """What is kept in the user's cache folder: what it was made from, how large it is, and when it was used."""
    from early_exit_cli.files.kept import KINDS, kept

    show_kept(kept([resolved.config.kept.kind] if resolved.config.kept.kind else [*KINDS]), as_json)


@configured(
    *("kept", "remove"),
    argument="remove.names",
    examples=("eexit cache rm --kind models --dry-run", "eexit cache rm --all"),
)
def rm(resolved: Resolved, as_json: bool) -> None:
    """Remove what is kept in the user's cache folder, and say what; it is made again when it is needed."""
    from early_exit_cli.files.kept import KINDS, kept, named

    kind, config = resolved.config.kept.kind, resolved.config.remove
    if config.all and (kind or config.names):
        raise ConfigError("--all is all but answers and hidden states: leave names and --kind out")
    if config.names:
        go(named(kept([kind] if kind else [*KINDS]), config.names), (), config.dry_run, as_json)
    elif kind or config.all:
        clear_kinds(kind, config.dry_run, as_json)
    else:
        raise ConfigError("what shall go?", hint="names or keys of eexit cache ls, --kind KIND, or --all")


@configured("clear", argument="clear.kind", examples=("eexit cache clear code", "eexit cache clear --dry-run"))
def clear(resolved: Resolved, as_json: bool) -> None:
    """The same as `rm --kind KIND`; without a kind, as `rm --all`."""
    clear_kinds(resolved.config.clear.kind, resolved.config.clear.dry_run, as_json)


@configured("cache", examples=("eexit cache verify --cache-dir states", "eexit cache verify --cache-dir states --json"))
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


@configured("cache", examples=("eexit cache repair --cache-dir states", "eexit cache repair --cache-dir states --json"))
def repair(resolved: Resolved, as_json: bool) -> None:
    """Compute damaged files of a cache again, and only those."""
    load_libraries()
    from early_exit_cli.backbone.load import load_backbone
    from early_exit_cli.cli.shared import load_text
    from early_exit_cli.config import BackboneConfig, CacheConfig
    from early_exit_cli.data.rows import read_data
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
        train, held_out = load_text(read_data(cache.data), backbone)
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


def clear_kinds(kind: KeptKind | None, is_dry: bool, as_json: bool) -> None:
    """Remove all of a kind, or of all kinds that are not dear."""
    from early_exit_cli.files.kept import cleared, kept

    go(kept(cleared(kind)), cleared(kind), is_dry, as_json)


def go(entries: list[Entry], kinds: Sequence[KeptKind], is_dry: bool, as_json: bool) -> None:
    """Show entries, and unless it is a dry run remove them, with the folders of `kinds`."""
    from early_exit_cli.files.kept import clear as clear_kind
    from early_exit_cli.files.kept import remove

    show_kept(entries, as_json)
    if not is_dry:
        for kind in kinds:
            clear_kind(kind)
        for entry in entries if not kinds else ():
            remove(entry)
    if not as_json:
        console.note("nothing was removed" if is_dry else "removed")


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
    from early_exit_cli.data.rows import read_data
    from early_exit_cli.heads.exit_heads import exit_layers_of
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
    text = read_data(config.data)  # refuse unreadable data before a model loads
    backbone = load_backbone(config.backbone)
    if "backbone.content" not in request:  # of the Hub, and only now on this machine
        request = cache_request(config.backbone, config.heads, config.data, config.cache)
        folder = config.cache.cache_dir or default_folder(request)
    exit_layers = exit_layers_of(config.heads, backbone.num_blocks)
    if config.data.on_policy and processes.is_main_process:
        token_bytes = bytes_per_token(backbone.hidden_size, len(exit_layers), config.cache.store)
        every_turn = config.data.answer_turns == "every"
        turns = sorted((len(record["sample"].prompts(every_turn)) for record in text.records), reverse=True)
        prompts = sum(turns[: config.data.max_documents])
        longest = prompts * (config.data.prompt_tokens + config.data.answer_tokens) // config.data.max_length + 1
        bounds = (config.cache, config.training, config.data.max_length, token_bytes, longest, processes.num_processes)
        most = (wanted_sequences(*bounds) + config.cache.held_out_rows) * config.data.max_length * token_bytes
        console.note(f"answering {prompts:,} prompts first; the cache will then take {most / 1e9:.2f} GB at most")
    train, held_out = load_text(text, backbone)
    with console.progress("extracting shards", 1) as ticker:
        return extract_states(
            folder,
            request,
            backbone,
            exit_layers,
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


def show_kept(entries: list[Entry], as_json: bool) -> None:
    """What is kept, and all of it together."""
    from early_exit_cli.files.environment import cache_place, from_home
    from early_exit_cli.files.kept import totals

    folder, origin = cache_place()
    size = sum(entry.bytes for entry in entries)
    if as_json:
        kinds = {kind: {"files": files, "bytes": count} for kind, (files, count) in totals(entries).items()}
        records = [
            asdict(entry)
            | {"paths": [str(path) for path in entry.paths], "made": moment(entry.made), "used": moment(entry.used)}
            for entry in entries
        ]
        console.emit_json({"folder": str(folder), "origin": origin, "entries": records, "kinds": kinds, "bytes": size})
        return
    rows: list[tuple[str | None, ...]] = [
        (entry.kind, entry.name, size_text(entry.bytes), age(entry.made), age(entry.used), entry.key)
        for entry in entries
    ]
    rows.append(("total", f"{len(rows)} {'entry' if len(rows) == 1 else 'entries'}", size_text(size), None, None, None))
    console.table(f"{from_home(folder)} ({origin})", ["kind", "name", "size", "made", "used", "key"], rows, result=True)


def size_text(size: int) -> str:
    """A size for people."""
    return f"{size / 1e6:,.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


def age(then: float | None) -> str | None:
    """How long ago, for people."""
    if then is None:
        return None
    seconds = max(time.time() - then, 0.0)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def moment(then: float | None) -> str | None:
    """A time of the file system as JSON holds it: ISO 8601, UTC."""
    return None if then is None else datetime.fromtimestamp(then, timezone.utc).isoformat(timespec="seconds")


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
        (
            "sequences",
            f"{facts['sequences']:,} of {facts['available_sequences']:,} that the text gives, beside those held out",
        ),
        ("tokens", f"{facts['tokens']:,} in {facts['shards']} shards, with those held out"),
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
