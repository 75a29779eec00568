"""From a folder or Hub id to a loaded `Engine`: heads, thresholds and records, checked against the backbone."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from early_exit_cli.backbone.backbone import Backbone
from early_exit_cli.backbone.load import load_backbone, load_settings
from early_exit_cli.backbone.load_assistant import refuse_other_assistant
from early_exit_cli.bundle.files import (
    CALIBRATION_FILE,
    CONFIG_FILE,
    HEADS_FILE,
    RECORD_FILE,
    BundleSource,
    applied_quantization,
    eagle_exit_layers,
    eagle_file,
    kind_of_heads,
    read_bundle_config,
    read_bundle_record,
)
from early_exit_cli.bundle.kinds import refuse_checkpoint
from early_exit_cli.config import SHIPPED_BUNDLE, BackboneConfig, BundleConfig
from early_exit_cli.config_fields import HUB_ID
from early_exit_cli.config_files import HubConfig
from early_exit_cli.engine import Engine
from early_exit_cli.errors import BackboneError, BundleError, HubError, shown
from early_exit_cli.files.atomic import fingerprint_differences
from early_exit_cli.files.schemas import (
    BundleForm,
    CalibrationBeside,
    CalibrationForm,
    CalibrationRecord,
    RecordForm,
    read_form,
)
from early_exit_cli.heads.cuda_eagle import cuda_eagle
from early_exit_cli.heads.eagle import load_eagle
from early_exit_cli.heads.exit_heads import load_heads
from early_exit_cli.heads.load_mtp import load_assistant_head, load_mtp_head
from early_exit_cli.heads.uncertainty import Thresholds, level_key
from early_exit_cli.resolve import nearest
from early_exit_cli.runtime.select import make_blocks


def bundle_source(config: BundleConfig) -> BundleSource:
    """Where the bundle of a setting is: an existing folder or its config.json, the shipped bundle, or a Hub id.

    A Hub id is downloaded once a process, so that all who ask see the same commit.

    Raises:
        BundleError: nothing there.
        HubError: a Hub id that cannot be had.
    """
    path = Path(config.bundle).expanduser()
    if path.name == CONFIG_FILE:
        path = path.parent
    if path.is_dir():
        if not (path / RECORD_FILE).is_file():
            refuse_checkpoint(path, config.bundle)
        return BundleSource(path)
    shipped = Path(__file__).parent.parent / "bundles" / config.bundle
    if config.bundle == SHIPPED_BUNDLE and shipped.is_dir():
        return BundleSource(shipped, is_shipped=True)
    repo_id, _, revision = config.bundle.partition("@")
    if HUB_ID.fullmatch(repo_id):
        try:
            return _from_hub(repo_id, revision or None)
        except HubError as error:
            raise HubError(f"no folder {config.bundle}, and as a Hub id: {error.message}", hint=error.hint) from error
    raise BundleError(
        f"no bundle at {config.bundle}{nearest(config.bundle, [SHIPPED_BUNDLE])}", hint="make one with eexit train"
    )


@functools.cache
def _from_hub(repo_id: str, revision: str | None) -> BundleSource:
    from early_exit_cli.bundle.pull import pull  # the Hub's client is loaded only where a Hub id is named

    return pull(HubConfig(repo_id=repo_id, revision=revision))


def bundle_folder(config: BundleConfig) -> Path:
    """The folder of `bundle_source`."""
    return bundle_source(config).folder


def read_thresholds(path: Path, num_heads: int) -> Thresholds:
    """calibration.json's thresholds.

    Raises:
        BundleError: an unknown metric, a level without its block, a head without its number.
    """
    record = read_form(path, CalibrationForm)
    found: dict[str, list[float]] = {}
    for level in record.accuracy_levels:
        block = record.thresholds.get(level_key(level))
        if block is None:
            raise BundleError(f"{path}: level {level!r} has no thresholds")
        missing = [head for head in range(num_heads) if str(head) not in block]
        if missing:
            raise BundleError(f"{path}: level {level_key(level)}, head {missing[0]}: no threshold")
        found[level_key(level)] = [block[str(head)] for head in range(num_heads)]
    return Thresholds(found, record.uncertainty_metric)


def calibration_record_path(folder: Path, calibration: Path) -> Path:
    """Where the record of a calibration stands: the bundle's eexit.json for its own, else NAME.eexit.json beside it."""
    own = calibration.resolve() == (folder / CALIBRATION_FILE).resolve()
    return folder / RECORD_FILE if own else calibration.with_suffix(f".{RECORD_FILE}")


def with_names_of_bundle(config: BackboneConfig, folder: Path) -> BackboneConfig:
    """The backbone section, with name and quantization taken from the bundle unless somebody set them."""
    known = read_bundle_config(folder)
    changes = known.model_dump(include={"model_name", "quantization"} - config.model_fields_set)
    if "model_name" in changes:
        changes["model_name"] = backbone_of_bundle(known.model_name, folder)
    return BackboneConfig.model_validate(config.model_dump() | changes)


