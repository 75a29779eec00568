// y[rows, N] = x[rows, K] dequant(W[N, K])^T for 1 to 16 rows, W in NF4 as bitsandbytes packs it.
//
// The weight is the tensor core's left operand, 16 of its rows a tile; tokens are columns of the right one, eight at a
// time, so that one to eight of them cost the same. Any order of k within 64 may be taken as long as both sides take
// it: lane (g, t) takes k = 16t .. 16t + 15, eight contiguous bytes of rows g and g + 8 and 32 of x. A byte, first
// value in the high nibble, becomes two bfloat16 by one look-up in a table of 256 words, of which every lane has its
// own copy (no bank is asked twice).
//
// A warp has a part of K, and fetches its weights for itself: chunks of 256 k, 128 bytes of each of 16 rows, on their
// way into a ring in shared memory while earlier ones are multiplied. Nobody waits for other warps but at a tile's end.
// Where a warp's part is one chunk, it keeps its part of x in registers; else two tiles are multiplied with what is
// read of x (`SETS`).
//
// Order of sums of one output: within 64 k the tensor core's, from zero; these, times their scale, in order of k over
// the part of K that a warp has; the warps' sums in order of warps. The parts depend on K alone.

#include "common.cuh"

#define TABLE_WORDS (256 * 32)

struct Product {
    const u8 *weight;         // [N, K / 2]; gated [2 N, K / 2], gate rows then up rows
    const float *scale;       // [rows of weight, K / 64]
    const u16 *bias;          // [rows of weight] or null
    const u16 *x;             // [rows, K]
    const float *squares;     // [rows, parts]: their sum is that of squares of what x was scaled from; null: x as it is
    u16 *out;                 // [rows, N]
    const u16 *residual;      // [rows, N] or null: out = residual + product
    const u16 *next_norm;     // [N]: with residual, the weight of the norm that reads out
    u16 *scaled;              // [rows, N]: out times next_norm
    float *squares_out;       // [rows, N / 16]: of out
    int inputs, outputs, rows, parts;
    int gated;                // out = silu(gate) * up
    float size, eps;          // of the norm: 1 / sqrt(sum / size + eps)
};

__constant__ u16 codes[16] = {  // the NF4 values (Dettmers et al. 2023, appendix E) in bfloat16
    0xbf80, 0xbf32, 0xbf06, 0xbeca, 0xbe92, 0xbe3d, 0xbdba, 0x0000,
    0x3da3, 0x3e25, 0x3e7c, 0x3ead, 0x3ee2, 0x3f10, 0x3f39, 0x3f80};

__device__ __forceinline__ void fill_table(u32 *table)
{
    for (int byte = threadIdx.x / 32; byte < 256; byte += blockDim.x / 32)
        table[byte * 32 + threadIdx.x % 32] = codes[byte >> 4] | (u32)codes[byte & 15] << 16;
}

#ifndef WARPS
#define WARPS 16
#endif
#ifndef STAGES
#define STAGES 4
#endif
#define CHUNK 4                                         // blocks of 64 k
#define PACKED_BYTES (16 * 32 * CHUNK)                  // of a stage: the weights; scales [16][CHUNK] stand behind them
#define STAGE_BYTES (PACKED_BYTES + 16 * 4 * CHUNK)

template <int BYTES> __device__ __forceinline__ void fetch(u32 to, const void *from, int bytes)
{
    if (BYTES == 16)
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
                     : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// What a lane fetches of every chunk: 16 bytes of rows lane / 8, + 4, + 8, + 12, and a scale of rows lane / 4 and + 8.
// The 16 bytes that come i-th in row r lie at place i ^ 2 (r % 4), so that four rows are read from different banks.
struct Fetcher {
    const char *packed, *scale;
    u32 packed_to, scale_to;
    int row_bytes, row_scales;

    __device__ __forceinline__ Fetcher(const Product &p, u32 ring, int lane)
    {
        row_bytes = p.inputs / 2;
        row_scales = p.inputs / 64 * 4;
        packed = (const char *)p.weight + (long long)(lane / 8) * row_bytes + lane % 8 * 16;
        scale = (const char *)p.scale + (long long)(lane / 4) * row_scales + lane % 4 * 4;
        packed_to = ring + lane / 8 * 128 + ((lane % 8 ^ (lane / 8 & 3) << 1) << 4);
        scale_to = ring + PACKED_BYTES + lane / 4 * CHUNK * 4 + lane % 4 * 4;
    }

    // Blocks from `last` on become zeros.
    __device__ __forceinline__ void chunk(int stage, int row, int block, int last, int lane) const
    {
        const char *from = packed + (long long)row * row_bytes + block * 32;
        const char *scale_from = scale + (long long)row * row_scales + block * 4;
        const int bytes = block + lane % 8 / 2 < last ? 16 : 0, scale_bytes = block + lane % 4 < last ? 4 : 0;
#pragma unroll
        for (int i = 0; i < 4; i++)
            fetch<16>(packed_to + stage * STAGE_BYTES + i * 512, from + i * 4 * row_bytes, bytes);
#pragma unroll
        for (int i = 0; i < 2; i++)
            fetch<4>(scale_to + stage * STAGE_BYTES + i * 8 * CHUNK * 4, scale_from + i * 8 * row_scales, scale_bytes);
    }
};

// A warp's part of x for one chunk: lane (g, t) has k = 16t .. 16t + 15 of each block for tokens g and g + 8.
template <int COLUMNS> struct Inputs {
    uint4 of[CHUNK][COLUMNS][2];

    __device__ __forceinline__ void load(const Product &p, int block, int last, int g, int t)
    {
#pragma unroll
        for (int i = 0; i < CHUNK; i++)
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) {
                const bool is_there = c * 8 + g < p.rows && block + i < last;
                const uint4 *from =
                    (const uint4 *)(p.x + (long long)(c * 8 + g) * p.inputs + (block + i) * 64 + t * 16);
                of[i][c][0] = is_there ? from[0] : make_uint4(0, 0, 0, 0);
                of[i][c][1] = is_there ? from[1] : make_uint4(0, 0, 0, 0);
            }
    }
};

