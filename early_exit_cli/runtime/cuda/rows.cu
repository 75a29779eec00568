// What is done to single rows: entering the blocks, norms, and the inputs of the EAGLE head. A block of 256 threads a
// row; a sum over a row is each thread's own in steps of 256, then `block_sum`.

#include "common.cuh"

#define THREADS 256

__device__ __forceinline__ float norm_factor(const u16 *row, int size, float eps, float *scratch)
{
    float square = 0.f;
    for (int i = threadIdx.x; i < size; i += THREADS)
        square += widen(row[i]) * widen(row[i]);
    return rsqrtf(block_sum(square, scratch) / size + eps);
}

// As the library rounds a norm: the normed value, then its product with the weight.
__device__ __forceinline__ u16 normed(u16 value, float factor, u16 weight)
{
    return narrow(rounded(widen(value) * factor) * widen(weight));
}

struct Enter {
    const Place *place;
    const u16 *from;          // the embedding [vocab, size], or the rows' states [rows, size] where by_token is 0
    const u16 *norm;          // [size], of the norm that reads them
    u16 *hidden, *scaled;     // [rows, size]: the states, and these times the norm's weight
    float *squares;           // [rows, size / 16]: as a product leaves them: who wrote the states makes no difference
    int size, by_token;
};

extern "C" __global__ void __launch_bounds__(THREADS) enter_rows(const __grid_constant__ Enter p)
{
    const int row = blockIdx.x;
    wait_for_predecessor();
    let_successor_start();
    const u16 *from = p.from + (p.by_token ? p.place->tokens[row] : row) * p.size;
    for (int i = threadIdx.x; i < p.size; i += THREADS) {  // whole half warps: size is a multiple of 16
        const u16 value = from[i];
        p.hidden[(long long)row * p.size + i] = value;
        p.scaled[(long long)row * p.size + i] = narrow(widen(value) * widen(p.norm[i]));
        const float square = sum_of_16(widen(value) * widen(value));
        if (i % 16 == 0)
            p.squares[(long long)row * (p.size / 16) + i / 16] = square;
    }
}

struct Norm {
    const Place *place;       // with `last_only`: of which row
    const u16 *hidden;
    const u16 *weight;        // [size], or null: the row as it is
    u16 *out;                 // [rows, size]; with `last_only` [1, size], of the last real row
    int size, last_only;
    float eps;
};

extern "C" __global__ void __launch_bounds__(THREADS) norm_rows(const __grid_constant__ Norm p)
{
    __shared__ float scratch[8];
    wait_for_predecessor();
    let_successor_start();
    const u16 *row = p.hidden + (p.last_only ? p.place->rows - 1 : blockIdx.x) * p.size;
    const float factor = p.weight ? norm_factor(row, p.size, p.eps, scratch) : 1.f;
    for (int i = threadIdx.x; i < p.size; i += THREADS)
        p.out[(long long)blockIdx.x * p.size + i] = p.weight ? normed(row[i], factor, p.weight[i]) : row[i];
}

struct Fuse {
    const u16 *states;        // [parts, rows, size]
    const u16 *weight;        // [normed, size], of the first parts; the others stay as they are
    u16 *out;                 // [rows, parts * size]
    int size, parts, normed, rows;
    float eps;
};

// grid (rows, parts)
extern "C" __global__ void __launch_bounds__(THREADS) fuse_states(const __grid_constant__ Fuse p)
{
    __shared__ float scratch[8];
    wait_for_predecessor();
    let_successor_start();
    const int part = blockIdx.y;
    const u16 *row = p.states + ((long long)part * p.rows + blockIdx.x) * p.size;
    u16 *out = p.out + ((long long)blockIdx.x * p.parts + part) * p.size;
    const bool is_to_norm = part < p.normed;
    const float factor = is_to_norm ? norm_factor(row, p.size, p.eps, scratch) : 1.f;
    for (int i = threadIdx.x; i < p.size; i += THREADS)
        out[i] = is_to_norm ? normed(row[i], factor, p.weight[part * p.size + i]) : row[i];
}

struct Join {
    const Place *place;
    const u16 *embedding;     // [vocab, size]
    const u16 *hidden;        // [rows, size]
    const u16 *input_norm, *hidden_norm;
    const long long *token;   // of row 0, or null: those of `place`
    u16 *out;                 // [rows, 2 size]: the normed embedding, then the normed state
    int size;
    float eps;
};

// grid (rows, 2)
extern "C" __global__ void __launch_bounds__(THREADS) join_token(const __grid_constant__ Join p)
{
    __shared__ float scratch[8];
    wait_for_predecessor();
    let_successor_start();
    const int row = blockIdx.x;
    const u16 *from =
        blockIdx.y ? p.hidden + (long long)row * p.size
                   : p.embedding + max(p.token ? *p.token : p.place->tokens[row], 0ll) * p.size;  // -1: not finite
    const u16 *weight = blockIdx.y ? p.hidden_norm : p.input_norm;
    const float factor = norm_factor(from, p.size, p.eps, scratch);
    u16 *out = p.out + (2ll * row + blockIdx.y) * p.size;
    for (int i = threadIdx.x; i < p.size; i += THREADS)
        out[i] = normed(from[i], factor, weight[i]);
}
