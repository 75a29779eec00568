/* Every compiled kernel at odd shapes, over memory of exactly the size that each says it reads: for sanitizers, and for
 * processors that are only emulated here. Numbers are made up, the same everywhere.
 *
 * It checks that products are near those in double precision, that bits depend on neither rows nor threads, and that
 * choices are the first of the best logits. It prints a hash of all outputs, and ends with 1 where a check fails.
 */
#include <pthread.h>
#include <stdio.h>

#include "blocks.c"
#include "eagle.c"
#include "exit_head.c"
#include "lm_head.c"

/* ---- threads that a thread sanitizer understands, in the place of the OpenMP library's ---- */

#ifdef OWN_THREADS
static __thread int own_number = 0, own_team = 1;

int omp_get_thread_num(void) { return own_number; }
int omp_get_num_threads(void) { return own_team; }

typedef struct {
    void (*work)(void *);
    void *data;
    int number, team;
} Share;

static void *do_share(void *given) {
    Share *share = given;
    own_number = share->number, own_team = share->team;
    share->work(share->data);
    return NULL;
}

void GOMP_parallel(void (*work)(void *), void *data, unsigned threads, unsigned flags) {
    (void)flags;
    pthread_t thread[threads];
    Share shares[threads];
    for (unsigned i = 0; i < threads; i++) {
        shares[i] = (Share){work, data, (int)i, (int)threads};
        pthread_create(&thread[i], NULL, do_share, &shares[i]);
    }
    for (unsigned i = 0; i < threads; i++) pthread_join(thread[i], NULL);
}
#endif

/* ---- made-up numbers ---- */

static uint64_t state = 1, hash = 14695981039346656037u;
static int failures = 0;

static uint32_t random_bits(void) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 33);
}
static bf16 random_bf16(float scale) {
    union { float value; uint32_t bits; } u = {scale * ((float)(random_bits() % 2001) - 1000.0f) / 1000.0f};
    return (bf16)(u.bits >> 16);
}
static void *room(size_t bytes) {
    void *found = malloc(bytes ? bytes : 1);
    if (!found) exit(3);
    return memset(found, 0, bytes);
}
static bf16 *numbers(int64_t count, float scale) {
    bf16 *found = room(count * sizeof(bf16));
    for (int64_t i = 0; i < count; i++) found[i] = random_bf16(scale);
    return found;
}
static bf16 *around_one(int64_t count) {
    bf16 *found = room(count * sizeof(bf16));
    for (int64_t i = 0; i < count; i++) found[i] = (bf16)(0x3F70 + random_bits() % 32);
    return found;
}
static void add_to_hash(const void *data, size_t bytes) {
    for (size_t i = 0; i < bytes; i++) hash = (hash ^ ((const uint8_t *)data)[i]) * 1099511628211u;
}
static void check(int holds, const char *what, int64_t shape) {
    if (!holds) printf("failed at %lld: %s\n", (long long)shape, what), failures++;
}

/* ---- NF4 ---- */

static Product nf4(int64_t in, int64_t out, int has_bias) {
    uint8_t *weight = room(in * out / 2);
    for (int64_t i = 0; i < in * out / 2; i++) weight[i] = (uint8_t)random_bits();
    bf16 *scale = around_one(in / BLOCK * out);
    for (int64_t i = 0; i < in / BLOCK * out; i++) scale[i] -= 0x280; /* about 2^-5 */
    return (Product){weight, scale, has_bias ? numbers(out, 0.5f) : NULL, in, out};
}
static void drop(Product p) { free((void *)p.weight), free((void *)p.scale), free((void *)p.bias); }

static double weight_of(const Product *p, int64_t output, int64_t input) {
    int64_t blocks = p->in / BLOCK, block = input / BLOCK;
    if (eexit_packs_outputs) {
        int64_t place = output % 32 * 2 + input % 2;
        uint8_t both = p->weight[output / 32 * 32 * p->in / 2 + input / 2 * 32 + place % 32];
        return (double)to_float(NF4[place < 32 ? both & 15 : both >> 4]) * to_float(p->scale[block * p->out + output]);
    }
    uint8_t both = p->weight[output * p->in / 2 + input / 2];
    return (double)to_float(NF4[input % 2 ? both & 15 : both >> 4]) *
           to_float(p->scale[(output / 4 * blocks + block) * 4 + output % 4]);
}

