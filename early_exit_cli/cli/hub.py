"""`eexit push`, `pull`, `import`: resolve, check the bundle, one call, report."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from early_exit_cli.cli.options import configured
from early_exit_cli.errors import ConfigError
from early_exit_cli.report import console
from early_exit_cli.resolve import Resolved

if TYPE_CHECKING:
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
    "dssd",
    argument="dssd.folder",
    examples=(
        "eexit import dssd-folder --output-dir heads",
        "eexit import --folder dssd-folder --output-dir heads --json",
    ),
)
def import_(resolved: Resolved, as_json: bool) -> None:
    """Make a bundle of heads that DSSD's own program trained."""
    from early_exit_cli.bundle.push import import_dssd

    config = resolved.config.dssd
    if config.folder is None or config.output_dir is None:
        raise ConfigError("from where to where?", hint="eexit import FOLDER --output-dir BUNDLE")
    bundle = import_dssd(config.folder, config.output_dir)
    if as_json:
        console.emit_json({"folder": str(config.output_dir), "fingerprint": bundle.record.fingerprint})
        return
    describe(bundle, str(config.folder))
    console.stream_text(f"{config.output_dir}\n")


def describe(bundle: Bundle, name: str) -> None:
    """One line on what a bundle is."""
    config = bundle.config
    console.note(
        f"{name}: {config.num_heads} {bundle.heads.kind} heads after blocks {config.head_layer_indices} of "
        f"{config.model_name} in {config.quantization}, "
        f"{'calibrated' if bundle.calibration else 'not calibrated (eexit calibrate)'}"
    )
