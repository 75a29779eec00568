"""`eexit push`, `pull`, `import`: resolve, check the bundle, one call, report."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from early_exit_cli.cli.options import configured
from early_exit_cli.cli.shared import load_libraries
from early_exit_cli.errors import ConfigError
from early_exit_cli.files.atomic import atomic_folder, require_new_folder
from early_exit_cli.report import console
from early_exit_cli.resolve import Resolved

if TYPE_CHECKING:
    from pathlib import Path

    from early_exit_cli.bundle.files import BundleSource
    from early_exit_cli.bundle.push import Bundle


@configured(
    *("hub", "bundle", "push"),
    argument="bundle.bundle",
    examples=(
        "eexit push --repo-id ORG/NAME runs/heads --dry-run",
        "eexit push --repo-id ORG/NAME runs/heads --private",
    ),
)
def push(resolved: Resolved, as_json: bool) -> None:
    """Upload a bundle to the Hub, in one commit, with a model card made from its records."""
    from early_exit_cli.bundle.load import bundle_folder
    from early_exit_cli.bundle.push import check_bundle, staged, write_card
    from early_exit_cli.bundle.push import push as push_files

    config = resolved.config
    if config.hub.repo_id is None:
        raise ConfigError("which repository?", hint="--repo-id ORG/NAME")
    if config.bundle.calibration_path is not None:
        raise ConfigError("push uploads the bundle's own calibration.json: leave --calibration-path out")
    bundle = check_bundle(bundle_folder(config.bundle))
    card = write_card(bundle, config.hub.repo_id, config.push)
    places = bundle.local_paths()
    if places:
        console.warn(f"this will be seen by others, and names places of this machine: {'; '.join(places)}")
    with staged(bundle, card) as files:
        sizes = {name: path.stat().st_size for name, path in files.items()}
        result = None if config.push.dry_run else push_files(files, config.hub, config.push)
    if as_json:
        sent = {"card": card} if result is None else asdict(result)
        console.emit_json({"repo_id": config.hub.repo_id, "dry_run": result is None, "files": sizes, **sent})
    elif result is None:
        console.table("", ["file", "bytes"], [(name, f"{size:,}") for name, size in sizes.items()], result=True)
        console.stream_text("\n" + card)
        console.note(f"nothing was sent to {config.hub.repo_id}")
    elif result.changed:
        what = f"pull request: {result.pull_request}" if result.pull_request else f"commit {result.commit}"
        console.note(f"{config.hub.repo_id}: {what} ({', '.join(result.changed)})")
    else:
        console.note(f"{config.hub.repo_id} holds this bundle already, in commit {result.commit}")


@configured(
    *("hub", "pull"),
    argument="hub.repo_id",
    examples=("eexit pull ORG/NAME", "eexit pull ORG/NAME --revision v2 --output-dir heads"),
)
def pull(resolved: Resolved, as_json: bool) -> None:
    """Download a bundle from the Hub."""
    from early_exit_cli.bundle.pull import copy_bundle
    from early_exit_cli.bundle.pull import pull as pull_bundle
    from early_exit_cli.bundle.push import check_bundle

    config = resolved.config
    source = pull_bundle(config.hub)
    bundle = check_bundle(source.folder)
    folder = config.pull.output_dir or source.folder
    if config.pull.output_dir:
        copy_bundle(source.folder, folder)
    if as_json:
        console.emit_json({**source.record(), "folder": str(folder)})
        return
    describe(bundle, f"{source.repo_id} at {source.commit}")
    console.stream_text(f"{folder}\n")


@configured(
    *("dssd", "backbone"),
    without=("backbone.assistant",),
    argument="dssd.folder",
    examples=(
        "eexit import ORG/EAGLE3-HEAD --output-dir heads --model-name ORG/BACKBONE",
        "eexit import dssd-folder --output-dir heads",
        "eexit import --folder dssd-folder --output-dir heads --json",
    ),
)
def import_(resolved: Resolved, as_json: bool) -> None:
    """Make a bundle of heads that were trained elsewhere: EAGLE-3 heads as they are published, or DSSD's."""
    load_libraries()
    from early_exit_cli.bundle.files import DSSD_HEADS_FILE
    from early_exit_cli.bundle.pull import checkpoint
    from early_exit_cli.bundle.push import import_dssd

    config = resolved.config.dssd
    if config.folder is None or config.output_dir is None:
        raise ConfigError("from where to where?", hint="eexit import ORG/NAME --output-dir BUNDLE")
    require_new_folder(config.output_dir)
    source = checkpoint(config.folder)
    if not (source.folder / DSSD_HEADS_FILE).is_file():
        import_eagle(resolved, source, config.output_dir, as_json)
        return
    bundle = import_dssd(source.folder, config.output_dir)
    if as_json:
        console.emit_json({"folder": str(config.output_dir), "fingerprint": bundle.record.fingerprint})
        return
    describe(bundle, config.folder)
    console.stream_text(f"{config.output_dir}\n")


def import_eagle(resolved: Resolved, source: BundleSource, output_dir: Path, as_json: bool) -> None:
    """A published EAGLE-3 head: settings of its backbone, one call, report."""
    from early_exit_cli.backbone.load import load_settings
    from early_exit_cli.backbone.quantization import quantization_of
    from early_exit_cli.bundle.files import applied_quantization
    from early_exit_cli.bundle.published import convert, read_published, target_of

    name = source.repo_id or str(source.folder)
    published = read_published(source.folder, name)
    backbone = resolved.config.backbone
    if resolved.is_default("backbone.model_name"):
        if published.backbone is None:
            raise ConfigError(f"{name} does not say which model it is for", hint="--model-name ORG/BACKBONE")
        backbone = backbone.model_copy(update={"model_name": published.backbone})
    settings = load_settings(backbone)
    target = target_of(backbone.model_name, settings, quantization_of(settings) or backbone.quantization)
    with atomic_folder(output_dir) as temporary:
        eagle = convert(
            published,
            f"{name} at {source.commit}" if source.commit else source.folder.resolve().name,
            target,
            temporary,
        )
    if as_json:
        found = {"folder": str(output_dir), "fingerprint": target.fingerprint, "exit_layers": eagle.exit_layers}
        console.emit_json({**found, "layout": published.kind.words})
        return
    console.note(
        f"{name}: {published.kind.words}, after {', '.join(map(str, eagle.exit_layers))} of {target.num_blocks} blocks of "
        f"{target.name} in {applied_quantization(target.quantization)}; not calibrated, so auto does not read it"
    )
    console.note(f"next: eexit calibrate --bundle {output_dir} --dataset-name prompts.jsonl --on-policy")
    console.stream_text(f"{output_dir}\n")


def describe(bundle: Bundle, name: str) -> None:
    """One line on what a bundle is."""
    config = bundle.config
    console.note(
        f"{name}: {config.num_heads} {bundle.heads.kind} heads after blocks {config.head_layer_indices} of "
        f"{config.model_name} in {config.quantization}, "
        f"{'calibrated' if bundle.calibration else 'not calibrated (eexit calibrate)'}"
    )
