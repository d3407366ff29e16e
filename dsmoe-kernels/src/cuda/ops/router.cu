// With OFFSET, weights of norms are stored as their distance from `offset`.
#if OFFSET
#define VARIANT , float offset
#define VARIANT_ARG , offset
#define NORM(w) ((w) + offset)
#else
#define VARIANT
#define VARIANT_ARG
#define NORM(w) w
#endif

// z [T, n] = h W^T + bias in f32, h = x rstd w: a warp per expert at a time, for TILE tokens of a block.
template <int TILE>
DEV void logits_of(float* z, const float* x, const float* rstd, const float* norm, const float* w, const float* bias,
                   int tokens, int n, int hidden VARIANT) {
  const int t0 = blockIdx.x * TILE, lane = threadIdx.x & 31;
  const float* rows = x + (i64)t0 * hidden;
  // Rows of tokens behind the last are those of the last.
  const int last = min(TILE, tokens - t0) - 1;
  // Vectors where all rows start at 16 bytes.
  const int vectors = hidden % 4 == 0 && (((u64)rows | (u64)norm | (u64)w) & 15) == 0 ? hidden / 4 : 0;
  for (int e = threadIdx.x >> 5; e < n; e += 8) {
    const float* we = w + (i64)e * hidden;
    float sums[TILE] = {};
#pragma unroll(TILE == 1 ? 4 : 1)
    for (int i = lane; i < vectors; i += 32) {
      const F4 b = ((const F4*)norm)[i], c = ((const F4*)we)[i];
      const F4 k = {NORM(b.x) * c.x, NORM(b.y) * c.y, NORM(b.z) * c.z, NORM(b.w) * c.w};
#pragma unroll
      for (int t = 0; t < TILE; t++) {
        const F4 a = ((const F4*)(rows + (i64)min(t, last) * hidden))[i];
        sums[t] += a.x * k.x + a.y * k.y + a.z * k.z + a.w * k.w;
      }
    }
    for (int i = 4 * vectors + lane; i < hidden; i += 32) {
      const float k = NORM(norm[i]) * we[i];
#pragma unroll
      for (int t = 0; t < TILE; t++) sums[t] += rows[(i64)min(t, last) * hidden + i] * k;
    }
#pragma unroll
    for (int t = 0; t < TILE; t++) {
      const float sum = warp_sum(sums[t]);
      if (lane == 0 && t <= last) z[(i64)(t0 + t) * n + e] = sum * rstd[t0 + t] + (bias ? bias[e] : 0.0f);
    }
  }
}
extern "C" __global__ void __launch_bounds__(256)
logits(float* z, const float* x, const float* rstd, const float* norm, const float* w, const float* bias, int tokens, int n,
       int hidden VARIANT) {
  logits_of<1>(z, x, rstd, norm, w, bias, tokens, n, hidden VARIANT_ARG);
}
extern "C" __global__ void __launch_bounds__(256)
logits_of_many(float* z, const float* x, const float* rstd, const float* norm, const float* w, const float* bias,
               int tokens, int n, int hidden VARIANT) {
  logits_of<TILE_TOKENS>(z, x, rstd, norm, w, bias, tokens, n, hidden VARIANT_ARG);
}

DEV float sigmoid(float z) { return z >= 0.0f ? 1.0f / (1.0f + expf(-z)) : expf(z) / (1.0f + expf(z)); }

// A warp per token, four at a block. `thresholds` are what a logit has to exceed, all open at -inf, and the logit at which
// a gate is a half.
extern "C" __global__ void __launch_bounds__(128)
route(float* gates, float* coefficients, u8* mask, u32* active, const float* z, int tokens, int n, const float* thresholds,
      int binary, int rescale, int force) {
  const int t = blockIdx.x * 4 + (threadIdx.x >> 5), lane = threadIdx.x & 31;
  if (t >= tokens) return;
  const float bar = thresholds[0], centre = thresholds[1];
  const bool all = bar == -__int_as_float(0x7f800000);
  const i64 at = (i64)t * n;
  int k = 0, best = 0x7fffffff;
  float top = -__int_as_float(0x7f800000);
  for (int e0 = 0; e0 < n; e0 += 32) {
    const int e = e0 + lane;
    const float ze = e < n ? z[at + e] : 0.0f;
    k += __popc(__ballot_sync(0xffffffffu, e < n && (all || ze > bar)));
    if (e < n && (ze > top || best == 0x7fffffff)) top = ze, best = e;
  }
  // The first of the largest.
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) {
    const float other = __shfl_xor_sync(0xffffffffu, top, o);
    const int place = __shfl_xor_sync(0xffffffffu, best, o);
    if (other > top || (other == top && place < best)) top = other, best = place;
  }
  const bool forced = force && k == 0;
  if (forced) k = 1;
  const float scale = rescale ? (float)n / (float)(k > 0 ? k : 1) : 1.0f;
  for (int e = lane; e < n; e += 32) {
    const float ze = z[at + e], q = sigmoid(ze - centre);
    const bool on = all || ze > bar || (forced && e == best);
    mask[at + e] = on;
    gates[at + e] = q;
    coefficients[at + e] = on ? scale * (binary ? 1.0f : q) : 0.0f;
  }
  if (lane == 0) active[t] = k;
}

