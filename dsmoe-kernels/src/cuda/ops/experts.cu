// Products of the pairs (token, expert) that are active. Lists say which tokens an expert has: `tokens` from offsets[e] to
// offsets[e + 1]. All weights are [n w, hidden], expert e the rows from e w; activations of pairs lie where those of all
// pairs would, [T, n w].
//
//   up       c = coefficient act(x gate^T) (x up^T)     rows gathered
//   project  g = x W^T                                   rows gathered
//   down     part = c W                                  rows gathered, written by place in the lists
//   input    part = da gate + db up                      as down
//   weights  dW += a^T x                                 terms gathered, three products at once
//
// A tile is 128 x 256 in steps of 64 terms; two warpgroups take 64 rows each. Copies run LOOK steps ahead, into the next
// tile too. Operands lie in shared memory as wgmma takes them, swizzled over 128 bytes: a row of 64 terms, or blocks of 64
// columns with a row for each term. Where there is no wgmma, mma.sync reads the same.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) && !PLAIN
#define WGMMA 1
#define LOOK (STAGES - 2)
#else
#define WGMMA 0
#define LOOK (STAGES - 1)
#endif
#define BM 128
#define BN 256
#define BK 64
#define A_BYTES (BM * BK * 2)
#define STAGE_BYTES ((BM + BN) * BK * 2)

enum Form { UP, PROJECT, DOWN, INPUT, WEIGHTS };

struct Args {
  const bf16* a[3];
  const bf16* b[3];
  void* out[3];
  const float* coefficients;
  const u32* offsets;
  const u32* tokens;
  int n, w, hidden;
};

struct Tile {
  int id, e, which, m0, n0, first, count, steps;
  bool ok;
};

// One of three, without an array in memory.
template <typename T> DEV T of(T const (&all)[3], int which) { return which == 0 ? all[0] : which == 1 ? all[1] : all[2]; }
DEV int ceil_div(int a, int b) { return (a + b - 1) / b; }

// The first tile from `id` on, in steps of the grid, that has terms to sum.
template <int FORM> DEV Tile tile_from(int id, const Args& p) {
  Tile t;
  t.which = 0;
  const int columns = FORM == UP ? ceil_div(p.w, BN / 2) : FORM == PROJECT ? ceil_div(p.w, BN) : ceil_div(p.hidden, BN);
  if (FORM == WEIGHTS) {
    const int rows = ceil_div(p.w, BM), each = rows * columns;
    for (;; id += gridDim.x) {
      t.id = id;
      t.ok = id < 3 * p.n * each;
      if (!t.ok) return t;
      // The products of one expert next to each other: they share operands.
      t.e = id / (3 * each);
      t.which = id / each % 3;
      t.m0 = id % each / columns * BM;
      t.n0 = id % columns * BN;
      t.first = p.offsets[t.e];
      t.count = p.offsets[t.e + 1] - t.first;
      t.steps = ceil_div(t.count, BK);
      if (t.steps > 0) return t;
    }
  }
  t.id = id;
  for (t.e = 0; t.e < p.n; t.e++) {
    t.first = p.offsets[t.e];
    t.count = p.offsets[t.e + 1] - t.first;
    const int here = ceil_div(t.count, BM) * columns;
    if (id < here) break;
    id -= here;
  }
  t.ok = t.e < p.n;
  t.m0 = id / columns * BM;
  t.n0 = id % columns * (FORM == UP ? BN / 2 : BN);
  const int inner = ceil_div(p.w, BK);
  t.steps = FORM == DOWN ? inner : FORM == INPUT ? 2 * inner : ceil_div(p.hidden, BK);
  return t;
}

