"""Our kernels on a card: against double precision, and bit for bit against themselves.

Every kernel by itself on random numbers, its outputs filled with NaN before.
"""

import gc
from types import SimpleNamespace

import pytest
import torch
from runs import distance, ids_of

from early_exit_cli.runtime.blocks import LARGEST_WIDTH
from early_exit_cli.runtime.cuda_kernels import (
    NF4_VALUES,
    SEGMENT,
    TILE,
    AttentionPlan,
    CudaKernels,
    NF4Weight,
    Normed,
    Places,
    recorder,
)
from early_exit_cli.runtime.device_pass import Buffers
from early_exit_cli.runtime.reference_kernels import ReferenceKernels

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
ROWS = range(1, LARGEST_WIDTH + 1)
EPS = 1e-5
BFLOAT16 = 2.0**-8
"""By how much, of itself, a number may move that is rounded to bfloat16 once."""


@pytest.fixture(scope="module")
def kernels():
    return CudaKernels(DEVICE)


@pytest.fixture(autouse=True)
def _same_numbers():
    torch.manual_seed(0)


def randn(*shape):
    return torch.randn(shape, device=DEVICE).bfloat16()


def norm_of(*shape):
    return (torch.rand(shape, device=DEVICE) + 0.5).bfloat16()


def nans(*shape, dtype=torch.bfloat16):
    return torch.full(shape, float("nan"), device=DEVICE, dtype=dtype)


