"""The kernels' sources without a card: they compile for every generation, and Python's side agrees with them."""

import ctypes
import re
import sys
from types import SimpleNamespace

import pytest
import torch

from early_exit_cli.runtime import cuda_code, cuda_kernels
from early_exit_cli.runtime.blocks import LARGEST_WIDTH
from early_exit_cli.runtime.cuda_code import NoCudaCode, compiled, options_for, product_bytes, shape_for
from early_exit_cli.runtime.cuda_kernels import NF4_VALUES, PAIRS, SEGMENT, Place, Places
from early_exit_cli.runtime.nf4_linear import SCALED_TOGETHER

MOST_SHARED = {(8, 0): 166912, (8, 6): 101376, (9, 0): 232448, (10, 0): 232448, (12, 0): 101376}
"""Compute capability -> bytes of shared memory that a block may have there. 8.9 is as 8.6 in all that matters here."""
REGISTERS = 65536
"""Of a multiprocessor."""
TOLERATED_SPILLS = 128
"""Bytes that a thread may keep in memory for want of registers."""
KERNELS = {
    "product": {
        f"product_{kind}_{sets}_{columns}" for kind in ("short", "long") for sets in (1, 2) for columns in (1, 2)
    },
    "attention": {"attention_64", "attention_128"},
    "lm_head": {"lm_head_1", "lm_head_2", "pick"},
    "rows": {"enter_rows", "norm_rows", "fuse_states", "join_token"},
}


def text_of(name):
    """A source with its header, without comments."""
    return re.sub(r"//[^\n]*", "", cuda_code.source_of(name))


def number(source, name):
    """What a source defines a name as."""
    return int(re.search(rf"#define {name} (\d+)\b", text_of(source))[1])


@pytest.fixture(scope="module")
def architectures():
    """What the compiler here knows."""
    try:
        nvrtc = cuda_code._bindings("nvrtc")
    except NoCudaCode as error:
        pytest.skip(f"no CUDA compiler: {error}")
    _, found = nvrtc.nvrtcGetSupportedArchs()
    return found


def dynamic_shared(kernel, warps, stages):
    """As `CudaKernels` asks for it."""
    kind, *rest = kernel.split("_")
    if kind == "product":
        return product_bytes(warps, stages, int(rest[1]), int(rest[2]))
    return 8 * PAIRS * (int(rest[0]) + 4) * 4 if kind == "attention" else 0


COMPILED_ALWAYS = ((8, 0), (9, 0), (12, 0))


