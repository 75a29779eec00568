/* A pass of blocks of the Llama shape, or near it, over weights in NF4, int8 or bfloat16, on a CPU.
 *
 * What a model has not is NULL, 0 or 1 in its Block and Model (`block_layout.BlockLayout`); then nothing is computed.
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
    Norm input_norm, behind_attention, mlp_norm, behind_mlp; /* [hidden] */
    Norm qk_norm;        /* of each head alone, [query_heads + kv_heads, head_dim] */
    Norm q_norm, k_norm; /* of all heads together, [query_heads * head_dim], [kv_heads * head_dim] */
    Product qkv, output, gate_up, down;
    int64_t window; /* keys a row sees, 0 for all */
    int64_t table;  /* which of a text's rotary tables it reads */
} Block;

typedef struct {
    const Block *blocks;
    const bf16 *embedding; /* [vocab, hidden] */
    int64_t hidden, inner, query_heads, kv_heads, head_dim;
    int64_t turned; /* numbers of a head that are rotated */
    int64_t gelu;   /* whether gates are bent by GELU, not by SiLU */
    int64_t exact_tables; /* whether rotary tables are in float32 */
    float eps, scale;
    float cap;                /* what attention's scores are bent below, or 0 */
    float embedded, residual; /* what embedded tokens and the outputs of attention and MLP are multiplied by */
} Model;

/* Rows of one text: `width` of them from `position` on. keys and values: one pointer a block, a KV cache for each key
 * head. cos and sin: the rotary tables of all positions, [positions, head_dim], sin with the sign of rotate_half; of bf16,
 * or of float32 where the model says so. */
typedef struct {
    bf16 *const *keys, *const *values;
    const void *const *cos, *const *sin;
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

/* out [width, inner] = activation(gate) * up. */
static void gated(const Product *p, const bf16 *x, bf16 *out, int64_t width, int64_t inner, int64_t is_gelu,
                  ProductScratch scratch) {
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
                Floats value = given16(p, output, own + i), gate = is_gelu ? gelu(value) : silu(value);
                store16(out + (row + i / TILE) * inner + output,
                        mul16(rounded16(gate), given16(p, inner + output, up + i)));
            }
        }
    }
}

/* ---- what stands around the products ---- */

/* Normed rows in `own`, or, without a norm, the rows themselves: [width, hidden]. */
static const bf16 *normed_rows(const Model *m, Norm norm, const bf16 *hidden, bf16 *own, int64_t width) {
    if (!is_there(norm)) return hidden;
    for (int64_t row = 0; row < width; row++)
        apply_norm(norm, hidden + row * m->hidden, own + row * m->hidden, m->hidden, m->eps);
    return own;
}

/* hidden [width, hidden] += x times the weights, normed and multiplied where the model does that; it is there behind
 * the last barrier. made: [width, hidden] of scratch. */
static void add_product(const Model *m, const Product *p, Norm behind, const bf16 *x, bf16 *made, bf16 *hidden,
                        int64_t width, ProductScratch scratch, Barrier *barrier) {
    int adds = !is_there(behind) && m->residual == 1;
    product(p, x, adds ? hidden : made, width, adds, scratch);
    barrier_wait(barrier);
    if (adds) return;
    int64_t from, to;
    share(width, &from, &to);
    for (int64_t row = from; row < to; row++) {
        bf16 *own = made + row * m->hidden, *sum = hidden + row * m->hidden;
        if (is_there(behind)) apply_norm(behind, own, own, m->hidden, m->eps);
        for (int64_t i = 0; i < m->hidden; i += 16)
            store16(sum + i, add16(load16(sum + i), rounded16(mul16(load16(own + i), all16(m->residual)))));
    }
    barrier_wait(barrier);
}

static void embed(const Model *m, int64_t token, bf16 *out) {
    const bf16 *row = m->embedding + token * m->hidden;
    if (m->embedded == 1)
        memcpy(out, row, m->hidden * sizeof(bf16));
    else
        for (int64_t i = 0; i < m->hidden; i += 16) store16(out + i, mul16(load16(row + i), all16(m->embedded)));
}

/* ---- attention ---- */

/* Queries and keys of a share of the rows, in place, by the norms over all heads. qkv: [width, stride]. */
static void norm_all_heads(const Model *m, const Block *block, bf16 *qkv, int64_t stride, int64_t width) {
    int64_t from, to, queries = m->query_heads * m->head_dim;
    share(width, &from, &to);
    for (int64_t row = from; row < to; row++) {
        bf16 *query = qkv + row * stride, *key = query + queries;
        apply_norm(block->q_norm, query, query, queries, m->eps);
        apply_norm(block->k_norm, key, key, m->kv_heads * m->head_dim, m->eps);
    }
}