def nf4(outputs, inputs, has_bias=False):
    packed = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8, device=DEVICE)
    scale = torch.rand(outputs, inputs // 64, device=DEVICE) * 0.05 + 0.01
    return NF4Weight(packed, scale, randn(outputs) if has_bias else None, outputs, inputs)


def dense(weight):
    """[out, in] float64, with the codes in bfloat16, as the kernels have them."""
    code = NF4_VALUES.bfloat16().double().to(DEVICE)
    values = code[torch.stack((weight.packed >> 4, weight.packed & 15), -1).long()].view(weight.outputs, -1, 64)
    return (values * weight.scale.double()[..., None]).view(weight.outputs, weight.inputs)


def assert_close(ours, exact, steps=1):
    """Every number, up to so many roundings to bfloat16, and a little of the whole."""
    small = 1e-3 * float(exact.double().abs().mean())
    torch.testing.assert_close(ours.double(), exact.double(), rtol=steps * BFLOAT16, atol=small)


def assert_rows_alike(found, whole):
    """found: rows -> outputs [rows, ...] of that many first rows."""
    for rows, outputs in found.items():
        for ours, theirs in zip(outputs, whole, strict=True):
            assert not ours.isnan().any(), rows
            assert torch.equal(ours, theirs[:rows]), rows


def normed_of(hidden, norm):
    """As a product's epilogue leaves it: scaled, and the sums of squares of 16 at a time."""
    squares = hidden.float().square().unflatten(-1, (-1, TILE)).sum(-1)
    return Normed((hidden.float() * norm.float()).bfloat16(), squares, EPS)


def first_rows(normed, rows):
    return Normed(normed.scaled[:rows].clone(), normed.squares[:rows].clone(), normed.eps)


PRODUCTS = [(960, 576), (576, 576), (576, 1536), (3072, 64), (6144, 4096), (4096, 14336), (5120, 5120), (1024, 8960)]


@pytest.mark.parametrize(("outputs", "inputs"), PRODUCTS)
def test_a_product_is_right_and_has_the_same_bits_at_every_width(kernels, outputs, inputs):
    weight, x = nf4(outputs, inputs, has_bias=True), randn(16, inputs)
    found = {}
    for rows in ROWS:
        found[rows] = nans(rows, outputs)
        kernels.product(weight, x[:rows].clone(), found[rows])()
    assert_close(found[16], x.double() @ dense(weight).T + weight.bias.double())
    assert_rows_alike({rows: [out] for rows, out in found.items()}, [found[16]])
    for row in (5, 11):  # a row by itself, and as another one
        for rows in (1, 3, 9):
            out = nans(rows, outputs)
            kernels.product(weight, x[row].expand(rows, -1).contiguous(), out)()
            assert torch.equal(out, found[16][row].expand(rows, -1))


@pytest.mark.parametrize(("outputs", "inputs"), [(960, 576), (6144, 4096)])
def test_a_product_norms_what_it_reads(kernels, outputs, inputs):
    weight, hidden, norm = nf4(outputs, inputs), randn(16, inputs) * 3, norm_of(inputs)
    normed, found = normed_of(hidden, norm), {}
    for rows in ROWS:
        found[rows] = nans(rows, outputs)
        kernels.product(weight, first_rows(normed, rows), found[rows])()
    factor = torch.rsqrt(hidden.double().square().mean(-1, keepdim=True) + EPS)
    assert_close(found[16], normed.scaled.double() @ dense(weight).T * factor)
    assert_rows_alike({rows: [out] for rows, out in found.items()}, [found[16]])


@pytest.mark.parametrize(("inner", "inputs"), [(1536, 576), (192, 128), (14336, 4096), (13824, 5120)])
def test_gate_and_up_are_right_and_have_the_same_bits_at_every_width(kernels, inner, inputs):
    weight, normed, found = nf4(2 * inner, inputs), normed_of(randn(16, inputs), norm_of(inputs)), {}
    for rows in ROWS:
        found[rows] = nans(rows, inner)
        kernels.gated(weight, first_rows(normed, rows), found[rows])()
    expected = nans(16, inner)
    ReferenceKernels().gated(weight, normed, expected)()
    assert distance(found[16], expected) < 0.01
    assert_rows_alike({rows: [out] for rows, out in found.items()}, [found[16]])


@pytest.mark.parametrize(("outputs", "inputs"), [(576, 576), (576, 1536), (128, 192), (4096, 4096), (4096, 14336)])
def test_an_added_product_leaves_states_and_their_squares(kernels, outputs, inputs):
    weight, x, residual, norm = nf4(outputs, inputs), randn(16, inputs), randn(16, outputs) * 4, norm_of(outputs)
    found = {}
    for rows in ROWS:
        out, normed = nans(rows, outputs), Normed(nans(rows, outputs), nans(rows, outputs // TILE).float(), EPS)
        kernels.added(weight, x[:rows].clone(), residual[:rows].clone(), out, norm, normed)()
        found[rows] = (out, normed.scaled, normed.squares)
    out, scaled, squares = found[16]
    product = (x.double() @ dense(weight).T).bfloat16().double()
    assert distance(out, residual.double() + product) < 0.004
    assert torch.equal(scaled, (out.float() * norm.float()).bfloat16())
    torch.testing.assert_close(squares, out.float().square().unflatten(-1, (-1, TILE)).sum(-1), rtol=1e-5, atol=1e-5)
    assert_rows_alike(found, found[16])


def buffers_of(rows, size):
    """What a pass has between its kernels."""
    block = SimpleNamespace(
        attention=SimpleNamespace(query_heads=1, head_dim=64),
        qkv=SimpleNamespace(outputs=192),
        down=SimpleNamespace(inputs=64),
    )
    return Buffers(rows, [block], size, EPS, DEVICE)


def places_at(*words):
    """Places that stand where each of `words` says: (cache, position, rows, tokens)."""
    places = Places(len(words), DEVICE)
    places.tell([place.set(*word) for place, word in zip(places.of, words, strict=True)])
    return places.of


NO_CACHE = SimpleNamespace(addresses=[0] * 5, capacity=0)


@pytest.mark.parametrize("size", [64, 576, 4096])
@pytest.mark.parametrize("rows", [1, 7, 16])
def test_rows_enter_by_token_and_as_states(kernels, rows, size):
    embedding, norm = randn(300, size), norm_of(size)
    tokens = ids_of(rows, vocab=300).tolist()
    (place,) = places_at((NO_CACHE, 5, rows, tokens))
    for source, by_token in ((embedding, True), (embedding[tokens].clone(), False)):
        buffers = buffers_of(rows, size)
        hidden, entered = buffers.hidden[0], buffers.normed
        for tensor in (hidden, entered.scaled, entered.squares):
            tensor.fill_(float("nan"))
        kernels.enter(place, source, by_token, norm, hidden, entered)()
        assert torch.equal(hidden, embedding[tokens])
        assert torch.equal(entered.scaled, (hidden.float() * norm.float()).bfloat16())
        torch.testing.assert_close(entered.squares.sum(-1), hidden.float().square().sum(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [128, 576, 4096])
def test_states_that_enter_are_read_as_those_that_a_block_left(kernels, size):
    """A pass that goes on from states in the middle gives the bits of the pass that came there: the same squares."""
    down, qkv, norm = nf4(size, size), nf4(2 * size, size), norm_of(size)
    for _ in range(8):
        residual, x = randn(16, size), randn(16, size)
        buffers = buffers_of(16, size)
        left = Normed(nans(16, size), nans(16, size // TILE).float(), EPS)
        states, expected, found = nans(16, size), nans(16, 2 * size), nans(16, 2 * size)
        kernels.added(down, x, residual, states, norm, left)()
        kernels.product(qkv, left, expected)()
        (place,) = places_at((NO_CACHE, 0, 16, ()))
        kernels.enter(place, states, False, norm, buffers.hidden[0], buffers.normed)()
        kernels.product(qkv, buffers.normed, found)()
        assert torch.equal(found, expected)


@pytest.mark.parametrize("size", [64, 576, 4096])
def test_norms_are_right_and_the_last_real_row_is_found(kernels, size):
    hidden, weight = randn(16, size) * 5, norm_of(size)
    found, expected = {}, nans(16, size)
    ReferenceKernels().norm(hidden, weight, EPS, expected)()
    for rows in ROWS:
        found[rows] = nans(rows, size)
        kernels.norm(hidden[:rows].clone(), weight, EPS, found[rows])()
    assert_close(found[16], expected, 2)
    assert_rows_alike({rows: [out] for rows, out in found.items()}, [found[16]])
    for rows in (1, 6, 16):
        (place,) = places_at((NO_CACHE, 0, rows, ()))
        last = nans(1, size)
        kernels.norm(hidden, weight, EPS, last, last_of=place)()
        assert torch.equal(last, found[16][rows - 1 : rows])
        kernels.norm(hidden, None, EPS, last, last_of=place)()
        assert torch.equal(last, hidden[rows - 1 : rows])


@pytest.mark.parametrize("rows", [1, 8, 16])
def test_inputs_of_the_eagle_head_are_right(kernels, rows):
    size, parts = 576, 4
    states, norms = randn(parts, rows, size), norm_of(parts - 1, size)
    found, expected = nans(rows, parts * size), nans(rows, parts * size)
    kernels.fuse(states, norms, EPS, found)()
    ReferenceKernels().fuse(states, norms, EPS, expected)()
    assert_close(found, expected, 2)
    assert torch.equal(found[:, -size:], states[-1])
    kernels.fuse(states, norms[:0], EPS, found)()  # as published heads have it
    assert torch.equal(found, torch.cat(states.unbind(), -1))

    embedding, hidden, pair = randn(300, size), randn(rows, size), (norm_of(size), norm_of(size))
    (place,) = places_at((NO_CACHE, 0, rows, ids_of(rows, vocab=300).tolist()))
    tokens = [None, torch.tensor([17], device=DEVICE)][: 2 if rows == 1 else 1]
    for token in tokens:
        found, expected = nans(rows, 2 * size), nans(rows, 2 * size)
        kernels.join(place, embedding, hidden, pair, EPS, token, found)()
        ReferenceKernels().join(place, embedding, hidden, pair, EPS, token, expected)()
        assert_close(found, expected, 2)


def test_a_token_that_is_not_there_reads_nothing_else(kernels):
    """-1, which a choice that is not finite gives: some embedding, and no fault."""
    (place,) = places_at((NO_CACHE, 0, 1, [0]))
    found, token = nans(1, 128), torch.tensor([-1], device=DEVICE)
    kernels.join(place, randn(4, 64), randn(1, 64), (norm_of(64), norm_of(64)), EPS, token, found)()
    assert found.isfinite().all()


class TextCache:
    """One text's keys and values in two blocks, as kernels and reference find them; not written from `end` on."""

    def __init__(self, keys, values, rotary, end):
        keys, values = keys.clone(), values.clone()
        keys[:, :, end:], values[:, :, end:] = float("nan"), float("nan")
        self.keys, self.values, self.rotary, self.capacity = list(keys), list(values), rotary, keys.shape[2]
        (tables,) = rotary.values()
        pairs = LARGEST_WIDTH * 16  # of as many query heads a key head as there are here
        room = (self.capacity // SEGMENT + 2) * keys.shape[1] * pairs * (keys.shape[3] + 2)
        self.partial = nans(room, dtype=torch.float32)
        self.addresses = [tensor.data_ptr() for tensor in (keys, values, *tables, self.partial)]


def rotary_of(limit, size):
    """cos and sin, [limit, 1, size]; sin with the sign of the turned half."""
    angles = torch.arange(limit, device=DEVICE)[:, None] * 10000.0 ** (-torch.arange(0, size, 2, device=DEVICE) / size)
    tables = angles.cos().repeat(1, 2), torch.cat((-angles.sin(), angles.sin()), -1)
    return {None: tuple(table.bfloat16()[:, None].contiguous() for table in tables)}


ATTENTIONS = {
    "llama-8b": (32, 8, 128, 0, False),
    "smollm2": (9, 3, 64, 0, False),
    "window-and-norms": (32, 8, 128, 300, True),
    "qwen2": (14, 2, 64, 0, False),
    "every-head-its-own": (4, 4, 64, 24, False),
    "one-key-head": (16, 1, 128, 0, True),
}
POSITIONS = (0, 3, 240, 250, 255, 256, 511, 1000, 2000, 4200)
CAPACITY = 4352


@pytest.mark.parametrize("shape", ATTENTIONS.values(), ids=ATTENTIONS)
def test_attention_is_right_and_has_the_same_bits_at_every_width(kernels, shape):
    """Keys that no row may see are NaN; up to seventeen segments; the other block's part of the cache is untouched."""
    query_heads, kv_heads, size, window, has_norms = shape
    keys, values = (randn(2, kv_heads, CAPACITY, size) for _ in range(2))
    rotary, qkv = rotary_of(CAPACITY, size), randn(16, (query_heads + 2 * kv_heads) * size)
    norms = norm_of(query_heads + kv_heads, size) if has_norms else None
    plan = AttentionPlan(1, query_heads, kv_heads, size, window, size**-0.5, norms, 1e-6)

    def attend(which, position, rows, first=0):
        """Rows first .. first + rows - 1 at the position."""
        cache = TextCache(keys, values, rotary, position)
        (place,) = places_at((cache, position, rows, ()))
        out = nans(rows, query_heads * size)
        which.attention(place, plan, qkv[first : first + rows].clone(), out)()
        return out, cache

    for position in POSITIONS:
        whole, cache = attend(kernels, position, 16)
        expected, expected_cache = attend(ReferenceKernels(), position, 16)
        assert distance(whole, expected) < 0.01, position
        rows = slice(position, position + 16)
        for ours, theirs, before in (
            (cache.keys, expected_cache.keys, keys),
            (cache.values, expected_cache.values, values),
        ):
            assert distance(ours[1][:, rows], theirs[1][:, rows]) < 0.004
            assert torch.equal(ours[1][:, :position], before[1][:, :position])
            assert torch.equal(ours[0][:, :position], before[0][:, :position])
            assert ours[0][:, position:].isnan().all()
            assert ours[1][:, position + 16 :].isnan().all()
        assert torch.equal(
            cache.values[1][:, rows], qkv.view(16, -1, size)[:, query_heads + kv_heads :].transpose(0, 1)
        )
        for count in ROWS if position < 600 else (1, 4, 9):
            out, own = attend(kernels, position, count)
            assert torch.equal(out, whole[:count]), (position, count)
            end = position + count
            assert torch.equal(own.keys[1][:, :end], cache.keys[1][:, :end]), (position, count)
            assert own.keys[1][:, end:].isnan().all()
            assert own.values[1][:, end:].isnan().all()
        assert not kernels.arrived.any()


@pytest.mark.parametrize("window", [0, 24, 300])
def test_a_row_attends_the_same_in_the_pass_before_and_by_itself(kernels, window):
    """The rows of one pass, given again one pass each: another first row, another first segment, the same bits."""
    keys, values = (randn(2, 3, 1024, 64) for _ in range(2))
    rotary, qkv = rotary_of(1024, 64), randn(16, 15 * 64)
    plan = AttentionPlan(0, 9, 3, 64, window, 64**-0.5, None, 1e-6)
    for position in (0, 250, 264, 540, 760):
        cache = TextCache(keys, values, rotary, position)
        (place,) = places_at((cache, position, 16, ()))
        whole = nans(16, 9 * 64)
        kernels.attention(place, plan, qkv, whole)()
        alone = TextCache(keys, values, rotary, position)
        for row in range(16):
            (place,) = places_at((alone, position + row, 1, ()))
            out = nans(1, 9 * 64)
            kernels.attention(place, plan, qkv[row : row + 1].clone(), out)()
            assert torch.equal(out[0], whole[row]), (position, row)
        assert torch.equal(alone.keys[0][:, : position + 16], cache.keys[0][:, : position + 16])


def test_texts_one_behind_the_other_share_what_is_left_between_segments(kernels):
    """Without a wait between them: the same counters and the same room for partial sums."""
    keys, values = (randn(1, 3, 2304, 64) for _ in range(2))
    rotary, qkv = rotary_of(2304, 64), randn(16, 15 * 64)
    plan = AttentionPlan(0, 9, 3, 64, 0, 64**-0.5, None, 1e-6)
    stands = [(2000, 5), (700, 4), (30, 1), (1100, 6)]
    first = TextCache(keys, values, rotary, 2304)
    caches = [TextCache(keys, values, rotary, 2304) for _ in stands]
    for cache in caches:
        cache.partial, cache.addresses[4] = first.partial, first.addresses[4]
    places = places_at(*((cache, *stand, ()) for cache, stand in zip(caches, stands, strict=True)))
    outs = [nans(rows, 9 * 64) for _, rows in stands]
    steps = [
        kernels.attention(place, plan, qkv[:rows].clone(), out)
        for place, (_, rows), out in zip(places, stands, outs, strict=True)
    ]
    torch.cuda.synchronize()
    for step in steps * 20:
        step()
    for (position, rows), out in zip(stands, outs, strict=True):
        (place,) = places_at((TextCache(keys, values, rotary, 2304), position, rows, ()))
        alone = nans(rows, 9 * 64)
        kernels.attention(place, plan, qkv[:rows].clone(), alone)()
        assert torch.equal(out, alone)
    assert not kernels.arrived.any()


def chosen(kernels, weight, x, vocab=None):
    """[token, value, entropy] of each row."""
    rows = x.shape[0]
    token = torch.full((rows,), -7, device=DEVICE)
    value, entropy = nans(rows, dtype=torch.float32), nans(rows, dtype=torch.float32)
    for step in kernels.choose(weight, x.contiguous(), token, value, entropy, vocab):
        step()
    return token, value, entropy


@pytest.mark.parametrize(("vocab", "inputs"), [(49152, 576), (128256, 4096), (8192, 576), (320, 128), (16, 64)])
def test_the_lm_head_is_right_and_has_the_same_bits_at_every_width(kernels, vocab, inputs):
    weight, x = randn(vocab, inputs) * 0.05, randn(16, inputs)
    logits, choices = {}, {}
    for rows in ROWS:
        logits[rows] = nans(rows, vocab)
        kernels.logits(weight, x[:rows].clone(), logits[rows])()
        *choices[rows], entropy = chosen(kernels, weight, x[:rows])
        log_p = logits[rows].double().log_softmax(-1)
        torch.testing.assert_close(entropy.double(), -(log_p.exp() * log_p).sum(-1), rtol=1e-3, atol=1e-3)
    assert_close(logits[16], x.double() @ weight.double().T)
    assert_rows_alike({rows: [out] for rows, out in logits.items()}, [logits[16]])
    assert_rows_alike(choices, choices[16])
    best = logits[16].amax(-1)
    assert torch.equal(choices[16][0], (logits[16] == best[:, None]).int().argmax(-1))
    assert torch.equal(choices[16][1], best.float())


def test_of_equal_logits_the_lowest_column_is_chosen(kernels):
    weight, x = randn(49152, 576) * 0.02, randn(16, 576)
    for row in range(16):
        weight[30_000 + row] = x[row] * 0.05  # far above the rest
    for row, places in enumerate(([5, 49151], [17, 18], [4096, 20_000], [0, 1, 2], [29_999], [15, 16, 31, 32])):
        weight[places] = weight[30_000 + row].clone()
    token, value, _ = chosen(kernels, weight, x)
    assert token[:6].tolist() == [5, 17, 4096, 0, 29_999, 15]
    assert token[6:].tolist() == list(range(30_006, 30_016))
    vocab = torch.randperm(100_000, device=DEVICE)[:49152]
    mapped, same_value, _ = chosen(kernels, weight, x, vocab)
    assert torch.equal(mapped, vocab[token])
    assert torch.equal(value, same_value)
    flat, _, entropy = chosen(kernels, torch.zeros_like(weight), x)
    assert flat.tolist() == [0] * 16
    torch.testing.assert_close(entropy, torch.full_like(entropy, 49152.0).log(), rtol=1e-4, atol=0)


def test_logits_that_are_not_finite_choose_nothing(kernels):
    weight, x = randn(8192, 576) * 0.05, randn(16, 576)
    expected, _, _ = chosen(kernels, weight, x)
    x[3, 100], x[9, 0] = float("nan"), float("inf")
    vocab = torch.arange(8192, device=DEVICE) + 1
    token, _, _ = chosen(kernels, weight, x)
    mapped, _, _ = chosen(kernels, weight, x, vocab)
    others = [row for row in range(16) if row not in (3, 9)]
    assert token[[3, 9]].tolist() == mapped[[3, 9]].tolist() == [-1, -1]
    assert torch.equal(token[others], expected[others])
    assert torch.equal(mapped[others], expected[others] + 1)
    weight[8191, 5] = float("nan")  # one column of all rows, the last
    assert chosen(kernels, weight, x)[0].tolist() == [-1] * 16


def recorded_choice(kernels, weight, x, token, value):
    """A recording of which nothing but itself is left: its scratch, its copy of x."""
    steps = kernels.choose(weight, x.clone(), token, value, None, None)
    return recorder(DEVICE)(lambda: [step() for step in steps])


def test_a_recording_keeps_alive_what_it_reads(kernels):
    weight, x = randn(8192, 576) * 0.05, randn(8, 576)
    expected = chosen(kernels, weight, x)[:2]
    token, value = torch.zeros(8, dtype=torch.int64, device=DEVICE), torch.zeros(8, device=DEVICE)
    replay = recorded_choice(kernels, weight, x, token, value)
    gc.collect()
    for turn in range(3):
        kept = [torch.full((size,), 1e9, device=DEVICE) for size in (16, 64, 2304, 4608, 20_000) for _ in range(200)]
        token.fill_(-7)
        value.fill_(float("nan"))
        replay()
        assert torch.equal(token, expected[0]), turn
        assert torch.equal(value, expected[1]), turn
        assert all((tensor == 1e9).all() for tensor in kept[::97])
        del kept


def test_tensors_that_are_not_contiguous_are_refused(kernels):
    weight, x = nf4(192, 128), randn(16, 256)
    with pytest.raises(ValueError, match="contiguous tensors only"):
        kernels.product(weight, x[:, :128], nans(16, 192))