@pytest.mark.parametrize(
    "capability",
    [pytest.param(found, marks=() if found in COMPILED_ALWAYS else pytest.mark.slow) for found in MOST_SHARED],
    ids=lambda capability: "sm_{}{}".format(*capability),
)
def test_every_kernel_compiles_and_fits_the_card(architectures, capability):
    if capability[0] * 10 + capability[1] not in architectures:
        pytest.skip(f"this compiler knows no sm_{capability[0]}{capability[1]}")
    most = MOST_SHARED[capability]
    warps, stages = shape_for(most)
    threads = {"product": warps * 32, "attention": 256, "lm": 2 * 256, "pick": 32}  # of the LM head two blocks at once
    for source in cuda_code.SOURCES:
        options = options_for(warps, stages) if source == "product" else ()
        code, log = compiled(source, capability, (*options, "--ptxas-options=-v"))
        assert code[:4] == b"\x7fELF"
        entries = re.split(r"Compiling entry function '", log)[1:]
        assert {entry.split("'")[0] for entry in entries} == KERNELS[source]
        for entry in entries:
            kernel = entry.split("'")[0]
            spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", entry)
            assert max(map(int, spilled.groups())) <= TOLERATED_SPILLS, kernel
            registers = -(-int(re.search(r"Used (\d+) registers", entry)[1]) // 8) * 8
            assert registers * threads.get(kernel.split("_")[0], 256) <= REGISTERS, kernel
            static = re.search(r"(\d+) bytes smem", entry)
            assert int(static[1] if static else 0) + dynamic_shared(kernel, warps, stages) <= most, kernel


@pytest.mark.parametrize("source", ["product", "attention", "lm_head"])
def test_shared_memory_that_is_read_16_bytes_at_a_time_is_aligned(architectures, source):
    nvrtc = cuda_code._bindings("nvrtc")
    _, program = nvrtc.nvrtcCreateProgram(cuda_code.source_of(source).encode(), b"source.cu", 0, [], [])
    assert nvrtc.nvrtcCompileProgram(program, 2, [b"--gpu-architecture=compute_80", b"--std=c++17"]) == (0,)
    ptx = cuda_code._filled(program, nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX).decode()
    aligned = {name: int(to) for to, name in re.findall(r"\.shared \.align (\d+) \.b8 (\w+)\[", ptx)}
    read = ("queries", "fresh_keys", "fresh_values", "weighted", "sums", "shared")
    found = [to for name, to in aligned.items() if re.search(rf"(?:^|\d)({'|'.join(read)})$", name)]
    assert found
    assert min(found) >= 16


def test_a_product_takes_the_largest_shape_that_a_card_has_room_for():
    assert [shape_for(most) for most in MOST_SHARED.values()] == [(8, 3), (8, 2), (16, 3), (16, 3), (8, 2)]
    for shape in cuda_code.SHAPES:
        sizes = [product_bytes(*shape, sets, columns) for sets in (1, 2) for columns in (1, 2)]
        assert max(sizes) == product_bytes(*shape, 2, 2)  # what `shape_for` asks about


def test_shared_memory_is_as_large_as_the_product_lays_it_out():
    chunk = number("product", "CHUNK")
    table, packed = 256 * 32 * 4, 16 * 32 * chunk
    for (warps, stages), sets, columns in (((16, 3), 1, 1), ((16, 3), 2, 2), ((8, 2), 1, 2), ((8, 3), 2, 1)):
        ring = stages * (packed + 16 * 4 * chunk)
        turns = 2 if sets * columns == 1 else 1
        sums = turns * sets * columns * 32 * 4 * 4
        assert product_bytes(warps, stages, sets, columns) == table + warps * (ring + sums) + 16 * 4


def test_sizes_are_the_same_in_python_and_in_the_sources():
    assert number("attention", "SEGMENT") == SEGMENT
    assert number("attention", "PAIRS") == PAIRS
    assert number("attention", "PART") * number("attention", "WARPS") == SEGMENT
    assert number("attention", "WARPS") * 32 == number("lm_head", "WARPS") * 32 == cuda_kernels.THREADS
    assert number("rows", "THREADS") == cuda_kernels.THREADS
    assert number("rows", "MOST_ROWS") == LARGEST_WIDTH
    assert number("product", "CHUNK") * SCALED_TOGETHER == cuda_kernels.MOST_KEPT
    values = NF4_VALUES.bfloat16().view(torch.int16)
    (codes,) = re.findall(r"codes\[16\] = \{([^}]*)\}", text_of("product"))
    assert [int(code, 16) for code in codes.split(",")] == [bits & 0xFFFF for bits in values.tolist()]


def fields_of(name):
    """(name, kind) of each field of a structure in the sources."""
    for source in cuda_code.SOURCES:
        body = re.search(rf"struct {name} \{{(.*?)\n\}};", text_of(source), re.DOTALL)
        if body:
            break
    fields = []
    for line in filter(None, (line.strip() for line in body[1].split(";"))):
        kind, names = re.fullmatch(r"(?:const )?(long long|\w+)\b(.*)", line, re.DOTALL).groups()
        for declared in names.split(","):
            is_pointer = "*" in declared
            fields.append((declared.strip(" *\n"), "pointer" if is_pointer else kind))
    return fields


KINDS = {
    ctypes.c_void_p: "pointer",
    ctypes.c_int: "int",
    ctypes.c_float: "float",
    ctypes.c_longlong: "long long",
}


def test_the_arguments_of_kernels_are_the_same_in_python_and_in_the_sources():
    taken = {name for source in cuda_code.SOURCES for name in re.findall(r"__grid_constant__ (\w+) p", text_of(source))}
    assert taken == {"Product", "Attention", "LMHead", "Pick", "Enter", "Norm", "Fuse", "Join"}
    for name in taken:
        ours = [(field.rstrip("_"), KINDS[kind]) for field, kind in getattr(cuda_code, name)._fields_]
        assert ours == fields_of(name), name


def test_a_place_is_the_same_in_python_and_in_the_sources():
    *fields, (tokens, kind) = fields_of("Place")
    assert (tokens, kind) == ("tokens[MOST_ROWS]", "long long")
    assert {kind for _, kind in fields} == {"pointer", "long long"}  # eight bytes each
    assert len(fields) == Place.FIELDS
    told = dict(keys=11, values=12, cos=13, sin=14, partial=15, capacity=16, position=17, rows=3)
    cache = SimpleNamespace(addresses=[told[name] for name in ("keys", "values", "cos", "sin", "partial")], capacity=16)
    places = Places(2, torch.device("cpu"))
    words = places.of[1].set(cache, 17, 3, [7, 8, 9])
    places.tell([[0] * len(words), words])
    assert places.of[1].numbers.tolist() == [*(told[name] for name, _ in fields), 7, 8, 9, *[0] * (LARGEST_WIDTH - 3)]
    assert (places.of[1].position, places.of[1].rows) == (17, 3)


def test_places_that_are_told_in_turns_keep_what_was_told_last():
    places = Places(3, torch.device("cpu"))
    width = Place.FIELDS + LARGEST_WIDTH
    for turn in range(2 * Places.SLOTS + 1):
        places.tell([[turn] * width])
        assert places.numbers[0].tolist() == [turn] * width
    assert not places.numbers[1:].any()


def test_the_best_of_an_lm_head_is_as_large_as_what_is_allocated_for_it():
    assert [kind for _, kind in fields_of("Best")] == ["float", "int", "float", "float", "float"]


def raises(error):
    def call(*_, **__):
        raise error

    return call


@pytest.mark.parametrize(
    "found",
    [None, SimpleNamespace(nvrtc=SimpleNamespace(nvrtcVersion=raises(RuntimeError("no libnvrtc.so"))))],
    ids=["no-bindings", "no-library"],
)
def test_a_machine_without_the_compiler_is_told_what_to_install(monkeypatch, found):
    monkeypatch.setitem(sys.modules, "cuda.bindings", found)
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
    with pytest.raises(NoCudaCode, match=r"nvrtc was not found \(pip install cuda-bindings nvidia-cuda-nvrtc\)"):
        compiled("rows", (9, 0))


def test_what_the_compiler_refuses_is_said(architectures):
    with pytest.raises(NoCudaCode, match=r"could not compile rows\.cu: .*gpu-architecture"):
        compiled("rows", (1, 0))
    with pytest.raises(NoCudaCode, match=r"could not compile rows\.cu: .*error"):
        compiled("rows", (9, 0), ("-Dnarrow=1",))


def test_a_card_without_bfloat16_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name="Tesla T4"))
    with pytest.raises(NoCudaCode, match=r"Tesla T4 is older than compute capability 8\.0"):
        cuda_code.Code(0)


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """The cache of machine code in a folder of its own, with a compiler that only counts."""
    calls = []

    def compile_nothing(name, capability, options=()):
        calls.append(name)
        return f"code {len(calls)}".encode(), ""

    monkeypatch.setenv("EEXIT_HOME", str(tmp_path))
    monkeypatch.setattr(cuda_code, "compiled", compile_nothing)
    monkeypatch.setattr(cuda_code, "_bindings", lambda name: SimpleNamespace(nvrtcVersion=lambda: (0, 13, 0)))
    return calls