// The part of every step that a thread copies.
template <int FORM> struct Loader {
  Tile t;
  int k;
  // Tokens of its rows of a, and where terms are tokens of b; -1 behind the last.
  int rows[4];

  DEV void start(int id, const Args& p) {
    t = tile_from<FORM>(id, p);
    k = 0;
    if (t.ok) find_rows(p);
  }

  // Here, as a load behind a copy would wait for it.
  DEV void find_rows(const Args& p) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int r = FORM == WEIGHTS ? k * BK + (threadIdx.x >> 4) + 16 * i : t.m0 + (threadIdx.x >> 3) + 32 * i;
      rows[i] = r < t.count ? (int)p.tokens[t.first + r] : -1;
    }
  }

  // Copies the next step to `stage`.
  DEV void step(u32 stage, const Args& p) {
    if (t.ok) {
      const int tid = threadIdx.x, width = p.n * p.w;
      if (FORM == WEIGHTS) {
        const bf16 *a = of(p.a, t.which), *b = of(p.b, t.which);
        const int row = tid >> 4, c = tid & 15, m = t.m0 + 8 * c;
        // Blocks of 64 columns: c and c + 16 of b are two blocks apart.
        const u32 to = stage + (c >> 3) * 8192 + row * 128 + (((c & 7) ^ (row & 7)) << 4);
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const bool in = rows[i] >= 0 && m < p.w;
          copy_async(to + i * 2048, in ? a + (i64)rows[i] * width + t.e * p.w + m : a, in ? 16 : 0);
        }
#pragma unroll
        for (int i = 0; i < 8; i++) {
          const int r = rows[i & 3], column = t.n0 + 8 * (c + (i & 4) * 4);
          const bool in = r >= 0 && column < p.hidden;
          const u32 at = to + A_BYTES + (i & 4) * 4096 + (i & 3) * 2048;
          copy_async(at, in ? b + (i64)r * p.hidden + column : b, in ? 16 : 0);
        }
      } else {
        const int inner = ceil_div(p.w, BK), second = FORM == INPUT && k >= inner;
        const int term = (second ? k - inner : k) * BK + 8 * (tid & 7);
        const int terms = FORM == UP || FORM == PROJECT ? p.hidden : p.w;
        const bf16* a = second ? p.a[1] : p.a[0];
        const i64 stride = FORM == UP || FORM == PROJECT ? p.hidden : width;
        const int before = FORM == UP || FORM == PROJECT ? 0 : t.e * p.w;
        const u32 to = stage + (tid >> 3) * 128 + (((tid & 7) ^ ((tid >> 3) & 7)) << 4);
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const bool in = rows[i] >= 0 && term < terms;
          copy_async(to + i * 4096, in ? a + rows[i] * stride + before + term : a, in ? 16 : 0);
        }
        if (FORM == UP || FORM == PROJECT) {
#pragma unroll
          for (int i = 0; i < 8; i++) {
            const bf16* b = FORM == UP && i >= 4 ? p.b[1] : p.b[0];
            const int r = t.n0 + (tid >> 3) + 32 * (FORM == UP ? i & 3 : i);
            const bool in = r < p.w && term < terms;
            copy_async(to + A_BYTES + i * 4096, in ? b + (i64)(t.e * p.w + r) * p.hidden + term : b, in ? 16 : 0);
          }
        } else {
          load_columns(stage, second ? p.b[1] : p.b[0], (second ? k - inner : k) * BK, p);
        }
      }
      if (++k == t.steps)
        start(t.id + gridDim.x, p);
      else if (FORM == WEIGHTS)
        find_rows(p);
    }
    copy_commit();
  }

  // 64 neurons of the expert from `first` on, 256 columns from n0.
  DEV void load_columns(u32 stage, const bf16* b, int first, const Args& p) {
    const int tid = threadIdx.x, row = tid >> 5, c = tid & 31;
    const int column = t.n0 + 8 * c;
    const u32 to = stage + A_BYTES + (c >> 3) * 8192 + row * 128 + (((c & 7) ^ (row & 7)) << 4);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const int at = first + row + 8 * i;
      const bool in = at < p.w && column < p.hidden;
      copy_async(to + i * 1024, in ? b + (i64)(t.e * p.w + at) * p.hidden + column : b, in ? 16 : 0);
    }
  }
};

