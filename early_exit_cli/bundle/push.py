"""Sharing a bundle: checks that need no backbone, the files of an upload, one commit; and bundles of DSSD.

What goes up is named here, file by file: checkpoints and optimizer states never do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

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
    eagle_exit_layers,
    eagle_file,
    kind_of_heads,
    read_bundle_config,
    read_bundle_record,
    record_json,
)
from early_exit_cli.bundle.hub_client import Commit, Repository
from early_exit_cli.bundle.load import read_thresholds
from early_exit_cli.bundle.model_card import model_card, read_bench, read_evaluation
from early_exit_cli.config_files import HubConfig, PushConfig
from early_exit_cli.errors import BundleError, ConfigError, shown
from early_exit_cli.files.atomic import (
    atomic_folder,
    file_sha256,
    fingerprint_differences,
    read_json,
    require_new_folder,
    write_json,
)
from early_exit_cli.files.schemas import BundleForm, CalibrationForm, Heads, RecordForm, read_form
from early_exit_cli.heads.exit_heads import read_heads, read_tensors


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files were checked. `calibration` is none where there is none."""

    folder: Path
    heads: Heads
    config: BundleForm
    record: RecordForm
    calibration: CalibrationForm | None

    def local_paths(self) -> list[str]:
        """Settings that name a place on this machine, as `config.json: model_name = /home/me/model`."""
        files = [name for name in (CONFIG_FILE, CALIBRATION_FILE, RECORD_FILE) if (self.folder / name).is_file()]
        return [
            f"{name}: {key} = {value}"
            for name in files
            for key, value in absolute_paths(record_json(self.folder / name))
        ]


def check_bundle(folder: Path) -> Bundle:
    """Check a bundle without its backbone: files, fingerprint, heads by name and shape, thresholds of every head.

    Raises:
        BundleError: what is missing or does not belong together.
    """
    missing = [name for name in (CONFIG_FILE, HEADS_FILE, RECORD_FILE) if not (folder / name).is_file()]
    if missing:
        raise BundleError(f"{folder} is no bundle: no {', no '.join(missing)}", hint="eexit train makes one")
    config, record = read_bundle_config(folder), read_bundle_record(folder)
    heads = kind_of_heads(record, folder)
    for key, theirs, ours in fingerprint_differences(config.declared, record.fingerprint):
        raise BundleError(f"{folder}: {key} is {theirs!r} in {CONFIG_FILE}, {shown(ours)} in the fingerprint")
    shape = (config.num_heads, config.hidden_size, config.vocab_size)
    read_heads(folder / HEADS_FILE, heads.kind, *shape, heads.rank)
    if record.eagle is not None:
        eagle_exit_layers(record.eagle, folder, config.num_hidden_layers)
        read_tensors(eagle_file(folder), config.vocab_size)
    calibration = None
    if (folder / CALIBRATION_FILE).is_file():
        calibration = check_calibration(folder, config.num_heads, record)
    return Bundle(folder, heads, config, record, calibration)


def check_calibration(folder: Path, num_heads: int, record: RecordForm) -> CalibrationForm:
    """calibration.json: the keys that DSSD's loader takes, a number for every level and head, and the same calibration
    as in eexit.json.

    Raises:
        BundleError
    """
    path = folder / CALIBRATION_FILE
    read_thresholds(path, num_heads)
    calibration = read_form(path, CalibrationForm)
    wrong = sorted(set(CalibrationForm.model_fields) ^ set(read_json(path)))
    if wrong:
        raise BundleError(f"{path}: {', '.join(wrong)} missing or unknown; DSSD's loader takes neither")
    heads = {str(head) for head in range(num_heads)}
    others = [level for level, block in calibration.thresholds.items() if set(block) != heads]
    if others:
        raise BundleError(f"{path}: level {shown(others[0])[1:-1]} has other heads than {', '.join(sorted(heads))}")
    statistics = calibration.statistics
    if set(statistics) != heads:
        raise BundleError(f"{path}: statistics must be of heads {', '.join(sorted(heads))}")
    if "calibration" in record.model_fields_set:
        ours = [head.agreement for head in record.calibration.heads]
        if ours != [statistics[str(head)].overall_accuracy for head in range(num_heads)]:
            raise BundleError(f"{path} and {RECORD_FILE} are of different calibrations", hint="eexit calibrate")
    return calibration


