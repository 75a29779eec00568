"""Bundles from the Hub: only safetensors, JSON and the card are fetched; DSSD's pickle is converted, never loaded as such."""

from __future__ import annotations

import shutil
from pathlib import Path

from early_exit_cli.bundle import dssd
from early_exit_cli.bundle.files import (
    BUNDLE_FILES,
    CALIBRATION_FILE,
    CARD_FILE,
    CONFIG_FILE,
    DSSD_HEADS_FILE,
    EAGLE_FILE,
    FORMER_EAGLE_FILE,
    HEADS_FILE,
    RECORD_FILE,
    BundleSource,
)
from early_exit_cli.bundle.hub_client import Repository
from early_exit_cli.bundle.kinds import refuse_checkpoint
from early_exit_cli.config_fields import HUB_ID
from early_exit_cli.config_files import HubConfig
from early_exit_cli.errors import BundleError, HubError
from early_exit_cli.files.atomic import atomic_folder, file_sha256, require_new_folder
from early_exit_cli.files.environment import kept_path

SAFE_FILES = (CONFIG_FILE, CALIBRATION_FILE, HEADS_FILE, EAGLE_FILE, FORMER_EAGLE_FILE, RECORD_FILE, CARD_FILE)
DSSD_FILES = (CONFIG_FILE, CALIBRATION_FILE, DSSD_HEADS_FILE)
SAFE_WEIGHTS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
PICKLED_WEIGHTS = ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json")


def pull(config: HubConfig) -> BundleSource:
    """Fetch a bundle into the Hub's cache; one of DSSD is converted beside our other files in the user's cache.

    Raises:
        HubError: it cannot be had.
        BundleError: it is no bundle, or its pickle holds more than tensors.
    """
    repository = Repository(config)
    folder, commit = repository.download(SAFE_FILES)
    if (folder / RECORD_FILE).is_file():
        return BundleSource(folder, repository.repo_id, commit)
    if (folder / HEADS_FILE).is_file():
        raise BundleError(f"{repository.name} has {HEADS_FILE}, but no {RECORD_FILE} to say what it is")
    refuse_checkpoint(folder, repository.name)
    folder, commit = Repository(config.model_copy(update={"revision": commit})).download(DSSD_FILES)
    if not (folder / DSSD_HEADS_FILE).is_file():
        raise BundleError(f"{repository.name} is no bundle: it has neither {RECORD_FILE} nor {DSSD_HEADS_FILE}")
    converted = kept_path("dssd", repository.repo_id.replace("/", "--"), commit)
    if not (converted / RECORD_FILE).is_file():
        with atomic_folder(converted, keep=True) as temporary:
            dssd.convert(folder, temporary)
    return BundleSource(converted, repository.repo_id, commit)


def checkpoint(name: str) -> BundleSource:
    """Heads to import: a folder, or the files of a Hub id; no pickle is fetched where the same is there without one.

    Raises:
        BundleError: nothing there, or a bundle already.
        HubError: it cannot be had.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        _refuse_bundle(folder, name)
        return BundleSource(folder)
    repo_id, _, revision = name.partition("@")
    if HUB_ID.fullmatch(repo_id) is None:
        raise BundleError(f"no folder {name}", hint="eexit import FOLDER, or ORG/NAME for one on the Hub")
    try:
        config = HubConfig(repo_id=repo_id, revision=revision or None)
        folder, commit = Repository(config).download((CONFIG_FILE, RECORD_FILE))
        _refuse_bundle(folder, name)
        config = config.model_copy(update={"revision": commit})
        for names in (DSSD_FILES, SAFE_WEIGHTS, PICKLED_WEIGHTS):
            folder, commit = Repository(config).download(names)
            if any((folder / name).is_file() for name in names if name not in (CONFIG_FILE, CALIBRATION_FILE)):
                break
    except HubError as error:
        raise HubError(f"no folder {name}, and as a Hub id: {error.message}", hint=error.hint) from error
    return BundleSource(folder, repo_id, commit)


def _refuse_bundle(folder: Path, name: str) -> None:
    if (folder / RECORD_FILE).is_file():
        raise BundleError(f"{name} is a bundle already", hint=f"eexit infer --bundle {name}")


def copy_bundle(source: Path, target: Path) -> None:
    """Copy a bundle's files into a new or empty folder; where they are already, nothing happens.

    Raises:
        ConfigError: the folder holds something else.
    """
    names = [name for name in (*BUNDLE_FILES, FORMER_EAGLE_FILE, CARD_FILE) if (source / name).is_file()]
    if all((target / name).is_file() and file_sha256(target / name) == file_sha256(source / name) for name in names):
        return
    require_new_folder(target)
    with atomic_folder(target) as temporary:
        for name in names:
            shutil.copyfile(source / name, temporary / name)
