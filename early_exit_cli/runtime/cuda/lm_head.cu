// The LM head over 1 to 16 rows: logits = x[rows, K] W[vocab, K]^T in bfloat16, and what is asked of them: the best
// one's place, the lowest where several are equal, and the entropy. Tiles, lanes and the order of sums as in
// product.cu; here the tensor core's sums run on over a warp's whole part of K.

#include "common.cuh"

#define WARPS 8

struct Best {
    float value;
    int place;
    float top, total, mean;   // of exp(x - top): the sum, and the sum times x
};

struct LMHead {
    const u16 *weight;        // [vocab, K]
    const u16 *x;             // [rows, K]
    u16 *logits;              // [rows, vocab] or null
    Best *best;               // [rows, gridDim.x] or null
    int inputs, vocab, rows;
};

// A NaN counts as infinite, so that it is found.
__device__ __forceinline__ void consider(Best &best, float value, int place)
{
    if (value != value)
        value = INFINITE;
    if (value > best.value || (value == best.value && place < best.place)) {
        best.value = value;
        best.place = place;
    }
}

__device__ __forceinline__ void weigh(Best &best, float value)
{
    if (value > best.top) {
        const float factor = exp2_of((best.top - value) * LOG2_E);
        best.total *= factor;
        best.mean *= factor;
        best.top = value;
    }
    const float weight = exp2_of((value - best.top) * LOG2_E);
    best.total += weight;
    best.mean += weight * value;
}

__device__ __forceinline__ void merge(Best &best, const Best &other)
{
    consider(best, other.value, other.place);
    if (other.top == -INFINITE)
        return;
    const float top = fmaxf(best.top, other.top);
    const float ours = best.top == -INFINITE ? 0.f : exp2_of((best.top - top) * LOG2_E),
                theirs = exp2_of((other.top - top) * LOG2_E);
    best.total = best.total * ours + other.total * theirs;
    best.mean = best.mean * ours + other.mean * theirs;
    best.top = top;
}

__device__ __forceinline__ Best nobody()
{
    return Best{-INFINITE, 0x7fffffff, -INFINITE, 0.f, 0.f};
}

__device__ __forceinline__ Best from_lane(const Best &best, int step)
{
    return Best{__shfl_xor_sync(0xffffffffu, best.value, step), __shfl_xor_sync(0xffffffffu, best.place, step),
                __shfl_xor_sync(0xffffffffu, best.top, step), __shfl_xor_sync(0xffffffffu, best.total, step),
                __shfl_xor_sync(0xffffffffu, best.mean, step)};
}

struct Rows {
    uint4 of[2][2];  // [rows g, g + 8][16 bytes each]: k = 16t .. 16t + 15
};

__device__ __forceinline__ void load(Rows &found, const LMHead &p, int tile, int block, int g, int t)
{
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const u16 *from = p.weight + (long long)(tile * 16 + half * 8 + g) * p.inputs + block * 64 + t * 16;
        found.of[half][0] = stream16(from);
        found.of[half][1] = stream16(from + 8);
    }
}

template <int COLUMNS>
__device__ __forceinline__ void accumulate(float (&sum)[COLUMNS][4], const Rows &w, const LMHead &p, int block, int g,
                                           int t)
{
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) {
        uint4 first = make_uint4(0, 0, 0, 0), second = first;
        if (c * 8 + g < p.rows) {
            const uint4 *from = (const uint4 *)(p.x + (long long)(c * 8 + g) * p.inputs + block * 64 + t * 16);
            first = from[0];
            second = from[1];
        }
        multiply(sum[c], w.of[0][0].x, w.of[1][0].x, w.of[0][0].y, w.of[1][0].y, first.x, first.y);
        multiply(sum[c], w.of[0][0].z, w.of[1][0].z, w.of[0][0].w, w.of[1][0].w, first.z, first.w);
        multiply(sum[c], w.of[0][1].x, w.of[1][1].x, w.of[0][1].y, w.of[1][1].y, second.x, second.y);
        multiply(sum[c], w.of[0][1].z, w.of[1][1].z, w.of[0][1].w, w.of[1][1].w, second.z, second.w);
    }
}

#ifndef AHEAD
#define AHEAD 3
#endif

