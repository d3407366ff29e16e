// Causal attention over tiles, on tensor cores: a warp has 16 rows of queries (or, for the gradients of keys and values,
// of keys), a block 64. HD is the head's width, HP that rounded up to whole steps of 16; columns behind HD are 0.
#define LD (HP + 8)
#define STEPS (HP / 16)
#define TILES (HP / 8)
#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f

// With WINDOW, a query sees itself and the keys before it, `window` in all; with CAPPED, scores are cap tanh(score / cap).
#if WINDOW || CAPPED
#define VARIANT , int window, float cap
#define VARIANT_ARGS , window, cap
#else
#define VARIANT
#define VARIANT_ARGS
#endif
#if WINDOW
#define SEEN(key, query) ((key) <= (query) && (query) - (key) < window)
#define FIRST_KEY(query, step) (max(0, (query) - window + 1) / (step) * (step))
#define LAST_QUERY(key) min(seq, (key) + window)
#else
#define SEEN(key, query) ((key) <= (query))
#define FIRST_KEY(query, step) 0
#define LAST_QUERY(key) seq
#endif

// Rows of 64 keys or queries: `row(i)` says where row i lies, or -1.
template <int ROWS, typename Row>
DEV void load_rows(bf16* to, const bf16* from, i64 stride, Row row) {
#if HD % 8 == 0
  for (int i = threadIdx.x; i < ROWS * (HP / 8); i += blockDim.x) {
    const int r = i / (HP / 8), c = i % (HP / 8) * 8;
    const i64 at = row(r);
    U4 v = {0, 0, 0, 0};
    if (at >= 0 && c < HD) v = *(const U4*)(from + at * stride + c);
    *(U4*)(to + r * LD + c) = v;
  }
#else
  for (int i = threadIdx.x; i < ROWS * HP; i += blockDim.x) {
    const int r = i / HP, c = i % HP;
    const i64 at = row(r);
    bf16 v;
    v.bits = 0;
    if (at >= 0 && c < HD) v = from[at * stride + c];
    to[r * LD + c] = v;
  }
#endif
}

DEV u32 pair_at(const bf16* p) { return *(const u32*)p; }

// Rows `row` and `row + 8`, step `s` of 16 columns: an operand's fragment.
DEV void rows_fragment(u32 (&a)[4], const bf16* tile, int row, int s) {
  const int c = s * 16 + 2 * (threadIdx.x & 3);
  a[0] = pair_at(tile + row * LD + c);
  a[1] = pair_at(tile + (row + 8) * LD + c);
  a[2] = pair_at(tile + row * LD + c + 8);
  a[3] = pair_at(tile + (row + 8) * LD + c + 8);
}

// c += (16 rows of a) times (8 rows of b from b_row)^T over all columns.
DEV void times_rows(float (&c)[4], const bf16* a, int a_row, const bf16* b, int b_row) {
  const int g = (threadIdx.x & 31) >> 2;
#pragma unroll
  for (int s = 0; s < STEPS; s++) {
    u32 f[4];
    rows_fragment(f, a, a_row + g, s);
    const bf16* at = b + (b_row + g) * LD + s * 16 + 2 * (threadIdx.x & 3);
    multiply(c, f, pair_at(at), pair_at(at + 8));
  }
}

// acc [16, HP] += p [16, 16] times the 16 rows of `tile` from `row`.
DEV void times_tile(float (&acc)[TILES][4], const u32 (&p)[4], const bf16* tile, int row) {
  const int lane = threadIdx.x & 31, matrix = lane >> 3;
  const bf16* at = tile + (row + (matrix & 1) * 8 + (lane & 7)) * LD + (matrix >> 1) * 8;
#pragma unroll
  for (int d = 0; d < TILES; d += 2) {
    u32 b0, b1, b2, b3;
    load_matrix_x4_trans(b0, b1, b2, b3, shared_address(at + d * 8));
    multiply(acc[d], p, b0, b1);
    multiply(acc[d + 1], p, b2, b3);
  }
}

DEV void fragment_of(u32 (&p)[4], const float (&left)[4], const float (&right)[4]) {
  p[0] = pack(left[0], left[1]);
  p[1] = pack(left[2], left[3]);
  p[2] = pack(right[0], right[1]);
  p[3] = pack(right[2], right[3]);
}

DEV void store_pair(bf16* to, float a, float b, int c) {
  if (c + 1 < HD) *(u32*)(to + c) = pack(a, b);
}

