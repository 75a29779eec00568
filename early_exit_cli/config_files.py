"""Sections of what lies on disk and on the Hub: what is kept in the cache folder, bundles that go to and fro, exports."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from early_exit_cli.config_fields import RepoId, Section, TextList, setting

KeptKind = Literal["models", "weights", "bundles", "measurements", "code", "answers", "states", "history"]


class KeptConfig(Section):
    """Which part of what is kept in the user's cache folder (`EEXIT_HOME`, else among the system's caches)."""

    kind: KeptKind | None = setting(
        None,
        "models: converted from GGUF files. weights: 4-bit copies of backbones. bundles: converted from DSSD's. "
        "measurements: widths and costs of passes. code: compiled here. answers, states: of training. history: typed in chats. "
        "Default: every kind.",
    )


class RemoveConfig(Section):
    """What to remove from the user's cache folder."""

    names: TextList = setting([], "Names or keys, as eexit cache ls shows them; a name removes all that has it.")
    all: bool = setting(False, "Everything but answers and hidden states, which go only by name, key or kind.")
    dry_run: bool = setting(False, "Say what would go, remove nothing.")


class ClearConfig(Section):
    """What `eexit cache clear` removes; `eexit cache rm` does the same and more."""

    kind: KeptKind | None = setting(None, "One kind. Default: all but answers and states.")
    dry_run: bool = setting(False, "Say what would go, remove nothing.")


class ExportConfig(Section):
    """An EAGLE head for serving engines."""

    format: Literal["speculators"] = setting(
        "speculators", "EAGLE-3 checkpoint of the package speculators, which vLLM and SGLang load."
    )
    output_dir: Path = setting(Path("runs/export"), "New folder to write.")
    draft_tokens: int = setting(3, "Tokens of one draft that the configuration asks of an engine.", ge=1)


class HubConfig(Section):
    """Where on the Hub, and how patiently."""

    repo_id: RepoId | None = setting(None, "Repository on the Hub: ORG/NAME.")
    revision: str | None = setting(
        None, "Pull: branch, tag or commit. Push: branch, made where it is missing. Default: main."
    )
    retries: int = setting(4, "Further tries when the Hub is busy (5xx) or a connection breaks.", ge=0)
    retry_wait: float = setting(1.0, "Seconds before the first further try; twice as long before each next.", ge=0.0)


class PushConfig(Section):
    """What to upload, and how."""

    private: bool = setting(False, "Create the repository as a private one; an existing public one is refused.")
    create_pr: bool = setting(False, "Open a pull request instead of committing to the branch.")
    dry_run: bool = setting(False, "List the files, print the model card, send nothing.")
    evaluation: Path | None = setting(None, "Record of eexit evaluate --output-path; its numbers go into the card.")
    bench: Path | None = setting(None, "report.json of eexit bench; its numbers go into the card.")
    license: str | None = setting(
        None, "License of the heads, as the Hub names it (apache-2.0). Default: none is named."
    )


class PullConfig(Section):
    """Where a pulled bundle goes."""

    output_dir: Path | None = setting(None, "Copy the bundle to this new folder. Default: it stays in the Hub's cache.")


class ImportConfig(Section):
    """Heads that were trained elsewhere: DSSD's, and EAGLE-3 heads as they are published."""

    folder: str | None = setting(
        None,
        "Folder, or Hub id (ORG/NAME, ORG/NAME@REVISION): an EAGLE-3 head in SafeAILab's or speculators' layout, or DSSD's "
        "aux_heads.pt, config.json and, if any, calibration.json.",
    )
    output_dir: Path | None = setting(None, "New folder of the bundle.")
