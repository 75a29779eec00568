"""`eexit export`: resolve, load, write, report."""

from __future__ import annotations

from early_exit_cli.cli.options import configured
from early_exit_cli.cli.shared import load_libraries
from early_exit_cli.errors import BundleError, ConfigError
from early_exit_cli.report import console
from early_exit_cli.resolve import Resolved


@configured(
    *("export", "bundle", "backbone"),
    without=("backbone.assistant",),
    examples=("eexit export --bundle runs/heads --output-dir runs/speculators", "eexit export --draft-tokens 5"),
)
def command(resolved: Resolved, as_json: bool) -> None:
    """Write a bundle's EAGLE head in a format that serving engines load."""
    load_libraries()
    from early_exit_cli.bundle.load import load_engine
    from early_exit_cli.cli.shared import backbone_of_bundle
    from early_exit_cli.heads.export_speculators import export_eagle

    settings = resolved.config.export
    if settings.output_dir.exists():
        raise ConfigError(f"{settings.output_dir} exists already", hint="name a new folder with --output-dir")
    engine = load_engine(backbone_of_bundle(resolved), resolved.config.bundle, with_thresholds=False)
    if engine.eagle is None:
        raise BundleError("the bundle has no EAGLE head", hint="eexit train --head eagle --output-dir BUNDLE")
    export_eagle(engine.eagle, engine.backbone, settings.output_dir, settings.draft_tokens)
    files = {path.name: path.stat().st_size for path in sorted(settings.output_dir.iterdir())}
    if as_json:
        console.emit_json({"folder": str(settings.output_dir), "files": files})
        return
    rows = [(name, f"{size / 1e6:.1f} MB") for name, size in files.items()]
    console.table(str(settings.output_dir), ["file", "size"], rows, result=True)