// Adds the products of a step to the sums, or sets the sums to them.
template <int FORM> DEV void multiply_step(float (&d)[128], u32 stage, bool add) {
  constexpr int A_COLUMNS = FORM == WEIGHTS, B_COLUMNS = FORM != UP && FORM != PROJECT;
  const int warp = threadIdx.x >> 5;
#if WGMMA
  const u64 a = matrix(stage + (warp >> 2) * 8192, 16);
  const u64 b = matrix(stage + A_BYTES, B_COLUMNS ? 8192 : 16);
  hold(d);
  products_fence();
#pragma unroll
  for (int q = 0; q < BK / 16; q++)
    Multiply<BN, A_COLUMNS, B_COLUMNS>::run(d, a + q * (A_COLUMNS ? 128 : 2), b + q * (B_COLUMNS ? 128 : 2), add || q > 0);
  products_commit();
#else
  if (!add)
#pragma unroll
    for (int i = 0; i < 128; i++) d[i] = 0.0f;
  const int lane = threadIdx.x & 31, low = lane & 7, middle = (lane >> 3) & 1, high = lane >> 4;
#pragma unroll 1
  for (int q = 0; q < BK / 16; q++) {
    u32 a[4];
    if (A_COLUMNS) {
      const int k = 16 * q + low + 8 * high, m = 2 * warp + middle;
      load_matrix_x4_trans(a[0], a[1], a[2], a[3], stage + (m >> 3) * 8192 + k * 128 + (((m & 7) ^ (k & 7)) << 4));
    } else {
      const int row = 16 * warp + low + 8 * middle;
      load_matrix_x4(a[0], a[1], a[2], a[3], stage + row * 128 + (((2 * q + high) ^ (row & 7)) << 4));
    }
#pragma unroll
    for (int j = 0; j < BN / 16; j++) {
      u32 b[4];
      if (B_COLUMNS) {
        const int k = 16 * q + low + 8 * middle, n = 2 * j + high;
        const u32 at = stage + A_BYTES + (n >> 3) * 8192 + k * 128 + (((n & 7) ^ (k & 7)) << 4);
        load_matrix_x4_trans(b[0], b[1], b[2], b[3], at);
      } else {
        const int row = 16 * j + low + 8 * high;
        load_matrix_x4(b[0], b[1], b[2], b[3], stage + A_BYTES + row * 128 + (((2 * q + middle) ^ (row & 7)) << 4));
      }
      multiply(*(float(*)[4])(d + 8 * j), a, b[0], b[1]);
      multiply(*(float(*)[4])(d + 8 * j + 4), a, b[2], b[3]);
    }
  }
#endif
}

// silu, or with GELU the tanh form of GELU.
#if GELU
DEV float act(float a) { return a * (1.0f / (1.0f + expf(-a * (1.5957692f + 0.07135482f * a * a)))); }
#else
DEV float act(float a) { return a * (1.0f / (1.0f + expf(-a))); }
#endif

// A warp's rows on their way out: 16 of 256 bytes, apart so that they lie in different banks.
#define PITCH 272
// Loads that one wait is for; fewer where registers are.
#define BATCH (WGMMA ? 8 : 4)

// Stores rows of 128 values of a warp, of which `value(j, half)` gives pairs: columns 8 j + 2 (lane % 4) and the next, row
// lane / 4 + 8 half. `row(r)` is where row r starts, 0 for none; columns from `end` on are none.
template <typename V, typename R> DEV void store_halves(u32 staging, int end, V value, R row) {
  const int lane = threadIdx.x & 31;
  const u32 mine = staging + (lane >> 2) * PITCH + 4 * (lane & 3);
  __syncwarp();
#pragma unroll
  for (int j = 0; j < 16; j++) {
    put(mine + 16 * j, value(j, 0));
    put(mine + 16 * j + 8 * PITCH, value(j, 1));
  }
  __syncwarp();
  const int c = lane & 15;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const int r = 2 * i + (lane >> 4);
    bf16* to = row(r);
    if (to && 8 * c < end) *(U4*)(to + 8 * c) = take(staging + r * PITCH + 16 * c);
  }
}

