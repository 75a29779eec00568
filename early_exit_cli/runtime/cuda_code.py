"""The CUDA code of a GPU's pass: compiled at first use, for the card at hand, and kept in the user's cache folder.

NVRTC, which comes with torch's CUDA builds, compiles; NVIDIA's `cuda-bindings`, which comes with them too, loads and
launches (docs/decisions/0019). Compiling needs no card: the tests compile for every generation.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from early_exit_cli.files.atomic import sha256_of, write_atomic
from early_exit_cli.files.environment import kept_path, versions
from early_exit_cli.steps import step

FOLDER = Path(__file__).parent / "cuda"
SOURCES = ("product", "attention", "lm_head", "rows")
OLDEST = (8, 0)
"""Compute capability from which on there are tensor cores for bfloat16."""
SHAPES = ((16, 3), (8, 3), (8, 2))
"""(warps, stages) of a product's block of threads, the best first."""
PROGRAMMATIC = (9, 0)
"""From which on a kernel may start while its predecessor runs."""
Step = Callable[[], object]


class NoCudaCode(Exception):
    """Why there is none, in words for people."""


def source_of(name: str) -> str:
    """A source with its header put in."""
    header = (FOLDER / "common.cuh").read_text(encoding="utf-8")
    return (FOLDER / f"{name}.cu").read_text(encoding="utf-8").replace('#include "common.cuh"', header)


@functools.cache
def code_key() -> str:
    """What the compiled code is made of."""
    return sha256_of(*(source_of(name) for name in SOURCES))[:24]


def compiled(name: str, capability: tuple[int, int], options: tuple[str, ...] = ()) -> tuple[bytes, str]:
    """A source as machine code of a compute capability, and the compiler's log.

    Raises:
        NoCudaCode: no compiler, or it refuses.
    """
    nvrtc = _bindings("nvrtc")
    flags = [f"--gpu-architecture=sm_{capability[0]}{capability[1]}", "--std=c++17", "--fmad=true", *options]
    created, program = nvrtc.nvrtcCreateProgram(source_of(name).encode(), f"{name}.cu".encode(), 0, [], [])
    if int(created):
        raise NoCudaCode(f"NVRTC failed with {created}")
    (result,) = nvrtc.nvrtcCompileProgram(program, len(flags), [flag.encode() for flag in flags])
    log = _filled(program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog).rstrip(b"\0").decode()
    if int(result):
        first = next((line for line in log.splitlines() if "error" in line), str(result))
        raise NoCudaCode(f"NVRTC could not compile {name}.cu: {first.strip()[:200]}")
    return _filled(program, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN), log


def _filled(program: Any, size_of: Any, get: Any) -> bytes:
    _, size = size_of(program)
    buffer = b" " * size
    get(program, buffer)
    return buffer


def _bindings(name: str) -> Any:
    try:
        if name == "nvrtc":
            from cuda.bindings import nvrtc

            nvrtc.nvrtcVersion()  # the library itself is looked for at the first call
            return nvrtc
        from cuda.bindings import driver

        return driver
    except (ImportError, RuntimeError) as error:
        raise NoCudaCode(f"{name} was not found (pip install cuda-bindings nvidia-cuda-nvrtc): {error}") from error


def lacks(capability: tuple[int, int]) -> str | None:
    """What a card of this compute capability lacks to run it; None where nothing is known to be missing."""
    if capability < OLDEST:
        return f"compute capability {capability[0]}.{capability[1]} is older than {OLDEST[0]}.{OLDEST[1]}"
    try:
        for name in ("driver", "nvrtc"):
            _bindings(name)
    except NoCudaCode as error:
        return str(error)
    return None


def shape_for(shared_memory: int) -> tuple[int, int]:
    """(warps of a product's block of threads, stages of their rings) for a card with so much shared memory a block.

    Raises:
        NoCudaCode: too little for any.
    """
    for shape in SHAPES:
        if product_bytes(*shape, 2, 2) <= shared_memory:
            return shape
    raise NoCudaCode(f"its blocks of threads have {shared_memory} bytes of shared memory, too few for a product")


def product_bytes(warps: int, stages: int, sets: int, columns: int) -> int:
    """Shared memory of a product's block of threads: table, rings, sums and norms as product.cu lays them out."""
    turns = 2 if sets * columns == 1 else 1
    return 256 * 32 * 4 + warps * (stages * (16 * 128 + 16 * 16) + turns * sets * columns * 512) + 64


def options_for(warps: int, stages: int) -> tuple[str, ...]:
    """What the compiler is told of a shape."""
    return (f"-DWARPS={warps}", f"-DSTAGES={stages}")


def _kept(name: str, capability: tuple[int, int], card: str, options: tuple[str, ...]) -> bytes:
    """The machine code, from the cache folder where it was compiled before."""
    made_by = str(_bindings("nvrtc").nvrtcVersion())
    key = sha256_of(source_of(name), *options, str(capability), card, made_by, str(versions()))
    path = kept_path("cuda", f"{name}-{key[:24]}.cubin")
    try:
        return path.read_bytes()
    except OSError:
        with step(f"compiling kernels for {card}, once"):
            code, _ = compiled(name, capability, options)
    with contextlib.suppress(OSError):  # a folder that cannot be written: compiled again next time
        write_atomic(path, functools.partial(_write, code))
    return code


def _write(code: bytes, path: Path) -> None:
    path.write_bytes(code)