def backbone_of_bundle(name: str, folder: Path) -> str:
    """A backbone as a bundle names it. A relative path is meant from the working folder, as it was in training; where it
    leads nowhere from there, from the bundle's folder or the nearest above it."""
    path = os.path.expanduser(name)
    if os.path.exists(path):
        return name
    places = (folder.resolve(), *folder.resolve().parents)
    return next((found for found in (os.path.join(place, path) for place in places) if os.path.exists(found)), name)


def load_engine(
    backbone_config: BackboneConfig,
    bundle: BundleConfig | None,
    *,
    with_thresholds: bool = True,
    with_mtp: bool = False,
    backbone: Backbone | None = None,
) -> Engine:
    """Load a backbone and, with `bundle`, its heads and thresholds.

    Args:
        with_mtp: the model's own drafter too: the assistant, where one was named, else the layer for multi-token
            prediction, where the backbone's checkpoint brings one.
        backbone: one that is loaded already, to take instead.

    Raises:
        BundleError: damaged bundle, or heads that were made for another backbone (both values are named).
        UnsupportedBackboneError: the assistant does not fit the backbone; told before any weight is read.
    """
    assistant = backbone_config.assistant if with_mtp else None
    if assistant is not None and backbone is None:
        refuse_other_assistant(assistant, load_settings(backbone_config), backbone_config.model_name)
    folder = bundle_folder(bundle) if bundle else None
    config = read_bundle_config(folder) if folder else None
    if backbone is None:
        check = None if config is None else functools.partial(check_size, config, folder, backbone_config.model_name)
        backbone = load_backbone(backbone_config, check)
    engine = Engine(backbone, make_blocks(backbone, backbone_config.runner, backbone_config.cuda_graphs))
    if assistant is not None:
        engine.mtp = load_assistant_head(engine.blocks, assistant)
    elif with_mtp:
        try:
            engine.mtp = load_mtp_head(engine.blocks)
        except BackboneError as error:
            engine.without_mtp = error.message
    if folder is None or config is None or bundle is None:
        return engine
    engine.record = record = read_bundle_record(folder)
    check_fingerprint(config, record, backbone, folder)
    if config.num_heads:
        made = kind_of_heads(record, folder)
        engine.heads = load_heads(folder / HEADS_FILE, backbone, made.kind, config.exit_layers, made.rank)
    if record.eagle is not None:
        exit_layers = eagle_exit_layers(record.eagle, folder, backbone.num_blocks)
        engine.eagle = load_eagle(eagle_file(folder), backbone, exit_layers, record.eagle.layout)
        if backbone.device.type == "cuda":
            cuda_eagle(engine.eagle)  # recorded now, not inside an answer
    calibration = bundle.calibration_path or folder / CALIBRATION_FILE
    if with_thresholds and (bundle.calibration_path or calibration.exists()):
        engine.thresholds = read_thresholds(calibration, config.num_heads)
        found = read_calibration_record(calibration_record_path(folder, calibration), config.num_heads)
        engine.record = record.model_copy(update={"calibration": found})
    return engine


def read_calibration_record(path: Path, num_heads: int) -> CalibrationRecord:
    """The calibration in the record at `path`; an empty one where there is none.

    Raises:
        BundleError: damaged, or of another number of heads.
    """
    calibration = read_form(path, CalibrationBeside).calibration if path.exists() else CalibrationRecord()
    if calibration.heads and len(calibration.heads) != num_heads:
        raise BundleError(
            f"{path}: the calibration is of {len(calibration.heads)} heads, the bundle has {num_heads}",
            hint="eexit calibrate",
        )
    return calibration


def check_fingerprint(config: BundleForm, record: RecordForm, backbone: Backbone, folder: Path) -> None:
    """Refuse heads of another backbone, naming the field and both values."""
    found = backbone.fingerprint
    applied = {**found, "quantization": applied_quantization(backbone.quantization)}
    differences = fingerprint_differences(config.declared, applied) or fingerprint_differences(
        record.fingerprint, found
    )
    if differences:
        raise _of_another(config, folder, backbone.name, differences)


def check_size(config: BundleForm, folder: Path | None, name: str, settings: Any) -> None:
    """Refuse heads that read states of another size than a backbone with these settings has."""
    if settings.hidden_size != config.hidden_size:
        raise _of_another(config, folder, name, [("hidden_size", config.hidden_size, settings.hidden_size)])


def _of_another(
    config: BundleForm, folder: Path | None, name: str, differences: list[tuple[str, Any, Any]]
) -> BundleError:
    named = "; ".join(f"{key}: heads {shown(theirs)}, backbone {ours!r}" for key, theirs, ours in differences)
    return BundleError(
        f"the heads in {folder} were made for another backbone than {name} ({named})",
        hint=f"their backbone is {config.model_name} in {config.quantization}; --bundle FOLDER names others",
    )
