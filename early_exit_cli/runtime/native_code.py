"""The C code of the CPU's pass: compiled once on this machine, for this machine, and kept in the user's cache folder.

One source serves all instruction sets (`native/vectors.h`, docs/decisions/0023-instruction-sets.md). Nothing is shipped compiled. Where there is no C compiler, or it fails, the reason is kept and PyTorch does the work.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from early_exit_cli.files.atomic import sha256_of, write_atomic
from early_exit_cli.files.environment import kept_path, processor_name
from early_exit_cli.files.instruction_sets import InstructionSet, find_compiler, instruction_set, lacks
from early_exit_cli.steps import step

FOLDER = Path(__file__).parent / "native"
FLAGS = ("-O3", "-ffp-contract=off", "-shared", "-fPIC")
"""Without reassociation and contraction: a sum has one order, see the sources."""
SECONDS = 120


class NoNativeCode(Exception):
    """Why there is none, in words for people."""


def code_key() -> str:
    """What the compiled code is made of and for: the sources, the flags, the instruction set, this machine."""
    return _key(instruction_set())


@functools.cache
def _key(variant: InstructionSet | None) -> str:
    sources = [path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.[ch]"))]
    target = () if variant is None else (variant.name, *variant.compiler)
    return sha256_of("\n".join((*sources, *FLAGS, *target, processor_name(), platform.platform())))[:24]


def native_code() -> ctypes.CDLL:
    """The library compiled for the instruction set that is used here.

    Raises:
        NoNativeCode: it cannot be had here.
        ConfigError: `EEXIT_ISA` names an instruction set that this machine has not.
    """
    lacking = lacks()
    variant = instruction_set()
    if lacking is not None or variant is None:
        raise NoNativeCode(lacking)
    found = _loaded(variant)
    if isinstance(found, str):
        raise NoNativeCode(found)
    return found


@functools.cache
def _loaded(variant: InstructionSet) -> ctypes.CDLL | str:
    """The library, or why it cannot be had: a compiler that failed, or hung for SECONDS, is not asked again."""
    try:
        return _load(variant)
    except NoNativeCode as error:
        return str(error)


def _load(variant: InstructionSet) -> ctypes.CDLL:
    compiler = find_compiler()
    path = kept_path("native", f"{_key(variant)}.so")
    if not path.exists():
        if compiler is None:
            raise NoNativeCode("no C compiler was found")
        _compile(compiler, variant, path)
    try:
        return _declared(ctypes.CDLL(str(path)))
    except (OSError, AttributeError, ValueError) as error:
        path.unlink(missing_ok=True)  # damaged: the next process compiles it again
        raise NoNativeCode(f"{path} cannot be loaded ({error})") from error


def why_no_native_code() -> str | None:
    """Why the compiled library cannot be had on this machine; None where it can."""
    try:
        native_code()
    except NoNativeCode as error:
        return str(error)
    return None


def has_native_code() -> bool:
    """Whether the compiled library can be had here."""
    return why_no_native_code() is None


def openmp() -> tuple[str, ...]:
    """The compiler's flags for threads. Apple's compiler has no OpenMP library of its own; torch brings one."""
    if sys.platform != "darwin":
        return ("-fopenmp",)
    spec = importlib.util.find_spec("torch")
    folder = Path(spec.origin or "").parent / "lib" if spec is not None else Path()
    return ("-Xclang", "-fopenmp", f"-L{folder}", "-lomp", f"-Wl,-rpath,{folder}")


def _compile(compiler: str, variant: InstructionSet, path: Path) -> None:
    def compile_to(target: Path) -> None:
        sources = [str(path) for path in sorted(FOLDER.glob("*.c"))]
        command = [compiler, *FLAGS, *variant.compiler, *openmp(), *sources, "-o", str(target), "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS)

    try:
        with step("compiling the passes for this processor, once"):
            write_atomic(path, compile_to)
    except subprocess.CalledProcessError as error:
        first = next((line for line in error.stderr.splitlines() if "error" in line), f"exit code {error.returncode}")
        raise NoNativeCode(f"{compiler} could not compile it: {first.strip()[:200]}") from error
    except Exception as error:  # a full disk, a folder that cannot be written, a compiler that hangs
        raise NoNativeCode(f"{compiler} could not compile it: {error}") from error


class Product(ctypes.Structure):
    """As in the source; pointers are addresses of tensors that somebody else keeps."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("inputs", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
        ("kind", ctypes.c_int64),
        ("row_scale", ctypes.c_void_p),
    )


class Norm(ctypes.Structure):
    """At most one of the two: bfloat16 weights, or float32 ones."""

    _fields_ = (("weight", ctypes.c_void_p), ("once", ctypes.c_void_p))