class Code:
    """The kernels on one card.

    Args:
        device: the CUDA device's index.

    Raises:
        NoCudaCode: the card is too old, or there is no compiler.
    """

    def __init__(self, device: int) -> None:
        import torch

        self.capability = torch.cuda.get_device_capability(device)
        properties: Any = torch.cuda.get_device_properties(device)
        if self.capability < OLDEST:
            raise NoCudaCode(f"{properties.name} is older than compute capability {OLDEST[0]}.{OLDEST[1]}")
        self.driver = _bindings("driver")
        self.multiprocessors = properties.multi_processor_count
        self.warps, self.stages = shape_for(properties.shared_memory_per_block_optin)
        self.guard = lambda: torch.cuda.device(device)
        with self.guard():
            torch.cuda.synchronize()  # makes the device's context
            self.modules = [self._module(name, properties.name) for name in SOURCES]
        self.functions: dict[tuple[str, int], Any] = {}
        self.current_stream = lambda: torch.cuda.current_stream(device).cuda_stream

    def _module(self, name: str, card: str) -> Any:
        """A source's machine code, loaded; what was kept and cannot be loaded is compiled again."""
        options = self.options(name)
        try:
            return self._checked(self.driver.cuModuleLoadData(_kept(name, self.capability, card, options)))
        except RuntimeError:
            return self._checked(self.driver.cuModuleLoadData(compiled(name, self.capability, options)[0]))

    def _checked(self, result: tuple[Any, ...]) -> Any:
        error, *values = result
        if int(error):
            raise RuntimeError(f"CUDA: {error.name}")
        return values[0] if values else None

    def options(self, source: str) -> tuple[str, ...]:
        """What a source is compiled with on this card."""
        return options_for(self.warps, self.stages) if source == "product" else ()

    def product_bytes(self, sets: int, columns: int) -> int:
        """`product_bytes` on this card."""
        return product_bytes(self.warps, self.stages, sets, columns)

    def function(self, name: str, shared: int) -> Any:
        """A kernel by name, allowed `shared` bytes of dynamic shared memory."""
        if (name, shared) not in self.functions:
            driver = self.driver
            for module in self.modules:
                error, function = driver.cuModuleGetFunction(module, name.encode())
                if not int(error):
                    break
            else:
                raise RuntimeError(f"no kernel {name}")
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self._checked(driver.cuFuncSetAttribute(function, attribute, shared))
            self.functions[name, shared] = function
        return self.functions[name, shared]

    def resident(self, name: str, threads: int, shared: int) -> int:
        """Blocks of a kernel that a multiprocessor holds at once."""
        function = self.function(name, shared)
        return self._checked(self.driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(function, threads, shared))

    def launch(
        self, name: str, grid: tuple[int, ...], threads: int, arguments: ctypes.Structure, shared: int, held: Any
    ) -> Step:
        """A call that launches a kernel on the current stream, prepared once; it keeps alive what is `held`."""
        driver = self.driver
        function = self.function(name, shared)
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = (*grid, 1, 1)[:3]
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = shared
        if self.capability >= PROGRAMMATIC:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs, config.numAttrs = [attribute], 1
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        address = ctypes.addressof(pointers)

        def step(held: Any = (arguments, pointers, held)) -> None:
            with self.guard():
                config.hStream = driver.CUstream(self.current_stream())
                (error,) = driver.cuLaunchKernelEx(config, function, address, 0)
            if int(error):
                raise RuntimeError(f"CUDA: {name}: {error.name}")

        return step


@functools.cache
def cuda_code(device: int) -> Code:
    """The kernels on a card, loaded once a process.

    Raises:
        NoCudaCode: they cannot be had there.
    """
    return Code(device)


def structure(name: str, **fields: Any) -> type[ctypes.Structure]:
    """A structure as in the sources; pointers are addresses of tensors that somebody else keeps."""
    return type(name, (ctypes.Structure,), {"_fields_": tuple(fields.items())})


_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
Product = structure(
    "Product",
    **dict.fromkeys(("weight", "scale", "bias", "x", "squares"), _POINTER),
    **dict.fromkeys(("out", "residual", "next_norm", "scaled", "squares_out"), _POINTER),
    **dict.fromkeys(("inputs", "outputs", "rows", "parts", "gated"), _INT),
    **dict.fromkeys(("size", "eps"), _FLOAT),
)
Attention = structure(
    "Attention",
    **dict.fromkeys(("place", "qkv", "qk_norm", "out", "arrived"), _POINTER),
    **dict.fromkeys(("block", "rows", "query_heads", "kv_heads", "window"), _INT),
    **dict.fromkeys(("scale", "eps"), _FLOAT),
)
LMHead = structure(
    "LMHead",
    **dict.fromkeys(("weight", "x", "logits", "best"), _POINTER),
    **dict.fromkeys(("inputs", "vocab", "rows"), _INT),
)
Pick = structure("Pick", **dict.fromkeys(("best", "vocab", "token", "value", "entropy"), _POINTER), parts=_INT)
Enter = structure(
    "Enter",
    **dict.fromkeys(("place", "from_", "norm", "hidden", "scaled", "squares"), _POINTER),
    **dict.fromkeys(("size", "by_token"), _INT),
)
Norm = structure(
    "Norm",
    **dict.fromkeys(("place", "hidden", "weight", "out"), _POINTER),
    **dict.fromkeys(("size", "last_only"), _INT),
    eps=_FLOAT,
)
Fuse = structure(
    "Fuse",
    **dict.fromkeys(("states", "weight", "out"), _POINTER),
    **dict.fromkeys(("size", "parts", "normed", "rows"), _INT),
    eps=_FLOAT,
)
Join = structure(
    "Join",
    **dict.fromkeys(("place", "embedding", "hidden", "input_norm", "hidden_norm", "token", "out"), _POINTER),
    size=_INT,
    eps=_FLOAT,
)
