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
from early_exit_cli.config_files import HubConfig
from early_exit_cli.errors import BundleError
from early_exit_cli.files.atomic import atomic_folder, file_sha256, require_new_folder
from early_exit_cli.files.environment import kept_path

SAFE_FILES = (CONFIG_FILE, CALIBRATION_FILE, HEADS_FILE, EAGLE_FILE, FORMER_EAGLE_FILE, RECORD_FILE, CARD_FILE)
DSSD_FILES = (CONFIG_FILE, CALIBRATION_FILE, DSSD_HEADS_FILE)


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
    folder, commit = Repository(config.model_copy(update={"revision": commit})).download(DSSD_FILES)
    if not (folder / DSSD_HEADS_FILE).is_file():
        raise BundleError(f"{repository.name} is no bundle: it has neither {RECORD_FILE} nor {DSSD_HEADS_FILE}")
    converted = kept_path("dssd", repository.repo_id.replace("/", "--"), commit)
    if not (converted / RECORD_FILE).is_file():
        with atomic_folder(converted, keep=True) as temporary:
            dssd.convert(folder, temporary)
    return BundleSource(converted, repository.repo_id, commit)


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