extern __shared__ __align__(128) char shared[];  // the table, the warps' rings, their sums, the rows' norms

__device__ __forceinline__ u32 look_up(u32 word, int byte, u32 column)
{
    const u32 moved = byte ? word >> (8 * byte - 7) : word << 7;  // a byte's row of the table is 128 bytes
    return *(const u32 *)(shared + ((moved & 0x7f80u) | column));
}

template <int COLUMNS>
__device__ __forceinline__ void accumulate(float (&sum)[COLUMNS][4], const char *stage, const Inputs<COLUMNS> &x,
                                           int lane)
{
    const int g = lane >> 2, t = lane & 3;
    const u32 column = lane * 4;
    const float4 upper_scale = *(const float4 *)(stage + PACKED_BYTES + g * CHUNK * 4);
    const float4 lower_scale = *(const float4 *)(stage + PACKED_BYTES + (g + 8) * CHUNK * 4);
    const char *at = stage + g * 128 + (t & 1) * 8;
#pragma unroll
    for (int i = 0; i < CHUNK; i++) {
        const int piece = ((2 * i + (t >> 1)) ^ (g & 3) << 1) << 4;
        const uint2 upper = *(const uint2 *)(at + piece), lower = *(const uint2 *)(at + 1024 + piece);
        float part[COLUMNS][4];
#pragma unroll
        for (int step = 0; step < 4; step++) {
            const u32 above = step < 2 ? upper.x : upper.y, below = step < 2 ? lower.x : lower.y;
            const int byte = 2 * (step & 1);
            const u32 a0 = look_up(above, byte, column), a1 = look_up(below, byte, column);
            const u32 a2 = look_up(above, byte + 1, column), a3 = look_up(below, byte + 1, column);
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) {
                const uint4 &from = x.of[i][c][step / 2];
                const u32 b0 = step & 1 ? from.z : from.x, b1 = step & 1 ? from.w : from.y;
                if (step == 0)
                    multiply_first(part[c], a0, a1, a2, a3, b0, b1);
                else
                    multiply(part[c], a0, a1, a2, a3, b0, b1);
            }
        }
        const float above = i == 0 ? upper_scale.x : i == 1 ? upper_scale.y : i == 2 ? upper_scale.z : upper_scale.w;
        const float below = i == 0 ? lower_scale.x : i == 1 ? lower_scale.y : i == 2 ? lower_scale.z : lower_scale.w;
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            sum[c][0] = fmaf(part[c][0], above, sum[c][0]);
            sum[c][1] = fmaf(part[c][1], above, sum[c][1]);
            sum[c][2] = fmaf(part[c][2], below, sum[c][2]);
            sum[c][3] = fmaf(part[c][3], below, sum[c][3]);
        }
    }
}

// What becomes of the sums of a place [row, column]: gate and up, or one output.
__device__ __forceinline__ float finished(const Product &p, float total, const float *norms, int row, int output)
{
    if (p.squares)
        total *= norms[row];
    return p.bias ? total + widen(p.bias[output]) : total;
}

