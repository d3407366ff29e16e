DEV float sigmoid(float z) { return 1.0f / (1.0f + expf(-z)); }
// The activation is a gate(a): silu, or with GELU the tanh form of GELU, whose gate is the sigmoid of 2 sqrt(2 / pi) (a +
// 0.044715 a^3). The slope is gate + a gate'.
#if GELU
DEV float gate(float a) { return sigmoid(a * (1.5957692f + 0.07135482f * a * a)); }
DEV float slope(float a, float s) {
  // Far outside the gate is 0 or 1; the square must not overflow there.
  const float c = fminf(fmaxf(a, -20.0f), 20.0f);
  return s * (1.0f + c * (1.5957692f + 3.0f * 0.07135482f * c * c) * (1.0f - s));
}
#else
DEV float gate(float a) { return sigmoid(a); }
#endif
DEV float act(float a) { return a * gate(a); }

// Eight neighbours, where they start at 16 bytes.
struct Eight { float v[8]; };
DEV Eight load(const bf16* from) {
  const U4 u = *(const U4*)from;
  return {lo_f32(u.x), hi_f32(u.x), lo_f32(u.y), hi_f32(u.y), lo_f32(u.z), hi_f32(u.z), lo_f32(u.w), hi_f32(u.w)};
}
DEV void store(bf16* to, const Eight& x) {
  *(U4*)to = U4{pack(x.v[0], x.v[1]), pack(x.v[2], x.v[3]), pack(x.v[4], x.v[5]), pack(x.v[6], x.v[7])};
}

// c = coefficient act(a) b, 0 where the coefficient is; eight neighbours per thread.
extern "C" __global__ void activate(bf16* c, const bf16* a, const bf16* b, const float* coefficients, i64 tokens,
                                    int width, int n) {
  const i64 i = 8 * ((i64)blockIdx.x * blockDim.x + threadIdx.x), total = tokens * width;
  if (i >= total) return;
  const int w = width / n;
  if (w % 8 == 0) {
    // They are of one pair.
    const float k = coefficients ? coefficients[i / w] : 1.0f;
    Eight out = {};
    if (k != 0.0f) {
      const Eight x = load(a + i), y = load(b + i);
#pragma unroll
      for (int j = 0; j < 8; j++) out.v[j] = k * act(x.v[j]) * y.v[j];
    }
    store(c + i, out);
    return;
  }
  for (i64 at = i; at < i + 8 && at < total; at++) {
    const float k = coefficients ? coefficients[at / w] : 1.0f;
    c[at] = to_bf16(k != 0.0f ? k * act(to_f32(a[at])) * to_f32(b[at]) : 0.0f);
  }
}

// Sets of_a, of_b and of_c; returns the part of dcoefficient.
DEV float gradients(float& of_a, float& of_b, float& of_c, float k, float a, float b, float g) {
  const float s = gate(a), u = a * s;
  of_c = k * u * b;
  of_b = k * g * u;
  #if GELU
  of_a = k * g * b * slope(a, s);
#else
  of_a = k * g * b * s * (1.0f + a * (1.0f - s));
#endif
  return u * b * g;
}

