"""The kernels' index arithmetic, lane by lane in NumPy.

Which bytes a lane fetches and reads back, what it pairs them with on the tensor core, in which order sums are added.
The formulas are written down here a second time, as they stand in product.cu and attention.cu: a change there is a
change here.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from early_exit_cli.runtime.cuda_kernels import NF4_VALUES, SEGMENT, NF4Weight

LANES = np.arange(32)
G, T = LANES // 4, LANES % 4
CHUNK = 4
F32, U32 = np.float32, np.uint32


def words_of(values):
    """float -> the bits of its bfloat16."""
    return torch.as_tensor(values).bfloat16().view(torch.int16).numpy().view(np.uint16)


def floats(bits):
    """bfloat16 bits -> float32."""
    return (bits.astype(U32) << 16).view(F32)


def paired(first, second):
    """What a 32-bit register holds of two bfloat16."""
    return first.astype(U32) | second.astype(U32) << 16


def low(word):
    return (word & 0xFFFF).astype(np.uint16)


def high(word):
    return (word >> 16).astype(np.uint16)


def multiply(sums, a, b):
    """mma.m16n8k16: sums [32, 4] float32, a [32, 4] and b [32, 2] registers, by the layout that PTX gives them."""
    left, right = np.zeros((16, 16)), np.zeros((16, 8))
    for register, (row, column) in enumerate(((0, 0), (8, 0), (0, 8), (8, 8))):
        left[G + row, 2 * T + column] = floats(low(a[:, register]))
        left[G + row, 2 * T + column + 1] = floats(high(a[:, register]))
    for register in range(2):
        right[2 * T + 8 * register, G] = floats(low(b[:, register]))
        right[2 * T + 8 * register + 1, G] = floats(high(b[:, register]))
    product = left @ right
    of_lanes = np.stack([product[G + row, 2 * T + column] for row in (0, 8) for column in (0, 1)], 1)
    return (sums + of_lanes).astype(F32)


def banks(addresses, size):
    """The banks of shared memory that lanes touch, `size` bytes from each address."""
    return (np.asarray(addresses)[:, None] // 4 + np.arange(size // 4)).ravel() % 32


def have_no_conflict(addresses, size):
    """Whether a warp's accesses are served without repeats: 128 bytes at a time are, each from its own bank."""
    lanes = 128 // size
    return all(
        len(set(banks(group, size).tolist())) == 32 for group in np.asarray(addresses).reshape(-1, min(lanes, 32))
    )


def fetches():
    """Of a chunk: (lane, row, byte of the row's 128, place in the stage) of each 16 bytes that a lane fetches."""
    for i in range(4):
        for lane in LANES:
            to = lane // 8 * 128 + ((lane % 8 ^ (lane // 8 & 3) << 1) << 4) + i * 512
            yield lane, lane // 8 + 4 * i, lane % 8 * 16, to


def scale_fetches():
    for i in range(2):
        for lane in LANES:
            yield (
                lane,
                lane // 4 + 8 * i,
                lane % 4,
                16 * 32 * CHUNK + lane // 4 * CHUNK * 4 + lane % 4 * 4 + 32 * CHUNK * i,
            )


def read_back(block):
    """Where in the stage each lane reads eight bytes of its upper row; those of the lower one stand 1024 behind."""
    piece = ((2 * block + (T >> 1)) ^ (G & 3) << 1) << 4
    return G * 128 + (T & 1) * 8 + piece


def test_what_a_lane_reads_back_is_its_part_of_its_rows():
    """Lane (g, t): k = 16t .. 16t + 15 of each block of 64, that is bytes 8t .. 8t + 7 of 32, of rows g and g + 8."""
    stage = np.full((2048, 2), -1)
    for _, row, byte, to in fetches():
        assert (stage[to : to + 16] == -1).all()
        stage[to : to + 16] = [(row, byte + i) for i in range(16)]
    assert (stage >= 0).all()
    for block in range(CHUNK):
        for lane, at in enumerate(read_back(block)):
            for half in range(2):
                found = stage[at + 1024 * half : at + 1024 * half + 8]
                expected = [(G[lane] + 8 * half, 32 * block + 8 * T[lane] + i) for i in range(8)]
                assert found.tolist() == [list(pair) for pair in expected]


