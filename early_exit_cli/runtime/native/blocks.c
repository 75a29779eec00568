/* A pass of blocks of the Llama shape over weights in NF4, int8 or bfloat16, on a CPU.
 *
 * One parallel region a pass: the threads share every product by tiles of 32 outputs and meet at barriers. The bits of
 * a row depend on nothing but the tokens before it, whatever the number of rows, of threads or of keys in the buffer.
 *
 * Values are rounded to bfloat16 where the library's modules round, and so are the weights' scales.
 */
#include "kernels.h"

#define TILE 32     /* outputs of a product that a thread makes at a time */
#define BLOCK 64    /* inputs that share a scale */

enum { NF4_CODES, BF16, INT8 }; /* kinds of weights */

typedef struct {
    const uint8_t *weight; /* NF4: half a byte for each input of each output, packed as nf4_pairs.h or nf4_rows.h says;
                            * else [out, in] */
    const bf16 *scale;     /* of each BLOCK inputs of each output in NF4 */
    const bf16 *bias;      /* [out] or NULL */
    int64_t in, out, kind;
    const float *row_scale; /* [out], of int8 */
} Product;

typedef struct {
    const bf16 *input_norm, *mlp_norm; /* [hidden] */
    const bf16 *qk_norm;               /* [query_heads + kv_heads, head_dim] or NULL */
    Product qkv, output, gate_up, down;
    int64_t window; /* keys a row sees, 0 for all */
} Block;

typedef struct {
    const Block *blocks;
    const bf16 *embedding; /* [vocab, hidden] */
    int64_t hidden, inner, query_heads, kv_heads, head_dim;
    float eps, scale;
} Model;

/* Rows of one text: `width` of them from `position` on. keys and values: one pointer a block, a KV cache for each key
 * head. cos and sin: [width, head_dim] of these positions, sin with the sign of rotate_half. */
typedef struct {
    bf16 *const *keys, *const *values;
    const bf16 *cos, *sin;
    int64_t capacity, position, width;
} Part;

/* ---- products ---- */

#ifdef HAS_BF16
#include "nf4_pairs.h"
#else
#include "nf4_rows.h"
#endif
#include "plain_rows.h"

/* A thread's own: outputs [2, PIECE, 32], and the inputs of up to PIECE rows, or GROUP weights, as a product reads them. */
typedef struct {
    float *outputs;
    void *read;
} ProductScratch;

/* Rows of a product as its kernel reads them. */
typedef struct {
    const bf16 *rows; /* as they are */
    Inputs inputs;
} Given;

INLINE Given given_of(const Product *p, const bf16 *x, int64_t rows, ProductScratch scratch) {
    Given found = {.rows = x};
    if (p->kind == NF4_CODES) found.inputs = inputs_of(x, rows, p->in, scratch.read);
    return found;
}

/* One tile of 32 outputs for all rows -> out [width, 32], not yet rounded. */
static void tile(const Product *p, int64_t index, Given x, int64_t width, ProductScratch scratch, float *out) {
    if (p->kind == NF4_CODES)
        sums_of_tile(p, index, x.inputs, width, out);
    else
        plain_sums_of_tile(p, index, x.rows, width, scratch.read, out);
}

/* 16 sums of a product from output `output` on, as it gives them: rounded, with the bias. */
INLINE Floats given16(const Product *p, int64_t output, const float *sums) {
    Floats value = rounded16(read16(sums));
    return p->bias ? rounded16(add16(value, load16(p->bias + output))) : value;
}

/* out [width, p->out] = x [width, p->in] times the weights, or added to what is there. */
static void product(const Product *p, const bf16 *x, bf16 *out, int64_t width, int adds, ProductScratch scratch) {
    int64_t from, to;
    float *own = scratch.outputs;
    share(p->out / TILE, &from, &to);
    for (int64_t row = 0; row < width; row += PIECE) {
        int rows = min(PIECE, width - row);
        Given given = given_of(p, x + row * p->in, rows, scratch);
        for (int64_t t = from; t < to; t++) {
            tile(p, t, given, rows, scratch, own);
            for (int64_t i = 0; i < rows * TILE; i += 16) {
                int64_t output = t * TILE + i % TILE;
                bf16 *place = out + (row + i / TILE) * p->out + output;
                Floats found = given16(p, output, own + i);
                store16(place, adds ? add16(load16(place), found) : found);
            }
        }
    }
}