// A block per token, a warp per expert:
//   dcoefficient = sum of act(a) b g,  dc = coefficient g
//   da = dc b act'(a),  db = dc act(a),  c as above
extern "C" __global__ void __launch_bounds__(256)
backward(bf16* da, bf16* db, bf16* c, float* dcoefficients, const bf16* g, const bf16* a, const bf16* b,
         const float* coefficients, int width, int n, int all_pairs) {
  const i64 t = blockIdx.x;
  const int lane = threadIdx.x & 31, w = width / n;
  for (int e = threadIdx.x >> 5; e < n; e += blockDim.x >> 5) {
    const float k = coefficients ? coefficients[t * n + e] : 1.0f;
    const i64 row = t * width + (i64)e * w;
    const bool on = k != 0.0f || all_pairs;
    float sum = 0.0f;
    if (w % 8 == 0) {
      for (int i = 8 * lane; i < w; i += 256) {
        Eight of_a = {}, of_b = {}, of_c = {};
        if (on) {
          const Eight x = load(a + row + i), y = load(b + row + i), d = load(g + row + i);
#pragma unroll
          for (int j = 0; j < 8; j++) sum += gradients(of_a.v[j], of_b.v[j], of_c.v[j], k, x.v[j], y.v[j], d.v[j]);
        }
        store(c + row + i, of_c);
        store(da + row + i, of_a);
        store(db + row + i, of_b);
      }
    } else {
      for (int i = lane; i < w; i += 32) {
        float of_a = 0.0f, of_b = 0.0f, of_c = 0.0f;
        if (on)
          sum += gradients(of_a, of_b, of_c, k, to_f32(a[row + i]), to_f32(b[row + i]), to_f32(g[row + i]));
        c[row + i] = to_bf16(of_c);
        da[row + i] = to_bf16(of_a);
        db[row + i] = to_bf16(of_b);
      }
    }
    if (dcoefficients) {
      sum = warp_sum(sum);
      if (lane == 0) dcoefficients[t * n + e] = sum;
    }
  }
}

// --- Pairs in slots, as `arrange` of router.cu orders them --------------------------------------------------------------

// A row of a tile: its slot and pair, and where the values of the pair's neurons are in [slots, wide], or with `dense` in [T, dense].
struct Row {
  i64 slot, token, from;
  int neurons, expert;   // 0 neurons behind a group's last pair; a negative expert in the core
  float factor;
  bool used;             // up to whole groups of 64 rows
};
DEV Row row_of(i64 r, const float* coefficients, const u32* tiles, const u32* tokens, int dense, int wide, int width, int pieces,
               int core) {
  const u32 what = tiles[2 * (r >> 7) + 1];
  const int at = (int)(r & 127), count = what & 511, group = what >> 10;
  Row row = {};
  row.expert = group - pieces;
  row.used = at < (count + 63) / 64 * 64;
  row.slot = tiles[2 * (r >> 7)] + at;
  const int first = group < pieces ? group * wide : core + row.expert * width;
  if (at < count) {
    row.token = tokens[row.slot];
    row.neurons = group < pieces ? min(wide, core - first) : width;
    row.factor = coefficients[row.slot];
  }
  row.from = dense ? row.token * dense + first : row.slot * wide;
  return row;
}

// As `activate`, for pairs in slots: a warp per row of a tile. a and b are of all pairs [T, dense], c is [slots, wide]. Slots
// behind a group's last, up to whole groups of 64, become zeros, as do columns behind its neurons.
extern "C" __global__ void __launch_bounds__(256)
activate_slots(bf16* c, const bf16* a, const bf16* b, const float* coefficients, const u32* tiles, const u32* pairs,
               const u32* tokens, int dense, int wide, int width, int pieces, int core) {
  const int lane = threadIdx.x & 31, warps = blockDim.x >> 5;
  const i64 rows = 2 * (i64)*pairs * 128;
  for (i64 r = (i64)blockIdx.x * warps + (threadIdx.x >> 5); r < rows; r += (i64)gridDim.x * warps) {
    const Row row = row_of(r, coefficients, tiles, tokens, dense, wide, width, pieces, core);
    if (!row.used) continue;
    for (int i = 8 * lane; i < wide; i += 256) {
      Eight out = {};
      if (i < row.neurons) {
        const Eight x = load(a + row.from + i), y = load(b + row.from + i);
#pragma unroll
        for (int j = 0; j < 8; j++) out.v[j] = row.factor * act(x.v[j]) * y.v[j];
      }
      store(c + row.slot * wide + i, out);
    }
  }
}

