// Attention of tiles of rows that read the same pages: chunks of prompts, and prefixes that decodes have in common. docs/numerics.md rule 6, the bits of
// `cpu-v1` and its KV formats, whatever rows a row is taken with.
//
// A *line* is a row and a head; a tile has up to 64 lines of one kv head. A cta walks the segments of its tile: pages come by cp.async as they are stored, a
// segment's keys, then its values are widened to f32 in one place of shared memory, where all lines read them. A thread has EACH lines and a sixteenth of the
// columns: tokens c, c + 16, c + 32, c + 48 of the scores (so the sixteen lanes of rule 6 are the half warp), D / 16 elements of the blend. Both are sums of
// outer products in registers, d and then t ascending. What crosses threads is a line's p, inside its half warp; m, l and o never leave registers.
//
//            d ->                    a warp: 2 EACH lines x 64 tokens, then x D columns
//   q [64][D + 4]   tile [64][D + 4]      half warp 0: even lines, half warp 1: odd lines
//   p [64][64]      raw  [64][D], next K or V under way as stored
//
// Layouts in memory: keys, values, scales, qkv, queries and tables as in attend.cu. tiles: eight words each, `Tile`.
// Operations: 2 D fma a line and token. Bytes: a tile reads each page once, 4 D a token in bf16 for 64 lines: fma limit it. Of shared memory a warp moves, in units of
// 128 bytes: scores 2 a token and 1 a line for 4 d, 16 for 128 fma of each lane; blend 1 a line for 4 tokens and D / 32 a token, 24 for 256 at D = 128. An SM has one
// such unit and four warps' fma a clock, so loads take half of the time and less. Registers, occupancy and the ceiling: docs/kernels-cuda.md. Unmeasured.
#include "numerics.cuh"

#define CHUNK_LINES 64

/// What a cta takes, of one kv head. Rows have one table, or tables that are equal as far as `end`.
struct Tile {
    u32 first, rows;      // of the queries
    u32 begin, end;       // segments
    u32 from, to;         // tokens that some row sees
    u32 all_from, all_to; // tokens that each row sees
};

/// Bytes of shared memory, as the picture shows them, and what each line sees.
template <int D, int FORMAT> constexpr int chunk_shared_bytes() {
    return 64 * (D + 4) * 4 + CHUNK_LINES * ((D + 4) * 4 + 64 * 4 + 8) + 64 * D * (FORMAT == F32_KV ? 4 : FORMAT == BF16_KV ? 2 : 1);
}

