"""Every compiled kernel at odd shapes under sanitizers, with threads, and on an emulated processor: in a program of its own."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from early_exit_cli.files.instruction_sets import SETS, find_compiler
from early_exit_cli.runtime.native_code import FOLDER

SOURCE = Path(__file__).parents[1] / "support" / "native_shapes.c"
HERE = [known for known in SETS if known.missing() is None]
CROSS, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"

pytestmark = pytest.mark.slow


def said(folder, compiler, instruction_set, *flags, emulator=()):
    """What the program says, compiled with more flags: the hash of all outputs."""
    program = folder / "shapes"
    command = [compiler, "-g", "-O1", "-ffp-contract=off", *instruction_set.compiler, *flags, f"-I{FOLDER}"]
    subprocess.run([*command, str(SOURCE), "-o", str(program), "-lm", "-lpthread"], check=True, timeout=300)
    result = subprocess.run([*emulator, str(program)], capture_output=True, text=True, timeout=500)
    assert (result.returncode, result.stderr) == (0, ""), result.stdout + result.stderr
    assert re.fullmatch(r"[0-9a-f]{16}\n", result.stdout)
    return result.stdout


@pytest.fixture
def compiler():
    found = find_compiler()
    if found is None:
        pytest.skip("no C compiler was found")
    return found


@pytest.mark.parametrize("variant", HERE, ids=lambda variant: variant.name)
def test_addresses_and_arithmetic_are_sound(tmp_path, compiler, variant):
    flags = ("-fopenmp", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    assert said(tmp_path, compiler, variant, *flags) == said(tmp_path, compiler, variant, "-fopenmp")


@pytest.mark.parametrize("variant", HERE, ids=lambda variant: variant.name)
def test_threads_do_not_race(tmp_path, compiler, variant):
    """With threads that the sanitizer knows, in the place of the OpenMP library's."""
    said(tmp_path, compiler, variant, "-fopenmp", "-DOWN_THREADS", "-fsanitize=thread")


def test_instruction_sets_without_bfloat16_have_the_same_bits(tmp_path, compiler):
    """All of them: AVX2, AVX512, and NEON where it can be emulated."""
    found = {v.name: said(tmp_path, compiler, v, "-fopenmp") for v in HERE if v.name != "avx512bf16"}
    if shutil.which(CROSS) and shutil.which(EMULATOR):
        neon = next(known for known in SETS if known.name == "neon")
        flags = ("-fopenmp", "-DOWN_THREADS", "-static")
        found["neon"] = said(tmp_path, CROSS, neon, *flags, emulator=(EMULATOR,))
    if len(found) < 2:
        pytest.skip("there is one only, and nothing to compare it with")
    assert len(set(found.values())) == 1, found
