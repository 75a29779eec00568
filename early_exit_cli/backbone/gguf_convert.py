"""A GGUF model as a folder of transformers: unpacked, with its tokenizer and its rotary scaling.

A model may be split over several files, `NAME-00001-of-00003.gguf`; what belongs together says the metadata of each.
"""

from __future__ import annotations

import contextlib
import errno
import io
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import torch

from early_exit_cli.backbone.contents import changing, place_of
from early_exit_cli.backbone.families import refusal
from early_exit_cli.backbone.gguf_reader import field_of, read_fast, reader_of
from early_exit_cli.backbone.gguf_rotary import rotary_scaling
from early_exit_cli.backbone.load_errors import require_all_weights
from early_exit_cli.errors import BackboneError, UnsupportedBackboneError
from early_exit_cli.files.atomic import atomic_folder, write_errno
from early_exit_cli.steps import Step

ROTARY = "rope_"
"""How the names of tensors begin that `rotary_scaling` reads."""
PART = re.compile(r"(?P<name>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})")


def gguf_parts(path: Path) -> list[Path]:
    """All files of the model that a GGUF file belongs to, in order; the file alone where it is not split.

    Raises:
        BackboneError: parts are missing, or the file is no GGUF.
    """
    count = field_of(reader_of(path), "split.count")
    if count is None or count < 2:
        return [path]
    named = PART.fullmatch(path.stem)
    if named is None or int(named["count"]) != count:
        raise BackboneError(
            f"{path} is one of {count} parts of a model, and its name does not say which",
            hint=f"name the parts NAME-00001-of-{count:05}.gguf and so on",
        )
    parts = [path.with_name(f"{named['name']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise BackboneError(
            f"{path} is one of {count} parts of a model, and {', '.join(missing[:3])} "
            f"{'is' if len(missing) == 1 else 'are'} missing{_and_more(len(missing) - 3)}",
            hint=f"put all parts into {path.parent}",
        )
    return parts


def convert(path: Path, parts: list[Path], places: list[str], target: Path, now: Step) -> None:
    """Write the model of some parts as a folder.

    `save_pretrained` refuses a model that was loaded from GGUF, so the weights move into a fresh one whose configuration
    has no trace of it.

    Args:
        places: `place_of` each part, before it was looked at.

    Raises:
        BackboneError: damaged or changed files, weights that are missing, or that transformers does not read.
        UnsupportedBackboneError: a family or a rotary scaling that does not run here.
    """
    doing = now.text
    model, tokenizer = _loaded(path, parts, now)
    readers = [reader_of(part) for part in parts]
    with read_fast():
        _require_all_read(path, model, readers)
    settings = model.config.to_dict()
    settings.pop("quantization_config", None)
    tables = settings.get("rope_parameters") or {}
    tables.get("full_attention", tables).update(_rotary_scaling(path, model.config, readers))  # Gemma 3 has two
    with torch.device("meta"):
        fresh: Any = type(model)(type(model.config)(**settings))
    fresh.load_state_dict(model.state_dict(), assign=True)
    fresh.tie_weights()
    fresh.generation_config = model.generation_config
    now.say(f"{doing}: writing it")
    with atomic_folder(target, keep=True) as folder:
        try:
            fresh.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        except Exception as error:
            raise _no_room(path, target, error) or error from None
        if [place_of(part) for part in parts] != places:
            raise changing(path)


def _no_room(path: Path, target: Path, error: Exception) -> BackboneError | None:
    """What a person is told where a full disk stopped the writing; None for any other error."""
    if write_errno(error) != errno.ENOSPC:
        return None
    return BackboneError(
        f"no room for the converted {path.name}: the disk of {target.parent} is full",
        hint="EEXIT_HOME=FOLDER names another cache folder; eexit cache ls shows what this one holds",
    )


def _loaded(path: Path, parts: list[Path], now: Step) -> tuple[Any, Any]:
    """transformers' model of some parts, unpacked to bfloat16, and its tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    doing = now.text
    with _one_file(parts) as whole:
        file: dict[str, Any] = {"pretrained_model_name_or_path": whole.parent, "gguf_file": whole.name}
        try:
            with contextlib.redirect_stderr(io.StringIO()), read_fast():  # stderr: a bar that no setting reaches
                config = AutoConfig.from_pretrained(**file)
                refused = refusal(config)
                if refused is not None:
                    raise UnsupportedBackboneError(f"{path} {refused}")
                now.say(f"{doing}: unpacking {_size(parts)} of weights")
                loaded: Any = AutoModelForCausalLM.from_pretrained(
                    **file,
                    config=config,
                    dtype=torch.bfloat16,
                    quantization_config=GgufConfig(dequantize=True),
                    ignore_mismatched_sizes=True,
                    output_loading_info=True,
                )
                now.say(f"{doing}: making the tokenizer")
                tokenizer = AutoTokenizer.from_pretrained(**file)
        except UnsupportedBackboneError:
            raise
        except Exception as error:  # the GGUF reader raises whatever a damaged file provokes
            raise BackboneError(f"{path} is not a GGUF file that transformers reads: {error}") from error
    model, report = loaded
    require_all_weights(str(path), report)
    return model, tokenizer


def _size(parts: list[Path]) -> str:
    return f"{sum(part.stat().st_size for part in parts) / 1e6:,.0f} MB"


@contextlib.contextmanager
def _one_file(parts: list[Path]) -> Iterator[Path]:
    """The parts of a model as the one file that transformers reads; it is gone after the block.

    Raises:
        BackboneError: a part is damaged or is another model's, or there is no room to join them.
    """
    if len(parts) == 1:
        yield parts[0]
        return
    with tempfile.TemporaryDirectory(prefix="eexit-gguf-") as folder:
        whole = Path(folder) / f"{parts[0].stem}.gguf"
        try:
            _join(parts, whole)
        except OSError as error:
            raise BackboneError(
                f"cannot join the parts of {parts[0]}: {error.strerror}", hint="TMPDIR names a folder with more room"
            ) from error
        yield whole


def _join(parts: list[Path], whole: Path) -> None:
    """Write a file with the first part's metadata and the tensors of all."""
    readers = [reader_of(part) for part in parts]
    tensors = [tensor for reader in readers for tensor in reader.tensors]
    declared = field_of(readers[0], "split.tensors.count")
    numbers = [field_of(reader, "split.no") for reader in readers]
    if numbers != list(range(len(parts))) or declared not in (None, len(tensors)):
        raise BackboneError(
            f"the parts of {parts[0]} do not belong together: they are numbered {numbers} from 0 and hold {len(tensors)} "
            f"tensors, of which there are {declared}"
        )
    writer = gguf.GGUFWriter(whole, field_of(readers[0], "general.architecture"), endianess=readers[0].endianess)
    for field in readers[0].fields.values():
        if not field.name.startswith(("GGUF.", "split.")) and field.name != "general.architecture":
            kind = field.types[0]
            inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, inner)
    for tensor in tensors:
        writer.add_tensor_info(
            tensor.name, tensor.data.shape, tensor.data.dtype, tensor.data.nbytes, tensor.tensor_type
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.data, tensor_endianess=readers[0].endianess)
    writer.close()