def absolute_paths(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, path) of every absolute path among the strings of a JSON value."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from absolute_paths(item, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for item in value:
            yield from absolute_paths(item, key)
    elif isinstance(value, str) and len(value) > 1 and Path(value).is_absolute():
        yield key, value


def write_card(bundle: Bundle, repo_id: str, config: PushConfig) -> str:
    """The model card, from the bundle's records and those that the settings name.

    Raises:
        BundleError: not calibrated.
        ConfigError: a record of something else.
    """
    if bundle.calibration is None:
        raise BundleError(
            f"{bundle.folder} is not calibrated", hint=f"eexit calibrate --bundle {bundle.folder}, then push"
        )
    heads = file_sha256(bundle.folder / HEADS_FILE)
    return model_card(
        repo_id,
        bundle.config,
        bundle.heads,
        bundle.calibration,
        bundle.record,
        uploaded(bundle),
        evaluation=read_evaluation(config.evaluation, heads) if config.evaluation else None,
        bench=read_bench(config.bench, heads) if config.bench else None,
        license=config.license,
    )


def uploaded(bundle: Bundle) -> list[str]:
    """Names of the bundle's files that go up: all, but `aux_heads.pt` only for linear heads, and an EAGLE head only
    where eexit.json has it."""
    absent = set() if bundle.heads.kind == "linear" else {DSSD_HEADS_FILE}
    if bundle.record.eagle is None:
        absent.add(EAGLE_FILE)
    return [name for name in BUNDLE_FILES if name not in absent]


@contextmanager
def staged(bundle: Bundle, card: str) -> Iterator[dict[str, Path]]:
    """Everything that goes up, by its name on the Hub. The card and `aux_heads.pt` are written to a temporary folder:
    the latter from heads.safetensors, so that both always hold the same heads. The bundle itself is left as it is.
    """
    with TemporaryDirectory(prefix="eexit-push-") as name:
        made = Path(name)
        files = {name: bundle.folder / name for name in uploaded(bundle)}
        if DSSD_HEADS_FILE in files:
            shape = (bundle.config.num_heads, bundle.config.hidden_size, bundle.config.vocab_size)
            heads, _ = read_heads(bundle.folder / HEADS_FILE, bundle.heads.kind, *shape, bundle.heads.rank)
            files[DSSD_HEADS_FILE] = made / DSSD_HEADS_FILE
            dssd.save_dssd_heads(heads, files[DSSD_HEADS_FILE])
        if EAGLE_FILE in files:
            files[EAGLE_FILE] = eagle_file(bundle.folder)
        record = record_json(bundle.folder / RECORD_FILE)
        if record != read_json(bundle.folder / RECORD_FILE):
            files[RECORD_FILE] = made / RECORD_FILE
            write_json(files[RECORD_FILE], record)
        files[CARD_FILE] = made / CARD_FILE
        files[CARD_FILE].write_text(card, encoding="utf-8")
        yield files


def push(files: Mapping[str, Path], hub: HubConfig, config: PushConfig) -> Commit:
    """Bring the repository to these files in one commit; a file of an earlier bundle that is not among them goes.

    Raises:
        ConfigError: a pull request from a branch other than main.
        HubError: refused or unreachable.
    """
    if config.create_pr and hub.revision not in (None, "main"):
        raise ConfigError(f"--create-pr opens a pull request to main, not to --revision {hub.revision}")
    repository = Repository(hub)
    repository.ensure(config.private)
    stale: dict[str, Path | None] = {name: None for name in (*BUNDLE_FILES, FORMER_EAGLE_FILE) if name not in files}
    return repository.commit(stale | dict(files), "Upload exit heads", config.create_pr)


def import_dssd(folder: Path, target: Path) -> Bundle:
    """Make a bundle of DSSD's folder, checked before it gets its name.

    Raises:
        ConfigError: `target` is not new.
        BundleError: see `dssd.convert` and `check_bundle`.
    """
    require_new_folder(target)
    with atomic_folder(target) as temporary:
        dssd.convert(folder, temporary)
        bundle = check_bundle(temporary)
    return bundle