template <int COLUMNS>
__device__ __forceinline__ void lm_head(const LMHead &p)
{
    __shared__ __align__(16) float sums[WARPS * COLUMNS * 128];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane >> 2, t = lane & 3;
    const int blocks = p.inputs / 64, tiles = p.vocab / 16;
    const int first = warp * blocks / WARPS, last = (warp + 1) * blocks / WARPS;
    const int n = threadIdx.x & 15, row = threadIdx.x >> 4;  // what this thread adds up, 16 rows at most
    Best best = nobody();

    // This warp's blocks of all its tiles, one after another; AHEAD of them are on their way.
    const int own = last - first, count = own * ((tiles - (int)blockIdx.x + (int)gridDim.x - 1) / (int)gridDim.x);
    Rows ahead[AHEAD];
    int next_tile = blockIdx.x, next_block = first, asked = 0;
    auto ask = [&](Rows &found) {
        if (asked < count) {
            load(found, p, next_tile, next_block, g, t);
            asked++;
            if (++next_block == last) {
                next_block = first;
                next_tile += gridDim.x;
            }
        }
    };
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
        ask(ahead[i]);
    wait_for_predecessor();
    let_successor_start();

    float sum[COLUMNS][4] = {};
    auto finish = [&](int tile) {
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            ((float4 *)sums)[(warp * COLUMNS + c) * 32 + lane] =
                make_float4(sum[c][0], sum[c][1], sum[c][2], sum[c][3]);
#pragma unroll
            for (int e = 0; e < 4; e++)
                sum[c][e] = 0.f;
        }
        __syncthreads();
        if (row < p.rows) {
            const int place = (row >> 3) * 128 + ((n & 7) * 4 + ((row & 7) >> 1)) * 4 + (n >> 3) * 2 + (row & 1);
            float total = 0.f;
            for (int w = 0; w < WARPS; w++)
                total += sums[w * COLUMNS * 128 + place];
            total = rounded(total);
            if (p.logits)
                p.logits[(long long)row * p.vocab + tile * 16 + n] = narrow(total);
            consider(best, total, tile * 16 + n);
            weigh(best, total);
        }
        __syncthreads();
    };
    if (own == 0)
        for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x)
            finish(tile);
    int tile = blockIdx.x, block = first;
    for (int i = 0; i < count; i += AHEAD)
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            if (i + j >= count)
                break;
            const Rows now = ahead[j];
            ask(ahead[j]);
            accumulate<COLUMNS>(sum, now, p, block, g, t);
            if (++block == last) {
                finish(tile);
                block = first;
                tile += gridDim.x;
            }
        }
    if (p.best) {
        for (int step = 8; step; step /= 2)
            merge(best, from_lane(best, step));
        if (n == 0 && row < p.rows)
            p.best[row * gridDim.x + blockIdx.x] = best;
    }
}

#define LM_HEAD(columns)                                                                                               \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, 2) lm_head_##columns(const __grid_constant__ LMHead p)    \
    {                                                                                                                  \
        lm_head<columns>(p);                                                                                           \
    }

LM_HEAD(1)
LM_HEAD(2)

struct Pick {
    const Best *best;         // [rows, parts]
    const long long *vocab;   // tokens of the columns, or null: the columns are tokens
    long long *token;         // [rows]: the best one's, -1 where it is not finite
    float *value;             // [rows]: the best logit
    float *entropy;           // [rows]: of the softmax, in nats; or null
    int parts;
};

// One warp a row.
extern "C" __global__ void __launch_bounds__(32) pick(const __grid_constant__ Pick p)
{
    wait_for_predecessor();
    let_successor_start();
    Best best = nobody();
    for (int part = threadIdx.x; part < p.parts; part += 32)
        merge(best, p.best[blockIdx.x * p.parts + part]);
    for (int step = 16; step; step /= 2)
        merge(best, from_lane(best, step));
    if (threadIdx.x == 0) {
        const bool is_finite = best.value < INFINITE && best.value > -INFINITE;
        p.token[blockIdx.x] = !is_finite ? -1 : p.vocab ? p.vocab[best.place] : best.place;
        p.value[blockIdx.x] = best.value;
        if (p.entropy)
            p.entropy[blockIdx.x] = best.top + __logf(best.total) - best.mean / best.total;
    }
}