/* out [width, inner] = silu(gate) * up. */
static void gated(const Product *p, const bf16 *x, bf16 *out, int64_t width, int64_t inner, ProductScratch scratch) {
    int64_t from, to;
    share(inner / TILE, &from, &to);
    float *own = scratch.outputs, *up = own + PIECE * TILE;
    for (int64_t row = 0; row < width; row += PIECE) {
        int rows = min(PIECE, width - row);
        Given given = given_of(p, x + row * p->in, rows, scratch);
        for (int64_t t = from; t < to; t++) {
            tile(p, t, given, rows, scratch, own);
            tile(p, t + inner / TILE, given, rows, scratch, up);
            for (int64_t i = 0; i < rows * TILE; i += 16) {
                int64_t output = t * TILE + i % TILE;
                Floats gate = silu(given16(p, output, own + i));
                store16(out + (row + i / TILE) * inner + output,
                        mul16(rounded16(gate), given16(p, inner + output, up + i)));
            }
        }
    }
}

/* ---- attention ---- */

/* Queries `first` .. + rows - 1 of one key head, of those of a text by row and then by query head: they read its keys
 * together. qkv [width, stride] (not rotated) -> out [width, query heads * head_dim]. */
static void attend_rows(const Model *m, const Block *block, const Part *part, int index, int64_t kv_head, int64_t first,
                        int rows, const bf16 *qkv, int64_t stride, bf16 *out, float *scores) {
    int64_t size = m->head_dim, group = m->query_heads / m->kv_heads, start = kv_head * part->capacity * size,
            end[ROWS];
    bf16 rotated[ROWS * size], *found[ROWS];
    for (int r = 0; r < rows; r++) {
        int64_t row = (first + r) / group, head = kv_head * group + (first + r) % group;
        const bf16 *norm = block->qk_norm ? block->qk_norm + head * size : NULL;
        rotate(qkv + row * stride + head * size, norm, part->cos + row * size, part->sin + row * size,
               rotated + r * size, size, m->eps);
        end[r] = part->position + row + 1;
        found[r] = out + (row * m->query_heads + head) * size;
    }
#define BODY(n)                                                                                                        \
    attend(rotated, end, part->keys[index] + start, part->values[index] + start, block->window, size, m->scale, n,     \
           scores, found)
    FOR_ROWS(ROWS, rows, BODY)
#undef BODY
}

/* The keys that a row of a text sees. */
INLINE int64_t keys_of(const Block *block, const Part *part, int64_t row) {
    int64_t keys = part->position + row + 1;
    return block->window && keys > block->window ? block->window : keys;
}

/* How many queries of a key head, of `group` a row, come before `keys` of the keys that they read one after another. */
static int64_t queries_before(const Block *block, const Part *part, int64_t group, int64_t keys) {
    int64_t row = 0;
    for (; row < part->width && keys >= group * keys_of(block, part, row); row++)
        keys -= group * keys_of(block, part, row);
    return row * group + (row < part->width ? max(keys, 0) / keys_of(block, part, row) : 0);
}

/* Attention of all texts, this thread's share of it: qkv [sum of widths, stride] -> out [sum of widths, query heads *
 * head_dim]. Threads have equal shares of the keys that are read: one may end between two queries of one key head. */
static void attend_texts(const Model *m, const Block *block, const Part *parts, int64_t count, int index,
                         const bf16 *qkv, int64_t stride, bf16 *out, float *scores) {
    int64_t group = m->query_heads / m->kv_heads, total = 0, from, to, keys[count + 1]; /* of a key head */
    for (int64_t i = 0; i < count; total += m->kv_heads * keys[i++]) {
        keys[i] = 0;
        for (int64_t row = 0; row < parts[i].width; row++) keys[i] += group * keys_of(block, parts + i, row);
    }
    share(total, &from, &to);
    for (int64_t i = 0; i < count; i++) {
        for (int64_t head = 0; head < m->kv_heads; head++, from -= keys[i], to -= keys[i]) {
            int64_t first = queries_before(block, parts + i, group, from),
                    end = queries_before(block, parts + i, group, to);
            for (; first < end; first += ROWS)
                attend_rows(m, block, parts + i, index, head, first, min(ROWS, end - first), qkv, stride, out, scores);
        }
        qkv += parts[i].width * stride;
        out += parts[i].width * m->query_heads * m->head_dim;
    }
}

/* Rotated keys, and values, of a text's rows into its buffers, for a share of the key heads. */
static void store_kv_rows(const Model *m, const Block *block, const Part *part, int index, const bf16 *qkv,
                          int64_t stride) {
    int64_t size = m->head_dim, from, to;
    share(m->kv_heads * part->width, &from, &to);
    for (int64_t unit = from; unit < to; unit++) {
        int64_t head = unit / part->width, row = unit % part->width;
        const bf16 *key = qkv + row * stride + (m->query_heads + head) * size;
        const bf16 *norm = block->qk_norm ? block->qk_norm + (m->query_heads + head) * size : NULL;
        bf16 rotated[size];
        rotate(key, norm, part->cos + row * size, part->sin + row * size, rotated, size, m->eps);
        store_kv(rotated, key + m->kv_heads * size, part->keys[index] + head * part->capacity * size,
                 part->values[index] + head * part->capacity * size, part->position + row, size);
    }
}