def test_code_is_compiled_once_for_each_source_card_compiler_and_option(kept, monkeypatch):
    card = ("rows", (9, 0), "a card", ())
    assert cuda_code._kept(*card) == cuda_code._kept(*card) == b"code 1"
    others = [
        ("rows", (8, 0), "a card", ()),
        ("rows", (9, 0), "another", ()),
        ("rows", (9, 0), "a card", ("-DWARPS=8",)),
    ]
    assert [cuda_code._kept(*other) for other in (*others, ("lm_head", *card[1:]))] == [
        f"code {turn}".encode() for turn in (2, 3, 4, 5)
    ]
    assert cuda_code._kept(*card) == b"code 1"
    with monkeypatch.context() as patch:
        source = cuda_code.source_of("rows")
        patch.setattr(cuda_code, "source_of", lambda name: source + " ")
        assert cuda_code._kept(*card) == b"code 6"
    with monkeypatch.context() as patch:
        patch.setattr(cuda_code, "_bindings", lambda name: SimpleNamespace(nvrtcVersion=lambda: (0, 13, 1)))
        assert cuda_code._kept(*card) == b"code 7"
    with monkeypatch.context() as patch:
        patch.setattr(cuda_code, "versions", lambda: {"torch": "another"})
        assert cuda_code._kept(*card) == b"code 8"
    assert cuda_code._kept(*card) == b"code 1"


def test_a_cache_folder_that_cannot_be_written_stops_nothing(kept, monkeypatch):
    monkeypatch.setattr(cuda_code, "write_atomic", raises(OSError(30, "read-only")))
    assert [cuda_code._kept("rows", (9, 0), "a card", ()) for _ in range(2)] == [b"code 1", b"code 2"]


def test_the_key_of_the_code_is_that_of_all_its_sources(monkeypatch):
    before, source_of = cuda_code.code_key(), cuda_code.source_of
    for name in cuda_code.SOURCES:
        assert '#include "' not in cuda_code.source_of(name)
        with monkeypatch.context() as patch:
            patch.setattr(cuda_code, "source_of", lambda asked, own=name: source_of(asked) + " " * (asked == own))
            assert cuda_code.code_key.__wrapped__() != before
    assert cuda_code.code_key() == before
