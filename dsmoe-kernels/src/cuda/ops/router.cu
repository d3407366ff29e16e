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

// The logits of one expert for TILE tokens from t0 on: h W^T + bias in f32, h = x rstd w. `put(t, z)` gets that of token t0 + t.
template <int TILE, typename P>
DEV void logits_of(P put, int e, int t0, const float* x, const float* rstd, const float* norm, const float* w,
                   const float* bias, int tokens, int hidden VARIANT) {
  const int lane = threadIdx.x & 31;
  const float* rows = x + (i64)t0 * hidden;
  // Rows of tokens behind the last are those of the last.
  const int last = min(TILE, tokens - t0) - 1;
  // Vectors where all rows start at 16 bytes.
  const int vectors = hidden % 4 == 0 && (((u64)rows | (u64)norm | (u64)w) & 15) == 0 ? hidden / 4 : 0;
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
#pragma unroll 1
  for (int i = 4 * vectors + lane; i < hidden; i += 32) {
    const float k = NORM(norm[i]) * we[i];
#pragma unroll
    for (int t = 0; t < TILE; t++) sums[t] += rows[(i64)min(t, last) * hidden + i] * k;
  }
#pragma unroll
  for (int t = 0; t < TILE; t++) {
    const float sum = warp_sum(sums[t]);
    if (lane == 0 && t <= last) put(t, sum * rstd[t0 + t] + (bias ? bias[e] : 0.0f));
  }
}
// z [T, n]: a warp per expert at a time, for TILE tokens of a block.
template <int TILE>
DEV void logits_of_tile(float* z, const float* x, const float* rstd, const float* norm, const float* w, const float* bias,
                        int tokens, int n, int hidden VARIANT) {
  const int t0 = blockIdx.x * TILE;
  for (int e = threadIdx.x >> 5; e < n; e += 8)
    logits_of<TILE>([=](int t, float logit) { z[(i64)(t0 + t) * n + e] = logit; }, e, t0, x, rstd, norm, w, bias, tokens,
                    hidden VARIANT_ARG);
}
extern "C" __global__ void __launch_bounds__(256)
logits(float* z, const float* x, const float* rstd, const float* norm, const float* w, const float* bias, int tokens, int n,
       int hidden VARIANT) {
  logits_of_tile<1>(z, x, rstd, norm, w, bias, tokens, n, hidden VARIANT_ARG);
}
extern "C" __global__ void __launch_bounds__(256)
logits_of_many(float* z, const float* x, const float* rstd, const float* norm, const float* w, const float* bias,
               int tokens, int n, int hidden VARIANT) {
  logits_of_tile<TILE_TOKENS>(z, x, rstd, norm, w, bias, tokens, n, hidden VARIANT_ARG);
}

DEV float sigmoid(float z) { return z >= 0.0f ? 1.0f / (1.0f + expf(-z)) : expf(z) / (1.0f + expf(z)); }

// The settings of the gates of a batch. `thresholds` has two values: the threshold of the logits (at -inf all gates are open),
// and the logit at which a gate is a half.
struct Rules {
  const float* thresholds;
  int binary, rescale, force;
};