extern __shared__ __align__(16) bf16 shared[];

// Queries first..first + count of a sequence, from row `q_row` of q; key j of `keys` is row j of `k` behind `k_row`, those
// before `split` behind `before` instead. Query i sees the keys up to i + keys - all queries.
struct Sequence { i64 q_row; int queries; i64 k_row; int keys; i64 before; int split; };

DEV void attend(bf16* out, float* lse, const bf16* q, i64 q_stride, const bf16* k, const bf16* v, i64 k_stride,
                Sequence s, int tile, int head, int heads, float scale VARIANT) {
    bf16 *qs = shared, *ks = qs + 64 * LD, *vs = ks + 64 * LD;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, c2 = 2 * (lane & 3);
  const int first = tile * 64;
  load_rows<64>(qs, q, q_stride, [&](int r) { return first + r < s.queries ? s.q_row + first + r : (i64)-1; });
  float acc[TILES][4] = {}, top[2] = {-1e30f, -1e30f}, sum[2] = {};
  const int last = min(first + 64, s.queries) - 1 + s.keys - s.queries;  // the last key that any row sees
  const int row = first + warp * 16 + g + s.keys - s.queries;            // the last key that row g sees
  const float scale2 = scale * LOG2E;
  for (int k0 = FIRST_KEY(first + s.keys - s.queries, 64); k0 <= last; k0 += 64) {
    __syncthreads();
    auto key = [&](int r) {
      const int j = k0 + r;
      return j > last ? (i64)-1 : j < s.split ? s.before + j : s.k_row + (j - s.split);
    };
    load_rows<64>(ks, k, k_stride, key);
    load_rows<64>(vs, v, k_stride, key);
    __syncthreads();
    float p[8][4] = {};
#pragma unroll
    for (int st = 0; st < STEPS; st++) {
      u32 f[4];
      rows_fragment(f, qs, warp * 16 + g, st);
#pragma unroll
      for (int n = 0; n < 8; n++) {
        const bf16* at = ks + (n * 8 + g) * LD + st * 16 + c2;
        multiply(p[n], f, pair_at(at), pair_at(at + 8));
      }
    }
    float now[2] = {top[0], top[1]};
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int j = k0 + n * 8 + c2 + (i & 1);
#if CAPPED
        p[n][i] = cap * tanhf(p[n][i] * scale / cap) * LOG2E;
        p[n][i] = SEEN(j, row + (i >> 1) * 8) ? p[n][i] : -1e30f;
#else
        p[n][i] = SEEN(j, row + (i >> 1) * 8) ? p[n][i] * scale2 : -1e30f;
#endif
        now[i >> 1] = fmaxf(now[i >> 1], p[n][i]);
      }
#pragma unroll
    for (int h = 0; h < 2; h++) {
      now[h] = fmaxf(now[h], __shfl_xor_sync(0xffffffffu, now[h], 1));
      now[h] = fmaxf(now[h], __shfl_xor_sync(0xffffffffu, now[h], 2));
      const float shrink = exp2f(top[h] - now[h]);
      sum[h] *= shrink;
      top[h] = now[h];
#pragma unroll
      for (int d = 0; d < TILES; d++) {
        acc[d][2 * h] *= shrink;
        acc[d][2 * h + 1] *= shrink;
      }
    }
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        p[n][i] = p[n][i] <= -1e29f ? 0.0f : exp2f(p[n][i] - top[i >> 1]);
        sum[i >> 1] += p[n][i];
      }
#pragma unroll
    for (int n = 0; n < 8; n += 2) {
      u32 f[4];
      fragment_of(f, p[n], p[n + 1]);
      times_tile(acc, f, vs, n * 8);
    }
  }
#pragma unroll
  for (int h = 0; h < 2; h++) {
    sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 1);
    sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 2);
    const int i = first + warp * 16 + g + h * 8;
    if (i >= s.queries) continue;
    const i64 at = (s.q_row + i) * heads + head;
    const float inverse = 1.0f / sum[h];
#pragma unroll
    for (int d = 0; d < TILES; d++)
      store_pair(out + at * HD, acc[d][2 * h] * inverse, acc[d][2 * h + 1] * inverse, d * 8 + c2);
    if (lse && (lane & 3) == 0) lse[at] = (top[h] + log2f(sum[h])) * LN2;
  }
}

