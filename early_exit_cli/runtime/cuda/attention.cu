// Grouped-query attention of 1 to 16 rows over a KV cache, with the norm of queries and keys where there is one, the
// rotary embedding, and writing the rows' keys and values.
//
// A segment is 256 keys, from multiples of 256 on; a warp has 32 of them. A block of threads has one segment, one key
// head and 16 pairs (row, query head of that key head). Order of sums of a row: the softmax's and the weighted values'
// within 32 keys the tensor core's; those of a segment's eight parts in order; the segments in order. Keys that a row
// may not see count as exact zeros. So a row's bits depend on its position alone: not on the rows beside it, the
// buffer, or the number of blocks.

#include "common.cuh"

#define SEGMENT 256
#define PART 32
#define PAIRS 16
#define WARPS 8

struct Attention {
    const Place *place;
    const u16 *qkv;           // [rows, (query_heads + 2 kv_heads) * head_dim]
    const u16 *qk_norm;       // [query_heads + kv_heads, head_dim] or null
    u16 *out;                 // [rows, query_heads * head_dim]
    int *arrived;             // [kv_heads, blocks of pairs], zeros between passes
    int block, rows, query_heads, kv_heads, window;  // window 0: all keys before
    float scale, eps;
};

__device__ __forceinline__ u32 transposed(u32 value)
{
    u32 result;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(value));
    return result;
}

// One head of one row, and its rotary tables: a lane has dimensions lane, lane + 32, ...
template <int DIM> struct HeadOfRow {
    u16 x[DIM / 32], cos[DIM / 32], sin[DIM / 32];

    __device__ __forceinline__ void load(const u16 *from, const u16 *cos_from, const u16 *sin_from, bool is_there,
                                         int lane)
    {
#pragma unroll
        for (int j = 0; j < DIM / 32; j++) {
            x[j] = is_there ? from[lane + 32 * j] : 0;
            cos[j] = is_there ? cos_from[lane + 32 * j] : 0;
            sin[j] = is_there ? sin_from[lane + 32 * j] : 0;
        }
    }

    // Normed where `norm` is given, then turned (Su et al. 2021).
    __device__ __forceinline__ void store(u16 *to, const u16 *norm, float eps, int lane) const
    {
        float value[DIM / 32], square = 0.f;
#pragma unroll
        for (int j = 0; j < DIM / 32; j++) {
            value[j] = widen(x[j]);
            square += value[j] * value[j];
        }
        if (norm) {
            const float factor = rsqrtf(warp_sum(square) / DIM + eps);
#pragma unroll
            for (int j = 0; j < DIM / 32; j++)
                value[j] = rounded(rounded(value[j] * factor) * widen(norm[lane + 32 * j]));
        }
#pragma unroll
        for (int j = 0; j < DIM / 32; j++)
            to[lane + 32 * j] = narrow(value[j] * widen(cos[j]) + value[j ^ (DIM / 64)] * widen(sin[j]));
    }
};