class Block(ctypes.Structure):
    _fields_ = (
        *((name, Norm) for name in ("input_norm", "behind_attention", "mlp_norm", "behind_mlp")),
        *((name, Norm) for name in ("qk_norm", "q_norm", "k_norm")),
        *((name, Product) for name in ("qkv", "output", "gate_up", "down")),
        ("window", ctypes.c_int64),
        ("table", ctypes.c_int64),
    )


class Model(ctypes.Structure):
    _fields_ = (
        ("blocks", ctypes.POINTER(Block)),
        ("embedding", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("hidden", "inner", "query_heads", "kv_heads", "head_dim")),
        *((name, ctypes.c_int64) for name in ("turned", "gelu", "exact_tables")),
        *((name, ctypes.c_float) for name in ("eps", "scale", "cap", "embedded", "residual")),
    )


class Part(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("keys", "values", "cos", "sin")),
        *((name, ctypes.c_int64) for name in ("capacity", "position", "width")),
    )


class Int8(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("inputs", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
    )


class LMHead(ctypes.Structure):
    _fields_ = (
        ("quantized", Int8),
        *((name, ctypes.c_void_p) for name in ("error", "norm", "rows")),
        ("final_norm", Norm),
        ("vocab", ctypes.c_int64),
        ("hidden", ctypes.c_int64),
        ("eps", ctypes.c_float),
    )


class Attention(ctypes.Structure):
    _fields_ = (
        *((name, Int8) for name in ("key_value", "query", "output")),
        *((name, ctypes.c_void_p) for name in ("query_norm", "key_norm")),
        *((name, ctypes.c_int64) for name in ("query_heads", "kv_heads", "head_dim")),
        *((name, ctypes.c_float) for name in ("scale", "eps")),
    )


class Eagle(ctypes.Structure):
    _fields_ = (
        ("attention", Attention),
        *((name, Int8) for name in ("fuse", "gate_up", "down", "lm_head")),
        *(
            (name, ctypes.c_void_p)
            for name in ("fuse_norms", "joint_norm", "input_norm", "hidden_norm", "mlp_norm", "norm", "embedding")
        ),
        *((name, ctypes.c_int64) for name in ("parts", "normed_parts", "state_size", "hidden", "inner")),
        *((name, ctypes.c_int64) for name in ("norm_before_residual", "norm_output")),
        ("eps", ctypes.c_float),
    )


class ExitHead(ctypes.Structure):
    _fields_ = (
        ("attention", Attention),
        *((name, Int8) for name in ("down", "up", "lm_head")),
        *((name, ctypes.c_void_p) for name in ("attention_norm", "norm", "final_norm")),
        *((name, ctypes.c_float) for name in ("eps", "final_eps")),
    )


class KVBuffers(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("keys", "values", "cos", "sin")),
        ("capacity", ctypes.c_int64),
    )


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    address, count = ctypes.c_void_p, ctypes.c_int64
    model, head = ctypes.POINTER(Model), ctypes.POINTER(LMHead)
    functions: dict[str, tuple[Any, ...]] = {
        "eexit_run": (
            *(model, address, address, ctypes.POINTER(Part), count, ctypes.c_int, ctypes.c_int),
            *(address, address, count, ctypes.c_int),
        ),
        "eexit_final_norm": (head, address, address, count),
        "eexit_logits": (head, address, address, count, ctypes.c_int),
        "eexit_eagle": (
            *(ctypes.POINTER(Eagle), address, address, address, count, count, ctypes.POINTER(KVBuffers)),
            *(address, address, ctypes.POINTER(ctypes.c_int64), ctypes.POINTER(ctypes.c_float), ctypes.c_int),
        ),
        "eexit_read_head": (
            *(ctypes.POINTER(ExitHead), address, count, count, ctypes.POINTER(KVBuffers), address),
            *(
                ctypes.POINTER(ctypes.c_int64),
                ctypes.POINTER(ctypes.c_float),
                ctypes.POINTER(ctypes.c_float),
                ctypes.c_int,
            ),
        ),
        "eexit_choose": (head, address, address, address, address, count, ctypes.c_int),
    }
    for name, arguments in functions.items():
        getattr(library, name).argtypes = arguments
    library.eexit_final_norm.restype = library.eexit_logits.restype = None
    library.packs_outputs = bool(ctypes.c_int.in_dll(library, "eexit_packs_outputs"))  # type: ignore[attr-defined]
    library.int8_inputs = ctypes.c_int.in_dll(library, "eexit_int8_inputs").value  # type: ignore[attr-defined]
    return library