/// Grid (kv heads, tiles, splits). The split form leaves segments for the merge of attention.cu, out being [query][kv head][segments][group][D + 2], and takes
/// `segments_each` of them; the other writes rows, and has one split.
template <int D, int EACH, int FORMAT, bool SPLIT>
DEVICE void attend_tile(float* out, const float* qkv, const u8* keys, const u8* values, const float* key_scales, const float* value_scales, const u32* queries, const u32* tables, const Tile* tiles, int group, int pieces, int window, float scale, float softcap, int segments_each, int segments) {
    constexpr int THREADS = 16 * CHUNK_LINES / EACH, ROW = D + 4, ELEMENT = FORMAT == F32_KV ? 4 : FORMAT == BF16_KV ? 2 : 1;
    constexpr int ROW_PIECES = D * ELEMENT / 16, TOKENS = THREADS / ROW_PIECES, COPIES = 64 / TOKENS, COLUMNS = D / 64, PAGES = SEGMENT_TOKENS / PAGE_TOKENS;
    static_assert(TOKENS <= 32, "tokens that all threads copy at once lie in two pages at most");
    DYNAMIC_SHARED(float, tile_at);
    float* q_at = tile_at + 64 * ROW;
    float* p_at = q_at + CHUNK_LINES * ROW;
    int* seen_at = (int*)(p_at + CHUNK_LINES * 64);
    u8* raw_at = (u8*)(seen_at + 2 * CHUNK_LINES);
    const Tile& tile = tiles[blockIdx.y];
    int kv_heads = gridDim.x, kv_head = blockIdx.x, heads = kv_heads * group, lines = (int)tile.rows * group;
    int begin = tile.begin, end = tile.end, from = tile.from, to = tile.to;
    if (SPLIT) {
        begin = begin + (int)blockIdx.z * segments_each;
        end = end < begin + segments_each ? end : begin + segments_each;
        if (begin >= end) return;
    }
    int lane = threadIdx.x & 15, odd = threadIdx.x >> 4 & 1;
    int warp = __shfl_sync(~0u, (int)(threadIdx.x >> 5), 0); // so that the compiler knows it is one for all lanes
    int first_line = warp * 2 * EACH + odd;                  // then every second one
    bool busy = warp * 2 * EACH < lines;
    const u32* tile_queries = queries + 4 * tile.first;
    const u32* table = tables + tile_queries[0];
    auto row_of_line = [&](int line) { return (size_t)tile_queries[4 * (line / group) + 2]; };

    // Pages are copied where they hold a token that some row sees; others may not be there.
    auto holds = [&](int page) { return page * PAGE_TOKENS < to && page * PAGE_TOKENS + PAGE_TOKENS > from; };
    u32 places[PAGES]; // where the sixteens of a segment lie, in sixteens; looked up before the values before it are used
    auto look_up = [&](int segment) {
#pragma unroll
        for (int p = 0; p < PAGES; p++) {
            int page = segment * PAGES + p;
            places[p] = segment < end && holds(page) ? (table[page / pieces] * kv_heads + kv_head) * pieces + page % pieces : 0;
        }
    };
    auto load = [&](int segment, const u8* pages) {
        if (segment < end) {
#pragma unroll
            for (int i = 0; i < COPIES; i++) {
                int token = threadIdx.x / ROW_PIECES, p = i * TOKENS / PAGE_TOKENS, further = TOKENS > PAGE_TOKENS && token >= PAGE_TOKENS;
                u32 place = further ? places[p + 1 < PAGES ? p + 1 : p] : places[p];
                if (holds(segment * PAGES + p + further))
                    cp_async16(raw_at + (i * THREADS + threadIdx.x) * 16, pages + ((size_t)place * PAGE_TOKENS + (i * TOKENS + token) % PAGE_TOKENS) * (D * ELEMENT) + threadIdx.x % ROW_PIECES * 16);
            }
        }
        cp_async_commit();
    };
    // Each thread widens what it copied itself, so its own wait is enough.
    auto widen = [&]() {
#pragma unroll
        for (int i = 0; i < COPIES; i++) {
            U4 piece = *(const U4*)(raw_at + (i * THREADS + threadIdx.x) * 16);
            u32 words[4] = {piece.x, piece.y, piece.z, piece.w};
            float* at = tile_at + (i * TOKENS + threadIdx.x / ROW_PIECES) * ROW + threadIdx.x % ROW_PIECES * (16 / ELEMENT);
            if (FORMAT == F32_KV) *(U4*)at = piece;
            if (FORMAT == BF16_KV)
#pragma unroll
                for (int j = 0; j < 4; j += 2) *(F4*)(at + 2 * j) = {bf16_low(words[j]), bf16_high(words[j]), bf16_low(words[j + 1]), bf16_high(words[j + 1])};
            if (FORMAT == INT8_KV)
#pragma unroll
                for (int j = 0; j < 4; j++) *(F4*)(at + 4 * j) = {(float)(i8)words[j], (float)(i8)(words[j] >> 8), (float)(i8)(words[j] >> 16), (float)(i8)(words[j] >> 24)};
        }
    };

    look_up(begin);
    load(begin, keys);
    for (int i = threadIdx.x; i < CHUNK_LINES * D / 4; i += THREADS) {
        int line = i / (D / 4), column = i % (D / 4) * 4;
        F4 four = {};
        if (line < lines) four = *(const F4*)(qkv + (row_of_line(line) * (heads + 2 * kv_heads) + kv_head * group + line % group) * D + column);
        *(F4*)(q_at + line * ROW + column) = four;
    }
    if (threadIdx.x < CHUNK_LINES) {
        int line = threadIdx.x, past = line < lines ? (int)tile_queries[4 * (line / group) + 1] + 1 : 0;
        seen_at[2 * line] = window && past > window ? past - window : 0;
        seen_at[2 * line + 1] = past;
    }
    const float nothing = float_of(0xff800000);
    // Lane i of a half warp keeps m and l of its line i; of o each lane has its columns.
    float m = nothing, l = 0.0f, o[EACH][COLUMNS * 4] = {};
    auto of_line = [&](float kept, int i) { return __shfl_sync(~0u, kept, odd << 4 | i); };

    for (int segment = begin; segment < end; segment++) {
        int base = segment * SEGMENT_TOKENS;
        float key_scale[4], value_scale[4];
        if (FORMAT == INT8_KV)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                bool there = holds(segment * PAGES + j);
                key_scale[j] = there ? key_scales[(size_t)places[j] * PAGE_TOKENS + lane] : 0.0f;
                value_scale[j] = there ? value_scales[(size_t)places[j] * PAGE_TOKENS + lane] : 0.0f;
            }
        cp_async_wait<0>();
        __syncthreads(); // the values of the segment before were read
        widen();
        load(segment, values);
        look_up(segment + 1);
        __syncthreads();
        float older = 0.0f, newer = 0.0f; // factors of the merge, of lane i's line; of a split m and l of the segment
        if (busy) {
            float s[EACH][4] = {};
            const float* q_line = q_at + first_line * ROW;
            const float* k_token = tile_at + lane * ROW;
#pragma unroll 2
            for (int d = 0; d < D; d += 4) {
                F4 k[4];
#pragma unroll
                for (int j = 0; j < 4; j++) k[j] = *(const F4*)(k_token + j * 16 * ROW + d);
#pragma unroll
                for (int i = 0; i < EACH; i++) {
                    F4 q = *(const F4*)(q_line + i * 2 * ROW + d);
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        s[i][j] = fmaf(q.x, k[j].x, s[i][j]);
                        s[i][j] = fmaf(q.y, k[j].y, s[i][j]);
                        s[i][j] = fmaf(q.z, k[j].z, s[i][j]);
                        s[i][j] = fmaf(q.w, k[j].w, s[i][j]);
                    }
                }
            }
            // Scores wait in p's place for the thread that put them there, so that the code below stands once and not EACH times: it is long.
#pragma unroll
            for (int i = 0; i < EACH; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) p_at[(first_line + 2 * i) * 64 + ((lane + 16 * j) ^ odd << 2)] = s[i][j];
#pragma unroll 2
            for (int i = 0; i < EACH; i++) {
                int line = first_line + 2 * i, lo = seen_at[2 * line] - base, hi = seen_at[2 * line + 1] - base;
                float* p_line = p_at + line * 64;
                bool in[4];
                float x[4], greatest = nothing;
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    in[j] = lane + 16 * j >= lo && lane + 16 * j < hi;
                    x[j] = p_line[(lane + 16 * j) ^ odd << 2];
                    if (FORMAT == INT8_KV) x[j] = x[j] * key_scale[j];
                    x[j] = x[j] * scale;
                    if (softcap > 0.0f) x[j] = softcap_exact(x[j], softcap);
                    greatest = fmaxf(greatest, in[j] ? x[j] : nothing);
                }
                for (int step = 8; step; step /= 2) greatest = fmaxf(greatest, __shfl_xor_sync(~0u, greatest, step));
                float sum = 0.0f;
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    float p = in[j] ? exp_exact(x[j] - greatest) : 0.0f;
                    sum = sum + p;
                    if (FORMAT == INT8_KV) p = p * value_scale[j];
                    // Below zero: masked. Adding 0 times a value is not the same, as a sum may be -0.
                    p_line[(lane + 16 * j) ^ odd << 2] = in[j] ? p : -1.0f;
                }
                for (int step = 8; step; step /= 2) sum = sum + __shfl_xor_sync(~0u, sum, step);
                if (lane != i) continue;
                if (SPLIT) { older = greatest; newer = sum; continue; }
                bool sees = lo < SEGMENT_TOKENS && hi > 0, rises = greatest > m;
                // One of the two factors is exp(0), exactly 1.
                float factor = exp_exact(rises ? m - greatest : greatest - m);
                older = rises ? factor : 1.0f;
                newer = rises ? 1.0f : factor;
                if (sees) { l = l * older + sum * newer; m = rises ? greatest : m; }
            }
        }
        cp_async_wait<0>();
        __syncthreads(); // the keys were read, and p is written
        widen();
        load(segment + 1, keys);
        __syncthreads();
        if (busy) {
            float blend[EACH][COLUMNS * 4] = {};
            const float* v_column = tile_at + lane * 4;
            const float* p_line = p_at + first_line * 64;
            auto add = [&](int i, float weight, const F4 (&v)[COLUMNS]) {
#pragma unroll
                for (int j = 0; j < COLUMNS; j++) {
                    blend[i][4 * j] = fmaf(weight, v[j].x, blend[i][4 * j]);
                    blend[i][4 * j + 1] = fmaf(weight, v[j].y, blend[i][4 * j + 1]);
                    blend[i][4 * j + 2] = fmaf(weight, v[j].z, blend[i][4 * j + 2]);
                    blend[i][4 * j + 3] = fmaf(weight, v[j].w, blend[i][4 * j + 3]);
                }
            };
            auto read = [&](F4 (&v)[COLUMNS], int token) {
#pragma unroll
                for (int j = 0; j < COLUMNS; j++) v[j] = *(const F4*)(v_column + token * ROW + j * 64);
            };
            if (base >= (int)tile.all_from && base + SEGMENT_TOKENS <= (int)tile.all_to) {
#pragma unroll 1
                for (int token = 0; token < SEGMENT_TOKENS; token += 4) {
                    F4 p[EACH], v[COLUMNS];
#pragma unroll
                    for (int i = 0; i < EACH; i++) p[i] = *(const F4*)(p_line + i * 128 + (token ^ odd << 2));
#pragma unroll
                    for (int t = 0; t < 4; t++) {
                        read(v, token + t);
#pragma unroll
                        for (int i = 0; i < EACH; i++) add(i, t == 0 ? p[i].x : t == 1 ? p[i].y : t == 2 ? p[i].z : p[i].w, v);
                    }
                }
            } else {
                int lo = from > base ? from - base : 0, hi = to - base < SEGMENT_TOKENS ? to - base : SEGMENT_TOKENS;
#pragma unroll 1
                for (int token = lo; token < hi; token++) {
                    F4 v[COLUMNS];
                    read(v, token);
#pragma unroll
                    for (int i = 0; i < EACH; i++) {
                        float weight = p_line[i * 128 + (token ^ odd << 2)];
                        if (!(weight < 0.0f)) add(i, weight, v);
                    }
                }
            }
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                int line = first_line + 2 * i;
                float old = of_line(older, i), fresh = of_line(newer, i);
                if (seen_at[2 * line] >= base + SEGMENT_TOKENS || seen_at[2 * line + 1] <= base) continue;
                if (!SPLIT) {
#pragma unroll
                    for (int j = 0; j < COLUMNS * 4; j++) o[i][j] = fmaf(blend[i][j], fresh, o[i][j] * old);
                    continue;
                }
                float* at = out + ((((size_t)tile.first + line / group) * kv_heads + kv_head) * segments + segment) * group * (D + 2) + line % group * (D + 2);
#pragma unroll
                for (int j = 0; j < COLUMNS * 4; j += 2) *(F2*)(at + j / 4 * 64 + lane * 4 + j % 4) = {blend[i][j], blend[i][j + 1]};
                if (lane == 0) *(F2*)(at + D) = {old, fresh};
            }
        }
    }
    cp_async_wait<0>();
    if (SPLIT || !busy) return;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        int line = first_line + 2 * i;
        float sum = of_line(l, i);
        if (line >= lines) continue;
        float* at = out + (row_of_line(line) * heads + kv_head * group + line % group) * D + lane * 4;