template <int DIM>
__device__ __forceinline__ void attention(const Attention &p)
{
    // Of rows in shared memory, so that several ask different banks.
    constexpr int STRIDE = DIM + 8, WEIGHTED = DIM + 4;
    __shared__ __align__(16) u16 queries[PAIRS * STRIDE], fresh_keys[MOST_ROWS * STRIDE],
        fresh_values[MOST_ROWS * STRIDE];
    __shared__ float maxima[WARPS][PAIRS], totals[WARPS][PAIRS];
    __shared__ int is_last;
    extern __shared__ __align__(16) float weighted[];  // [warps, pairs, WEIGHTED]

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane >> 2, t = lane & 3;
    const int head = blockIdx.y, group = p.query_heads / p.kv_heads, first_pair = blockIdx.z * PAIRS;
    const int pairs = min(PAIRS, p.rows * group - first_pair);
    const long long position = p.place->position, capacity = p.place->capacity;
    const int first_segment = p.window ? (int)(max(position - p.window + 1, 0ll) / SEGMENT) : 0;
    const int segments = (int)((position + p.rows - 1) / SEGMENT) - first_segment + 1;
    const int active = min(segments, (int)gridDim.x);
    if ((int)blockIdx.x >= active)
        return;
    const long long cached = ((long long)p.block * p.kv_heads + head) * capacity * DIM;
    u16 *keys = p.place->keys + cached, *values = p.place->values + cached;
    const int row_width = (p.query_heads + 2 * p.kv_heads) * DIM;
    bool is_waiting = true;

    for (int segment = first_segment + blockIdx.x; segment < first_segment + segments; segment += gridDim.x) {
        // Keys and values of earlier tokens, all on their way at once. Lane (g, t) has of key 8i + g dimensions 64d +
        // 16t .. + 15, of value 8i + g dimensions 32d + 8t .. + 7.
        const long long start = (long long)segment * SEGMENT + warp * PART;
        uint4 k[4][DIM / 64][2], v[4][DIM / 32];
        const uint4 nothing = make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const long long key = start + 8 * i + g;
            const bool is_old = key < position;
#pragma unroll
            for (int d = 0; d < DIM / 64; d++)
#pragma unroll
                for (int half = 0; half < 2; half++)
                    k[i][d][half] = is_old ? *(const uint4 *)(keys + key * DIM + 64 * d + 16 * t + 8 * half) : nothing;
#pragma unroll
            for (int d = 0; d < DIM / 32; d++)
                v[i][d] = is_old ? *(const uint4 *)(values + key * DIM + 32 * d + 8 * t) : nothing;
        }
        if (is_waiting) {
            wait_for_predecessor();
            let_successor_start();
            is_waiting = false;
            // A warp has two pairs and two rows; all that they need is asked for before anything is waited for.
            HeadOfRow<DIM> query[2], key[2];
            u16 value[2][DIM / 32];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int pair = warp + i * WARPS, row = (first_pair + pair) / group;
                const long long at = (position + row) * DIM, own = (position + pair) * DIM;
                query[i].load(p.qkv + (long long)row * row_width + (head * group + (first_pair + pair) % group) * DIM,
                              p.place->cos + at, p.place->sin + at, pair < pairs, lane);
                const u16 *from = p.qkv + (long long)pair * row_width + (p.query_heads + head) * DIM;
                key[i].load(from, p.place->cos + own, p.place->sin + own, pair < p.rows, lane);
#pragma unroll
                for (int j = 0; j < DIM / 32; j++)
                    value[i][j] = pair < p.rows ? from[p.kv_heads * DIM + lane + 32 * j] : 0;
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int pair = warp + i * WARPS;
                const int query_head = head * group + (first_pair + pair) % group;
                query[i].store(queries + pair * STRIDE, p.qk_norm ? p.qk_norm + query_head * DIM : nullptr, p.eps,
                               lane);
                key[i].store(fresh_keys + pair * STRIDE, p.qk_norm ? p.qk_norm + (p.query_heads + head) * DIM : nullptr,
                             p.eps, lane);
#pragma unroll
                for (int j = 0; j < DIM / 32; j++)
                    fresh_values[pair * STRIDE + lane + 32 * j] = value[i][j];
            }
        }
        __syncthreads();
        if (start + PART > position && start < position + p.rows) {  // the rows' own keys and values
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const long long row = start + 8 * i + g - position;
                if (row < 0 || row >= p.rows)
                    continue;
                const u16 *key = fresh_keys + row * STRIDE, *value = fresh_values + row * STRIDE;
                const long long to = (position + row) * DIM;
#pragma unroll
                for (int d = 0; d < DIM / 64; d++)
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        k[i][d][half] = *(const uint4 *)(key + 64 * d + 16 * t + 8 * half);
                        if (blockIdx.z == 0)
                            *(uint4 *)(keys + to + 64 * d + 16 * t + 8 * half) = k[i][d][half];
                    }
#pragma unroll
                for (int d = 0; d < DIM / 32; d++) {
                    v[i][d] = *(const uint4 *)(value + 32 * d + 8 * t);
                    if (blockIdx.z == 0)
                        *(uint4 *)(values + to + 32 * d + 8 * t) = v[i][d];
                }
            }
        }

        float score[4][4] = {};  // [8 keys][pairs g, g; g + 8, g + 8]
#pragma unroll
        for (int d = 0; d < DIM / 64; d++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const uint4 a = *(const uint4 *)(queries + g * STRIDE + 64 * d + 16 * t + 8 * half);
                const uint4 b = *(const uint4 *)(queries + (g + 8) * STRIDE + 64 * d + 16 * t + 8 * half);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    multiply(score[i], a.x, b.x, a.y, b.y, k[i][d][half].x, k[i][d][half].y);
                    multiply(score[i], a.z, b.z, a.w, b.w, k[i][d][half].z, k[i][d][half].w);
                }
            }

        float best[2] = {-INFINITE, -INFINITE}, total[2] = {};
        u32 weight[4][2];
#pragma unroll
        for (int side = 0; side < 2; side++) {
            const int pair = g + 8 * side;
            const long long row = position + (first_pair + pair) / group;
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const long long key = start + 8 * i + 2 * t + e;
                    const bool is_seen = pair < pairs && key <= row && (!p.window || key > row - p.window);
                    score[i][2 * side + e] = is_seen ? score[i][2 * side + e] * (p.scale * LOG2_E) : -INFINITE;
                    best[side] = fmaxf(best[side], score[i][2 * side + e]);
                }
            best[side] = fmaxf(best[side], __shfl_xor_sync(0xffffffffu, best[side], 1));
            best[side] = fmaxf(best[side], __shfl_xor_sync(0xffffffffu, best[side], 2));
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float first = best[side] == -INFINITE ? 0.f : exp2_of(score[i][2 * side] - best[side]);
                const float second = best[side] == -INFINITE ? 0.f : exp2_of(score[i][2 * side + 1] - best[side]);
                total[side] += first + second;
                weight[i][side] = pack(first, second);
            }
            total[side] += __shfl_xor_sync(0xffffffffu, total[side], 1);
            total[side] += __shfl_xor_sync(0xffffffffu, total[side], 2);
            if (t == 0) {
                maxima[warp][pair] = best[side];
                totals[warp][pair] = total[side];
            }
        }