// A warp's token: returns how many experts it opens. `z` are the logits of the token, the others its place.
DEV int route_token(float* gates, float* coefficients, u8* mask, const float* z, int n, const Rules& rules) {
  const int lane = threadIdx.x & 31;
  const float bar = rules.thresholds[0], centre = rules.thresholds[1];
  const bool all = bar == -__int_as_float(0x7f800000);
  int k = 0, best = 0x7fffffff;
  float top = -__int_as_float(0x7f800000);
  for (int e0 = 0; e0 < n; e0 += 32) {
    const int e = e0 + lane;
    const float ze = e < n ? z[e] : 0.0f;
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
  const bool forced = rules.force && k == 0;
  if (forced) k = 1;
  const float scale = rules.rescale ? (float)n / (float)(k > 0 ? k : 1) : 1.0f;
  for (int e = lane; e < n; e += 32) {
    const float ze = z[e], q = sigmoid(ze - centre);
    const bool on = all || ze > bar || (forced && e == best);
    mask[e] = on;
    gates[e] = q;
    coefficients[e] = on ? scale * (rules.binary ? 1.0f : q) : 0.0f;
  }
  return k;
}

// A warp per token, four at a block.
extern "C" __global__ void __launch_bounds__(128)
route(float* gates, float* coefficients, u8* mask, u32* active, const float* z, int tokens, int n, const float* thresholds,
      int binary, int rescale, int force) {
  const int t = blockIdx.x * 4 + (threadIdx.x >> 5);
  if (t >= tokens) return;
  const i64 at = (i64)t * n;
  const int k = route_token(gates + at, coefficients + at, mask + at, z + at, n, {thresholds, binary, rescale, force});
  if ((threadIdx.x & 31) == 0) active[t] = k;
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

// --- Routing in three launches: logits, gates and counts; places of the experts' pairs and their tiles; the pairs' slots ---
//
// Pairs lie in slots, by group and in the order of the tokens. A group is an expert, or a piece of the core, which has all
// tokens; groups start at multiples of 128 slots.

// A block takes GROUP_TOKENS tokens: `counts` [n, blocks] get how many of them an expert has, and `partials` [blocks, 2] the
// sums of the gates of active and of all pairs. Warps take TILE tokens of an expert at a time. Without a router `z` is given.
template <int TILE>
DEV void assign_tokens(float* gates, float* coefficients, u8* mask, u32* active, u32* counts, double* partials, float* z,
                       const float* x, const float* rstd, const float* norm, const float* w, const float* bias, int tokens,
                       int n, int hidden, const Rules& rules, u64* histogram, u32* of_tokens VARIANT) {
  const int t0 = blockIdx.x * GROUP_TOKENS, here = min(GROUP_TOKENS, tokens - t0);
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, warps = blockDim.x >> 5;
  const i64 first = (i64)t0 * n;
  if (w) {
    constexpr int TILES = GROUP_TOKENS / TILE;
#pragma unroll 1
    for (int job = warp; job < n * TILES; job += warps) {
      const int e = job / TILES, at = t0 + job % TILES * TILE;
      if (at < tokens)
        logits_of<TILE>([=](int t, float logit) { z[(i64)(at + t) * n + e] = logit; }, e, at, x, rstd, norm, w, bias, tokens,
                        hidden VARIANT_ARG);
    }
    __syncthreads();
  }
  for (int t = warp; t < here; t += warps) {
    const i64 at = first + (i64)t * n;
    const int k = route_token(gates + at, coefficients + at, mask + at, z + at, n, rules);
    if (lane == 0) {
      active[t0 + t] = k;
      if (of_tokens) of_tokens[t0 + t] += k;
      // Counts are whole numbers: their order does not matter.
      if (histogram) atomicAdd(histogram + k, 1ull);
    }
  }
  __syncthreads();
  for (int e = threadIdx.x; e < n; e += blockDim.x) {
    u32 sum = 0;
    for (int t = 0; t < here; t++) sum += mask[first + (i64)t * n + e];
    counts[(i64)e * gridDim.x + blockIdx.x] = sum;
  }
  if (partials && warp == 0) {
    double of_active = 0.0, all = 0.0;
    for (int i = lane; i < here * n; i += 32) {
      const double q = gates[first + i];
      all += q;
      if (mask[first + i]) of_active += q;
    }
    of_active = warp_sum(of_active);
    all = warp_sum(all);
    if (lane == 0) {
      partials[2 * (i64)blockIdx.x] = of_active;
      partials[2 * (i64)blockIdx.x + 1] = all;
    }
  }
}
#define ASSIGN_PARAMETERS                                                                                                  \
  float *gates, float *coefficients, u8 *mask, u32 *active, u32 *counts, double *partials, float *z, const float *x,       \
      const float *rstd, const float *norm, const float *w, const float *bias, int tokens, int n, int hidden,              \
      const float *thresholds, int binary, int rescale, int force, u64 *histogram, u32 *of_tokens VARIANT
#define ASSIGN(TILE)                                                                                                       \
  assign_tokens<TILE>(gates, coefficients, mask, active, counts, partials, z, x, rstd, norm, w, bias, tokens, n, hidden,   \
                      {thresholds, binary, rescale, force}, histogram, of_tokens VARIANT_ARG)
extern "C" __global__ void __launch_bounds__(256, 4) assign_many(ASSIGN_PARAMETERS) { ASSIGN(GROUP_TOKENS); }
extern "C" __global__ void __launch_bounds__(1024) assign_few(ASSIGN_PARAMETERS) { ASSIGN(2); }

// The counts of a mask that the host made: a thread per (expert, block of tokens).
extern "C" __global__ void __launch_bounds__(256) tally(u32* counts, const u8* mask, int tokens, int n, int blocks) {
  const i64 at = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (at >= (i64)n * blocks) return;
  const int e = (int)(at / blocks), t0 = (int)(at % blocks) * GROUP_TOKENS;
  u32 sum = 0;
  for (int t = t0; t < tokens && t < t0 + GROUP_TOKENS; t++) sum += mask[(i64)t * n + e];
  counts[at] = sum;
}

// A tile of rows of a group: where it starts, and its rows | shared << 9 | group << 10. Tiles come in pairs, which clusters take;
// those of a shared pair are of one group.
struct Half {
  int slot;
  u32 what;
};

// The rows of a group's tiles: 128, or of wide tiles up to 256 in whole groups of 16, so many that all have about the same.
DEV u32 rows_of(u32 size, bool wide) {
  const u32 tiles = (size + 255) / 256;
  return !wide || tiles == 0 ? 128 : ((size + tiles - 1) / tiles + 15) / 16 * 16;
}

// Lists the last tiles of groups with an odd number of them, the fuller ones first, behind the pairs of the others, of which
// `order` gets where each group's start; returns the number of pairs.
DEV u32 list_last(Half* halves, u32* order, const u32* starts, const u32* sizes, int groups, bool wide) {
  u32 half = 0;
  for (int g = 0; g < groups; g++) {
    order[g] = half;
    half += (sizes[g] + rows_of(sizes[g], wide) - 1) / rows_of(sizes[g], wide) / 2 * 2;
  }
  for (int full = 1; full >= 0; full--)
    for (int g = 0; g < groups; g++) {
      const u32 each = rows_of(sizes[g], wide), tiles = (sizes[g] + each - 1) / each;
      if (tiles % 2 == 0) continue;
      const u32 rows = sizes[g] - each * (tiles - 1);
      if ((rows > (wide ? 128 : 64)) == full) halves[half++] = Half{(int)(starts[g] + each * (tiles - 1)), rows | (u32)g << 10};
    }
  if (half % 2) halves[half++] = Half{0, 0};
  return half / 2;
}

// One block. `counts` become the pairs before each block of tokens; `starts` [groups + 1] and `sizes` [groups] the groups' slots
// and pairs; `halves` the tiles and `pairs` half their number, and `wide_halves` and `wide_pairs` those of wide tiles: per group
// the pairs of tiles, then, two by two, the last tiles of groups with an odd number. `order` [2 groups] is scratch memory.
extern "C" __global__ void __launch_bounds__(1024)
arrange(u32* counts, u32* starts, u32* sizes, Half* halves, u32* pairs, Half* wide_halves, u32* wide_pairs, u32* order,
        int blocks, int n, int pieces, int tokens, const double* partials, u64* load, double* sums) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5, groups = pieces + n;
  for (int e = warp; e < n; e += warps) {
    u32* mine = counts + (i64)e * blocks;
    u32 at = 0;
    for (int b0 = 0; b0 < blocks; b0 += 32) {
      const int b = b0 + lane;
      const u32 here = b < blocks ? mine[b] : 0;
      u32 upto = here;
#pragma unroll
      for (int o = 1; o < 32; o <<= 1) {
        const u32 before = __shfl_up_sync(0xffffffffu, upto, o);
        if (lane >= o) upto += before;
      }
      if (b < blocks) mine[b] = at + upto - here;
      at += __shfl_sync(0xffffffffu, upto, 31);
    }
    if (lane == 0) {
      sizes[pieces + e] = at;
      if (load) load[e] += at;
    }
  }
  for (int g = threadIdx.x; g < pieces; g += blockDim.x) sizes[g] = tokens;
  if (partials && warp == warps - 1) {
    // In the order of the blocks, by lane.
    double of_active = 0.0, all = 0.0;
    for (int b = lane; b < blocks; b += 32) {
      of_active += partials[2 * (i64)b];
      all += partials[2 * (i64)b + 1];
    }
    of_active = warp_sum(of_active);
    all = warp_sum(all);
    if (lane == 0) {
      sums[0] += of_active;
      sums[1] += all;
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    u32 slot = 0;
    for (int g = 0; g < groups; g++) {
      starts[g] = slot;
      slot += (sizes[g] + 127) / 128 * 128;
    }
    starts[groups] = slot;
  }
  __syncthreads();
  if (threadIdx.x == 0) *pairs = list_last(halves, order, starts, sizes, groups, false);
  if (threadIdx.x == 32) *wide_pairs = list_last(wide_halves, order + groups, starts, sizes, groups, true);
  __syncthreads();
  for (int job = warp; job < 2 * groups; job += warps) {
    const bool wide = job >= groups;
    const int g = wide ? job - groups : job;
    const u32 each = rows_of(sizes[g], wide), whole = (sizes[g] + each - 1) / each / 2 * 2;
    Half* to = (wide ? wide_halves : halves) + order[job];
    for (u32 tile = lane; tile < whole; tile += 32)
      to[tile] = Half{(int)(starts[g] + each * tile), min(each, sizes[g] - each * tile) | 512u | (u32)g << 10};
  }
}

// A warp takes 32 tokens: `tokens_of` and `coefficients_of` [slots] get the pairs' tokens and factors, 1 in the core, and
// `slots` [T, groups] a token's slots in the order of the groups, of which it has pieces + active[t].
extern "C" __global__ void __launch_bounds__(128)
place(u32* tokens_of, float* coefficients_of, u32* slots, const u32* starts, const u32* counts, const u8* mask,
      const float* coefficients, int blocks, int n, int pieces, int tokens) {
  const int t = (blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5)) * 32 + (threadIdx.x & 31), lane = threadIdx.x & 31;
  const u32 earlier = ((1u << lane) - 1) & ~((1u << lane / GROUP_TOKENS * GROUP_TOKENS) - 1);
  u32* mine = slots + (i64)t * (pieces + n);
  for (int g = 0; g < pieces; g++)
    if (t < tokens) {
      const u32 slot = starts[g] + t;
      tokens_of[slot] = t;
      coefficients_of[slot] = 1.0f;
      *mine++ = slot;
    }
  for (int e = 0; e < n; e++) {
    const bool on = t < tokens && mask[(i64)t * n + e];
    const u32 all = __ballot_sync(0xffffffffu, on);
    if (on) {
      const u32 slot = starts[pieces + e] + counts[(i64)e * blocks + t / GROUP_TOKENS] + __popc(all & earlier);
      tokens_of[slot] = t;
      coefficients_of[slot] = coefficients[(i64)t * n + e];
      *mine++ = slot;
    }
  }
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
