// What every kernel shares: bfloat16 without the toolkit's headers, tensor-core products, and starting before a
// predecessor has ended.
//
// One rule holds everywhere: the order in which a number's summands are added depends on shapes alone, never on how
// many rows stand beside it, on the length of a buffer, or on which block of threads came first.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define INFINITE __int_as_float(0x7f800000)
#define LOG2_E 1.4426950408889634f
#define MOST_ROWS 16

// Where a pass stands, in device memory: filled by the host before it. Everything that changes between passes is here,
// so that one recording serves all texts.
struct Place {
    long long position;      // of row 0
    long long rows;          // how many are real; those behind them are padding
    u16 *keys;               // [blocks, kv_heads, capacity, head_dim]
    u16 *values;             // the same
    long long capacity;
    const u16 *cos, *sin;    // [limit, head_dim]; sin with the sign of the turned half
    float *partial;          // room for the segments of long texts, see attention.cu
    long long tokens[MOST_ROWS];
};

__device__ __forceinline__ float low(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float widen(u16 value) { return __uint_as_float((u32)value << 16); }

__device__ __forceinline__ u32 pack(float first, float second)
{
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
}
__device__ __forceinline__ u16 narrow(float value) { return (u16)pack(value, 0.f); }
__device__ __forceinline__ float rounded(float value) { return low(pack(value, 0.f)); }

__device__ __forceinline__ float exp2_of(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// sum[16, 8] += a[16, 16] b[16, 8]. Lane (g, t) = (lane / 4, lane % 4) holds of a: rows g and g + 8, columns 2t, 2t + 1
// and 2t + 8, 2t + 9; of b: the same rows of column g; of sum: rows g and g + 8, columns 2t and 2t + 1.
__device__ __forceinline__ void multiply(float (&sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The same from zero.
__device__ __forceinline__ void multiply_first(float (&sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
        : "=f"(sum[0]), "=f"(sum[1]), "=f"(sum[2]), "=f"(sum[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(0.f));
}

// A kernel may start while its predecessor runs (programmatic dependent launch, from sm_90 on): what neither it nor any
// later kernel writes, such as weights, is on its way by then. The successor is let go only behind
// `wait_for_predecessor`, so that all kernels but the one before have ended when a kernel starts: keys of earlier
// tokens may be read early too.
__device__ __forceinline__ void let_successor_start()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void wait_for_predecessor()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Weights are read once a pass: past the first cache.
__device__ __forceinline__ uint4 stream16(const void *address)
{
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(address));
    return v;
}

__device__ __forceinline__ float warp_sum(float value)
{
    for (int step = 16; step; step /= 2)
        value += __shfl_xor_sync(0xffffffffu, value, step);
    return value;
}

// Of 16 threads in a row, all of which call it.
__device__ __forceinline__ float sum_of_16(float value)
{
    for (int step = 8; step; step /= 2)
        value += __shfl_xor_sync(0xffffu << (threadIdx.x & 16), value, step);
    return value;
}

// Of a block of 256 threads, in warp order; `scratch` holds 8 floats.
__device__ __forceinline__ float block_sum(float value, float *scratch)
{
    value = warp_sum(value);
    __syncthreads();
    if (threadIdx.x % 32 == 0)
        scratch[threadIdx.x / 32] = value;
    __syncthreads();
    float sum = 0.f;
    for (int warp = 0; warp < 8; warp++)
        sum += scratch[warp];
    return sum;
}