// Sequences of equal length; q, k and v may be columns of one matrix.
extern "C" __global__ void __launch_bounds__(128)
forward(bf16* out, float* lse, const bf16* q, const bf16* k, const bf16* v, i64 q_stride, i64 k_stride, int queries,
        int keys, int heads, int group, float scale VARIANT) {
  const int head = blockIdx.y, b = blockIdx.z, kv = head / group;
  const Sequence s = {(i64)b * queries, queries, (i64)b * keys, keys, 0, 0};
  // The longest rows first.
  attend(out, lse, q + head * HD, q_stride, k + kv * HD, v + kv * HD, k_stride, s, gridDim.x - 1 - blockIdx.x, head,
         heads, scale VARIANT_ARGS);
}

// Segments: `table` has of each its first row, its rows, and first row and rows of what it continues; `tiles` of each block
// its segment and tile.
extern "C" __global__ void __launch_bounds__(128)
ragged(bf16* out, const bf16* q, const bf16* k, const bf16* v, i64 stride, const u32* table, const u32* tiles, int heads,
       int group, float scale VARIANT) {
  const u32* of = table + 4 * tiles[2 * blockIdx.x];
  const int head = blockIdx.y, kv = head / group;
  const Sequence s = {of[0], (int)of[1], of[0], (int)(of[1] + of[3]), of[2], (int)of[3]};
  attend(out, nullptr, q + head * HD, stride, k + kv * HD, v + kv * HD, stride, s, tiles[2 * blockIdx.x + 1], head, heads,
         scale VARIANT_ARGS);
}

// delta [T, heads]: dot products of dout and out, a warp each.
extern "C" __global__ void __launch_bounds__(128) deltas(float* delta, const bf16* dout, const bf16* out, i64 rows) {
  const i64 r = (i64)blockIdx.x * 4 + (threadIdx.x >> 5);
  if (r >= rows) return;
  float sum = 0.0f;
  for (int i = threadIdx.x & 31; i < HD; i += 32) sum += to_f32(dout[r * HD + i]) * to_f32(out[r * HD + i]);
  sum = warp_sum(sum);
  if ((threadIdx.x & 31) == 0) delta[r] = sum;
}

// dq: a block has 64 queries and goes over the keys that they see.
extern "C" __global__ void __launch_bounds__(128, 1)
backward_queries(bf16* dqkv, const bf16* dout, const bf16* qkv, const float* lse, const float* delta, i64 stride, int seq,
                 int heads, int kv_heads, float scale VARIANT) {
    bf16 *qs = shared, *os = qs + 64 * LD, *ks = os + 64 * LD, *vs = ks + 32 * LD;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, c2 = 2 * (lane & 3);
  const int head = blockIdx.y, kv = head / (heads / kv_heads), first = (gridDim.x - 1 - blockIdx.x) * 64;
  const i64 base = (i64)blockIdx.z * seq;
  auto query = [&](int r) { return first + r < seq ? base + first + r : (i64)-1; };
  load_rows<64>(qs, qkv + head * HD, stride, query);
  load_rows<64>(os, dout + head * HD, (i64)heads * HD, query);
  const int row = first + warp * 16 + g, last = min(first + 64, seq) - 1;
  float l2[2], dl[2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const i64 at = (base + min(row + 8 * h, seq - 1)) * heads + head;
    l2[h] = lse[at] * LOG2E;
    dl[h] = delta[at];
  }
  float acc[TILES][4] = {};
  for (int k0 = FIRST_KEY(first, 32); k0 <= last; k0 += 32) {
    __syncthreads();
    auto key = [&](int r) { return k0 + r <= last ? base + k0 + r : (i64)-1; };
    load_rows<32>(ks, qkv + (heads + kv) * HD, stride, key);
    load_rows<32>(vs, qkv + (heads + kv_heads + kv) * HD, stride, key);
    __syncthreads();
    float ds[4][4];
#pragma unroll
    for (int n = 0; n < 4; n++) {
      float s[4] = {}, dp[4] = {};
      times_rows(s, qs, warp * 16, ks, n * 8);
      times_rows(dp, os, warp * 16, vs, n * 8);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int h = i >> 1, j = k0 + n * 8 + c2 + (i & 1);
#if CAPPED
        const float t = tanhf(s[i] * scale / cap), p = SEEN(j, row + 8 * h) ? exp2f(cap * t * LOG2E - l2[h]) : 0.0f;
        ds[n][i] = p * (dp[i] - dl[h]) * (1.0f - t * t) * scale;
#else
        const float p = SEEN(j, row + 8 * h) ? exp2f(s[i] * scale * LOG2E - l2[h]) : 0.0f;
        ds[n][i] = p * (dp[i] - dl[h]) * scale;
#endif
      }
    }
#pragma unroll
    for (int n = 0; n < 4; n += 2) {
      u32 f[4];
      fragment_of(f, ds[n], ds[n + 1]);
      times_tile(acc, f, ks, n * 8);
    }
  }