// A set is 16 outputs; with SETS = 2 a block of threads has two at a time: gate and up of the same, or sets i and
// i + half.
template <int SETS, int COLUMNS, bool KEEPS_X>
__device__ __forceinline__ void product(const Product &p)
{
    constexpr int SUMS = WARPS * SETS * COLUMNS * 128;
    constexpr int TURNS = SETS * COLUMNS == 1 ? 2 : 1;  // room for the sums of so many units of work
    // [turns][warps, sets, columns, lanes, 4]
    float *sums = (float *)(shared + TABLE_WORDS * 4 + WARPS * STAGES * STAGE_BYTES);
    float *norms = sums + TURNS * SUMS;                                                // [16]
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane >> 2, t = lane & 3;
    const int blocks = p.inputs / 64, units = p.outputs / 16 / (SETS == 2 && !p.gated ? 2 : 1);
    const int apart = p.gated ? p.outputs : units * 16;  // outputs between the sets
    const int first = warp * blocks / WARPS, last = (warp + 1) * blocks / WARPS;
    const char *ring = shared + TABLE_WORDS * 4 + warp * STAGES * STAGE_BYTES;
    const Fetcher fetcher(p, (u32)__cvta_generic_to_shared(ring), lane);

    // The order of chunks: the first of each set, the second of each set, ... , then the next unit.
    int next_unit = blockIdx.x, next_set = 0, next_block = first, next_stage = 0, stage = 0;
    auto fetch_next = [&]() {
        if (next_unit < units && first < last) {
            fetcher.chunk(next_stage, next_set * apart + next_unit * 16, next_block, last, lane);
            if (SETS == 2)
                next_set ^= 1;
            if (next_set == 0 && (KEEPS_X || (next_block += CHUNK) >= last)) {
                next_block = first;
                next_unit += gridDim.x;
            }
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
        next_stage = next_stage + 1 == STAGES ? 0 : next_stage + 1;
    };
    for (int i = 0; i < STAGES - 1; i++)
        fetch_next();
    fill_table((u32 *)shared);
    wait_for_predecessor();
    let_successor_start();
    Inputs<COLUMNS> x;
    if (KEEPS_X)
        x.load(p, first, last, g, t);
    if (p.squares)
        for (int row = warp; row < p.rows; row += WARPS) {
            float sum = 0.f;
            for (int part = lane; part < p.parts; part += 32)
                sum += p.squares[row * p.parts + part];
            sum = warp_sum(sum);
            if (lane == 0)
                norms[row] = rsqrtf(sum / p.size + p.eps);
        }
    __syncthreads();

    int turn = 0;
    for (int unit = blockIdx.x; unit < units; unit += gridDim.x, turn = (turn + 1) % TURNS) {
        float *own_sums = sums + turn * SUMS;  // of two, the other one may be read still while this one is written
        float sum[SETS][COLUMNS][4] = {};
        for (int block = first; block < last; block += CHUNK) {
            if (!KEEPS_X)
                x.load(p, block, last, g, t);
#pragma unroll
            for (int set = 0; set < SETS; set++) {
                asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
                __syncwarp();  // everybody's pieces are there, and everybody has read the stage that comes next
                fetch_next();
                accumulate<COLUMNS>(sum[set], ring + stage * STAGE_BYTES, x, lane);
                stage = stage + 1 == STAGES ? 0 : stage + 1;
            }
        }
#pragma unroll
        for (int set = 0; set < SETS; set++)
#pragma unroll
            for (int c = 0; c < COLUMNS; c++)
                ((float4 *)own_sums)[((warp * SETS + set) * COLUMNS + c) * 32 + lane] =
                    make_float4(sum[set][c][0], sum[set][c][1], sum[set][c][2], sum[set][c][3]);
        __syncthreads();
        for (int i = threadIdx.x; i < COLUMNS * 128; i += WARPS * 32) {  // 16 threads in a row share a token
            const int n = i & 15, row = i >> 4;
            if (row >= p.rows)
                break;  // padding
            const int place = (row >> 3) * 128 + ((n & 7) * 4 + ((row & 7) >> 1)) * 4 + (n >> 3) * 2 + (row & 1);
            float total[SETS];
#pragma unroll
            for (int set = 0; set < SETS; set++) {
                total[set] = 0.f;
#pragma unroll
                for (int w = 0; w < WARPS; w++)
                    total[set] += own_sums[(w * SETS + set) * COLUMNS * 128 + place];
                total[set] = finished(p, total[set], norms, row, set * apart + unit * 16 + n);
            }
            if (SETS == 2 && p.gated) {
                const float gate = rounded(total[0]), up = rounded(total[SETS - 1]);
                p.out[(long long)row * p.outputs + unit * 16 + n] =
                    narrow(rounded(gate / (1.f + exp2_of(-gate * LOG2_E))) * up);
                continue;
            }
#pragma unroll
            for (int set = 0; set < SETS; set++) {
                const int output = set * apart + unit * 16 + n;
                const long long where = (long long)row * p.outputs + output;
                if (!p.residual) {
                    p.out[where] = narrow(total[set]);
                    continue;
                }
                const float whole = rounded(widen(p.residual[where]) + rounded(total[set]));
                p.out[where] = narrow(whole);
                p.scaled[where] = narrow(whole * widen(p.next_norm[output]));
                const float square = sum_of_16(whole * whole);
                if (n == 0)
                    p.squares_out[row * (p.outputs / 16) + output / 16] = square;
            }
        }
        if (TURNS == 1)
            __syncthreads();
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
}

#define PRODUCT(name, sets, columns, keeps_x)                                                                          \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, 1) product_##name##_##sets##_##columns(                   \
        const __grid_constant__ Product p)                                                                             \
    {                                                                                                                  \
        product<sets, columns, keeps_x>(p);                                                                            \
    }

PRODUCT(short, 1, 1, true)
PRODUCT(short, 1, 2, true)
PRODUCT(short, 2, 1, true)
PRODUCT(short, 2, 2, true)
PRODUCT(long, 1, 1, false)
PRODUCT(long, 1, 2, false)
PRODUCT(long, 2, 1, false)
PRODUCT(long, 2, 2, false)