// A warp per (chunk of tokens, expert): chunks [blocks of tokens, n] get how many are active.
extern "C" __global__ void __launch_bounds__(1024) count(u32* offsets, u32* chunks, const u8* mask, int tokens, int n) {
  const int at = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5), lane = threadIdx.x & 31;
  const int parts = (tokens + CHUNK - 1) / CHUNK;
  if (at >= parts * n) return;
  const int part = at / n, e = at % n;
  u32 sum = 0;
#pragma unroll
  for (int i = 0; i < CHUNK; i += 32) {
    const int t = part * CHUNK + i + lane;
    sum += __popc(__ballot_sync(0xffffffffu, t < tokens && mask[(i64)t * n + e]));
  }
  if (lane == 0) chunks[at] = sum;
}

// One block, a warp per expert: sums of its chunks, then starts in their place.
extern "C" __global__ void __launch_bounds__(1024) scan(u32* offsets, u32* chunks, int tokens, int n) {
  const int parts = (tokens + CHUNK - 1) / CHUNK;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  for (int e = warp; e < n; e += warps) {
    u32 sum = 0;
    for (int p = lane; p < parts; p += 32) sum += chunks[(i64)p * n + e];
    sum = __reduce_add_sync(0xffffffffu, sum);
    if (lane == 0) offsets[e + 1] = sum;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    offsets[0] = 0;
    for (int e = 0; e < n; e++) offsets[e + 1] += offsets[e];
  }
  __syncthreads();
  for (int e = warp; e < n; e += warps) {
    u32 at = offsets[e];
    for (int p0 = 0; p0 < parts; p0 += 32) {
      const int p = p0 + lane;
      const u32 here = p < parts ? chunks[(i64)p * n + e] : 0;
      u32 upto = here;
#pragma unroll
      for (int o = 1; o < 32; o <<= 1) {
        const u32 before = __shfl_up_sync(0xffffffffu, upto, o);
        if (lane >= o) upto += before;
      }
      if (p < parts) chunks[(i64)p * n + e] = at + upto - here;
      at += __shfl_sync(0xffffffffu, upto, 31);
    }
  }
}

// One block: token_offsets [T + 1] from the tokens' counts.
extern "C" __global__ void __launch_bounds__(1024) scan_tokens(u32* token_offsets, const u32* active, int tokens) {
  __shared__ u32 sums[1024];
  const int per = (tokens + 1023) / 1024, first = threadIdx.x * per;
  u32 sum = 0;
  for (int t = first; t < tokens && t < first + per; t++) sum += active[t];
  sums[threadIdx.x] = sum;
  __syncthreads();
  for (int o = 1; o < 1024; o <<= 1) {
    const u32 before = threadIdx.x >= o ? sums[threadIdx.x - o] : 0;
    __syncthreads();
    sums[threadIdx.x] += before;
    __syncthreads();
  }
  u32 at = threadIdx.x > 0 ? sums[threadIdx.x - 1] : 0;
  for (int t = first; t < tokens && t < first + per; t++) {
    token_offsets[t] = at;
    at += active[t];
  }
  if (threadIdx.x == 1023) token_offsets[tokens] = sums[1023];
}

// A warp per (chunk, expert) writes its pairs, in the order of the tokens.
extern "C" __global__ void __launch_bounds__(1024)
fill(u32* list, u32* slots, const u32* chunks, const u32* token_offsets, const u8* mask, int tokens, int n) {
  const int at = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5), lane = threadIdx.x & 31;
  const int parts = (tokens + CHUNK - 1) / CHUNK;
  if (at >= parts * n) return;
  const int part = at / n, e = at % n;
  u32 first = chunks[at];
#pragma unroll
  for (int i = 0; i < CHUNK; i += 32) {
    const int t = part * CHUNK + i + lane;
    const u8* row = mask + (i64)t * n;
    const bool on = t < tokens && row[e];
    const u32 all = __ballot_sync(0xffffffffu, on);
    if (on) {
      const u32 slot = first + __popc(all & ((1u << lane) - 1));
      u32 before = 0;
      for (int o = 0; o < e; o++) before += row[o];
      list[slot] = t;
      slots[token_offsets[t] + before] = slot;
    }
    first += __popc(all);
  }
}

// One block: adds the load [n] and the histogram [n + 1] to `counts`, sums of gates of active and of all experts to `sums`,
// and the active experts of every token to `of_tokens`, if it is there.
extern "C" __global__ void __launch_bounds__(1024)
stats(u64* counts, double* sums, u32* of_tokens, const float* gates, const u8* mask, const u32* active, int tokens, int n) {
  __shared__ double shared[32];
  double of_active = 0.0, all = 0.0;
  for (i64 i = threadIdx.x; i < (i64)tokens * n; i += blockDim.x) {
    const double q = gates[i];
    all += q;
    if (mask[i]) of_active += q;
  }
  of_active = block_sum(of_active, shared);
  all = block_sum(all, shared);
  if (threadIdx.x == 0) {
    sums[0] += of_active;
    sums[1] += all;
  }
  // Counts are whole numbers: their order does not matter.
  for (int i = threadIdx.x; i < tokens; i += blockDim.x) {
    atomicAdd(counts + n + active[i], 1ull);
    if (of_tokens) of_tokens[i] += active[i];
  }
  for (i64 i = threadIdx.x; i < (i64)tokens * n; i += blockDim.x)
    if (mask[i]) atomicAdd(counts + i % n, 1ull);
}

