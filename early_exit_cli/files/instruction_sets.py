"""The instruction sets that compiled passes are written for, which of them this processor has, and the compiler.

`EEXIT_ISA` names one, for tests and comparisons; else it is the first one that the processor has.
"""

from __future__ import annotations

import functools
import os
import platform
import shutil
import sys
from dataclasses import dataclass

from early_exit_cli.errors import ConfigError, shown
from early_exit_cli.files.environment import processor_flags

VARIABLE = "EEXIT_ISA"
MACHINES = {"x86_64": "x86-64", "amd64": "x86-64", "aarch64": "ARM64", "arm64": "ARM64"}


@dataclass(frozen=True)
class InstructionSet:
    """needs: what it is made of, as Linux calls it. compiler: flags that let a C compiler use it, and nothing beyond it that
    has vectors.
    """

    name: str
    machine: str
    needs: tuple[str, ...]
    compiler: tuple[str, ...]

    def missing(self) -> str | None:
        """What this machine lacks of it, in words for people."""
        if self.machine != machine():
            return f"this is {machine()}"
        lacking = [flag for flag in self.needs if flag not in _flags()]
        return f"this processor has no {lacking[0]}" if lacking else None


SETS = (
    InstructionSet("avx512bf16", "x86-64", ("avx512bw", "avx512_vnni", "avx512_bf16"), ("-march=native",)),
    InstructionSet(
        *("avx512", "x86-64"),
        ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"),
        ("-march=x86-64-v4", "-mavx512vnni", "-mtune=native"),
    ),
    InstructionSet("avx2", "x86-64", ("avx2", "fma", "f16c"), ("-march=x86-64-v3", "-mtune=native")),
    InstructionSet("neon", "ARM64", (), ("-march=armv8-a",)),
)
"""The fastest first."""


def machine() -> str:
    """The kind of this machine's processor."""
    found = platform.machine()
    return MACHINES.get(found.lower(), found)


def instruction_set() -> InstructionSet | None:
    """The one that compiled passes use here; None where there is none for this machine.

    Raises:
        ConfigError: `EEXIT_ISA` names one that is not known, or that this machine has not.
    """
    asked = os.environ.get(VARIABLE)
    if not asked:
        return None if sys.platform == "win32" else next((s for s in SETS if s.missing() is None), None)
    known = {s.name: s for s in SETS}
    if asked not in known:
        raise ConfigError(f"{VARIABLE} is {shown(asked)}", hint=f"it is one of {', '.join(known)}")
    missing = known[asked].missing()
    if missing is not None:
        raise ConfigError(f"{VARIABLE} is {asked}, and {missing}", hint=f"leave {VARIABLE} out")
    return known[asked]


def lacks() -> str | None:
    """Why no instruction set here is one of ours; None where one is.

    Raises:
        ConfigError: as `instruction_set`.
    """
    if instruction_set() is not None:
        return None
    if sys.platform == "win32":
        return "they are compiled on Linux and macOS only"
    if machine() not in {s.machine for s in SETS}:
        return f"they are written for x86-64 and ARM64, and this is {machine()}"
    return next(s for s in reversed(SETS) if s.machine == machine()).missing()


def find_compiler() -> str | None:
    """The C compiler: `CC` where it is set, else the system's."""
    names = [os.environ["CC"]] if os.environ.get("CC") else ["cc", "gcc", "clang"]
    return next(filter(None, map(shutil.which, names)), None)


@functools.cache
def _flags() -> frozenset[str]:
    flags = processor_flags()
    if flags is None:  # not Linux: a library knows, which takes a second
        import cpuinfo

        flags = frozenset(cpuinfo.get_cpu_info().get("flags", []))
    return flags