static void products(int64_t in, int64_t out, int64_t width) {
    Product p = nf4(in, out, 0);
    bf16 *x = numbers(width * in, 4.0f);
    float *sums = room(width * TILE * sizeof(float)), *alone = room(TILE * sizeof(float));
    void *scratch = scratch_of(width * bytes_of_inputs(in)), *of_one = scratch_of(bytes_of_inputs(in));
    Inputs inputs = inputs_of(x, width, in, scratch);
    for (int64_t tile = 0; tile < out / TILE; tile++) {
        sums_of_tile(&p, tile, inputs, width, sums);
        add_to_hash(sums, width * TILE * sizeof(float));
        for (int64_t row = 0; row < width; row++) {
            sums_of_tile(&p, tile, inputs_of(x + row * in, 1, in, of_one), 1, alone);
            check(!memcmp(alone, sums + row * TILE, TILE * sizeof(float)), "a row's bits depend on others", in);
            for (int64_t output = 0; output < TILE; output++) {
                double wanted = 0, size = 0;
                for (int64_t i = 0; i < in; i++) {
                    double part = weight_of(&p, tile * TILE + output, i) * to_float(x[row * in + i]);
                    wanted += part, size += fabs(part);
                }
                check(fabs(sums[row * TILE + output] - wanted) <= 1e-4 * size + 1e-6, "a product", in);
            }
        }
    }
    drop(p), free(x), free(sums), free(alone), free(scratch), free(of_one);
}

/* Inputs of all sizes, zeros, and one that is not finite, which must not be lost. */
static void extreme_inputs(void) {
    Product p = nf4(128, 32, 0);
    bf16 *x = numbers(128, 1.0f);
    float sums[32];
    void *scratch = scratch_of(bytes_of_inputs(128));
    static const bf16 cases[] = {0x0000, 0x8000, 0x0001, 0x0080, 0x7F7F, 0xFF7F, 0x7F80, 0x7FC0};
    for (int i = 0; i < 8; i++) {
        for (int j = 0; j < 64; j++) x[j] = j % 3 || i == 1 ? cases[i] : 0;
        sums_of_tile(&p, 0, inputs_of(x, 1, 128, scratch), 1, sums);
        if (i < 4) add_to_hash(sums, sizeof sums);
        check(i < 6 || !isfinite(sums[3]), "an input that is not finite is lost", i);
        check(i > 3 || isfinite(sums[3]), "a small input is no number", i);
    }
    drop(p), free(x), free(scratch);
}

/* ---- weights as they are kept ---- */

static Product plain(int64_t in, int64_t out, int64_t kind) {
    uint8_t *weight = room(in * out * (kind == BF16 ? sizeof(bf16) : 1));
    float *scale = NULL;
    if (kind == BF16)
        for (int64_t i = 0; i < in * out; i++) ((bf16 *)weight)[i] = random_bf16(1.0f);
    else {
        scale = room(out * sizeof(float));
        for (int64_t i = 0; i < in * out; i++) weight[i] = (uint8_t)(random_bits() % 255 - 127);
        for (int64_t i = 0; i < out; i++) scale[i] = (1.0f + (float)(random_bits() % 64) / 64.0f) / 128.0f;
    }
    return (Product){weight, NULL, NULL, in, out, kind, scale};
}