template <int FORM> DEV void store(const float (&d)[128], u32 staging, const Tile& t, const Args& p) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int first = t.m0 + 16 * warp;
  staging += warp * 16 * PITCH;
  if (FORM == WEIGHTS) {
    float* out = (float*)of(p.out, t.which) + (i64)t.e * p.w * p.hidden + t.n0;
#pragma unroll
    for (int c = 0; c < BN; c += 64) {
      const u32 mine = staging + (lane >> 2) * PITCH + 8 * (lane & 3);
      __syncwarp();
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const int at = 4 * (c / 8 + j);
        put(mine + 32 * j, d[at], d[at + 1]);
        put(mine + 32 * j + 8 * PITCH, d[at + 2], d[at + 3]);
      }
      __syncwarp();
      const int column = c + 4 * (lane & 15);
#pragma unroll
      for (int g = 0; g < 8; g += BATCH) {
        F4 v[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
          const int r = first + 2 * (g + i) + (lane >> 4);
          if (r < p.w && t.n0 + column < p.hidden) v[i] = *(const F4*)(out + (i64)r * p.hidden + column);
        }
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
          const int r = first + 2 * (g + i) + (lane >> 4);
          const U4 u = take(staging + (2 * (g + i) + (lane >> 4)) * PITCH + 16 * (lane & 15));
          v[i].x += __uint_as_float(u.x);
          v[i].y += __uint_as_float(u.y);
          v[i].z += __uint_as_float(u.z);
          v[i].w += __uint_as_float(u.w);
          if (r < p.w && t.n0 + column < p.hidden) *(F4*)(out + (i64)r * p.hidden + column) = v[i];
        }
      }
    }
  } else if (FORM == UP) {
    float k[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int r = first + (lane >> 2) + 8 * half;
      k[half] = r < t.count ? p.coefficients[(i64)p.tokens[t.first + r] * p.n + t.e] : 0.0f;
    }
    const auto a = [&](int j, int half) { return pack(d[4 * j + 2 * half], d[4 * j + 2 * half + 1]); };
    const auto b = [&](int j, int half) { return pack(d[64 + 4 * j + 2 * half], d[64 + 4 * j + 2 * half + 1]); };
    const auto c = [&](int j, int half) {
      const u32 x = a(j, half), y = b(j, half);
      return pack(k[half] * act(lo_f32(x)) * lo_f32(y), k[half] * act(hi_f32(x)) * hi_f32(y));
    };
    const auto row = [&](void* out, int r) {
      const bool in = first + r < t.count;
      return in ? (bf16*)out + (i64)p.tokens[t.first + first + r] * p.n * p.w + t.e * p.w + t.n0 : (bf16*)0;
    };
    store_halves(staging, p.w - t.n0, c, [&](int r) { return row(p.out[0], r); });
    if (p.out[1]) {
      store_halves(staging, p.w - t.n0, a, [&](int r) { return row(p.out[1], r); });
      store_halves(staging, p.w - t.n0, b, [&](int r) { return row(p.out[2], r); });
    }
  } else {
#pragma unroll
    for (int c = 0; c < BN; c += 128) {
      const auto value = [&](int j, int half) {
        const int at = 4 * (c / 8 + j) + 2 * half;
        return pack(d[at], d[at + 1]);
      };
      const auto row = [&](int r) {
        if (first + r >= t.count) return (bf16*)0;
        const i64 place = t.first + first + r;
        const i64 start = FORM == PROJECT ? (i64)p.tokens[place] * p.n * p.w + t.e * p.w : place * p.hidden;
        return (bf16*)p.out[0] + start + t.n0 + c;
      };
      store_halves(staging, (FORM == PROJECT ? p.w : p.hidden) - t.n0 - c, value, row);
    }
  }
}