def test_no_bank_of_shared_memory_is_asked_twice():
    writes = list(fetches())
    for i in range(4):
        assert have_no_conflict([to for *_, to in writes[32 * i : 32 * i + 32]], 16)
    scales = list(scale_fetches())
    for i in range(2):
        assert have_no_conflict([to for *_, to in scales[32 * i : 32 * i + 32]], 4)
    for block in range(CHUNK):
        for half in (0, 1024):
            assert have_no_conflict(read_back(block) + half, 8)
    rows = np.random.default_rng(0).integers(256, size=32)
    assert have_no_conflict(rows * 128 + LANES * 4, 4)  # the table: every lane has a copy
    plain = G * 128 + T * 8  # without the exchange of places, rows would meet
    assert not have_no_conflict(plain, 8)


@pytest.mark.parametrize("size", [64, 128])
def test_no_bank_is_asked_twice_in_attention(size):
    stride, weighted = size + 8, size + 4
    for d in range(size // 64):
        for half in range(2):
            assert have_no_conflict((G * stride + 64 * d + 16 * T + 8 * half) * 2, 16)  # queries
    for d in range(size // 32):
        for part in range(2):
            assert have_no_conflict((G * weighted + 32 * d + 8 * T + 4 * part) * 4, 16)  # weighted values


def staged(packed, scale, block, last):
    """A stage of a warp's ring once a chunk is there: weights' bytes, then scales. Blocks from `last` on are zeros."""
    stage = np.full(2048 + 256, 0xAB, np.uint8)
    for lane, row, byte, to in fetches():
        is_there = block + lane % 8 // 2 < last
        stage[to : to + 16] = packed[row, block * 32 + byte : block * 32 + byte + 16] if is_there else 0
    for lane, row, place, to in scale_fetches():
        is_there = block + lane % 4 < last
        stage[to : to + 4] = scale[row, block + place : block + place + 1].view(np.uint8) if is_there else 0
    return stage


def table():
    """256 words, each 32 times: a byte's two values, the first one from the high nibble."""
    codes = words_of(NF4_VALUES)
    byte = np.arange(256)
    return np.repeat(paired(codes[byte >> 4], codes[byte & 15]), 32)


def look_up(words, word, byte):
    moved = word >> U32(8 * byte - 7) if byte else word << U32(7)
    return words[((moved & U32(0x7F80)) | (LANES * 4).astype(U32)) // 4]


def inputs_of(x, rows, column, block, last):
    """[32, 8] registers of a block: k = 16t .. 16t + 15 of token 8 column + g, zeros where there is none."""
    found = np.zeros((32, 8), U32)
    for lane in LANES:
        token = column * 8 + G[lane]
        if token < rows and block < last:
            k = block * 64 + 16 * T[lane]
            found[lane] = x[token, k : k + 16].view(U32)
    return found


def accumulate(words, sums, stage, x, rows, column, block, last):
    """One chunk onto the sums [32, 4] of a warp."""
    for i in range(CHUNK):
        at = read_back(i)
        upper, lower = (
            np.stack([stage[place + half : place + half + 8].view(U32) for place in at]) for half in (0, 1024)
        )
        inputs = inputs_of(x, rows, column, block + i, last)
        part = np.zeros((32, 4), F32)
        for step in range(4):
            above, below = upper[:, step // 2], lower[:, step // 2]
            byte = 2 * (step & 1)
            a = [look_up(words, half, place) for place in (byte, byte + 1) for half in (above, below)]
            of_x = inputs[:, 4 * (step // 2) : 4 * (step // 2) + 4]
            b = of_x[:, 2:] if step & 1 else of_x[:, :2]
            part = multiply(part, np.stack(a, 1), b)
        scales = stage[2048:].view(F32).reshape(16, CHUNK)
        factor = np.stack([scales[G, i], scales[G, i], scales[G + 8, i], scales[G + 8, i]], 1)
        sums = (part.astype(np.float64) * factor + sums).astype(F32)  # fmaf
    return sums


def tile_product(packed, scale, x, rows, warps, norms=None):
    """[rows, 16] float32: a tile of 16 outputs, as product.cu adds it up."""
    words, blocks, columns = table(), packed.shape[1] // 32, 1 if rows <= 8 else 2
    sums = np.full((warps, columns, 32, 4), np.nan, F32)
    for warp in range(warps):
        first, last = warp * blocks // warps, (warp + 1) * blocks // warps
        for column in range(columns):
            own = np.zeros((32, 4), F32)
            for block in range(first, last, CHUNK):
                own = accumulate(words, own, staged(packed, scale, block, last), x, rows, column, block, last)
            sums[warp, column] = own
    out = np.full((rows, 16), np.nan, F32)
    for i in range(columns * 128):
        n, row = i & 15, i >> 4
        if row >= rows:
            break
        place = (row >> 3) * 128 + ((n & 7) * 4 + ((row & 7) >> 1)) * 4 + (n >> 3) * 2 + (row & 1)
        total = F32(0)
        for warp in range(warps):
            total += sums[warp].ravel()[place]
        out[row, n] = total if norms is None else total * norms[row]
    return out


@pytest.mark.parametrize(
    ("inputs", "warps"),
    [(576, 16), (1536, 16), (1536, 8), (4160, 16), (64, 8)],
    ids=["idle-warps", "parts-of-one-chunk", "three-blocks-a-warp", "several-chunks", "one-block"],
)
def test_lanes_of_a_product_add_up_to_the_product(inputs, warps):
    """Parts of K of unequal length, chunks that end inside a warp's part, warps that have nothing to do."""
    rng = np.random.default_rng(inputs)
    packed = rng.integers(256, size=(16, inputs // 2), dtype=np.uint8)
    scale = rng.uniform(0.01, 0.06, size=(16, inputs // 64)).astype(F32)
    bits = words_of(rng.standard_normal((16, inputs)))
    dense = NF4Weight(torch.from_numpy(packed), torch.from_numpy(scale), None, 16, inputs).dense().double().numpy()
    values = floats(words_of(NF4_VALUES)).astype(np.float64)  # the kernel's codes are in bfloat16
    rounded = values[np.stack((packed >> 4, packed & 15), -1)].reshape(16, -1, 64) * scale[:, :, None]
    x = floats(bits).astype(np.float64)
    exact, intended = x @ rounded.reshape(16, inputs).T, x @ dense.T
    assert np.linalg.norm(exact - intended) < 0.004 * np.linalg.norm(intended)
    found = {rows: tile_product(packed, scale, bits, rows, warps) for rows in (1, 8, 9, 16)}
    for rows, out in found.items():
        assert np.abs(out - exact[:rows]).max() < 2e-6 * np.abs(exact).max() + 1e-6
        assert np.array_equal(out, found[16][:rows])
    norms = rng.uniform(0.5, 2.0, 16).astype(F32)
    assert np.array_equal(tile_product(packed, scale, bits, 9, warps, norms), found[9] * norms[:9, None])


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("sets", [1, 2])
@pytest.mark.parametrize(("first", "last", "keeps_x"), [(3, 7, True), (0, 4, False), (2, 12, False), (5, 5, True)])
def test_a_warp_multiplies_the_chunks_that_it_fetched(stages, sets, first, last, keeps_x):
    """The ring: what a turn finds in its stage is its own chunk; none is filled while it is waited for or read."""
    units, block, grid = 7, 1, 3
    ring, pending = [None] * stages, []
    ahead = SimpleNamespace(unit=block, set=0, block=first, stage=0)

    def fetch_next():
        if ahead.unit < units and first < last:
            assert ahead.stage not in [stage for stage, _ in pending]
            pending.append((ahead.stage, (ahead.unit, ahead.set, ahead.block)))
            if sets == 2:
                ahead.set ^= 1
            if ahead.set == 0:
                ahead.block += 0 if keeps_x else CHUNK
                if keeps_x or ahead.block >= last:
                    ahead.block, ahead.unit = first, ahead.unit + grid
        else:
            pending.append((None, None))  # an empty group
        ahead.stage = (ahead.stage + 1) % stages

    for _ in range(stages - 1):
        fetch_next()
    stage = 0
    for unit in range(block, units, grid):
        for at in range(first, last, CHUNK):
            for number_of_set in range(sets):
                while len(pending) > stages - 2:  # wait_group
                    filled, chunk = pending.pop(0)
                    if filled is not None:
                        ring[filled] = chunk
                fetch_next()
                assert pending[-1][0] != stage
                assert ring[stage] == (unit, number_of_set, at)
                stage = (stage + 1) % stages


def transposed(words):
    """movmatrix.trans: lane (g, t) holds row g, columns 2t and 2t + 1 of eight by eight; then of the transpose."""
    matrix = np.zeros((8, 8), np.uint16)
    matrix[G, 2 * T], matrix[G, 2 * T + 1] = low(words), high(words)
    return paired(matrix[2 * T, G], matrix[2 * T + 1, G])


def registers(rows, at):
    """[32, 4]: the eight bfloat16 of each lane's row from `at` on."""
    return np.stack([rows[lane, place : place + 8].view(U32) for lane, place in enumerate(at)])


def part_scores(queries, keys):
    """[16, 32] of 16 pairs and the 32 keys of a warp, from the lanes' registers."""
    size, score = keys.shape[1], np.zeros((4, 32, 4), F32)
    for d in range(size // 64):
        for half in range(2):
            at = 64 * d + 16 * T + 8 * half
            a, b = registers(queries[G], at), registers(queries[G + 8], at)
            for i in range(4):
                k = registers(keys[8 * i + G], at)
                score[i] = multiply(score[i], np.stack((a[:, 0], b[:, 0], a[:, 1], b[:, 1]), 1), k[:, :2])
                score[i] = multiply(score[i], np.stack((a[:, 2], b[:, 2], a[:, 3], b[:, 3]), 1), k[:, 2:])
    found = np.full((16, 32), np.nan, F32)
    for i in range(4):
        for side in range(2):
            for e in range(2):
                found[G + 8 * side, 8 * i + 2 * T + e] = score[i][:, 2 * side + e]
    return found


def part_weighted(weights, values):
    """[16, size] of weights [16, 32] bits times values [32, size] bits, from the lanes' registers."""
    size = values.shape[1]
    found = np.full((16, size), np.nan, F32)
    weight = [
        [paired(weights[G + 8 * side, 8 * i + 2 * T], weights[G + 8 * side, 8 * i + 2 * T + 1]) for side in range(2)]
        for i in range(4)
    ]
    for d in range(size // 32):
        v = [registers(values[8 * i + G], 32 * d + 8 * T) for i in range(4)]
        for q in range(4):
            sums = np.zeros((32, 4), F32)
            for j in range(2):
                a = np.stack((*weight[2 * j], *weight[2 * j + 1]), 1)
                b = np.stack((transposed(v[2 * j][:, q]), transposed(v[2 * j + 1][:, q])), 1)
                sums = multiply(sums, a, b)
            for side in range(2):
                for e in range(2):
                    found[G + 8 * side, 32 * d + 8 * T + 2 * q + e] = sums[:, 2 * side + e]
    return found


@pytest.mark.parametrize("size", [64, 128])
def test_lanes_of_attention_hold_scores_and_weighted_values(size):
    rng = np.random.default_rng(size)
    queries, keys, values = (words_of(rng.standard_normal((count, size))) for count in (16, 32, 32))
    exact = floats(queries).astype(np.float64) @ floats(keys).astype(np.float64).T
    assert np.abs(part_scores(queries, keys) - exact).max() < 1e-5
    weights = words_of(rng.uniform(size=(16, 32)))
    exact = floats(weights).astype(np.float64) @ floats(values).astype(np.float64)
    assert np.abs(part_weighted(weights, values) - exact).max() < 1e-5


def merged(parts):
    """Parts (best, total, weighted), in base 2, added up in order."""
    top = np.max([best for best, _, _ in parts])
    total, weighted = F32(0), np.zeros_like(parts[0][2])
    for best, own, values in parts:
        factor = F32(0) if best == -np.inf else np.exp2(F32(best - top))
        total = F32(np.float64(own) * factor + total)
        weighted = (values.astype(np.float64) * factor + weighted).astype(F32)
    return top, total, weighted


def attended(queries, keys, values, position, rows, window, is_rounded=True):
    """[rows, size]: one head's rows at `position`, segment by segment, part by part; arguments are of all."""
    size = queries.shape[1]
    factor, out = F32(size**-0.5 * np.log2(np.e)), []
    first = max(position - window + 1, 0) // SEGMENT if window else 0
    segments = (position + rows - 1) // SEGMENT - first + 1
    own = np.zeros((16, size), np.uint16)
    own[:rows] = queries[position : position + rows]
    place = position + np.arange(16)
    found = [[] for _ in range(rows)]
    for segment in range(first, first + segments):
        parts = [[] for _ in range(rows)]
        for warp in range(8):
            start = segment * SEGMENT + warp * 32
            held_keys, held_values = np.zeros((2, 32, size), np.uint16)
            there = max(0, min(32, position + rows - start))
            held_keys[:there], held_values[:there] = keys[start : start + there], values[start : start + there]
            key = start + np.arange(32)
            seen = (key <= place[:, None]) & (np.arange(16) < rows)[:, None]
            if window:
                seen &= key > place[:, None] - window
            score = np.where(seen, part_scores(own, held_keys) * factor, -np.inf).astype(F32)
            best = score.max(1)
            with np.errstate(invalid="ignore"):
                weights = np.where((best == -np.inf)[:, None], 0, np.exp2(score - best[:, None])).astype(F32)
            if is_rounded:
                weighted = part_weighted(words_of(weights), held_values)
            else:
                weighted = weights.astype(np.float64) @ floats(held_values)
            for row in range(rows):
                parts[row].append((best[row], weights[row].sum(dtype=F32), weighted[row]))
        for row in range(rows):
            found[row].append(merged(parts[row]))
    for own_segments in found:
        _, total, weighted = own_segments[0] if segments == 1 else merged(own_segments)
        out.append(weighted / total)
    return np.stack(out)


@pytest.fixture(scope="module")
def head_of_text():
    """queries, keys and values of one head at 560 positions, bfloat16 bits."""
    rng = np.random.default_rng(7)
    return [words_of(rng.standard_normal((560, 64)) * factor) for factor in (1.5, 1.5, 1.0)]


@pytest.mark.parametrize("window", [0, 40, 300])
@pytest.mark.parametrize(("position", "rows"), [(0, 1), (3, 16), (250, 16), (255, 2), (540, 16)])
def test_parts_and_segments_in_order_are_the_softmax_over_all_keys(head_of_text, position, rows, window):
    queries, keys, values = (floats(bits).astype(np.float64) for bits in head_of_text)
    place, key = position + np.arange(rows)[:, None], np.arange(position + rows)
    scores = queries[position : position + rows] @ keys[: position + rows].T * 64**-0.5
    hidden = (key > place) | (key <= place - window if window else False)
    weights = np.exp(np.where(hidden, -np.inf, scores - scores.max(1, keepdims=True)))
    exact = weights / weights.sum(1, keepdims=True) @ values[: position + rows]
    found = attended(*head_of_text, position, rows, window, is_rounded=False)
    assert np.linalg.norm(found - exact) < 2e-6 * np.linalg.norm(exact)
    found = attended(*head_of_text, position, rows, window)
    assert np.linalg.norm(found - exact) < 0.004 * np.linalg.norm(exact)


@pytest.mark.parametrize("window", [0, 40, 300])
@pytest.mark.parametrize(("position", "rows"), [(250, 16), (290, 9), (505, 16)])
def test_a_rows_attention_has_the_same_bits_alone(head_of_text, position, rows, window):
    """Also where the rows before it begin in an earlier segment, or those behind it end in a later one."""
    together = attended(*head_of_text, position, rows, window)
    for row in range(0, rows, 3):
        assert np.array_equal(together[row : row + 1], attended(*head_of_text, position + row, 1, window))