static void plain_products(int64_t in, int64_t width, int64_t kind) {
    Product p = plain(in, 2 * TILE, kind);
    bf16 *x = numbers(width * in, 4.0f), *decoded = room(bytes_of_group(in));
    float *sums = room(width * TILE * sizeof(float)), *alone = room(TILE * sizeof(float));
    plain_sums_of_tile(&p, 1, x, width, decoded, sums);
    add_to_hash(sums, width * TILE * sizeof(float));
    for (int64_t row = 0; row < width; row++) {
        plain_sums_of_tile(&p, 1, x + row * in, 1, decoded, alone);
        check(!memcmp(alone, sums + row * TILE, TILE * sizeof(float)), "a row's bits depend on others", in);
        for (int64_t output = 0; output < TILE; output++) {
            double wanted = 0, size = 0;
            for (int64_t i = 0; i < in; i++) {
                int64_t place = (TILE + output) * in + i;
                double weight = kind == BF16 ? to_float(((const bf16 *)p.weight)[place])
                                             : ((const int8_t *)p.weight)[place] * p.row_scale[TILE + output];
                wanted += weight * to_float(x[row * in + i]), size += fabs(weight * to_float(x[row * in + i]));
            }
            check(fabs(sums[row * TILE + output] - wanted) <= 1e-5 * size + 1e-6, "a plain product", in);
        }
    }
    drop(p), free((void *)p.row_scale), free(x), free(decoded), free(sums), free(alone);
}

/* ---- a pass ---- */

enum Kind { BARE, DRESSED, GEMMA, OLMO };

static Norm norm(int64_t count) { return (Norm){around_one(count), NULL}; }
static Norm norm_once(int64_t count) {
    float *found = room(count * sizeof(float));
    for (int64_t i = 0; i < count; i++) found[i] = to_float((bf16)(0x3F70 + random_bits() % 32));
    return (Norm){NULL, found};
}
static void drop_norm(Norm norm) { free((void *)norm.weight), free((void *)norm.once); }

/* Two blocks: bare Llama's; with norms of queries and keys and biases; all that Gemma 2 and 3 and Granite have, the
 * second block with tables of its own; OLMo 2's norms, half of a head turned. */
static void pass(int64_t hidden, int64_t inner, int64_t heads, int64_t kv_heads, int64_t size, int64_t width,
                 int64_t window, enum Kind kind) {
    enum { BLOCKS = 2 };
    const int is_dressed = kind == DRESSED;
    Block blocks[BLOCKS];
    int64_t rows = heads + 2 * kv_heads, vocab = 16, position = 21, end = position + width;
    int64_t capacity = (end + 15) / 16 * 16, of_keys = kv_heads * capacity * size * sizeof(bf16);
    for (int i = 0; i < BLOCKS; i++)
    {
        Norm none = {NULL, NULL};
        Block block = {none, none, none, none, none, none, none, nf4(hidden, rows * size, is_dressed),
                       nf4(heads * size, hidden, 0), nf4(hidden, 2 * inner, 0), nf4(inner, hidden, 0), window, 0};
        if (kind < GEMMA) block.input_norm = norm(hidden), block.mlp_norm = norm(hidden);
        if (kind == DRESSED) block.qk_norm = norm((heads + kv_heads) * size);
        if (kind == GEMMA) {
            block.input_norm = norm_once(hidden), block.mlp_norm = norm_once(hidden), block.table = i;
            block.qk_norm = norm_once((heads + kv_heads) * size);
        }
        if (kind >= GEMMA) block.behind_attention = norm_once(hidden), block.behind_mlp = norm_once(hidden);
        if (kind == OLMO) block.q_norm = norm_once(heads * size), block.k_norm = norm_once(kv_heads * size);
        blocks[i] = block;
    }
    int is_gemma = kind == GEMMA;
    Model model = {blocks, numbers(vocab * hidden, 1.0f), hidden, inner, heads, kv_heads, size,
                   kind == OLMO ? size / 2 : size, is_gemma, kind == OLMO, 1e-5f, 1.0f / sqrtf((float)size), is_gemma ? 2.0f : 0,
                   is_gemma ? 7.5f : 1, is_gemma ? 0.25f : 1};
    bf16 *found[3];
    void *tables[4];
    for (int i = 0; i < 4; i++) {
        tables[i] = numbers(end * size, 1.0f);
        if (kind != OLMO) continue;
        float *exact = room(end * size * sizeof(float));
        for (int64_t j = 0; j < end * size; j++) exact[j] = to_float(((bf16 *)tables[i])[j]);
        free(tables[i]), tables[i] = exact;
    }
    const void *cos[] = {tables[0], tables[1]}, *sin[] = {tables[2], tables[3]};
    int64_t tokens[end];
    for (int64_t i = 0; i < end; i++) tokens[i] = random_bits() % vocab;
    for (int way = 0; way < 3; way++) { /* all rows in two passes, with three threads, a row at a time */
        bf16 *keys[BLOCKS], *values[BLOCKS];
        for (int i = 0; i < BLOCKS; i++) keys[i] = room(of_keys), values[i] = room(of_keys);
        found[way] = room(end * hidden * sizeof(bf16));
        bf16 *kept = room(end * hidden * sizeof(bf16));
        for (int64_t first = 0; first < end;) {
            int64_t count = way == 2 ? 1 : first ? width : position, stop = 1;
            Part part = {keys, values, cos, sin, capacity, first, count};
            bf16 *copy = kept + first * hidden;
            check(!eexit_run(&model, tokens + first, found[way] + first * hidden, &part, 1, 0, BLOCKS, &stop, &copy, 1,
                             way == 1 ? 3 : 1), "no memory", width);
            first += count;
        }
        check(way == 0 || !memcmp(found[way], found[0], end * hidden * sizeof(bf16)), "bits of a pass", width);
        for (int i = 0; i < BLOCKS; i++) {
            if (!way) add_to_hash(keys[i], of_keys);
            free(keys[i]), free(values[i]);
        }
        if (!way) add_to_hash(kept, end * hidden * sizeof(bf16));
        free(kept);
    }
    add_to_hash(found[0], end * hidden * sizeof(bf16));
    for (int i = 0; i < BLOCKS; i++) {
        drop_norm(blocks[i].input_norm), drop_norm(blocks[i].mlp_norm), drop_norm(blocks[i].qk_norm);
        drop_norm(blocks[i].behind_attention), drop_norm(blocks[i].behind_mlp);
        drop_norm(blocks[i].q_norm), drop_norm(blocks[i].k_norm);
        drop(blocks[i].qkv), drop(blocks[i].output), drop(blocks[i].gate_up), drop(blocks[i].down);
    }
    free((void *)model.embedding);
    for (int i = 0; i < 4; i++) free(tables[i]);
    for (int way = 0; way < 3; way++) free(found[way]);
}

