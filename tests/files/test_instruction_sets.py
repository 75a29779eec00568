"""Which instruction set compiled passes use: the processor's fastest, or the one that EEXIT_ISA names."""

import platform

import pytest
from commands import eexit

from early_exit_cli.errors import ConfigError
from early_exit_cli.files import instruction_sets
from early_exit_cli.files.instruction_sets import SETS, instruction_set, lacks

AVX2 = frozenset({"avx", "avx2", "fma", "f16c"})
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"}


@pytest.fixture
def on(monkeypatch):
    """As if this were another machine."""

    def be(machine, flags=frozenset()):
        monkeypatch.delenv("EEXIT_ISA", raising=False)
        monkeypatch.setattr(platform, "machine", lambda: machine)
        monkeypatch.setattr(instruction_sets, "_flags", lambda: flags)

    return be


@pytest.mark.parametrize(
    ("machine", "flags", "name"),
    [
        ("x86_64", AVX512 | {"avx512_bf16"}, "avx512bf16"),
        ("x86_64", AVX512, "avx512"),
        ("x86_64", AVX512 - {"avx512_vnni"}, "avx2"),
        ("AMD64", AVX2, "avx2"),
        ("aarch64", frozenset(), "neon"),
        ("arm64", frozenset(), "neon"),
    ],
)
def test_the_fastest_that_the_processor_has_is_used(on, machine, flags, name):
    on(machine, flags)
    assert instruction_set().name == name
    assert lacks() is None


@pytest.mark.parametrize(
    ("machine", "flags", "reason"),
    [
        ("x86_64", AVX2 - {"fma"}, "this processor has no fma"),
        ("x86_64", frozenset(), "this processor has no avx2"),
        ("riscv64", frozenset(), "they are written for x86-64 and ARM64, and this is riscv64"),
    ],
)
def test_what_a_processor_lacks_is_named(on, machine, flags, reason):
    on(machine, flags)
    assert instruction_set() is None
    assert lacks() == reason


def test_windows_has_pytorchs_passes(on, monkeypatch):
    on("AMD64", AVX512)
    monkeypatch.setattr(instruction_sets.sys, "platform", "win32")
    assert lacks() == "they are compiled on Linux and macOS only"


def test_one_that_is_named_is_used_or_refused(on, monkeypatch):
    on("x86_64", AVX512)
    monkeypatch.setenv("EEXIT_ISA", "avx2")
    assert instruction_set().name == "avx2"
    for name, message in (
        ("avx512bf16", "EEXIT_ISA is avx512bf16, and this processor has no avx512_bf16"),
        ("neon", "EEXIT_ISA is neon, and this is x86-64"),
        ("sse9", "EEXIT_ISA is 'sse9'"),
    ):
        monkeypatch.setenv("EEXIT_ISA", name)
        with pytest.raises(ConfigError) as caught:
            instruction_set()
        assert caught.value.message == message
    assert caught.value.hint == "it is one of " + ", ".join(known.name for known in SETS)


def test_a_command_refuses_an_unknown_one_in_one_line(monkeypatch):
    monkeypatch.setenv("EEXIT_ISA", "sse9")
    code, out, err = eexit("infer", "Hi!")
    assert (code, out) == (2, "")
    (line,) = [line for line in err.splitlines() if "EEXIT_ISA" in line]
    assert "'sse9'" in line


def test_env_names_the_one_that_is_used(monkeypatch):
    found = instruction_set()
    if found is None:
        pytest.skip(lacks())
    monkeypatch.setenv("EEXIT_ISA", found.name)
    assert f"passes instruction set: {found.name}" in eexit("env")[1]
