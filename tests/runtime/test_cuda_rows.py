"""The kernels of rows.cu without a card: the shipped source, compiled for the CPU with fibres for threads, given what Python gives.

Its few lines in the assembler of cards are written anew: rounding to bfloat16.
"""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from early_exit_cli.runtime import cuda_code
from early_exit_cli.runtime.cuda_kernels import THREADS, TILE, CudaKernels, Normed, Places
from early_exit_cli.runtime.reference_kernels import ReferenceKernels

KERNELS = {"enter_rows": "Enter", "norm_rows": "Norm", "fuse_states": "Fuse", "join_token": "Join"}
PACK = "\nstatic u32 pack(float first, float second) { return bfloat16(first) | bfloat16(second) << 16; }\n"
EPS = 1e-5
SIZES = (64, 320, 576)


def on_the_cpu(source):
    """Without the functions that are in a card's own assembler, but for those that are empty on an older card."""
    function = re.compile(r"(?<=\n)__device__ __forceinline__ [^\n]*\n\{.*?\n\}\n", re.DOTALL)
    kept = function.sub(lambda found: "" if "asm" in found[0] and "__CUDA_ARCH__" not in found[0] else found[0], source)
    before, after = kept.split("__device__ __forceinline__ u16 narrow", 1)
    return f"{before}{PACK}__device__ __forceinline__ u16 narrow{after}"


class Emulated(CudaKernels):
    """`CudaKernels` that launch there."""

    def __init__(self, library):
        self.library = library

    def _call(self, name, grid, threads, kind, *values, shared=0):
        assert (threads, shared) == (THREADS, 0)
        assert all(value.is_contiguous() for value in values if isinstance(value, torch.Tensor))
        fields = (value.data_ptr() if isinstance(value, torch.Tensor) else value for value in values)
        arguments, run = kind(*fields), getattr(self.library, f"run_{name}")

        def step(held=values):
            assert run(ctypes.byref(arguments), *(*grid, 1)[:2]) == 0, "threads wait for others that do not come"

        return step


def built(folder, source):
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    text = (Path(__file__).parent.parent / "support" / "emulated.cpp").read_text() + on_the_cpu(source)
    path = folder / "rows.cpp"
    path.write_text(text + "".join(f"RUN({kernel}, {arguments})\n" for kernel, arguments in KERNELS.items()))
    command = [compiler, "-std=c++17", "-O1", "-w", "-shared", "-fPIC", str(path), "-o", str(folder / "rows.so")]
    subprocess.run(command, check=True, capture_output=True)
    return Emulated(ctypes.CDLL(str(folder / "rows.so")))


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return built(tmp_path_factory.mktemp("rows"), cuda_code.source_of("rows"))


@pytest.fixture
def place():
    places = Places(1, torch.device("cpu"))
    cache = SimpleNamespace(addresses=[0] * 5, capacity=64)
    places.tell([places.of[0].set(cache, 7, 2, [5, 0, 3])])
    return places.of[0]


@pytest.fixture(params=SIZES)
def numbers(request):
    torch.manual_seed(0)
    return lambda *shape: torch.randn(*shape, request.param).bfloat16()


def empty(*shape, dtype=torch.bfloat16):
    return torch.full(shape, float("nan"), dtype=dtype)


def test_rows_are_normed_or_left(kernels, numbers, place):
    rows = numbers(3)
    size = rows.shape[1]
    for weight in (numbers(), None):
        for last_of, count in ((None, 3), (place, 1)):
            ours, theirs = empty(count, size), empty(count, size)
            kernels.norm(rows, weight, EPS, ours, last_of)()
            ReferenceKernels().norm(rows, weight, EPS, theirs, last_of)()
            torch.testing.assert_close(ours, theirs, rtol=2.0**-7, atol=1e-6)
            if weight is None:
                assert torch.equal(ours, rows if last_of is None else rows[1:2])
    in_place, apart, weight = rows.clone(), empty(3, size), numbers()
    kernels.norm(rows, weight, EPS, apart)()
    kernels.norm(in_place, weight, EPS, in_place)()  # as a chain norms what is fused
    assert torch.equal(in_place, apart)


@pytest.mark.parametrize("normed", [0, 2, 3])
def test_states_are_fused(kernels, numbers, normed):
    states, norms = numbers(3, 4), numbers(normed)
    size = states.shape[2]
    ours, theirs = empty(4, 3 * size), empty(4, 3 * size)
    kernels.fuse(states, norms, EPS, ours)()
    ReferenceKernels().fuse(states, norms, EPS, theirs)()
    torch.testing.assert_close(ours, theirs, rtol=2.0**-7, atol=1e-6)


def test_rows_enter_and_tokens_join_states(kernels, numbers, place):
    embedding, rows, norms = numbers(9), numbers(3), (numbers(), numbers())
    size = rows.shape[1]
    for by_token in (True, False):
        found = []
        for each in (kernels, ReferenceKernels()):
            hidden, normed = empty(3, size), Normed(empty(3, size), empty(3, size // TILE, dtype=torch.float32), EPS)
            each.enter(place, embedding if by_token else rows, by_token, norms[0], hidden, normed)()
            found.append((hidden, normed.scaled, normed.squares))
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2.0**-7, atol=1e-6)
    for token, count in ((None, 3), (torch.tensor([4]), 1)):
        ours, theirs = empty(count, 2 * size), empty(count, 2 * size)
        for each, out in ((kernels, ours), (ReferenceKernels(), theirs)):
            each.join(place, embedding, rows[:count], norms, EPS, token, out)()
        torch.testing.assert_close(ours, theirs, rtol=2.0**-7, atol=1e-6)


def test_threads_that_wait_for_ever_are_found(tmp_path):
    source = cuda_code.source_of("rows")
    wrong = source.replace("const float factor = p.weight ?", "const float factor = p.weight && threadIdx.x < 100 ?")
    assert wrong != source
    rows = torch.ones(2, 64).bfloat16()
    with pytest.raises(AssertionError, match="others that do not come"):
        built(tmp_path, wrong).norm(rows, rows[0].clone(), EPS, empty(*rows.shape))()