/* ---- int8 ---- */

/* rows: where to put what the integers stand for, [out, in], or NULL. */
static Int8 int8(int64_t in, int64_t out, bf16 *rows) {
    uint8_t *weight = room(in * out);
    float *scale = room(out * sizeof(float));
    for (int64_t output = 0; output < out; output++) {
        scale[output] = (1.0f + (float)(random_bits() % 64) / 64.0f) / 2048.0f;
        for (int64_t i = 0; i < in; i++) {
            int whole = (int)(random_bits() % 255) - 127;
            int64_t place = (output / 16 * (in / INT8_INPUTS) + i / INT8_INPUTS) * 16 + output % 16;
            weight[place * INT8_INPUTS + i % INT8_INPUTS] = (uint8_t)(whole + 128);
            if (rows) rows[output * in + i] = narrowed(scale[output] * (float)whole);
        }
    }
    return (Int8){weight, scale, in, out};
}
static void drop_int8(Int8 p) { free((void *)p.weight), free((void *)p.scale); }

static void lm_head(int64_t hidden, int64_t vocab, int64_t width) {
    bf16 *rows = room(vocab * hidden * sizeof(bf16));
    LMHead head = {int8(hidden, vocab, rows), NULL, NULL, rows, norm(hidden), vocab, hidden, 1e-5f};
    float *error = room(vocab * sizeof(float)), *norm = room(vocab * sizeof(float));
    float *values = room(width * sizeof(float));
    for (int64_t token = 0; token < vocab; token++) {
        double square = 0;
        for (int64_t i = 0; i < hidden; i++) square += pow(to_float(rows[token * hidden + i]), 2);
        norm[token] = 1.01f * (float)sqrt(square), error[token] = 0.005f * norm[token];
    }
    memcpy(rows + (vocab - 1) * hidden, rows + 3 * hidden, hidden * sizeof(bf16)); /* two that tie */
    error[vocab - 1] = 3 * norm[vocab - 1];
    head.error = error, head.norm = norm;
    bf16 *states = numbers(width * hidden, 3.0f), *normed = room(width * hidden * sizeof(bf16)),
         *logits = room(width * vocab * sizeof(bf16));
    int64_t *choices = room(width * sizeof(int64_t));
    for (int threads = 1; threads < 4; threads += 2) {
        check(!eexit_choose(&head, states, normed, choices, values, width, threads), "no memory", width);
        eexit_logits(&head, normed, logits, width, threads);
        for (int64_t row = 0; row < width; row++) {
            int64_t best = 0;
            for (int64_t token = 1; token < vocab; token++)
                if (to_float(logits[row * vocab + token]) > to_float(logits[row * vocab + best])) best = token;
            check(choices[row] == best && values[row] == to_float(logits[row * vocab + best]), "a choice", row);
        }
        add_to_hash(logits, width * vocab * sizeof(bf16));
    }
    states[0] = 0x7FC0;
    check(!eexit_choose(&head, states, normed, choices, values, width, 1) && choices[0] == -1, "a state of NaN", width);
    drop_int8(head.quantized), free(rows), drop_norm(head.final_norm), free(error), free(norm), free(values);
    free(states), free(normed), free(logits), free(choices);
}