#pragma unroll
  for (int h = 0; h < 2; h++) {
    if (row + 8 * h >= seq) continue;
    bf16* to = dqkv + (base + row + 8 * h) * stride + head * HD;
#pragma unroll
    for (int d = 0; d < TILES; d++) store_pair(to, acc[d][2 * h], acc[d][2 * h + 1], d * 8 + c2);
  }
}

// dk and dv: a block has 64 keys of one head of keys and goes over the queries that see them, head by head of its group.
extern "C" __global__ void __launch_bounds__(128, 1)
backward_keys(bf16* dqkv, const bf16* dout, const bf16* qkv, const float* lse, const float* delta, i64 stride, int seq,
              int heads, int kv_heads, float scale VARIANT) {
    bf16 *ks = shared, *vs = ks + 64 * LD, *qs = vs + 64 * LD, *os = qs + 32 * LD;
  __shared__ float ls[32], dl[32];
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, c2 = 2 * (lane & 3);
  const int kv = blockIdx.y, group = heads / kv_heads, first = blockIdx.x * 64;
  const i64 base = (i64)blockIdx.z * seq;
  auto key = [&](int r) { return first + r < seq ? base + first + r : (i64)-1; };
  load_rows<64>(ks, qkv + (heads + kv) * HD, stride, key);
  load_rows<64>(vs, qkv + (heads + kv_heads + kv) * HD, stride, key);
  const int row = first + warp * 16 + g;
  float dk[TILES][4] = {}, dv[TILES][4] = {};
  for (int head = kv * group; head < (kv + 1) * group; head++) {
    for (int q0 = first; q0 < LAST_QUERY(first + 63); q0 += 32) {
      __syncthreads();
      auto query = [&](int r) { return q0 + r < seq ? base + q0 + r : (i64)-1; };
      load_rows<32>(qs, qkv + head * HD, stride, query);
      load_rows<32>(os, dout + head * HD, (i64)heads * HD, query);
      if (threadIdx.x < 32) {
        const i64 at = (base + min(q0 + (int)threadIdx.x, seq - 1)) * heads + head;
        ls[threadIdx.x] = lse[at] * LOG2E;
        dl[threadIdx.x] = delta[at];
      }
      __syncthreads();
      float p[4][4], ds[4][4];
#pragma unroll
      for (int n = 0; n < 4; n++) {
        float s[4] = {}, dp[4] = {};
        times_rows(s, ks, warp * 16, qs, n * 8);
        times_rows(dp, vs, warp * 16, os, n * 8);
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int r = n * 8 + c2 + (i & 1), q = q0 + r;
#if CAPPED
          const float t = tanhf(s[i] * scale / cap);
          p[n][i] = SEEN(row + (i >> 1) * 8, q) && q < seq ? exp2f(cap * t * LOG2E - ls[r]) : 0.0f;
          ds[n][i] = p[n][i] * (dp[i] - dl[r]) * (1.0f - t * t) * scale;
#else
          p[n][i] = SEEN(row + (i >> 1) * 8, q) && q < seq ? exp2f(s[i] * scale * LOG2E - ls[r]) : 0.0f;
          ds[n][i] = p[n][i] * (dp[i] - dl[r]) * scale;
#endif
        }
      }
#pragma unroll
      for (int n = 0; n < 4; n += 2) {
        u32 f[4];
        fragment_of(f, p[n], p[n + 1]);
        times_tile(dv, f, os, n * 8);
        fragment_of(f, ds[n], ds[n + 1]);
        times_tile(dk, f, qs, n * 8);
      }
    }
  }
#pragma unroll
  for (int h = 0; h < 2; h++) {
    if (row + 8 * h >= seq) continue;
    bf16* to = dqkv + (base + row + 8 * h) * stride + (heads + kv) * HD;
#pragma unroll
    for (int d = 0; d < TILES; d++) {
      store_pair(to, dk[d][2 * h], dk[d][2 * h + 1], d * 8 + c2);
      store_pair(to + kv_heads * HD, dv[d][2 * h], dv[d][2 * h + 1], d * 8 + c2);
    }
  }
}