template <int FORM> DEV void run(const Args& p) {
  const u32 stages = (shared_address(dynamic_shared()) + 1023) & ~1023u;
  Loader<FORM> loader;
  loader.start(blockIdx.x, p);
  Tile t = loader.t;
  for (int i = 0; i < LOOK; i++) loader.step(stages + i * STAGE_BYTES, p);
  int slot = 0, next = LOOK;
  float d[128];
  while (t.ok) {
#pragma unroll 1
    for (int k = 0; k < t.steps; k++) {
      copy_wait<LOOK - 1>();
#if WGMMA
      fence_async();
#endif
      // All have copied this step, and are through with the one that `next` was used for.
      __syncthreads();
      multiply_step<FORM>(d, stages + slot * STAGE_BYTES, k > 0);
      loader.step(stages + next * STAGE_BYTES, p);
#if WGMMA
      products_wait<1>();
#endif
      slot = slot + 1 == STAGES ? 0 : slot + 1;
      next = next + 1 == STAGES ? 0 : next + 1;
    }
#if WGMMA
    products_wait<0>();
    hold(d);
#endif
    store<FORM>(d, stages + STAGES * STAGE_BYTES, t, p);
    t = tile_from<FORM>(t.id + gridDim.x, p);
  }
}

extern "C" __global__ void __launch_bounds__(256)
up(bf16* c, bf16* a, bf16* b, const bf16* x, const bf16* gate, const bf16* up, const float* coefficients,
   const u32* offsets, const u32* tokens, int n, int w, int hidden) {
  run<UP>({{x, x}, {gate, up}, {c, a, b}, coefficients, offsets, tokens, n, w, hidden});
}
extern "C" __global__ void __launch_bounds__(256)
project(bf16* out, const bf16* x, const bf16* weight, const u32* offsets, const u32* tokens, int n, int w, int hidden) {
  run<PROJECT>({{x}, {weight}, {out}, 0, offsets, tokens, n, w, hidden});
}
extern "C" __global__ void __launch_bounds__(256)
down(bf16* parts, const bf16* c, const bf16* weight, const u32* offsets, const u32* tokens, int n, int w, int hidden) {
  run<DOWN>({{c, c}, {weight, weight}, {parts}, 0, offsets, tokens, n, w, hidden});
}
extern "C" __global__ void __launch_bounds__(256)
input(bf16* parts, const bf16* da, const bf16* db, const bf16* gate, const bf16* up, const u32* offsets,
      const u32* tokens, int n, int w, int hidden) {
  run<INPUT>({{da, db}, {gate, up}, {parts}, 0, offsets, tokens, n, w, hidden});
}
extern "C" __global__ void __launch_bounds__(256)
weights(float* dgate, float* dup, float* ddown, const bf16* da, const bf16* db, const bf16* c, const bf16* x,
        const bf16* dy, const u32* offsets, const u32* tokens, int n, int w, int hidden) {
  run<WEIGHTS>({{da, db, c}, {x, x, dy}, {dgate, dup, ddown}, 0, offsets, tokens, n, w, hidden});
}

// y[t] = the sum of the parts of token t, in the order of the experts: a block per token, 8 columns per thread.
extern "C" __global__ void __launch_bounds__(256)
combine(float* y, const bf16* parts, const u32* token_offsets, const u32* slots, int hidden) {
  const i64 t = blockIdx.x;
  const u32 first = token_offsets[t], end = token_offsets[t + 1];
  for (int i = 8 * threadIdx.x; i < hidden; i += 8 * blockDim.x) {
    float sums[8] = {};
    for (u32 s = first; s < end; s++) {
      const U4 v = *(const U4*)(parts + (i64)slots[s] * hidden + i);
      const u32 pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int j = 0; j < 4; j++) {
        sums[2 * j] += lo_f32(pairs[j]);
        sums[2 * j + 1] += hi_f32(pairs[j]);
      }
    }
    F4* to = (F4*)(y + t * hidden + i);
    to[0] = F4{sums[0], sums[1], sums[2], sums[3]};
    to[1] = F4{sums[4], sums[5], sums[6], sums[7]};
  }
}