#pragma unroll
        for (int d = 0; d < DIM / 32; d++)
        {
            float sum[4][4] = {};  // [q]: columns n of these eight are dimensions 32d + 8 (n / 2) + 2q + n % 2
#pragma unroll
            for (int q = 0; q < 4; q++)
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    const uint4 &upper = v[2 * j][d], &lower = v[2 * j + 1][d];
                    const u32 b0 = transposed(q == 0 ? upper.x : q == 1 ? upper.y : q == 2 ? upper.z : upper.w);
                    const u32 b1 = transposed(q == 0 ? lower.x : q == 1 ? lower.y : q == 2 ? lower.z : lower.w);
                    multiply(sum[q], weight[2 * j][0], weight[2 * j][1], weight[2 * j + 1][0], weight[2 * j + 1][1], b0,
                             b1);
                }
#pragma unroll
            for (int side = 0; side < 2; side++) {
                float4 *to = (float4 *)(weighted + (warp * PAIRS + g + 8 * side) * WEIGHTED + 32 * d + 8 * t);
                to[0] = make_float4(sum[0][2 * side], sum[0][2 * side + 1], sum[1][2 * side], sum[1][2 * side + 1]);
                to[1] = make_float4(sum[2][2 * side], sum[2][2 * side + 1], sum[3][2 * side], sum[3][2 * side + 1]);
            }
        }
        __syncthreads();

        // The eight parts in order; a thread has one pair and DIM / 16 dimensions.
        constexpr int OWN = DIM / PAIRS;
        const int pair = threadIdx.x / PAIRS, dimension = threadIdx.x % PAIRS * OWN;
        float top = -INFINITE, sum_of_weights = 0.f, sum[OWN] = {};
#pragma unroll
        for (int w = 0; w < WARPS; w++)
            top = fmaxf(top, maxima[w][pair]);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float factor = maxima[w][pair] == -INFINITE ? 0.f : exp2_of(maxima[w][pair] - top);
            sum_of_weights += totals[w][pair] * factor;
#pragma unroll
            for (int d = 0; d < OWN; d++)
                sum[d] += weighted[(w * PAIRS + pair) * WEIGHTED + dimension + d] * factor;
        }
        const int row = (first_pair + pair) / group, query_head = head * group + (first_pair + pair) % group;
        u16 *out = p.out + ((long long)row * p.query_heads + query_head) * DIM + dimension;
        if (segments == 1) {
            if (pair < pairs)
#pragma unroll
                for (int d = 0; d < OWN; d++)
                    out[d] = narrow(sum[d] / sum_of_weights);
            return;
        }
        // [segments, kv_heads, blocks of pairs, pairs, DIM + 2]
        const long long unit = (long long)PAIRS * (DIM + 2), place = blockIdx.y * gridDim.z + blockIdx.z;
        float *partial =
            p.place->partial + ((segment - first_segment) * (long long)(gridDim.y * gridDim.z) + place) * unit;
        partial += pair * (DIM + 2);
#pragma unroll
        for (int d = 0; d < OWN; d++)
            partial[dimension + d] = sum[d];
        if (threadIdx.x % PAIRS == 0) {
            partial[DIM] = top;
            partial[DIM + 1] = sum_of_weights;
        }
        __syncthreads();  // shared memory is free for the next segment
        if (segment + (int)gridDim.x < first_segment + segments)
            continue;

        // The last block of threads to arrive adds the segments up, in order.
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) {
            is_last = atomicAdd(p.arrived + place, 1) == active - 1;
            if (is_last)
                p.arrived[place] = 0;
        }
        __syncthreads();
        if (!is_last)
            return;
        __threadfence();
        const float *found = p.place->partial + place * unit + pair * (DIM + 2);
        const long long step = (long long)(gridDim.y * gridDim.z) * unit;
        top = -INFINITE;
#pragma unroll 4
        for (int s = 0; s < segments; s++)
            top = fmaxf(top, __ldcg(found + s * step + DIM));
        sum_of_weights = 0.f;
#pragma unroll
        for (int d = 0; d < OWN; d++)
            sum[d] = 0.f;
#pragma unroll 4
        for (int s = 0; s < segments; s++) {
            const float best_there = __ldcg(found + s * step + DIM), total_there = __ldcg(found + s * step + DIM + 1);
            float there[OWN];
#pragma unroll
            for (int d = 0; d < OWN; d += 2)
                *(float2 *)(there + d) = __ldcg((const float2 *)(found + s * step + dimension + d));
            const float factor = best_there == -INFINITE ? 0.f : exp2_of(best_there - top);
            sum_of_weights += total_there * factor;
#pragma unroll
            for (int d = 0; d < OWN; d++)
                sum[d] += there[d] * factor;
        }
        if (pair < pairs)
#pragma unroll
            for (int d = 0; d < OWN; d++)
                out[d] = narrow(sum[d] / sum_of_weights);
    }
}

#define ATTENTION(dim)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, 1) attention_##dim(const __grid_constant__ Attention p)   \
    {                                                                                                                  \
        attention<dim>(p);                                                                                             \
    }

ATTENTION(64)
ATTENTION(128)