#pragma unroll
        for (int j = 0; j < COLUMNS; j++)
            *(F4*)(at + j * 64) = {__fdiv_rn(o[i][4 * j], sum), __fdiv_rn(o[i][4 * j + 1], sum), __fdiv_rn(o[i][4 * j + 2], sum), __fdiv_rn(o[i][4 * j + 3], sum)};
    }
}

#define ENTRY_OF(NAME, D, EACH, CTAS, FORMAT, SPLIT)                                                                                              \
    extern "C" __global__ void __launch_bounds__(16 * CHUNK_LINES / EACH, CTAS) NAME(float* out, const float* qkv, const u8* keys, const u8* values, const float* key_scales, const float* value_scales, const u32* queries, const u32* tables, const Tile* tiles, int group, int pieces, int window, float scale, float softcap, int segments_each, int segments) { \
        attend_tile<D, EACH, FORMAT, SPLIT>(out, qkv, keys, values, key_scales, value_scales, queries, tables, tiles, group, pieces, window, scale, softcap, segments_each, segments); \
    }
#define OF_HEAD(D, EACH, CTAS)                                 \
    ENTRY_OF(chunk_f32_d##D, D, EACH, CTAS, F32_KV, false)     \
    ENTRY_OF(chunk_bf16_d##D, D, EACH, CTAS, BF16_KV, false)   \
    ENTRY_OF(chunk_int8_d##D, D, EACH, CTAS, INT8_KV, false)   \
    ENTRY_OF(chunk_split_bf16_d##D, D, EACH, CTAS, BF16_KV, true)
#if HEAD == 64 || defined(EVERY_HEAD) // the emulated card has all in one unit
OF_HEAD(64, 8, 2)
#endif
#if HEAD == 128 || defined(EVERY_HEAD)
OF_HEAD(128, 8, 2)
#endif
#if HEAD == 256 || defined(EVERY_HEAD)
ENTRY_OF(chunk_bf16_d256, 256, 4, 1, BF16_KV, false)
#endif
#undef ENTRY_OF
#undef OF_HEAD