def _require_all_read(path: Path, model: Any, readers: list[Any]) -> None:
    """Refuse tensors that transformers leaves out without a word, as the biases of a Llama: by its own map of names.

    Raises:
        BackboneError: the first of them, and how many they are.
    """
    from transformers import modeling_gguf_pytorch_utils as library

    kind = library.TENSOR_PROCESSORS.get(field_of(readers[0], "general.architecture"), library.TensorProcessor)
    names = library.get_gguf_hf_weights_map(model, kind(config=model.config.to_dict()))
    known = {name.removesuffix(".weight") for name in names}  # those of experts stand there without it
    unread = [
        tensor.name
        for reader in readers
        for tensor in reader.tensors
        if tensor.name.removesuffix(".weight") not in known and not tensor.name.startswith(ROTARY)
    ]
    if unread:
        raise BackboneError(
            f"{path} holds {len(unread):,} tensors that transformers does not read: {', '.join(unread[:3])}"
            f"{_and_more(len(unread) - 3)}",
            hint="the model's own checkpoint, in place of the GGUF file, may run",
        )


def _rotary_scaling(path: Path, config: Any, readers: list[Any]) -> dict[str, Any]:
    """`rotary_scaling` of the model in some files."""
    prefix = f"{field_of(readers[0], 'general.architecture')}.rope."
    fields = {
        name.removeprefix(prefix): field.contents()
        for name, field in readers[0].fields.items()
        if name.startswith(prefix)
    }
    tensors = {
        tensor.name: torch.from_numpy(tensor.data.copy())
        for reader in readers
        for tensor in reader.tensors
        if tensor.name.startswith(ROTARY)
    }
    return rotary_scaling(str(path), config, fields, tensors)


def _and_more(count: int) -> str:
    return f", and {count} more" if count > 0 else ""