/* ---- heads that draft ---- */

static Attention attention(int64_t in, int64_t hidden, int64_t heads, int64_t kv_heads, int64_t size) {
    return (Attention){int8(in, 2 * kv_heads * size, NULL), int8(in, heads * size, NULL),
                       int8(heads * size, hidden, NULL), NULL, NULL, heads, kv_heads, size, 1.0f / sqrtf((float)size),
                       1e-5f};
}
static void drop_attention(Attention a) { drop_int8(a.key_value), drop_int8(a.query), drop_int8(a.output); }

static KVBuffers buffers_of(int64_t kv_heads, int64_t capacity, int64_t size) {
    return (KVBuffers){room(kv_heads * capacity * size * sizeof(bf16)), room(kv_heads * capacity * size * sizeof(bf16)),
                       numbers(capacity * size, 1.0f), numbers(capacity * size, 1.0f), capacity};
}
static void drop_buffers(KVBuffers b) { free(b.keys), free(b.values), free((void *)b.cos), free((void *)b.sin); }

static void heads(int64_t hidden, int64_t inner, int64_t vocab, int64_t rows) {
    enum { HEADS = 3, KV_HEADS = 1, SIZE = 64, EXITS = 2, TOKENS = 16 };
    int64_t rank = 48, choice, tokens[rows];
    float entropy, confidence, *logits = room(vocab * sizeof(float)), *first_logits = room(vocab * sizeof(float));
    bf16 *state = room(hidden * sizeof(bf16)), *states[EXITS + 1];
    for (int i = 0; i <= EXITS; i++) states[i] = numbers(rows * hidden, 2.0f);
    for (int64_t i = 0; i < rows; i++) tokens[i] = random_bits() % TOKENS;
    Eagle ours = {attention(2 * hidden, hidden, HEADS, KV_HEADS, SIZE), int8((EXITS + 1) * hidden, hidden, NULL),
                  int8(hidden, 2 * inner, NULL), int8(inner, hidden, NULL), int8(hidden, vocab, NULL),
                  around_one(EXITS * hidden), NULL, around_one(hidden), around_one(hidden), around_one(hidden),
                  around_one(hidden), numbers(TOKENS * hidden, 1.0f), EXITS + 1, EXITS, hidden, hidden, inner, 0, 1,
                  1e-5f};
    Eagle other = ours; /* as published ones may be */
    other.parts = EXITS, other.normed_parts = 0, other.norm_before_residual = 1, other.norm_output = 0;
    other.fuse = int8(EXITS * hidden, hidden, NULL), other.joint_norm = around_one(EXITS * hidden);
    other.attention.query_norm = around_one(SIZE), other.attention.key_norm = around_one(SIZE);
    int64_t capacity = (rows + 1 + 15) / 16 * 16;
    for (int turn = 0; turn < 4; turn++) {
        const Eagle *eagle = turn % 2 ? &other : &ours;
        int threads = turn < 2 ? 1 : 3;
        KVBuffers buffers = buffers_of(KV_HEADS, capacity, SIZE);
        state[0] = 0;
        check(!eexit_eagle(eagle, (const bf16 *const *)states, NULL, tokens, rows, 0, &buffers, state, logits, &choice,
                           &entropy, threads), "no memory", rows);
        check(!eexit_eagle(eagle, NULL, state, tokens, 1, rows, &buffers, state, logits, &choice, &entropy, threads),
              "no memory", rows);
        check(entropy >= 0 && choice >= 0 && choice < vocab, "what the EAGLE head says", rows);
        add_to_hash(state, hidden * sizeof(bf16)), add_to_hash(logits, vocab * sizeof(float));
        drop_buffers(buffers);
    }
    for (int attends = 0; attends < 2; attends++) {
        Int8 none = {NULL, NULL, 0, 0};
        ExitHead head = {{none, none, none, NULL, NULL, 0, 0, 0, 0, 0}, int8(hidden, rank, NULL), int8(rank, hidden, NULL),
                         int8(hidden, vocab, NULL), around_one(hidden), around_one(hidden),
                         around_one(hidden), 1e-5f, 1e-6f};
        if (attends) head.attention = attention(hidden, hidden, HEADS, KV_HEADS, SIZE);
        KVBuffers buffers = buffers_of(KV_HEADS, capacity, SIZE);
        for (int threads = 1; threads < 4; threads += 2) {
            float *into = threads == 1 ? first_logits : logits;
            check(!eexit_read_head(&head, states[0], rows, 0, attends ? &buffers : NULL, into, &choice, &entropy,
                                   &confidence, threads), "no memory", rows);
        }
        check(!memcmp(first_logits, logits, vocab * sizeof(float)), "an exit head's bits depend on threads", rows);
        check(confidence > 0 && confidence <= 1 && entropy >= 0, "what an exit head says", rows);
        add_to_hash(logits, vocab * sizeof(float));
        if (attends) drop_attention(head.attention);
        drop_int8(head.down), drop_int8(head.up), drop_int8(head.lm_head), drop_buffers(buffers);
        free((void *)head.attention_norm), free((void *)head.norm), free((void *)head.final_norm);
    }
    drop_attention(ours.attention), drop_int8(ours.fuse), drop_int8(ours.gate_up), drop_int8(ours.down);
    drop_int8(ours.lm_head), free((void *)ours.fuse_norms), free((void *)ours.input_norm);
    free((void *)ours.hidden_norm), free((void *)ours.mlp_norm), free((void *)ours.norm);
    free((void *)ours.embedding), drop_int8(other.fuse), free((void *)other.joint_norm);
    free((void *)other.attention.query_norm), free((void *)other.attention.key_norm);
    for (int i = 0; i <= EXITS; i++) free(states[i]);
    free(state), free(logits), free(first_logits);
}

int main(void) {
    static const int64_t widths[] = {1, 2, 3, 4, 5, 6, 7, 8, 17, 65};
    for (int i = 0; i < 10; i++) products(i % 2 ? 64 : 192, i % 3 ? 32 : 96, widths[i]);
    extreme_inputs();
    for (int i = 0; i < 10; i++)
        for (int64_t kind = BF16; kind <= INT8; kind++) plain_products(i % 2 ? 32 : 96 + 64 * i, widths[i], kind);
    for (int i = 0; i < 10; i += 4) pass(64, 192, 1, 1, 64, widths[i], 0, BARE);
    pass(192, 64, 6, 2, 64, 17, 0, DRESSED);
    pass(192, 320, 3, 1, 128, 3, 5, DRESSED);
    pass(192, 64, 6, 2, 64, 17, 5, GEMMA);
    pass(192, 320, 3, 1, 128, 3, 0, OLMO);
    for (int i = 0; i < 10; i += 3) lm_head(i % 2 ? 64 : 192, i % 2 ? 48 : 208, widths[i]);
    heads(64, 48, 16, 1);
    heads(192, 80, 112, 17);
    printf("%016llx\n", (unsigned long long)hash);
    return failures > 0;
}