/* ---- a pass ---- */

/* Blocks first .. last - 1 over the rows of the texts, one after another, in place: hidden [sum of widths, hidden],
 * which starts as the embedded `tokens` where these are given. kept: where to copy the states to after `stops` blocks,
 * ascending. Returns 0, or 1 when there is no memory. */
int eexit_run(const Model *m, const int64_t *tokens, bf16 *hidden, const Part *parts, int64_t count, int first,
              int last, const int64_t *stops, bf16 *const *kept, int64_t stops_count, int threads) {
    int64_t width = 0, keys = 0;
    for (int64_t i = 0; i < count; i++) {
        width += parts[i].width;
        if (keys < parts[i].position + parts[i].width) keys = parts[i].position + parts[i].width;
    }
    int64_t size = m->head_dim, queries = m->query_heads * size, stride = (m->query_heads + 2 * m->kv_heads) * size;
    bf16 *qkv = scratch_of(width * stride * sizeof(bf16)), *attended = scratch_of(width * queries * sizeof(bf16));
    bf16 *gate = scratch_of(width * m->inner * sizeof(bf16)),
         *normed = scratch_of(threads * width * m->hidden * sizeof(bf16));
    int64_t row_of_scores = ROWS * (keys + 32);
    float *scores = scratch_of(threads * row_of_scores * sizeof(float));
    float *outputs = scratch_of(threads * 2 * PIECE * TILE * sizeof(float));
    int64_t widest = max(max(m->hidden, m->inner), queries);
    int64_t of_inputs = max(min(width, PIECE) * bytes_of_inputs(widest), bytes_of_group(widest));
    uint8_t *inputs = scratch_of(threads * of_inputs);
    int failed = !qkv || !attended || !gate || !normed || !scores || !outputs || !inputs;
    Barrier barrier = {0};
    if (!failed && tokens)
        for (int64_t row = 0; row < width; row++)
            memcpy(hidden + row * m->hidden, m->embedding + tokens[row] * m->hidden, m->hidden * sizeof(bf16));
    if (!failed)
#pragma omp parallel num_threads(threads)
    {
        int thread = omp_get_thread_num();
        bf16 *own = normed + thread * width * m->hidden;
        ProductScratch output = {outputs + thread * 2 * PIECE * TILE, inputs + thread * of_inputs};
        for (int index = first; index < last; index++) {
            const Block *block = m->blocks + index;
            for (int64_t row = 0; row < width; row++)
                rms_norm(hidden + row * m->hidden, block->input_norm, own + row * m->hidden, m->hidden, m->eps);
            product(&block->qkv, own, qkv, width, 0, output);
            barrier_wait(&barrier);
            for (int64_t i = 0, row = 0; i < count; row += parts[i++].width)
                store_kv_rows(m, block, parts + i, index, qkv + row * stride, stride);
            barrier_wait(&barrier);
            attend_texts(m, block, parts, count, index, qkv, stride, attended, scores + thread * row_of_scores);
            barrier_wait(&barrier);
            product(&block->output, attended, hidden, width, 1, output);
            barrier_wait(&barrier);
            for (int64_t row = 0; row < width; row++)
                rms_norm(hidden + row * m->hidden, block->mlp_norm, own + row * m->hidden, m->hidden, m->eps);
            gated(&block->gate_up, own, gate, width, m->inner, output);
            barrier_wait(&barrier);
            product(&block->down, gate, hidden, width, 1, output);
            barrier_wait(&barrier);
            for (int64_t i = 0; i < stops_count; i++)
                if (stops[i] == index + 1) {
                    int64_t from, to;
                    share(width, &from, &to); /* nobody changes them before two more barriers */
                    memcpy(kept[i] + from * m->hidden, hidden + from * m->hidden,
                           (to - from) * m->hidden * sizeof(bf16));
                }
        }
    }
    free(qkv), free(attended), free(gate), free(normed), free(scores), free(outputs), free(inputs);
    return failed;
}

/* How an instruction set wants its weights packed, for who packs them. */
#ifdef HAS_BF16
const int eexit_packs_outputs = 1; /* nf4_pairs.h */
#else
const int eexit_packs_outputs = 0; /* nf4_rows.h */
#endif
const int eexit_int8_inputs = INT8_INPUTS;