// As `backward`, for pairs in slots: a warp per row of a tile. a, b and g are of slots [slots, wide], or with `dense` of all
// pairs [T, dense]. Slots behind a group's last, up to whole groups of 64, become zeros, as do columns behind its neurons.
extern "C" __global__ void __launch_bounds__(256)
backward_slots(bf16* da, bf16* db, bf16* c, float* dcoefficients, const bf16* g, const bf16* a, const bf16* b,
               const float* coefficients, const u32* tiles, const u32* pairs, const u32* tokens, int dense, int n, int wide,
               int width, int pieces, int core) {
  const int lane = threadIdx.x & 31, warps = blockDim.x >> 5;
  const i64 rows = 2 * (i64)*pairs * 128;
  for (i64 r = (i64)blockIdx.x * warps + (threadIdx.x >> 5); r < rows; r += (i64)gridDim.x * warps) {
    const Row row = row_of(r, coefficients, tiles, tokens, dense, wide, width, pieces, core);
    if (!row.used) continue;
    float sum = 0.0f;
    for (int i = 8 * lane; i < wide; i += 256) {
      Eight of_a = {}, of_b = {}, of_c = {};
      if (i < row.neurons) {
        const Eight x = load(a + row.from + i), y = load(b + row.from + i), d = load(g + row.from + i);
#pragma unroll
        for (int j = 0; j < 8; j++)
          sum += gradients(of_a.v[j], of_b.v[j], of_c.v[j], row.factor, x.v[j], y.v[j], d.v[j]);
      }
      store(c + row.slot * wide + i, of_c);
      store(da + row.slot * wide + i, of_a);
      store(db + row.slot * wide + i, of_b);
    }
    sum = warp_sum(sum);
    if (lane == 0 && row.neurons > 0 && row.expert >= 0) dcoefficients[row.token * n + row.expert] = sum;
  }
}

// The gradients of the coefficients of inactive pairs, from the products of all pairs [T, dense]: a warp per pair.
extern "C" __global__ void __launch_bounds__(256)
backward_inactive(float* dcoefficients, const bf16* g, const bf16* a, const bf16* b, const u8* mask, i64 all, int dense, int n,
                  int width, int core) {
  const i64 pair = (i64)blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5);
  if (pair >= all || mask[pair]) return;
  const int lane = threadIdx.x & 31;
  const i64 from = pair / n * dense + core + pair % n * width;
  float sum = 0.0f;
  for (int i = 8 * lane; i < width; i += 256) {
    const Eight x = load(a + from + i), y = load(b + from + i), d = load(g + from + i);
    float none[3];
#pragma unroll
    for (int j = 0; j < 8; j++) sum += gradients(none[0], none[1], none[2], 0.0f, x.v[j], y.v[j], d.v[j]);
  }
  sum = warp_sum(sum);
  if (lane == 0) dcoefficients[pair] = sum;
}

// The gradients of the coefficients of inactive pairs where they get none.
extern "C" __global__ void __launch_bounds__(256) clear_inactive(float* dcoefficients, const u8* mask, i64 all) {
  const i64 pair = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (pair < all && !mask[pair]) dcoefficients[pair] = 0.0f;
}

// y [T, hidden] = the sums of the parts [slots, hidden] of tokens, in the order of the groups: a block per token, 8 columns per
// thread. `slots` is [T, pieces + n].
extern "C" __global__ void __launch_bounds__(256)
sum_slots(float* y, const bf16* parts, const u32* slots, const u32* active, int pieces, int n, int hidden) {
  const i64 t = blockIdx.x;
  const u32* mine = slots + t * (pieces + n);
  const int count = pieces + active[t];
  for (int i = 8 * threadIdx.x; i < hidden; i += 8 * blockDim.x) {
    float sums[8] = {};
    for (int s = 0; s < count; s++) {
      const Eight part = load(parts + (i64)mine[s] * hidden + i);
#pragma unroll
      for (int j = 0; j < 8; j++) sums[j] += part.v[j];
    }
    F4* to = (F4*)(y + t * hidden + i);
    to[0] = F4{sums[0], sums[1], sums[2], sums[3]};
    to[1] = F4{sums[4], sums[5], sums[6], sums[7]};
  }
}
