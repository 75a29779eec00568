// Kernels of CUDA source, run on the CPU: a block's threads are fibres that change places where they wait for each other.
// What a card would never finish, threads that wait where others do not come, is found.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <ucontext.h>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __grid_constant__
#define __shared__ static
#define rsqrtf(x) (1.f / std::sqrt(x))
using std::max;

constexpr int MOST_THREADS = 256, STACK = 1 << 16;
struct Dimensions {
    int x, y, z;
};
static Dimensions threadIdx, blockIdx;

struct Meeting {
    int here = 0, past = 0;
};
static Meeting of_block, of_warp[8], of_half[16];
static float told[MOST_THREADS];
static ucontext_t home, fibres[MOST_THREADS];
static std::vector<char> stacks(MOST_THREADS * STACK);
static bool ended[MOST_THREADS], moved;

static void meet(Meeting &meeting, int expected)
{
    if (++meeting.here == expected) {
        meeting.here = 0;
        meeting.past++;
        moved = true;
        return;
    }
    for (const int past = meeting.past; meeting.past == past;)
        swapcontext(&fibres[threadIdx.x], &home);
}
static void __syncthreads() { meet(of_block, MOST_THREADS); }
static float __shfl_xor_sync(unsigned mask, float value, int step)
{
    const bool is_whole = mask == 0xffffffffu;
    Meeting &meeting = is_whole ? of_warp[threadIdx.x / 32] : of_half[threadIdx.x / 16];
    told[threadIdx.x] = value;
    meet(meeting, is_whole ? 32 : 16);
    const float found = told[threadIdx.x ^ step];
    meet(meeting, is_whole ? 32 : 16);
    return found;
}
template <class To, class From> static To same_bits(From value)
{
    To found;
    std::memcpy(&found, &value, sizeof found);
    return found;
}
#define __uint_as_float same_bits<float, unsigned>
#define __int_as_float same_bits<float, int>
static unsigned bfloat16(float value)  // to nearest, ties to even
{
    const unsigned bits = same_bits<unsigned>(value);
    return std::isnan(value) ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
}

static void (*body)(const void *);
static const void *arguments;
static void in_fibre()
{
    body(arguments);
    ended[threadIdx.x] = moved = true;
    swapcontext(&fibres[threadIdx.x], &home);
}

// 0, or 1 where some threads wait for ever.
static int run(void (*kernel)(const void *), const void *given, int columns, int rows)
{
    body = kernel, arguments = given;
    for (int block = 0; block < columns * rows; block++) {
        blockIdx = {block % columns, block / columns, 0};
        of_block = {}, std::fill(of_warp, of_warp + 8, Meeting()), std::fill(of_half, of_half + 16, Meeting());
        for (int thread = 0; thread < MOST_THREADS; thread++) {
            getcontext(&fibres[thread]);
            fibres[thread].uc_stack.ss_sp = &stacks[thread * STACK];
            fibres[thread].uc_stack.ss_size = STACK;
            makecontext(&fibres[thread], in_fibre, 0);
            ended[thread] = false;
        }
        do {
            moved = false;
            for (int thread = 0; thread < MOST_THREADS; thread++)
                if (!ended[thread]) {
                    threadIdx = {thread, 0, 0};
                    swapcontext(&home, &fibres[thread]);
                }
        } while (moved);
        if (std::count(ended, ended + MOST_THREADS, true) < MOST_THREADS)
            return 1;
    }
    return 0;
}
#define RUN(kernel, Arguments)                                                                                   \
    extern "C" int run_##kernel(const void *given, int columns, int rows)                                       \
    {                                                                                                            \
        return run([](const void *p) { kernel(*(const Arguments *)p); }, given, columns, rows);                 \
    }