/* A head of a text's row, normed and rotated: [head_dim]. head: of the queries, then of the keys. */
static void turn(const Model *m, const Block *block, const Part *part, int64_t row, int64_t head, const bf16 *x,
                 bf16 *out) {
    int64_t place = (part->position + row) * m->head_dim;
    const void *cos = part->cos[block->table], *sin = part->sin[block->table];
    if (m->exact_tables)
        rotate_once(x, (const float *)cos + place, (const float *)sin + place, out, m->head_dim, m->turned);
    else
        rotate(x, norm_from(block->qk_norm, head * m->head_dim), (const bf16 *)cos + place, (const bf16 *)sin + place,
               out, m->head_dim, m->turned, m->eps);
}

/* Queries `first` .. + rows - 1 of one key head, of those of a text by row and then by query head: they read its keys
 * together. qkv [width, stride] (not rotated) -> out [width, query heads * head_dim]. */
static void attend_rows(const Model *m, const Block *block, const Part *part, int index, int64_t kv_head, int64_t first,
                        int rows, const bf16 *qkv, int64_t stride, bf16 *out, float *scores) {
    int64_t size = m->head_dim, group = m->query_heads / m->kv_heads, start = kv_head * part->capacity * size,
            end[ROWS];
    bf16 rotated[ROWS * size], *found[ROWS];
    for (int r = 0; r < rows; r++) {
        int64_t row = (first + r) / group, head = kv_head * group + (first + r) % group;
        turn(m, block, part, row, head, qkv + row * stride + head * size, rotated + r * size);
        end[r] = part->position + row + 1;
        found[r] = out + (row * m->query_heads + head) * size;
    }
#define BODY(n)                                                                                                        \
    attend(rotated, end, part->keys[index] + start, part->values[index] + start, block->window, size, m->scale, m->cap,\
           n, scores, found)
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
        bf16 rotated[size];
        turn(m, block, part, row, m->query_heads + head, key, rotated);
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
    bf16 *made = scratch_of(width * m->hidden * sizeof(bf16)), *gate = scratch_of(width * m->inner * sizeof(bf16)),
         *normed = scratch_of(threads * width * m->hidden * sizeof(bf16));
    int64_t row_of_scores = ROWS * (keys + 32);
    float *scores = scratch_of(threads * row_of_scores * sizeof(float));
    float *outputs = scratch_of(threads * 2 * PIECE * TILE * sizeof(float));
    int64_t widest = max(max(m->hidden, m->inner), queries);
    int64_t of_inputs = max(min(width, PIECE) * bytes_of_inputs(widest), bytes_of_group(widest));
    uint8_t *inputs = scratch_of(threads * of_inputs);
    int failed = !qkv || !attended || !made || !gate || !normed || !scores || !outputs || !inputs;
    Barrier barrier = {0};
    if (!failed && tokens)
        for (int64_t row = 0; row < width; row++) embed(m, tokens[row], hidden + row * m->hidden);
    if (!failed)
#pragma omp parallel num_threads(threads)
    {
        int thread = omp_get_thread_num();
        bf16 *own = normed + thread * width * m->hidden;
        ProductScratch output = {outputs + thread * 2 * PIECE * TILE, inputs + thread * of_inputs};
        for (int index = first; index < last; index++) {
            const Block *block = m->blocks + index;
            product(&block->qkv, normed_rows(m, block->input_norm, hidden, own, width), qkv, width, 0, output);
            barrier_wait(&barrier);
            if (is_there(block->q_norm)) {
                norm_all_heads(m, block, qkv, stride, width);
                barrier_wait(&barrier);
            }
            for (int64_t i = 0, row = 0; i < count; row += parts[i++].width)
                store_kv_rows(m, block, parts + i, index, qkv + row * stride, stride);
            barrier_wait(&barrier);
            attend_texts(m, block, parts, count, index, qkv, stride, attended, scores + thread * row_of_scores);
            barrier_wait(&barrier);
            add_product(m, &block->output, block->behind_attention, attended, made, hidden, width, output, &barrier);
            gated(&block->gate_up, normed_rows(m, block->mlp_norm, hidden, own, width), gate, width, m->inner, m->gelu,
                  output);
            barrier_wait(&barrier);
            add_product(m, &block->down, block->behind_mlp, gate, made, hidden, width, output, &barrier);
            for (int64_t i = 0; i < stops_count; i++)
                if (stops[i] == index + 1) {
                    int64_t from, to;
                    share(width, &from, &to); /* nobody changes them before two more barriers */
                    memcpy(kept[i] + from * m->hidden, hidden + from * m->hidden,
                           (to - from) * m->hidden * sizeof(bf16));
                }
        }
    }
    free(qkv), free(attended), free(made), free(gate), free(normed), free(scores), free(outputs), free(inputs);
    return failed;
}

/* How an instruction set wants its weights packed, for who packs them. */
#ifdef HAS_BF16
const int eexit_packs_outputs = 1; /* nf4_pairs.h */
#else
const int eexit_packs_outputs = 0; /* nf4_rows.h */
#endif
const int eexit_int8_inputs = INT8_INPUTS;