// Counts logits in `bins` of equal width, the first of which starts at -largest; those outside are in the first and last one.
extern "C" __global__ void __launch_bounds__(256)
count_logits(u64* bins, const float* z, i64 total, int count, double largest, double per_unit) {
  const i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= total) return;
  const double at = ((double)z[i] + largest) * per_unit;
  // Not a number is in the first one.
  const int bin = at >= count ? count - 1 : at > 0.0 ? (int)at : 0;
  atomicAdd(bins + bin, 1ull);
}

// A thread per token; see the straight-through rule of the router crate.
extern "C" __global__ void backward(float* dz, const float* dcoefficients, const float* gates, const u8* mask,
                                    const u32* active, int tokens, int n, const float* weight, float factor, int opened,
                                    int all, int binary, int rescale, int ste) {
  const int t = blockIdx.x * blockDim.x + threadIdx.x;
  if (t >= tokens) return;
  const u32 k = active[t];
  const float scale = rescale ? (float)n / (float)(k > 0 ? k : 1) : 1.0f;
  for (int e = 0; e < n; e++) {
    const i64 i = (i64)t * n + e;
    const bool on = mask[i];
    float dq = ste || (on && !binary) ? scale * dcoefficients[i] : 0.0f;
    if (all || (on && opened)) dq += *weight * factor;
    const float q = gates[i];
    dz[i] = dq * q * (1.0f - q);
  }
}

// One block: what all gates get so that their logits' gradients sum to weight factor times the sum of q (1 - q).
extern "C" __global__ void __launch_bounds__(1024)
held(float* shift, const float* dz, const float* gates, i64 total, const float* weight, float factor) {
  __shared__ double shared[32];
  double sum = 0.0, slopes = 0.0;
  for (i64 i = threadIdx.x; i < total; i += blockDim.x) {
    const float q = gates[i];
    sum += dz[i];
    slopes += q * (1.0f - q);
  }
  sum = block_sum(sum, shared);
  slopes = block_sum(slopes, shared);
  if (threadIdx.x == 0) *shift = slopes > 0.0 ? (float)((double)(*weight * factor) - sum / slopes) : 0.0f;
}
extern "C" __global__ void hold(float* dz, const float* gates, const float* shift, i64 total) {
  const i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= total) return;
  const float q = gates[i];
  dz[i] += *shift * q * (1.0f - q);
}

// partials [blocks, n, hidden] and [blocks, n]: dz^T h and the sums of dz over the tokens b, b + blocks, ... of block b;
// a thread per column. EXPERTS at a time.
extern "C" __global__ void __launch_bounds__(128)
backward_weights(float* partials, float* bias_partials, const float* dz, const float* x, const float* rstd,
                 const float* norm, int tokens, int n, int hidden VARIANT) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x, part = blockIdx.y, parts = gridDim.y;
  const float w = i < hidden ? NORM(norm[i]) : 0.0f;
  for (int e0 = 0; e0 < n; e0 += 8) {
    float sums[8] = {}, biases[8] = {};
    for (int t = part; t < tokens; t += parts) {
      const float h = i < hidden ? x[(i64)t * hidden + i] * rstd[t] * w : 0.0f;
#pragma unroll
      for (int e = 0; e < 8; e++) {
        const float d = e0 + e < n ? dz[(i64)t * n + e0 + e] : 0.0f;
        sums[e] += d * h;
        biases[e] += d;
      }
    }
#pragma unroll
    for (int e = 0; e < 8; e++) {
      if (e0 + e >= n) break;
      if (i < hidden) partials[((i64)part * n + e0 + e) * hidden + i] = sums[e];
      if (i == 0) bias_partials[(i64)part * n + e0 + e] = biases[e];
    }
  }
}

// dh [T, hidden] += dz W: a thread per column, for TILE_TOKENS tokens at a time.
extern "C" __global__ void backward_input(float* dh, const float* dz, const float* w, int tokens, int n, int hidden) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= hidden) return;
  for (int t0 = blockIdx.y * TILE_TOKENS; t0 < tokens; t0 += gridDim.y * TILE_TOKENS) {
    const int last = min(TILE_TOKENS, tokens - t0) - 1;
    float sums[TILE_TOKENS] = {};
    for (int e = 0; e < n; e++) {
      const float we = w[(i64)e * hidden + i];
#pragma unroll
      for (int t = 0; t < TILE_TOKENS; t++) sums[t] += dz[(i64)(t0 + min(t, last)) * n + e] * we;
    }
#pragma unroll
    for (int t = 0; t < TILE_TOKENS; t++)
      if (t <= last) dh[(i64)(t0 + t) * hidden + i] += sums[t];
  }
}
